"""Data files that come with the package."""

from __future__ import annotations

from pathlib import Path


def recipes_dir() -> Path:
    """Return the folder with a recipe folder per host and the teachers files.

    `composer_plugins/recipes` is a link to `recipes` at the top of the source tree, and a folder once installed. A source
    tree that was unpacked without links has the top-level folder alone.
    """
    inside = Path(__file__).parent / "recipes"
    return inside.resolve() if inside.is_dir() else Path(__file__).parents[1] / "recipes"
