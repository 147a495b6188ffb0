"""What the exchange must do on an accelerator, without one: torchft's own functions are made to insist on it here."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from composer_torchft import exchange as exchanges
from composer_torchft.exchange import IslandFragment
from composer_torchft.fingerprints import values_hash
from composer_torchft.fragments import ParameterFragment
from torchft import local_sgd
from torchft.local_sgd import _StreamingDiLoCoFragment

from composer_plugins.config import OuterConfig


class Work:
    """Asserts, as torchft's does, that it is waited for on the stream it was made on."""

    def __init__(self, streams: list) -> None:
        self._streams, self._made = streams, list(streams)

    def wait(self) -> bool:
        assert self._streams == self._made and self._made
        return True


@pytest.fixture
def streams(monkeypatch):
    """The streams that are current, in the order in which they were entered."""
    current: list = []

    @contextmanager
    def entered(stream):
        current.append(stream)
        yield
        current.pop()

    for module in (exchanges, local_sgd):
        monkeypatch.setattr(module, "get_stream_context", entered)
    return current


def fragment(streams: list) -> tuple[IslandFragment, torch.nn.Parameter]:
    """A fragment whose exchange always succeeds."""
    manager = SimpleNamespace(
        register_state_dict_fn=lambda *_: None, errored=lambda: None, should_commit=lambda: True,
        allreduce=lambda tensor, **_: Work(streams),
    )  # fmt: skip
    parameter = torch.nn.Parameter(torch.ones(4))
    part = ParameterFragment([("weight", parameter)])
    return IslandFragment(manager, part, 0, torch.optim.SGD([parameter], lr=1.0), OuterConfig(sync_every=2)), parameter


def test_the_exchange_is_waited_for_on_the_stream_it_was_sent_from(streams):
    one, parameter = fragment(streams)
    with torch.no_grad():
        parameter.sub_(0.5)
    one.prepare_sync()
    assert one.perform_sync()
    torch.testing.assert_close(parameter.detach(), torch.full((4,), 1 - 0.7 * 1.9 * 0.5))


def test_nothing_is_read_from_a_copy_that_is_still_under_way(streams, monkeypatch):
    under_way = []
    save = _StreamingDiLoCoFragment.save_parameters
    monkeypatch.setattr(_StreamingDiLoCoFragment, "save_parameters", lambda self: under_way.append(self))

    def finish() -> None:
        while under_way:
            save(under_way.pop())

    monkeypatch.setattr(exchanges, "synchronize", finish)
    one, parameter = fragment(streams)
    assert one.digest() == values_hash([parameter])
    with torch.no_grad():
        parameter.sub_(0.5)
    one.prepare_sync()
    assert one.perform_sync()
    assert one.digest() == values_hash([parameter])
    torch.testing.assert_close(one.outer_state()["original_parameters"]["weight"], parameter.detach())
