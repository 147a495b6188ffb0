"""The outer loop on torchft under the conformance suite: `composer-rl conformance torchft`.

A real lighthouse on loopback, one process per island, and `attach` around an SGD whose gradients are the plan's moves.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from composer_plugins.config import OuterConfig
from composer_plugins.conformance.outer import IslandResult, OuterLoopConformance, Plan
from composer_plugins.conformance.ranks import Servant, together
from composer_plugins.errors import OuterLoopError
from composer_torchft.doctor import LighthouseLimits
from composer_torchft.fingerprints import values_hash
from composer_torchft.lighthouse import Lighthouse
from composer_torchft.loop import attach

LIMITS = {"quorum": 60, "allreduce": 30, "connect": 20}


class TestTorchFT(OuterLoopConformance):
    """DiLoCo through torchft."""

    servants: ClassVar[list[Servant]] = []

    @classmethod
    def teardown_class(cls) -> None:
        """End the islands' processes."""
        while TestTorchFT.servants:
            TestTorchFT.servants.pop().close()

    def islands(self, plan: Plan) -> list[IslandResult]:
        count = range(plan.islands)
        with tempfile.TemporaryDirectory() as folder:
            if plan.resume_after is None:
                return self._together(plan, [(plan, i, 0, len(plan.moves), folder) for i in count])
            first = self._together(plan, [(plan, i, 0, plan.resume_after, folder) for i in count])
            self.teardown_class()  # what goes on from a checkpoint are new processes
            second = self._together(plan, [(plan, i, plan.resume_after, len(plan.moves), folder) for i in count])
        for before, after in zip(first, second, strict=True):
            for name in ("before", "after", "hashes"):
                setattr(after, name, getattr(before, name) + getattr(after, name))
        return second

    def _together(self, plan: Plan, arguments: list[tuple]) -> list[IslandResult]:
        with Lighthouse("127.0.0.1:0", LighthouseLimits(5.0, 5.0, plan.islands)) as lighthouse:
            while len(self.servants) < plan.islands:
                self.servants.append(Servant())
            given = [(lighthouse.address, *rest) for rest in arguments]
            return together(self.servants[: plan.islands], _island, given)


def _island(address: str, plan: Plan, number: int, first: int, last: int, folder: str) -> IslandResult:
    """Rounds `first` to `last` of one island, from the checkpoint in `folder` unless `first` is 0."""
    torch.set_num_threads(1)
    result = IslandResult(process=os.getpid())
    checkpoint = Path(folder) / f"island{number}.pt"
    saved = torch.load(checkpoint, weights_only=True) if first else {}
    parameters = _parameters(saved["theta"].numpy() if saved else plan.start[number])
    optimizer = torch.optim.SGD(list(parameters.values()), lr=1.0)
    local: list[np.ndarray] = []
    optimizer.register_step_post_hook(lambda *_: local.append(_flat(parameters)))  # before the outer loop's own hook
    try:
        loop = attach(optimizer, list(parameters.items()), _config(plan, address, number), resume=saved.get("outer"))
    except OuterLoopError as error:
        result.error = str(error)
        return result
    for move in plan.inner_steps(number, first, last):
        rounds = len(loop.log.rounds)
        _step(optimizer, parameters, move)
        if len(loop.log.rounds) > rounds:
            result.before.append(local[-1])
            result.after.append(_flat(parameters))
            result.hashes.append(values_hash(parameters.values()))
    if last < len(plan.moves):
        torch.save({"theta": torch.from_numpy(_flat(parameters)), "outer": loop.state_dict()}, checkpoint)
    loop.finish()
    result.exported = _flat(parameters)
    return result


def _parameters(theta: np.ndarray) -> dict[str, torch.nn.Parameter]:
    """The vector as two parameters."""
    head, tail = torch.from_numpy(theta.copy()).split([2, len(theta) - 2])
    return {"layers.0.weight": torch.nn.Parameter(head[:, None]), "layers.1.weight": torch.nn.Parameter(tail)}


def _flat(parameters: dict[str, torch.nn.Parameter]) -> np.ndarray:
    return torch.cat([p.detach().reshape(-1) for p in parameters.values()]).numpy().copy()


def _step(optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter], move: np.ndarray) -> None:
    """One inner step of length `move`."""
    taken = 0
    for parameter in parameters.values():
        parameter.grad = torch.from_numpy(move[taken : taken + parameter.numel()].copy()).reshape(parameter.shape)
        taken += parameter.numel()
    optimizer.step()


def _config(plan: Plan, address: str, number: int) -> OuterConfig:
    options: dict[str, Any] = {name: getattr(plan, name) for name in ("sync_every", "lr", "momentum", "nesterov")}
    return OuterConfig(
        **options, lighthouse=address, island=f"island-{number}", start_with=plan.islands, timeouts=LIMITS
    )
