"""Runs a function on several processes of this machine: data-parallel ranks (gloo, loopback), or strangers."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from composer_plugins.conformance.problem import Layout, Outcome


def on_ranks(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """Return what `function(*args)` returns on each rank, in order.

    Args:
        function: of a module that the new processes can import; finds RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
            MASTER_PORT in its environment and sets up torch.distributed itself, or lets its host do so.
        world: number of processes.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank failed; the message holds its traceback.
    """
    from torch.multiprocessing import spawn

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (function, world, port, folder, args), nprocs=world)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world)]  # our own files


def _rank(rank: int, function, world: int, port: int, folder: str, args: tuple) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(function(*args)))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def of_rank(layout: Layout, rank: int) -> tuple[tuple[int, ...], ...]:
    """The micro-batches of one rank: they are dealt out in turn."""
    return layout.micro_batches[rank :: layout.ranks]


def averaged(outcomes: list[Outcome]) -> Outcome:
    """The step of hosts that average gradients over ranks and scale each rank's loss to that; metrics are rank 0's."""
    first = outcomes[0]
    return Outcome(
        loss=sum(o.loss for o in outcomes) / len(outcomes),
        gradient=sum(o.gradient for o in outcomes) / len(outcomes),
        hinted_gradient=None if first.hinted_gradient is None else sum(o.hinted_gradient for o in outcomes),
        metrics=first.metrics,
        forwards=first.forwards,
        teacher_ids=[ids for o in outcomes for ids in o.teacher_ids],
    )


def summed(outcomes: list[Outcome]) -> Outcome:
    """The step of hosts that add gradients up over ranks and divide each rank's loss by counts over all of them."""
    whole = averaged(outcomes)
    whole.loss, whole.gradient = whole.loss * len(outcomes), whole.gradient * len(outcomes)
    whole.metrics = {name: sum(o.metrics.get(name, 0.0) for o in outcomes) for o in outcomes for name in o.metrics}
    return whole


class Servant:
    """A process that makes one call after the other, for hosts that take long to import or own their process.

    Warnings of a call are given again in this process.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,), daemon=True)
        self._process.start()
        other.close()

    def call(self, function: Callable[..., Any], *arguments: Any, timeout: float = 300.0) -> Any:
        """Return what `function(*arguments)` returns there. Raises `RuntimeError` with the traceback, or when it hangs."""
        self.begin(function, *arguments)
        return self.result(timeout)

    def begin(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Start a call; `result` waits for it."""
        self._name = function.__name__
        self._pipe.send((function, arguments))

    def result(self, timeout: float = 300.0) -> Any:
        """Return what the call that was begun returned; raises as `call`."""
        if not self._pipe.poll(timeout):
            self.close()
            raise RuntimeError(f"{self._name} did not end within {timeout:.0f} s.")
        try:
            done, value, heard = self._pipe.recv()
        except EOFError as error:
            raise RuntimeError(f"The process that ran {self._name} died.") from error
        for category, message in heard:
            warnings.warn(message, category, stacklevel=2)
        if not done:
            raise RuntimeError(f"{self._name} failed:\n{value}")
        return value

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def together(servants: Sequence[Servant], function: Callable[..., Any], arguments: Sequence[tuple]) -> list[Any]:
    """Return what `function(*arguments[i])` returns in each servant, all at the same time. Raises as `Servant.call`."""
    for servant, given in zip(servants, arguments, strict=True):
        servant.begin(function, *given)
    return [servant.result() for servant in servants]


def _serve(pipe) -> None:
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            try:
                done, value = True, function(*arguments)
            except Exception:
                done, value = False, traceback.format_exc()
        told = [(w.category, str(w.message)) for w in heard if w.category.__module__.startswith("composer_plugins")]
        pipe.send((done, value, told))
