"""Which parameters are synced, and in which fragment.

torchft's fragment asks its model for `named_parameters()` and nothing else, so a list of parameters will do
where no module is at hand (a host whose plugin sees only the optimizer). It is given plain tensors that share the
parameters' memory: the part of a sharded parameter (FSDP2's DTensor) that lies here, and never the inner gradients.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from composer_plugins.errors import OuterLoopError

Named = list[tuple[str, torch.nn.Parameter]]

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def local_part(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return what this process holds of a parameter, sharing its memory."""
    return getattr(parameter, "_local_tensor", parameter).detach()


def is_sharded(parameter: torch.nn.Parameter) -> bool:
    """Return whether it is a DTensor."""
    return hasattr(parameter, "_local_tensor")


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether no value is NaN or infinite."""
    return all(_is_finite(t) for t in tensors)


def _is_finite(values: torch.Tensor) -> bool:
    # one NaN or infinity makes the sum one too; only a sum that overflows needs the slower look at every value
    total = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))
    return bool(total.isfinite()) or bool(values.isfinite().all())


@dataclass
class ParameterFragment:
    """Parameters that are synced together."""

    parameters: Named

    def __post_init__(self) -> None:
        self._views = [torch.nn.Parameter(local_part(p), requires_grad=False) for _, p in self.parameters]

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield (name, plain tensor in the parameter's memory), as `torch.nn.Module.named_parameters` does."""
        for (name, parameter), view in zip(self.parameters, self._views, strict=True):
            part = local_part(parameter)
            if view.data_ptr() != part.data_ptr():  # the host gave the parameter new memory
                view.data = part
            yield name, view

    def is_finite(self) -> bool:
        """Return whether all values that this process holds are numbers."""
        return all_finite(v for _, v in self.named_parameters())

    def numel(self) -> int:
        """Return the number of values that this process holds."""
        return sum(v.numel() for v in self._views)


def parameters_of(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, torch.nn.Parameter]]) -> Named:
    """Return what the optimizer trains, named, in the model's order, each parameter once (tied ones share a name).

    Raises:
        OuterLoopError: the optimizer trains a parameter that `named` lacks, holds one twice, or holds one that
            cannot be synced.
    """
    trained: dict[int, torch.nn.Parameter] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in trained:
                raise OuterLoopError(
                    "The optimizer holds one parameter twice (in two groups): it would be synced twice. Give every "
                    "parameter to one group."
                )
            trained[id(parameter)] = parameter
    # frozen ones (some hosts hand all parameters to the optimizer) never move, so there is nothing to exchange
    trained = {key: parameter for key, parameter in trained.items() if parameter.requires_grad}
    found: Named = []
    for name, parameter in named:
        if trained.pop(id(parameter), None) is not None:
            found.append((name, parameter))
    if trained:
        shapes = ", ".join(str(tuple(p.shape)) for p in list(trained.values())[:3])
        raise OuterLoopError(
            f"{len(trained)} of the optimizer's parameters (shapes {shapes}) are not among the named parameters: they "
            "would never be synced. Pass the parameters of the model that the optimizer was built from."
        )
    if not found:
        raise OuterLoopError("The optimizer trains no parameter of this model: there is nothing to sync.")
    for name, parameter in found:
        if parameter.dim() == 0:
            raise OuterLoopError(
                f"The parameter {name!r} has no dimension, which torchft cannot sync. Make it a vector of one value."
            )
        if not parameter.is_floating_point():
            raise OuterLoopError(f"The parameter {name!r} is {parameter.dtype}: only floating point can be averaged.")
    return found


def split_by_depth(parameters: Named, fragments: int) -> list[ParameterFragment]:
    """Cut the parameters, in model order and between layers, into parts of about equal size.

    Raises:
        OuterLoopError: there are fewer layers (runs of names with the same layer number) than fragments.
    """
    if fragments == 1:
        return [ParameterFragment(parameters)]
    runs: list[Named] = []
    last: object = object()
    for name, parameter in parameters:
        layer = _LAYER.search(name)
        key = layer.group(1) if layer else name.split(".")[0]
        if key != last:
            runs.append([])
            last = key
        runs[-1].append((name, parameter))
    if len(runs) < fragments:
        raise OuterLoopError(
            f"{fragments} fragments were asked for, but the model has {len(runs)} parts that can be told apart by "
            "their names. Lower outer.fragments."
        )
    sizes = [sum(p.numel() for _, p in run) for run in runs]
    total, parts, done = sum(sizes), [[] for _ in range(fragments)], 0
    current = 0
    for number, (run, size) in enumerate(zip(runs, sizes, strict=True)):
        left = len(runs) - number
        full = done + size / 2 > (current + 1) * total / fragments
        if parts[current] and current < fragments - 1 and (full or left <= fragments - 1 - current):
            current += 1
        parts[current].extend(run)
        done += size
    return [ParameterFragment(part) for part in parts]
