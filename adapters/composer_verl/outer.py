"""The outer loop on verl: inside the actor's optimizer, before verl sends weights to the rollout engine.

verl builds the options of our policy loss where the actor is trained, and imports `composer_verl.register` in every
process; both lead to `install`, which waits for the actor's optimizer to make its first step. Nothing of verl is
patched. One island is one verl run with a Ray cluster of its own; process r of its actor exchanges with process r of the
other islands.

Like all modules here but `options` and `register`, this one imports verl inside functions at most.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from composer_plugins.config import OuterConfig
from composer_plugins.errors import ConfigError, OuterLoopError
from composer_plugins.outer import OUTER_ENV

logger = logging.getLogger("composer_verl")

#: Key in the optimizer's `state` under which verl's own checkpoints carry the outer state; torch keeps entries that
#: belong to no parameter as they are (`torch.optim.Optimizer.load_state_dict`).
STATE_KEY = "composer_outer"

_installed: Any = None


def install(config: OuterConfig) -> Any:
    """Wait in this process for the actor's first optimizer step, and attach the outer loop there; once per process.

    `ComposerPolicyLossConfig` calls this, which verl builds on the driver, to check it, and where the actor is trained.

    Args:
        config: `composer.outer` of the recipe.

    Returns:
        the waiting `composer_plugins.first_step.FirstStep`, or None when `sync_every` is 0.

    Raises:
        OuterLoopError: another outer loop is attached in this process already.
    """
    global _installed
    if not config.sync_every or (_installed is not None and _installed.config == config):
        return _installed
    from composer_plugins.first_step import FirstStep

    if _installed is not None:
        if _installed.loop is not None:
            raise OuterLoopError("An outer loop with another `outer` section is attached to this process already.")
        _installed.close()
    _installed = FirstStep(config, lambda optimizer: _place(optimizer, config))
    return _installed


def install_at_import() -> None:
    """Install what COMPOSER_OUTER says, for recipes without our section (verl's own losses); `register` calls this.

    verl swallows what a plugin raises, and the run would go on without an outer loop: the error comes at the first step.
    """
    if not os.environ.get(OUTER_ENV):
        return
    from composer_plugins.first_step import outer_from_environment

    try:
        config = outer_from_environment()
    except ConfigError as error:
        _fail_at_first_step(error)
    else:
        install(config or OuterConfig())


def _fail_at_first_step(error: ConfigError) -> None:
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    def fail(*_: Any) -> None:
        raise error

    register_optimizer_step_pre_hook(fail)


def metrics() -> dict[str, float]:
    """Return the last round's figures, `outer/...`; empty before the first and without a loop.

    Our losses put them among verl's metrics (`actor/outer/...`). A loss is computed before the optimizer's step, so a
    step's figures are those of the last round before it.
    """
    return _installed.metrics() if _installed is not None else {}


_UNREAD = (
    f"composer.outer is set, but nothing reads it, so no outer loop would start: it comes to the training processes with a "
    "policy loss of ours (actor.policy_loss: {_target_: composer_verl.options.ComposerPolicyLossConfig, loss_mode: "
    f"composer_<objective>, composer: ${{composer}}}}, as in our recipes), or for verl's own losses in {OUTER_ENV} "
    "(docs/how-to/diloco.md)."
)
_STRATEGY = (
    "The outer loop on verl needs actor_rollout_ref.actor.strategy=fsdp2 (FSDP2's sharded parameters are exchanged shard "
    "by shard), found {!r}."
)


def problems(config: Any) -> list[str]:
    """Return what is wrong with a recipe that has an outer loop, as sentences with the fix.

    Args:
        config: the whole configuration as verl's `main_ppo` sees it.
    """
    from omegaconf import OmegaConf

    def get(key: str, default: Any = None) -> Any:
        return OmegaConf.select(config, key, default=default)

    if not get("composer.outer.sync_every"):
        return []
    actor, found = "actor_rollout_ref.actor", []
    read = get(f"{actor}.policy_loss.composer.outer.sync_every") == get("composer.outer.sync_every")
    if not (read and str(get(f"{actor}.policy_loss.loss_mode")).startswith("composer_")) and not os.environ.get(
        OUTER_ENV
    ):
        found.append(_UNREAD)
    if get(f"{actor}.strategy") != "fsdp2":
        found.append(_STRATEGY.format(get(f"{actor}.strategy")))
    found += [text for key, text in _OFFLOAD.items() if get(f"{actor}.fsdp_config.{key}")]
    for part in ("save_contents", "load_contents"):
        contents = get(f"{actor}.checkpoint.{part}") or []
        if (get("trainer.save_freq") or 0) > 0 and "optimizer" not in contents:
            found.append(
                f"{actor}.checkpoint.{part} lacks `optimizer`, where the outer state is kept: no run could be resumed."
            )
    if get("composer.outer.start_with") == 1 and not get("composer.outer.min_islands", 1) > 1:
        logger.warning("composer.outer.start_with is 1: set it to the number of islands, see docs/how-to/diloco.md.")
    return found


_OFFLOAD = {
    "param_offload": "actor.fsdp_config.param_offload moves the parameters to other memory between two steps, and the "
    "outer loop holds on to theirs: set it to false (optimizer_offload may stay).",
    "offload_policy": "actor.fsdp_config.offload_policy keeps the parameters on the CPU and steps them there, which is "
    "not supported: set it to false.",
}


def _place(optimizer: Any, config: OuterConfig) -> Any:
    """Return where the loop goes when this optimizer is the actor's; None for a critic's and any other."""
    from composer_plugins.first_step import Place, at_work, schedule_state

    base = sys.modules.get("verl.workers.engine.base")
    if base is None:
        return None
    engine = at_work(lambda v: isinstance(v, base.BaseEngine) and getattr(v, "optimizer", None) is optimizer)
    # verl names a critic's engine value_model; in one process with the actor each has an optimizer of its own
    if engine is None or getattr(engine.model_config, "model_type", "language_model") != "language_model":
        return None
    _refuse(engine)
    resume = optimizer.state.pop(STATE_KEY, None)
    done = engine.lr_scheduler.last_epoch
    if resume is None and done > 0:
        raise OuterLoopError(
            f"verl resumed this run at step {done}, and its checkpoint has no outer state: it was written without an outer "
            "loop, or without the optimizer (actor.checkpoint.save_contents). Resume from one that has it, or start a "
            "new run from its weights."
        )
    steps = _Steps(engine.lr_scheduler, engine.optimizer_config.total_training_steps)
    return Place(
        named_parameters=engine.module.named_parameters(),
        host_state=schedule_state(engine.lr_scheduler),
        resume=resume,
        log=config.log if engine.rank == 0 else None,
        attached=lambda loop: _save_with(optimizer, loop),
        before=steps.before,
        is_last=steps.is_last,
        reports=engine.rank == 0,
    )


def _refuse(engine: Any) -> None:
    """Raise `OuterLoopError` for an engine whose parameters cannot be exchanged."""
    settings = engine.engine_config
    if settings.strategy != "fsdp2":
        raise OuterLoopError(_STRATEGY.format(settings.strategy))
    found = [text for key, text in _OFFLOAD.items() if getattr(settings, key, False)]
    if found:
        raise OuterLoopError("\n".join(found))


def _save_with(optimizer: Any, loop: Any) -> None:
    """Have verl's checkpoints carry the outer state: with the optimizer's, one file per process."""

    def add(optimizer: Any, state: dict[str, Any]) -> None:
        outer = loop.state_dict()
        state["state"][STATE_KEY] = outer
        if outer.get("local_step"):
            logger.warning(
                "this checkpoint is of a moment %d inner steps after the last sync: it resumes exactly, but its model is "
                "this island's own. Let trainer.save_freq fall on syncs to have the global model in it.",
                outer["local_step"],
            )

    optimizer.register_state_dict_post_hook(add)


class _Steps:
    """Counts verl's training steps in the training process, to know the run's last optimizer step.

    verl makes one or more optimizer steps per training step, marks the last of them (`update_lr_scheduler`) and then
    steps the schedule, also when it skipped an update whose gradient was not finite. The schedule's own count will not
    do: a late joiner takes over the others'.
    """

    def __init__(self, scheduler: Any, total: int) -> None:
        self._scheduler, self._total = scheduler, total
        self._done = self._seen = scheduler.last_epoch

    def before(self) -> None:
        self._done += self._scheduler.last_epoch - self._seen

    def is_last(self) -> bool:
        from composer_plugins.first_step import at_work

        self._seen = self._scheduler.last_epoch
        return self._done + 1 == self._total and at_work(_is_last_of_its_step) is not None


def _is_last_of_its_step(value: Any) -> bool:
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu

    return isinstance(value, TensorDict) and bool(tu.get(value, key="update_lr_scheduler", default=False))
