"""Attaching through torch's global pre-step hook, with no help from the host."""

from __future__ import annotations

import threading

import pytest
import torch
from composer_torchft import attach_at_first_step
from harness_torchft import in_threads, outer
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from composer_plugins.config import OuterConfig
from composer_plugins.errors import OuterLoopError
from composer_plugins.first_step import FirstStep, Place, named_by_position

PREDICTED = [0.202, -0.9362, -2.38058]  # of test_outer_arithmetic.py
MOVES = (0.4, 0.8)


def host(optimizer, parameters, steps: int, move: float):
    """A training loop that knows nothing of an outer loop; yields after every step."""
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, move)
        optimizer.step()
        yield


@pytest.mark.parametrize("fragments", [1, 2])
def test_the_arithmetic_is_that_of_a_loop_attached_before(lighthouse, fragments):
    address, every = lighthouse().address, 2 * fragments

    def body(i):
        parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        waiting = attach_at_first_step(
            outer(address, i, sync_every=every, fragments=fragments), lambda o: o is optimizer
        )
        assert waiting.loop is None
        found = []
        for step, _ in enumerate(host(optimizer, parameters, 3 * every, MOVES[i] / every), 1):
            if step % every == 0:
                found.append(parameters[1].detach().reshape(-1)[0].item())
        assert waiting.finish() == 0
        return found

    first, second = in_threads(2, body)
    assert first == second == pytest.approx(PREDICTED, abs=1e-5)


def test_a_late_joiner_does_not_apply_a_gradient_of_other_parameters(lighthouse):
    address = lighthouse(1, join=5).address
    started, done = threading.Event(), threading.Event()

    def body(i):
        parameters = [torch.nn.Parameter(torch.ones(3))]
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        waiting = attach_at_first_step(outer(address, i), lambda o: o is optimizer)
        if i == 1:
            started.wait(60)
            with torch.no_grad():
                parameters[0].fill_(50.0)  # its own, which the others' replace
            next(host(optimizer, parameters, 1, 1000.0))
            done.set()
            theta = waiting.loop.fragments[0].global_tensors()[0]
            unmoved = torch.equal(theta, parameters[0])
            waiting.close()
            return unmoved
        for _ in host(optimizer, parameters, 4000, 1e-4):
            if waiting.loop.manager.current_step() >= 2:
                started.set()
            if done.is_set():
                break
        waiting.close()
        return parameters[0].abs().max().item()

    moved, unmoved = in_threads(2, body)
    assert unmoved is True and moved < 2


def test_other_optimizers_are_left_alone_and_a_missing_one_is_said(lighthouse):
    waiting = attach_at_first_step(outer(lighthouse().address, 0), lambda o: False)
    parameters = [torch.nn.Parameter(torch.ones(2))]
    list(host(torch.optim.SGD(parameters, lr=1.0), parameters, 3, 0.1))
    assert waiting.loop is None and parameters[0][0].item() == pytest.approx(0.7)
    with pytest.raises(OuterLoopError, match="never attached"):
        waiting.finish()


def test_no_outer_loop_in_the_configuration():
    with pytest.raises(OuterLoopError, match="sync_every is 0"):
        attach_at_first_step(OuterConfig())


def test_names_tell_order_and_shape():
    a, b = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": 0.1}], lr=0.2)
    assert [n for n, _ in named_by_position(optimizer)] == ["parameters.0.2x3", "parameters.1.4"]


def test_the_last_step_leaves_with_the_global_parameters(lighthouse, capsys):
    address = lighthouse().address
    both = threading.Barrier(2, timeout=60)

    def body(i):
        parameters = [torch.nn.Parameter(torch.ones(3))]
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        steps, found = iter(range(1, 9)), []
        place = Place(is_last=lambda: next(steps) == 7, reports=i == 0)
        waiting = FirstStep(outer(address, i), lambda o: place if o is optimizer else None)
        for _ in host(optimizer, parameters, 7, MOVES[i] / 2):
            found.append(parameters[0][0].item())
        both.wait()  # the two share torch's global hooks here, as islands never do
        # what the host does next it does alone, and undisturbed
        list(host(optimizer, parameters, 1, 0.5))
        both.wait()
        lost = waiting.finish()
        return found[5], found[6], parameters[0][0].item(), lost

    results = in_threads(2, body)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    for sixth, seventh, alone, lost in results:
        assert sixth == seventh == pytest.approx(PREDICTED[2], abs=1e-5)
        assert alone == pytest.approx(sixth - 0.5) and lost == 1
    said = capsys.readouterr().out
    assert said.count("outer loop of island") == 1 and "island isl0" in said  # the process that reports, once
    assert said.count("(1 inner steps since the last sync were given up)") == 1


def test_steps_that_torchs_checkpoints_make_are_not_counted(lighthouse):
    """Before the first step, as when a host resumes, and with an empty state, as right after a heal."""
    address = lighthouse().address

    def body(i):
        model = torch.nn.Linear(2, 2)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(1.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        waiting = attach_at_first_step(outer(address, i), lambda o: o is optimizer)
        get_optimizer_state_dict(model, optimizer)
        assert waiting.loop is None
        found = []
        for _ in host(optimizer, list(model.parameters()), 6, MOVES[i] / 2):
            optimizer.zero_grad()
            get_optimizer_state_dict(model, optimizer)
            found.append(model.bias[0].item())
        waiting.finish()
        return found[1::2]

    for found in in_threads(2, body):
        assert found == pytest.approx(PREDICTED, abs=1e-5)


def test_frozen_parameters_in_the_optimizer_are_not_exchanged(lighthouse):
    address = lighthouse().address

    def body(i):
        frozen = torch.nn.Parameter(torch.full((5,), float(i)), requires_grad=False)  # differs, and may
        parameters = [torch.nn.Parameter(torch.ones(3)), frozen]
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        waiting = attach_at_first_step(outer(address, i), lambda o: o is optimizer)
        list(host(optimizer, parameters[:1], 2, MOVES[i] / 2))
        size = waiting.loop.metrics()["outer/bytes"]
        waiting.finish()
        return size, frozen[0].item(), parameters[0][0].item()

    assert [f[:2] for f in in_threads(2, body)] == [(12.0, 0.0), (12.0, 1.0)]
