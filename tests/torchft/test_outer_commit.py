"""The commit inside one island, and what the record of a round counts."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from composer_torchft import links
from composer_torchft import loop as loops
from composer_torchft.doctor import LighthouseLimits
from composer_torchft.lighthouse import Lighthouse
from composer_torchft.loop import attach
from harness_torchft import free_port, in_threads, outer

from composer_plugins.errors import OuterLoopError


@pytest.fixture
def alone(lighthouse):
    """The manager of an island without others, in a quorum."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    loop = attach(optimizer, [("weight", parameter)], outer(lighthouse(1).address, 0))
    yield loop.manager
    loop.close()


def unanswered(*_, **__):
    raise TimeoutError("planted: no answer")


@pytest.mark.parametrize(
    ("mine", "other", "ends"),
    [
        (True, True, False), (False, False, False), (None, None, False),
        (False, None, False), (None, False, False),  # no answer of a server that said no: nobody has committed
        (True, None, True), (None, True, True),
    ],
)  # fmt: skip
def test_what_the_processes_of_an_island_were_answered(alone, monkeypatch, mine, other, ends):
    monkeypatch.setattr(links, "gathered", lambda answer, world: [answer, other])
    if mine is None:
        alone._client._client = SimpleNamespace(should_commit=unanswered)
    elif mine is False:
        alone.report_error(RuntimeError("planted"))
    before = alone.current_step()
    if ends:
        with pytest.raises(OuterLoopError, match="do not agree"):
            alone.should_commit()
        return
    assert alone.should_commit() is bool(mine)
    assert alone.current_step() == before + bool(mine)


def test_an_error_that_is_none_of_the_question_ends_the_island(alone, monkeypatch):
    """A RuntimeError is also what CUDA raises: it must not pass for a server that gave no answer."""

    def failing():
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(alone._pg, "errored", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        alone.should_commit()


def test_a_lighthouse_that_is_started_later_is_found():
    port, found = free_port(), []

    def late():
        time.sleep(2 * links.CONNECT.total_seconds())
        found.append(Lighthouse(f"127.0.0.1:{port}", LighthouseLimits(0.5, 1.0, 1)))

    thread = threading.Thread(target=late)
    thread.start()
    parameter = torch.nn.Parameter(torch.ones(2))
    try:
        loop = attach(
            torch.optim.SGD([parameter], lr=1.0), [("weight", parameter)], outer(f"http://127.0.0.1:{port}", 0)
        )
        loop.close()
    finally:
        thread.join()
        found[0].close()


def train(address: str, island: int, *, steps: int, nan_at: int | None = None, **options) -> list:
    """Train two layers of two values; return the rounds. `nan_at`: the second island's parameters are NaN after it."""
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    names = ("layers.0.weight", "layers.1.weight")
    loop = attach(optimizer, zip(names, parameters, strict=True), outer(address, island, **options))
    for step in range(1, steps + 1):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, float("nan") if island and step == nan_at else island + 1.0)
        optimizer.step()
    loop.finish()
    return loop.log.rounds


def test_a_meeting_that_failed_is_counted_and_sent_nothing(lighthouse, monkeypatch):
    """One island does not get the cards. The other does, and sends its pseudo-gradient for nothing."""
    address, exchange, lost = lighthouse().address, loops.exchange, []

    def lose_once(manager, card):
        cards = exchange(manager, card)
        if manager.current_step() == 1 and "isl1" in manager._replica_id and not lost:
            lost.append(manager)
            manager.report_error(RuntimeError("planted: the cards were lost"))
            manager._pg.abort()
            return None
        return cards

    monkeypatch.setattr(loops, "exchange", lose_once)
    rounds = in_threads(2, lambda i: train(address, i, steps=6))
    once = 2 * 2 * 4  # bytes of all parameters
    assert [[r.retries for r in of] for of in rounds] == [[0, 1, 0]] * 2
    assert [r.bytes for r in rounds[0]] == [once, 2 * once, once]
    assert [r.bytes for r in rounds[1]] == [once] * 3
    assert [[r.discarded_inner_steps for r in of] for of in rounds] == [[0] * 3] * 2


def test_steps_that_are_lost_with_several_fragments(lighthouse):
    """Each of two is synced every 4 steps, in turn. NaN at step 6 takes 4 of one and 2 of the other."""
    address = lighthouse().address
    rounds = in_threads(2, lambda i: train(address, i, steps=10, nan_at=6, sync_every=4, fragments=2))
    assert [r.discarded_inner_steps for r in rounds[0]] == [0] * 5
    assert [r.discarded_inner_steps for r in rounds[1]] == [0, 0, 4, 0, 0]
    assert [r.not_finite for r in rounds[1]] == [False, False, True, False, False]
