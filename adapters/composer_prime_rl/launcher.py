"""prime-rl's `rl` and `orchestrator` commands with the algorithm `composer`: `python -m composer_prime_rl.launcher rl @ run.toml`.

prime-rl's launcher starts `orchestrator` by name from the PATH. So ours puts a program of that name first on the PATH of
its children, which registers the algorithm and then is prime-rl's. Nothing of prime-rl is changed on disk.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from pathlib import Path

USAGE = "usage: python -m composer_prime_rl.launcher {rl,orchestrator} [prime-rl's own arguments]"


def main(argv: list[str] | None = None) -> int:
    """Run one of prime-rl's commands; return the exit code of a wrong call."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in ("rl", "orchestrator"):
        print(USAGE, file=sys.stderr)
        return 2
    from composer_prime_rl.algorithm import register

    try:
        register()
    except ModuleNotFoundError as error:
        print(
            f"error: prime-rl cannot be imported ({error.name} is missing): install it from its source.",
            file=sys.stderr,
        )
        return 1
    sys.argv = argv
    if argv[0] == "rl":
        with tempfile.TemporaryDirectory(prefix="composer-prime-rl-") as folder:
            os.environ["PATH"] = f"{orchestrator_program(Path(folder)).parent}{os.pathsep}{os.environ.get('PATH', '')}"
            from prime_rl.entrypoints.rl import main as run

            run()
        return 0
    from composer_prime_rl.algorithm import register_runtime

    register_runtime()
    from prime_rl.entrypoints.orchestrator import main as run

    run()
    return 0


def orchestrator_program(folder: Path) -> Path:
    """Write the program `orchestrator` into `folder` and return its path."""
    path = folder / "orchestrator"
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m composer_prime_rl.launcher orchestrator "$@"\n')
    path.chmod(0o755)
    return path


if __name__ == "__main__":
    sys.exit(main())
