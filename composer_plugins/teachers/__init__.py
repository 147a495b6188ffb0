"""Teachers that replay recorded states (the data of channel 3, which is our addition to the recipe)."""

from composer_plugins.teachers.base import Teacher, TeacherStopped

__all__ = ["Teacher", "TeacherStopped"]
