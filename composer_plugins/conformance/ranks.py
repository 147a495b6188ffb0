"""Runs a function on several data-parallel processes of this machine (gloo, loopback)."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
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
