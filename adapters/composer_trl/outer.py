"""The outer loop inside transformers' Trainer: a callback, found through the core's hooks.

Works with any `transformers.Trainer`; `ComposerGRPOTrainer` adds it when `composer.outer.sync_every` is above 0.
The sync happens inside the optimizer's step, so weights that go to an inference engine afterwards are synced ones.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from composer_plugins.config import OuterConfig
from composer_plugins.errors import ConfigError, OuterLoopError
from composer_plugins.outer import HostState, OuterLoop, report_end
from composer_plugins.plugins import get_plugin_manager

logger = logging.getLogger(__name__)

STATE_FILE = "outer.pt"
LOG_FILE = "outer.jsonl"


class OuterLoopCallback(TrainerCallback):
    """Attaches the outer loop when training begins and leaves it when training ends.

    Args:
        config: the `outer` section.
        resume: checkpoint folder to continue from; None: `args.output_dir/checkpoint-<step>` of a resumed Trainer.

    Raises (from the Trainer's `train`):
        OuterLoopError: the islands do not agree, or a checkpoint lacks the outer state.
    """

    def __init__(self, config: OuterConfig, resume: str | Path | None = None) -> None:
        self.config = config
        self.resume = Path(resume) if resume is not None else None
        self.loop: OuterLoop | None = None
        self._rounds = 0

    def on_train_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **_: Any) -> None:
        if args.load_best_model_at_end:
            raise ConfigError(
                "load_best_model_at_end would load one island's unsynced weights over the global ones: switch it off."
            )
        if state.max_steps % self.config.sync_every:
            logger.warning(
                "max_steps %d is no multiple of outer.sync_every %d: the last %d steps of every island will be given up.",
                state.max_steps, self.config.sync_every, state.max_steps % self.config.sync_every,
            )  # fmt: skip
        attach = get_plugin_manager().outer_loops.get(self.config.kind).load()
        self.loop = attach(
            optimizer,
            getattr(model, "module", model).named_parameters(),
            self.config,
            host_state=_schedule(state, lr_scheduler),
            resume=self._saved(args, state, model),
            log=(self.config.log or Path(args.output_dir) / LOG_FILE) if args.process_index == 0 else None,
        )

    def _saved(self, args, state, model) -> dict[str, Any] | None:
        if state.global_step == 0:
            return None
        folder = self.resume or Path(args.output_dir) / f"checkpoint-{state.global_step}"
        file = folder / _state_file(args, any(hasattr(p, "_local_tensor") for p in model.parameters()))
        if not file.exists():
            raise OuterLoopError(
                f"Resuming at step {state.global_step} needs the outer state, expected at {file}: there is "
                "no such file. Resume from a checkpoint of a run with the outer loop, or start a new run from its weights."
            )
        return torch.load(file, map_location="cpu", weights_only=True)

    def on_save(self, args, state, control, **_: Any) -> None:
        if self.loop is None:
            return
        sharded = getattr(self.loop, "sharded", False)
        if sharded or args.process_index == 0:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            torch.save(self.loop.state_dict(), folder / _state_file(args, sharded))

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self.loop is None or logs is None:
            return
        figures = self.loop.metrics()
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def on_train_end(self, args, state, control, **_: Any) -> None:
        if self.loop is None:
            return
        lost = self.loop.finish()
        if args.process_index == 0:
            report_end(self.loop, lost)


def equal_adapter(model, lora):
    """Return the model with a fresh adapter that is the same on every island.

    The Trainer would draw it with its own seed, in which islands have to differ for their rollouts to differ.
    """
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(model, lora)


def _state_file(args, sharded: bool) -> str:
    """One file, or one per process when every process holds a part of its own (FSDP2)."""
    return f"outer.rank{args.process_index}.pt" if sharded else STATE_FILE


def _schedule(state, lr_scheduler) -> HostState:
    """What a late joiner takes over: the place in the learning-rate schedule and the step count."""

    def read() -> dict[str, Any]:
        schedule = {k: v for k, v in lr_scheduler.state_dict().items() if isinstance(v, int | float | list)}
        return {"global_step": state.global_step, "schedule": schedule}

    def write(found: dict[str, Any], ahead: int) -> None:
        lr_scheduler.load_state_dict({**lr_scheduler.state_dict(), **found["schedule"]})
        for group, lr in zip(lr_scheduler.optimizer.param_groups, found["schedule"].get("_last_lr", []), strict=False):
            group["lr"] = lr
        if ahead > 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of a schedule that moves before the first optimizer step
                lr_scheduler.step()
        state.global_step = found["global_step"] + ahead

    return HostState(read, write) if lr_scheduler is not None else HostState()
