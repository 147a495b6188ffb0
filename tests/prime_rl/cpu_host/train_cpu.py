"""prime-rl's `trainer` command on a CPU, for tests: `torchrun --nproc-per-node 1 train_cpu.py @ trainer.toml`."""

from __future__ import annotations

import os
import socket

import prime_cpu


def _rendezvous() -> None:
    """A single process needs no torchrun."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_WORLD_SIZE": 1,
        "MASTER_PORT": port,
    }.items():
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")


if __name__ == "__main__":
    _rendezvous()
    prime_cpu.install()
    prime_cpu.fit_host()
    from prime_rl.trainer.rl.train import main

    main()
