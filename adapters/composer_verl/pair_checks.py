"""What channel 3 needs from verl's configuration, checked on the driver before a worker starts."""

from __future__ import annotations

from composer_plugins.errors import UnsupportedError


def refuse(config) -> None:
    """Raise `UnsupportedError` for options of verl that tear pairs apart or change their log-probs.

    Args:
        config: verl's whole configuration (DictConfig).
    """
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    problems = []
    if actor.shuffle:
        problems.append(
            "actor_rollout_ref.actor.shuffle=true draws the rows of mini-batches one by one, which tears pairs apart: "
            "set it to false."
        )
    if actor.get("use_prefix_grouper"):
        problems.append(
            "actor_rollout_ref.actor.use_prefix_grouper regroups the rows of a batch by prompt, and pair rows belong to "
            "no group of rollouts: set it to false."
        )
    strategy = str(actor.strategy)
    replay = ((actor.get(strategy) or {}).get("router_replay") or {}).get("mode", "disabled")
    if replay not in (None, "disabled"):
        problems.append(
            f"actor_rollout_ref.actor.{strategy}.router_replay.mode={replay} replays the experts that served a rollout; pair rows "
            "were served by none: set it to disabled."
        )
    if row_temperature(config) is not None:
        fused = config.actor_rollout_ref.model.get("use_fused_kernels")
        if fused or strategy == "torchtitan":
            where = "model.use_fused_kernels=true takes" if fused else "actor.strategy=torchtitan takes"
            problems.append(
                f"actor_rollout_ref.{where} one temperature for the whole batch, but pairs are trained at temperature 1 "
                f"and rollouts were sampled at {rollout.temperature}: turn it off, or set rollout.temperature=1.0."
            )
    if problems:
        raise UnsupportedError("composer.replay_dpo on verl:\n" + "\n".join(problems))


def row_temperature(config) -> float | None:
    """Return the rollout temperature when rows need one each (it is not 1), else None.

    DPO compares log-probs at temperature 1, while verl divides every logit by the rollout temperature.
    """
    temperature = float(config.actor_rollout_ref.rollout.temperature)
    return None if temperature == 1.0 else temperature
