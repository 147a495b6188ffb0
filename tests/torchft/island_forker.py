"""Forks islands from a process that has imported everything: real processes, without seconds of imports for each.

Reads one JSON request per line, `{"run": [program, argument], "out": file}` or `{"ask": pid}`, and answers with one: the
pid, or the exit code (null while it runs). Ends, with all it started, when its input does.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import traceback

import composer_torchft.loop  # noqa: F401
import numpy  # noqa: F401
import torch

torch.set_num_threads(1)


def child(program: str, argument: str, out: str) -> None:
    """Become an island."""
    try:
        file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = [program, argument]
        runpy.run_path(program, run_name="__main__")
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def main() -> None:
    codes: dict[int, int | None] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "run" in request:
            assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked"
            answer = os.fork()
            if answer == 0:
                child(*request["run"], request["out"])
            codes[answer] = None
        else:
            pid = request["ask"]
            if codes[pid] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                codes[pid] = os.waitstatus_to_exitcode(status) if ended else None
            answer = codes[pid]
        print(json.dumps(answer), flush=True)
    for pid, code in codes.items():
        if code is None:
            os.kill(pid, signal.SIGKILL)


main()
