"""What an optimizer must be for the outer loop to count its steps and to own its parameters."""

from __future__ import annotations

from typing import Any

import torch

from composer_plugins.errors import OuterLoopError

#: Wrappers that pass each `step` on exactly once (or not at all, when a loss scaler skips it).
_TRANSPARENT = {"AcceleratedOptimizer": "optimizer"}

#: Optimizers whose `step` runs several times per step, or on copies of the parameters elsewhere.
_REFUSED = {
    "CPUOffloadOptimizer": "it steps copies of the parameters on the CPU, one parameter at a time",
    "CPUOffloadOptimizerWrapper": "it moves state between devices around every step",
    "DeepSpeedOptimizerWrapper": "DeepSpeed steps partitions of its own",
    "DeepSpeedZeroOptimizer": "DeepSpeed steps partitions of its own",
    "OptimizerWrapper": "torchft's per-step manager already commits every step",
    "ZeroRedundancyOptimizer": "each process steps only its part of the parameters",
    "AdaLomo": "it steps inside the backward pass",
    "Lomo": "it steps inside the backward pass",
}


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer whose `step` runs the hooks.

    Raises:
        OuterLoopError: the wrapper is unknown, or the optimizer is of a kind whose steps would be miscounted.
    """
    seen = 0
    while (name := type(optimizer).__name__) in _TRANSPARENT and seen < 8:
        optimizer, seen = getattr(optimizer, _TRANSPARENT[name]), seen + 1
    for kind in type(optimizer).__mro__:
        if kind.__name__ in _REFUSED:
            raise OuterLoopError(
                f"The outer loop cannot wrap {type(optimizer).__name__}: {_REFUSED[kind.__name__]}. Use a plain "
                "torch.optim optimizer, without offload."
            )
    hooks = "_optimizer_step_post_hooks" in vars(optimizer) if hasattr(optimizer, "__dict__") else False
    if not isinstance(optimizer, torch.optim.Optimizer) or not hooks:
        raise OuterLoopError(
            f"The outer loop needs a torch.optim.Optimizer with step hooks and found "
            f"{type(optimizer).__module__}.{type(optimizer).__name__}, a wrapper it does not know. Pass the optimizer "
            "inside it."
        )
    if not getattr(type(optimizer).step, "hooked", False):
        raise OuterLoopError(
            f"{type(optimizer).__name__}.step does not run torch's step hooks, so its steps cannot be counted."
        )
    return optimizer


def same_run(state: dict[str, Any], **expected: Any) -> None:
    """Check that a checkpoint's outer state is of this run's version, outer configuration and layout of parameters.

    Raises:
        OuterLoopError: one of them differs.
    """
    names = {"version": "format", "config": "outer configuration", "layout": "set of parameters"}
    for key, mine in expected.items():
        if state.get(key) != mine:
            raise OuterLoopError(
                f"The checkpoint's outer state has another {names[key]}: expected {mine}, found {state.get(key)}. "
                "Resume with the recipe that wrote it."
            )
