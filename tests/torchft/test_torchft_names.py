"""Everything of torchft that the outer loop uses and that is not public: the list of docs/decisions/0012."""

from __future__ import annotations

import inspect
from importlib.metadata import version
from pathlib import Path

import pytest

torchft = pytest.importorskip(
    "torchft", reason="all tests of the outer loop need torchft: pip install 'composer-plugins[torchft]'"
)

from torchft.checkpointing import http_transport
from torchft.local_sgd import _StreamingDiLoCoFragment
from torchft.process_group import ProcessGroupWrapper, create_store_client

ROOT = Path(__file__).parents[2]


def test_the_version_is_the_pinned_one():
    assert version("torchft") == "0.2.0"
    assert "torchft==0.2.0" in (ROOT / "pyproject.toml").read_text()
    assert "torchft==0.2.0" in (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize(
    "name",
    [
        "_save_local_parameters",
        "_clear_local_parameters",
        "_save_grads",
        "_merge_parameters",
        "prepare_sync",
        "perform_sync",
    ],
)
def test_the_fragment_has_the_steps_we_stand_between(name):
    assert callable(getattr(_StreamingDiLoCoFragment, name))


def test_the_fragment_calls_what_we_override_and_keeps_what_we_read():
    source = inspect.getsource(_StreamingDiLoCoFragment)
    assert "self._clear_local_parameters()" in inspect.getsource(_StreamingDiLoCoFragment.perform_sync)
    fields = ("_allreduce_work", "_grads", "_local_parameters", "original_parameters", "_outer_optimizer", "_stream")
    for name in (*fields, "_fragment_update_alpha"):
        assert f"self.{name}" in source, name


def test_the_manager_has_what_we_set():
    source = inspect.getsource(torchft.Manager)
    names = ("_quorum_id", "_quorum_future", "_pg", "_client", "_group_world_size")
    for name in names:
        assert f"self.{name}" in source, name
    # a number that differs makes it connect anew
    assert "if quorum_id != self._quorum_id" in inspect.getsource(torchft.Manager._async_quorum)


def test_the_transport_and_the_group_have_the_parts_we_replace():
    source = inspect.getsource(http_transport.HTTPTransport)
    for name in ("self._server", "self._thread", "def _serve", "def _load_from_address", "self._disallowed"):
        assert name in source, name
    assert callable(http_transport._streaming_load) and callable(create_store_client)
    group = inspect.getsource(ProcessGroupWrapper.configure)
    for name in ("_replica_id", "_quorum_id", "_group_rank", "_group_world_size", "_rank", "_global_ranks"):
        assert f"self.{name} =" in group, name
    assert "_create_pg" in group
