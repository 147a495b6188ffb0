"""A real lighthouse on loopback, and islands as threads of this process or as processes of their own."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from composer_torchft.doctor import LighthouseLimits
from composer_torchft.lighthouse import Lighthouse

from composer_plugins.config import OuterConfig

WORKER = Path(__file__).with_name("island_worker.py")


@pytest.fixture
def lighthouse():
    """Return a function that starts lighthouses; they stop with the test."""
    started = []

    def start(islands: int = 2, *, join: float = 0.5, heartbeat: float = 1.0, bind: str = "127.0.0.1:0") -> Lighthouse:
        started.append(Lighthouse(bind, LighthouseLimits(join, heartbeat, islands)))
        return started[-1]

    yield start
    for one in started:
        one.close()


def outer(address: str, island: int, **options) -> OuterConfig:
    """The outer section of one island, with time limits for a test."""
    limits = {"quorum": 60, "allreduce": 20, "connect": 10, **options.pop("timeouts", {})}
    return OuterConfig(
        **{"sync_every": 2, "lighthouse": address, "island": f"isl{island}", "timeouts": limits, **options}
    )


def reference(local: np.ndarray, start: np.ndarray, *, lr: float = 0.7, momentum: float = 0.9) -> np.ndarray:
    """DiLoCo's outer optimizer in float64: `local` is (rounds, islands, size), the parameters before each sync."""
    theta, velocity, found = start.astype(np.float64), 0.0, []
    for islands in local:
        gradient = (theta - islands).mean(axis=0)
        velocity = momentum * velocity + gradient
        theta = theta - lr * (gradient + momentum * velocity)
        found.append(theta)
    return np.array(found)


def in_threads(count: int, body) -> list:
    """Run `body(i)` in one thread per island; return what each returned or raised."""
    results = [None] * count

    def run(i: int) -> None:
        try:
            results[i] = body(i)
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
        assert not thread.is_alive(), "an island hangs"
    return results


class Forker:
    """Starts processes by forking one that has imported everything, see `island_forker.py`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER.with_name("island_forker.py"))], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "RUST_LOG": "error"},
        )  # fmt: skip

    def ask(self, **request) -> int | None:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@functools.cache
def forker() -> Forker:
    """Return the one of this session; it ends with it."""
    return Forker()


class Forked:
    """A process that `forker` started, with what is needed of `subprocess.Popen`."""

    def __init__(self, program: Path, argument: str, out: Path) -> None:
        self.pid = forker().ask(run=[str(program), argument], out=str(out))

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""
        return forker().ask(ask=self.pid)

    def wait(self, seconds: float = 120) -> int:
        """Return the exit code."""
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"island process {self.pid}", seconds)
            time.sleep(0.02)
        return code

    def kill(self) -> None:
        """Send SIGKILL, which also ends a stopped one."""
        os.kill(self.pid, signal.SIGKILL)


class Island:
    """One process that runs `island_worker.py`."""

    def __init__(self, folder: Path, address: str, index: int, **settings) -> None:
        self.index, self.folder, self.faulty = index, folder, bool(settings.get("fault"))
        self.log = folder / f"island{index}.jsonl"
        settings = {"index": index, "address": address, "folder": str(folder), **settings}
        self.process = Forked(WORKER, json.dumps(settings), folder / f"island{index}.out")

    def wait(self, seconds: float = 120) -> int:
        """Return the exit code."""
        return self.process.wait(seconds)

    def output(self) -> str:
        return (self.folder / f"island{self.index}.out").read_text(errors="replace")[-4000:]

    def events(self, kind: str | None = None) -> list[SimpleNamespace]:
        """Return what the worker wrote down so far."""
        if not self.log.exists():
            return []
        rows = [json.loads(line) for line in self.log.read_text().splitlines() if line.endswith("}")]
        return [SimpleNamespace(**row) for row in rows if kind is None or row["kind"] == kind]

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def islands(tmp_path):
    """Return a function that starts an island's process; all are killed with the test."""
    started = []

    def start(address: str, index: int, **settings) -> Island:
        started.append(Island(tmp_path, address, index, **settings))
        return started[-1]

    start.started = started
    yield start
    for island in started:
        island.stop()


def free_port() -> int:
    """A port that no outgoing connection is given: islands that call a dead lighthouse may get its own port."""
    for port in random.SystemRandom().sample(range(20000, 30000), 100):
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port between 20000 and 30000")
