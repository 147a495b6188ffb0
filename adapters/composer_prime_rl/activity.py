"""Watches the channels that the loss computes: one that contributes nothing for several optimizer steps says so.

The loss is called per sample and is never told where a step ends; torch's global optimizer hook tells. Each rank
counts its own samples.
"""

from __future__ import annotations

import os

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from composer_plugins.channels.silence import SilenceMonitor
from composer_prime_rl.section import LossOptions

_WHY = {
    "policy": "no token with an advantage other than 0 reached the loss (groups whose rollouts all have one reward, or "
    "orchestrator.train.filter_zero_advantages took them out)",
    "sdpo": "no token with a reference log-prob that the hint moved reached the loss (no error turn was hinted, or "
    "orchestrator.train.filter_zero_advantages took its sample out: sdpo_route: ref_kl does not depend on advantages)",
}


class Activity:
    """Counts active tokens of each channel between two steps of the first optimizer that it meets."""

    def __init__(self, options: LossOptions) -> None:
        monitor = options.composer.monitor
        self.channels = [name for name in _WHY if _is_on(options, name)]
        self.monitor = SilenceMonitor(monitor.silent_after, monitor.on_silence)
        self._seen: dict[str, torch.Tensor] = {}
        self._optimizer: int | None = None
        self._hook = register_optimizer_step_pre_hook(self._step)

    def add(self, metrics: dict[str, torch.Tensor]) -> None:
        """Take in one sample's metrics; nothing is moved off the device before the step."""
        for name in self.channels:
            active = metrics[f"{name}/active_tokens"].detach()
            self._seen[name] = self._seen[name] + active if name in self._seen else active

    def _step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._optimizer = self._optimizer or id(optimizer)
        if id(optimizer) != self._optimizer:  # Muon beside AdamW: one step, not two
            return
        seen, self._seen = self._seen, {}
        rank = os.environ.get("RANK", "0")
        for name in self.channels:
            active = float(seen[name]) if name in seen else 0.0
            self.monitor.update(name, active, why=f"{_WHY[name]}; seen on rank {rank}")

    def close(self) -> None:
        """Stop listening to optimizers."""
        self._hook.remove()


_watching: Activity | None = None
_options: LossOptions | None = None


def watch(options: LossOptions, metrics: dict[str, torch.Tensor]) -> None:
    """Add one sample's metrics to the counts of this process; the first call begins to listen."""
    global _watching, _options
    if _options is not options:  # parsed once per set of arguments, so another object is another run
        stop()
        _watching, _options = Activity(options), options
    _watching.add(metrics)


def stop() -> None:
    """Stop listening and forget the counts."""
    global _watching, _options
    if _watching is not None:
        _watching.close()
    _watching = _options = None


def _is_on(options: LossOptions, channel: str) -> bool:
    if channel == "sdpo":
        return options.composer.sdpo.weight > 0 and options.sdpo_route == "loss"
    return options.composer.policy.weight > 0
