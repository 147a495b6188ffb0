"""The outer loop on prime-rl: inside the trainer's optimizer, before it broadcasts weights to the inference engine.

prime-rl imports our loss before it builds its optimizer; the import leads to `install`, which waits for the first
optimizer step of the trainer. The settings come by environment variable (`[trainer.env_vars]`), because the loss gets
its options only later. Nothing of prime-rl is patched: what else is needed is read from the local variables of its
`train` function (`config`, `model`, `scheduler`, `progress`, the checkpoint manager), found by their types' names.
prime-rl's checkpoints (torch.distributed.checkpoint) take no entry of ours, so the outer state is saved next to them.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from composer_plugins.config import OuterConfig
from composer_plugins.errors import OuterLoopError
from composer_plugins.outer import OUTER_ENV

logger = logging.getLogger("composer_prime_rl")

#: Beside `trainer/` in prime-rl's `checkpoints/step_<n>/`; one file per process.
FOLDER = "composer_outer"
LOG_FILE = "outer.jsonl"

_installed: Any = None


def install() -> Any:
    """Wait in this process for the trainer's first optimizer step, and attach the outer loop there; once per process.

    Returns:
        the waiting `composer_plugins.first_step.FirstStep`, or None when COMPOSER_OUTER names no outer loop.

    Raises:
        ConfigError: COMPOSER_OUTER is malformed.
    """
    global _installed
    if _installed is None and os.environ.get(OUTER_ENV):
        from composer_plugins.first_step import FirstStep, outer_from_environment

        config = outer_from_environment()
        if config is not None:
            _installed = FirstStep(config, lambda optimizer: _place(optimizer, config))
    return _installed


def metrics() -> dict[str, float]:
    """Return the last round's figures, `outer/...`, for prime-rl's metrics; empty before the first."""
    return _installed.metrics() if _installed is not None else {}


def _place(optimizer: Any, config: OuterConfig) -> Any:
    """Return where the loop goes; None outside prime-rl's trainer."""
    from composer_plugins.first_step import Place, at_work, schedule_state

    trainer = at_work(lambda v: _is(v, "TrainerConfig"))
    if trainer is None:
        return None
    _refuse(trainer)
    parameter = optimizer.param_groups[-1]["params"][0]
    model = at_work(lambda v: _holds(v, parameter))
    scheduler = at_work(lambda v: _is(v, "LRScheduler") and getattr(v, "optimizer", None) is optimizer)
    progress, manager = (at_work(lambda v, name=name: _is(v, name)) for name in ("Progress", "CheckpointManager"))
    for what, found in (("model", model), ("scheduler", scheduler), ("progress", progress)):
        if found is None:
            raise OuterLoopError(
                f"The outer loop does not find the {what} in prime-rl's train function; composer_prime_rl is tested with "
                "the versions in docs/how-to/prime-rl.md."
            )
    rank = int(os.environ.get("RANK", "0"))
    return Place(
        named_parameters=model.named_parameters(),
        host_state=schedule_state(scheduler),
        resume=_saved(trainer, manager, progress.step - 1, rank) if progress.step > 1 else None,
        log=(config.log or Path(trainer.output_dir) / LOG_FILE) if rank == 0 else None,
        attached=lambda loop: _save_with(optimizer, loop, manager, progress, rank),
        is_last=lambda: trainer.max_steps is not None and progress.step >= trainer.max_steps,
        reports=rank == 0,
    )


def _is(value: Any, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(value).__mro__)


def _holds(value: Any, parameter: Any) -> bool:
    import torch

    return isinstance(value, torch.nn.Module) and any(p is parameter for p in value.parameters())


def _refuse(trainer: Any) -> None:
    """Raise `OuterLoopError` for settings under which steps would be miscounted or parameters lie elsewhere."""
    reasons = {
        "full_offload": "steps copies of the parameters on the CPU during the backward pass, one by one",
        "fsdp_cpu_offload": "keeps the parameters on the CPU and steps them there",
    }
    for key, reason in reasons.items():
        if getattr(trainer.model, key, None):
            raise OuterLoopError(f"The outer loop does not go with trainer.model.{key}, which {reason}. Take it out.")
    if getattr(trainer, "max_concurrent_runs", 1) > 1:
        raise OuterLoopError(
            "The outer loop does not go with trainer.max_concurrent_runs above 1: every run has an optimizer of its own. "
            "Set it to 1."
        )


def _saved(trainer: Any, manager: Any, step: int, rank: int) -> dict[str, Any]:
    """Return the outer state of the checkpoint that prime-rl resumed from."""
    import torch

    folder = getattr(getattr(trainer, "resume", None), "dir", None)
    file = _file(Path(folder) if folder else _step_folder(manager, step), rank)
    if not file.exists():
        raise OuterLoopError(
            f"Resuming at step {step} needs the outer state, expected at {file}: there is no such file. Resume from a "
            "checkpoint of a run with the outer loop and as many processes, or start a new run from its weights."
        )
    return torch.load(file, map_location="cpu", weights_only=True)


def _save_with(optimizer: Any, loop: Any, manager: Any, progress: Any, rank: int) -> None:
    """Save the outer state whenever prime-rl takes the optimizer's state, which it does for its checkpoints."""
    import torch

    def save(optimizer: Any, state: dict[str, Any]) -> None:
        file = _file(_step_folder(manager, progress.step), rank)
        file.parent.mkdir(parents=True, exist_ok=True)
        outer = loop.state_dict()
        torch.save(outer, file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)
        if outer.get("local_step") and rank == 0:
            logger.warning(
                "checkpoint %d is of a moment %d inner steps after the last sync: it resumes exactly, but its model is this "
                "island's own. Let ckpt.interval be a multiple of outer.sync_every to have the global model in it.",
                progress.step, outer["local_step"],
            )  # fmt: skip

    if manager is not None:
        optimizer.register_state_dict_post_hook(save)


def _step_folder(manager: Any, step: int) -> Path:
    return Path(manager.get_ckpt_path(step)).parent


def _file(folder: Path, rank: int) -> Path:
    return folder / FOLDER / f"rank_{rank}.pt"
