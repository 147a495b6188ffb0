"""An island whose training went to NaN gives up its round, and takes nobody along."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from composer_torchft.loop import attach
from harness_torchft import in_threads, outer, reference

from composer_plugins.errors import OuterLoopError

MOVES = (0.4, 0.8)


def train(address: str, island: int, log, broken: dict[int, float], rounds: int = 4):
    """Move by a fixed amount per step; `broken`: by step, what the gradient is instead."""
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    optimizer = torch.optim.SGD(parameters, lr=1.0, momentum=0.5)  # it has a state, which keeps the NaN
    config = outer(address, island)
    before = []
    optimizer.register_step_post_hook(lambda *_: before.append(parameters[0][0].item()))
    loop = attach(optimizer, zip(["layers.0.weight", "layers.1.weight"], parameters, strict=True), config, log=log)
    found = []
    for step in range(rounds * config.sync_every):
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.full_like(parameter, MOVES[island] / 2)
            if step in broken and number:
                parameter.grad[0, 1] = broken[step]  # one value of one parameter
        optimizer.step()
        if step % 2:
            found.append(parameters[0][0].item())
    loop.finish()
    return before[1::2], found


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_others_go_on_and_the_broken_one_begins_again_at_theirs(lighthouse, tmp_path, caplog, value):
    address = lighthouse().address
    with caplog.at_level(logging.WARNING):
        results = in_threads(2, lambda i: train(address, i, tmp_path / f"{i}.jsonl", {2: value} if i else {}))
    (local_a, first), (local_b, second) = results
    assert first == second and np.isfinite(first).all()
    local_b[1] = first[0]  # in the second round it sends a pseudo-gradient of zero
    expected = reference(np.array([local_a, local_b]).T[..., None], np.ones(1))
    np.testing.assert_allclose(first, expected[:, 0], atol=1e-5)
    rows = [[json.loads(line) for line in (tmp_path / f"{i}.jsonl").read_text().splitlines()] for i in range(2)]
    assert [r["discarded_inner_steps"] for r in rows[0]] == [0, 0, 0, 0]
    assert [r["discarded_inner_steps"] for r in rows[1]] == [0, 2, 0, 0]
    assert [r["not_finite"] for r in rows[1]] == [False, True, False, False]
    assert [r.message for r in caplog.records if "not finite" in r.message and "isl1" in r.message]


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_nan_between_sending_and_applying_is_not_mixed_in(lighthouse, alpha):
    """One step lies between; in it an island's parameters become NaN, and the result of the exchange replaces them."""
    address = lighthouse().address

    def body(i):
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        loop = attach(optimizer, [("weight", parameter)], outer(address, i, sync_delay=1, mixing_alpha=alpha))
        found = []
        for step in range(6):
            parameter.grad = torch.full_like(parameter, 0.1 * (i + 1))
            if i and step == 1:
                parameter.grad[0] = float("nan")
            optimizer.step()
            if step % 2:
                found.append(parameter.detach().numpy().copy())
        loop.finish()
        return found

    healthy, broken = in_threads(2, body)
    assert np.isfinite(broken).all() and np.isfinite(healthy).all()
    theta = 1 - 0.7 * 1.9 * 0.15  # the islands had gone 0.1 and 0.2
    np.testing.assert_allclose(broken[0], theta, atol=1e-6)
    np.testing.assert_allclose(healthy[0], (1 - alpha) * theta + alpha * 0.8, atol=1e-6)


def test_global_parameters_that_are_not_finite_end_the_run(lighthouse):
    address = lighthouse().address

    def body(i):
        parameter = torch.nn.Parameter(torch.tensor([1.0, float("nan")]))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        loop = attach(optimizer, [("weight", parameter)], outer(address, i))
        parameter.grad = torch.zeros(2)
        try:
            for _ in range(2):
                optimizer.step()
        finally:
            loop.close()

    results = in_threads(2, body)
    assert all(isinstance(r, OuterLoopError) and "earlier checkpoint" in str(r) for r in results)
