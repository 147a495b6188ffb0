"""prime-rl's `rl` command on a CPU, for tests: `python rl_cpu.py rl @ run.toml`.

prime-rl's launcher starts `env-server`, `orchestrator` and `torchrun` by name. They are prime-rl's and torch's own programs
here, put on the PATH by `programs()`; two of them run behind `prime_cpu` (its stand-ins for packages that need a GPU, and the
CPU in place of "cuda"), and the inference server is whatever the recipe names.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

#: What the launcher starts -> what runs.
PROGRAMS = {
    "env-server": "-m prime_rl.entrypoints.env_server",
    "orchestrator": f"{shlex.quote(__file__)} orchestrator",
    "torchrun": f"{shlex.quote(__file__)} torchrun",
}


def programs(folder: Path) -> dict[str, str]:
    """Write the programs into `folder`; return the environment variables of a process that finds them."""
    for name, what in PROGRAMS.items():
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {what} "$@"\n')
        path.chmod(0o755)
    # the launcher counts GPUs in CUDA_VISIBLE_DEVICES when it is set
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "0"}


def main(argv: list[str]) -> None:
    """Run one of prime-rl's programs, or torch's launcher with our trainer script in place of prime-rl's module."""
    program, *arguments = argv
    if program == "torchrun":
        where = arguments.index("-m")
        assert arguments[where + 1] == "prime_rl.trainer.rl.train", arguments
        script = [str(Path(__file__).with_name("train_cpu.py")), *arguments[where + 2 :]]
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *arguments[:where], *script])
    import prime_cpu

    prime_cpu.install()
    sys.argv = argv
    if program == "rl":
        from prime_rl.entrypoints.rl import main as run
    else:
        from prime_rl.entrypoints.orchestrator import main as run
    run()


if __name__ == "__main__":
    main(sys.argv[1:])
