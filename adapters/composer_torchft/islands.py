"""Several islands on one machine, for tests and demos: N processes of one command and a lighthouse."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable

from composer_plugins.errors import OuterLoopError
from composer_torchft.links import ISLAND_ENV, LIGHTHOUSE_ENV

INDEX_ENV = "COMPOSER_ISLAND_INDEX"


def run_islands(
    command: list[str], count: int, lighthouse: str, *, write: Callable[[str], None], env: dict[str, str] | None = None
) -> list[int]:
    """Run `command` once per island and return the exit codes.

    Args:
        command: `{i}` in an argument becomes the island's number.
        lighthouse: address of a running lighthouse.
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
        codes = [process.wait() for process in processes]
        for thread in threads:
            thread.join(5)
        return codes
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)


def _copy(process: subprocess.Popen, index: int, write: Callable[[str], None]) -> None:
    for line in process.stdout or ():
        write(f"[{index}] {line.rstrip()}")
