"""The outer loop where a host lets us import a module and nothing more: torch's global optimizer step hooks.

The hook runs before the first step moves the parameters, so the outer loop still sees the initial ones (a hook after
the step would not). What else is needed (names, a schedule, where checkpoints go) is read from the objects that the
host is working with at that moment: the local variables of the functions that called `step`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from composer_plugins.config import OuterConfig, explain
from composer_plugins.errors import ConfigError, OuterLoopError
from composer_plugins.outer import OUTER_ENV, HostState, OuterLoop, report_end
from composer_plugins.plugins import get_plugin_manager

Named = Iterable[tuple[str, torch.nn.Parameter]]


@dataclass
class Place:
    """Where an outer loop goes: what a host's objects say at the first step of the optimizer it belongs to.

    Args:
        named_parameters: the model's, in module order; None: named by position in the optimizer.
        host_state, resume, log: as in `composer_plugins.outer.AttachOuterLoop`.
        attached: called once with the attached loop, e.g. to have it saved with the host's checkpoints.
        before: called before every further step.
        is_last: called after every step: whether it was the run's last. Then the outer loop is left, so that what the
            host does next (weights to the inference engine, the final checkpoint) is done with the global parameters.
        reports: whether this process prints the table of all rounds at the end; one of an island should.
    """

    named_parameters: Named | None = None
    host_state: HostState = field(default_factory=HostState)
    resume: dict[str, Any] | None = None
    log: Path | None = None
    attached: Callable[[OuterLoop], None] = lambda loop: None
    before: Callable[[], None] = lambda: None
    is_last: Callable[[], bool] = lambda: False
    reports: bool = True


Look = Callable[[torch.optim.Optimizer], Place | None]


class FirstStep:
    """Waits for the first step of the optimizer that `look` knows, then attaches to it.

    Args:
        config: with `sync_every` above 0.
        look: called before every step of every optimizer until it returns a place; None: not this one.
    """

    def __init__(self, config: OuterConfig, look: Look) -> None:
        if not config.sync_every:
            raise OuterLoopError("outer.sync_every is 0, which means no outer loop: set the inner steps between syncs.")
        self.config = config
        self._look, self._place, self._optimizer = look, None, None
        self._busy = self._left = False
        self._lost = 0
        #: The outer loop; None until the first step.
        self.loop: OuterLoop | None = None
        self._handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),  # runs after the loop's own hooks
        ]

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # the handles cannot be removed here: torch is iterating over the hooks
        if self._busy or is_rehearsal(optimizer):
            return
        if self.loop is not None:
            if optimizer is self._optimizer:
                self._place.before()
            return
        place = self._look(optimizer)
        if place is None:
            return
        self._busy = True  # an outer step inside `attach` is an optimizer's step too
        try:
            self._attach(optimizer, place)
        finally:
            self._busy = False

    def _attach(self, optimizer: torch.optim.Optimizer, place: Place) -> None:
        attach = get_plugin_manager().outer_loops.get(self.config.kind).load()
        named = named_by_position(optimizer) if place.named_parameters is None else place.named_parameters
        loop = attach(
            optimizer, named, self.config, host_state=place.host_state, resume=place.resume, log=place.log
        )  # fmt: skip
        if loop.replaced:  # it joined late: this gradient was taken at parameters that are gone
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        place.attached(loop)
        self.loop, self._place, self._optimizer = loop, place, optimizer

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._left or optimizer is not self._optimizer or is_rehearsal(optimizer):
            return
        if self._place.is_last():
            self._leave()

    def _leave(self) -> int:
        if not self._left:
            self._lost, self._left = self.loop.finish(), True
            if self._place.reports:
                report_end(self.loop, self._lost)
        return self._lost

    def finish(self) -> int:
        """Leave as `OuterLoop.finish` does; returns the inner steps that were given up.

        Raises:
            OuterLoopError: no optimizer that `look` knows has made a step.
        """
        self._remove()
        if self.loop is None:
            raise OuterLoopError(
                "The outer loop was never attached: no optimizer that it is meant for has made a step in this process."
            )
        return self._leave()

    def metrics(self) -> dict[str, float]:
        """Return the figures of the last round, `outer/...`; empty before the first."""
        return self.loop.metrics() if self.loop is not None else {}

    def close(self) -> None:
        """Remove the hooks and stop the connections; parameters stay as they are."""
        self._remove()
        if self.loop is not None and not self._left:
            self.loop.close()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def attach_at_first_step(
    config: OuterConfig,
    match: Callable[[torch.optim.Optimizer], bool] | None = None,
    *,
    host_state: HostState | None = None,
    resume: dict[str, Any] | None = None,
    log: Path | None = None,
) -> FirstStep:
    """Attach to the next optimizer of this process that makes a step, before the step moves its parameters.

    Args:
        config: with `sync_every` above 0.
        match: which optimizer; None: the first that steps. Give it when the process has several.
        host_state, resume, log: as in `composer_plugins.outer.AttachOuterLoop`.

    Raises:
        OuterLoopError: here when there is no outer loop in `config`; from the optimizer's `step` when it cannot be
            attached or the islands do not agree.
    """
    place = Place(host_state=host_state or HostState(), resume=resume, log=log)
    return FirstStep(config, lambda optimizer: place if match is None or match(optimizer) else None)


def outer_from_environment() -> OuterConfig | None:
    """Return the `outer` section in COMPOSER_OUTER; None when it is not set or has no outer loop.

    Raises:
        ConfigError: it is no mapping, or has an unknown key or a bad value.
    """
    text = os.environ.get(OUTER_ENV)
    if not text:
        return None
    try:
        section = yaml.safe_load(text)
        if not isinstance(section, dict):
            raise ConfigError(f"{OUTER_ENV} must be a mapping such as {{sync_every: 20}}, found {text!r}.")
        config = OuterConfig.model_validate(section)
    except yaml.YAMLError as error:
        raise ConfigError(f"{OUTER_ENV} is no YAML: {error}. Write it as {{sync_every: 20}}.") from error
    except ValidationError as error:
        raise ConfigError(f"{OUTER_ENV}: {explain(error, prefix='outer')}") from error
    return config if config.sync_every else None


def named_by_position(optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.nn.Parameter]]:
    """Return the optimizer's parameters, named by group and position; equal on islands that build it alike.

    With several fragments each parameter counts as a layer of its own, in the optimizer's order.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [(f"parameters.{i}.{'x'.join(map(str, p.shape))}", p) for i, p in enumerate(parameters)]


def is_rehearsal(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether this is the step with rate 0 by which torch.distributed.checkpoint creates an optimizer's state.

    It happens before a checkpoint is loaded, or saved when the state is empty, and is no step of the training. Source:
    torch/distributed/checkpoint/state_dict.py `_init_optim_state`.
    """
    if any(float(group.get("lr", 1.0)) for group in optimizer.param_groups):
        return False
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_init_optim_state":
            return True
        frame = frame.f_back
    return False


def at_work(fits: Callable[[Any], bool]) -> Any:
    """Return the innermost object that the functions calling this one are working with and that fits, or None.

    Only local variables are looked at, from the caller outwards. For hosts whose trainer objects are reached in no
    other way; what is not found has to be an error or to be done without.
    """
    frame = sys._getframe(1)
    while frame is not None:
        for value in list(frame.f_locals.values()):
            if fits(value):
                return value
        frame = frame.f_back
    return None


def schedule_state(scheduler: Any) -> HostState:
    """Return what a late joiner takes over of a learning-rate scheduler (torch's interface).

    Its host steps the scheduler after this very step, as the donor's does, so nothing is added.
    """

    def read() -> dict[str, Any]:
        return {"schedule": _plain(scheduler.state_dict())}

    def write(found: dict[str, Any], ahead: int) -> None:
        scheduler.load_state_dict(_merged(scheduler.state_dict(), found["schedule"]))
        for group, lr in zip(scheduler.optimizer.param_groups, found["schedule"].get("_last_lr", []), strict=False):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    return HostState(read, write)


def _plain(value: Any) -> Any:
    """Keep numbers, strings and what holds them; None for everything else."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, bool | int | float | str) else None


def _merged(mine: Any, found: Any) -> Any:
    """Take over what `_plain` kept."""
    if isinstance(mine, dict) and isinstance(found, dict):
        return {k: _merged(v, found.get(str(k))) for k, v in mine.items()}
    if isinstance(mine, list | tuple) and isinstance(found, list) and len(mine) == len(found):
        return type(mine)(_merged(a, b) for a, b in zip(mine, found, strict=True))
    return mine if found is None else found
