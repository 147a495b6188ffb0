"""Several islands on one machine, for tests and demos: N processes of one command and a lighthouse."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable

from composer_plugins.errors import OuterLoopError
from composer_plugins.outer import ISLAND_ENV, LIGHTHOUSE_ENV

INDEX_ENV = "COMPOSER_ISLAND_INDEX"
#: Seconds an island is given to end when it is told to.
GRACE = 10.0
#: Seconds that islands have to end by themselves when too few are left: one that has left the loop may still be writing
#: its last checkpoint.
LAST_WORDS = 60.0


def run_islands(
    command: list[str], count: int, lighthouse: str, *, fewest: int = 1, write: Callable[[str], None],
    env: dict[str, str] | None = None,
) -> list[int | None]:  # fmt: skip
    """Run `command` once per island and return the exit codes; None: it was ended, because too few others were left.

    Args:
        command: `{i}` in an argument becomes the island's number.
        lighthouse: address of a running lighthouse.
        fewest: islands below which the lighthouse forms no quorum. When failures leave fewer, the others would wait for
            their time limit, an hour by default: they are ended.
        write: gets every line of output, marked with the island.

    Raises:
        OuterLoopError: the command cannot be started.
    """
    processes: list[subprocess.Popen] = []
    try:
        for index in range(count):
            environment = {
                **os.environ, **(env or {}), LIGHTHOUSE_ENV: lighthouse, ISLAND_ENV: f"island-{index}",
                INDEX_ENV: str(index),
            }  # fmt: skip
            arguments = [part.replace("{i}", str(index)) for part in command]
            try:
                process = subprocess.Popen(
                    arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                    errors="replace",
                )  # fmt: skip
            except OSError as error:
                raise OuterLoopError(
                    f"The command of the islands cannot be started: {error}. Check {command[0]!r}."
                ) from error
            processes.append(process)
        threads = [
            threading.Thread(target=_copy, args=(p, i, write), daemon=True) for i, p in enumerate(processes)
        ]  # fmt: skip
        for thread in threads:
            thread.start()
        left_alone = _wait(processes, fewest)
        for thread in threads:
            thread.join(5)
        return [None if i in left_alone else process.returncode for i, process in enumerate(processes)]
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)


def _wait(processes: list[subprocess.Popen], fewest: int) -> set[int]:
    """Wait until all have ended; return the numbers of those that were ended here."""
    while any(p.poll() is None for p in processes):
        running = [i for i, p in enumerate(processes) if p.poll() is None]
        if any(p.returncode for p in processes) and len(running) < fewest:
            deadline = time.monotonic() + LAST_WORDS
            while time.monotonic() < deadline and any(processes[i].poll() is None for i in running):
                time.sleep(0.1)
            ended = {i for i in running if processes[i].poll() is None}
            for i in ended:
                _end(processes[i])
            return ended
        time.sleep(0.1)
    return set()


def _end(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _copy(process: subprocess.Popen, index: int, write: Callable[[str], None]) -> None:
    for line in process.stdout or ():
        write(f"[{index}] {line.rstrip()}")
