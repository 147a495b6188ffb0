"""The run folder and the report: what a run leaves behind, and how a person reads it. Torch-free."""

from composer_plugins.report.run_folder import (
    Check,
    ModelInfo,
    RunSummary,
    RunWriter,
    StageCount,
    TeacherInfo,
    TokenView,
    ViewMessage,
)

__all__ = ["Check", "ModelInfo", "RunSummary", "RunWriter", "StageCount", "TeacherInfo", "TokenView", "ViewMessage"]
