"""Writes the run folder while the run goes, with one progress bar."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

from composer_plugins.report.run_folder import RunWriter

#: Logged by the Trainer at the very end; they are no metrics of a step.
_TOTALS = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss"}
_RENAMED = {"learning_rate": "lr"}


class RunFolderCallback(TrainerCallback):
    """Appends one metrics line per optimizer step.

    Args:
        writer: of the run folder.
        console: where the progress bar goes.
    """

    def __init__(self, writer: RunWriter, console: Console) -> None:
        self.writer = writer
        self.progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[last]}"), console=console,
        )  # fmt: skip
        self._task: Any = None

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        self._task = self.progress.add_task("training", total=state.max_steps, completed=state.global_step, last="")
        self.progress.start()

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        self.progress.update(self._task, completed=state.global_step)

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        values = {_RENAMED.get(k, k): v for k, v in (logs or {}).items() if isinstance(v, int | float)}
        if not values or _TOTALS & values.keys():
            return
        self.writer.metrics(state.global_step, {k: v for k, v in values.items() if k not in ("step", "time")})
        shown = [f"{k} {values[k]:.3g}" for k in ("reward", "sdpo/divergence", "replay_dpo/accuracy") if k in values]
        self.progress.update(self._task, last="  ".join(shown))

    def on_train_end(self, args, state, control, **kwargs: Any) -> None:
        self.progress.stop()
