"""`composer-rl lighthouse` and `composer-rl islands`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

islands = typer.Typer(
    no_args_is_help=True, help="DiLoCo islands: start several on this machine, or check the time limits of a recipe."
)


def add_commands(app: typer.Typer) -> None:
    """Add the outer loop's commands to `composer-rl`."""
    app.command("lighthouse")(lighthouse)
    app.add_typer(islands, name="islands")


JoinTimeout = Annotated[float, typer.Option(min=0.01, help="Seconds to wait for islands that are alive but late.")]
Heartbeat = Annotated[float, typer.Option(min=0.1, help="Seconds without a heartbeat after which an island is dead.")]
MinIslands = Annotated[int, typer.Option(min=1, help="Fewest islands of a quorum.")]


def lighthouse(
    bind: Annotated[
        str, typer.Option(help="HOST:PORT to listen on; the address that islands use. Private networks only.")
    ] = "127.0.0.1:29510",
    min_islands: MinIslands = 1,
    join_timeout: JoinTimeout = 30.0,
    heartbeat_timeout: Heartbeat = 5.0,
) -> None:
    """Run the lighthouse, through which the islands of a DiLoCo run find each other, until Ctrl-C.

    It holds no state that matters: when it dies, start it again at the same address; islands wait for it.
    There is no authentication: bind it to an interface that only your islands reach.

    Example: `composer-rl lighthouse --bind 10.0.0.1:29510 --min-islands 2`
    """
    import signal
    import threading

    from rich.console import Console

    from composer_torchft.doctor import LighthouseLimits
    from composer_torchft.lighthouse import Lighthouse

    limits = LighthouseLimits(join_timeout, heartbeat_timeout, min_islands)
    console = Console()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with Lighthouse(bind, limits) as server:
        for problem in limits.problems():
            console.print(f"Warning: {problem}", highlight=False, soft_wrap=True)
        console.print(f"lighthouse at {server.address}", highlight=False, soft_wrap=True)
        console.print(f"on every island: export TORCHFT_LIGHTHOUSE={server.address}", highlight=False, soft_wrap=True)
        try:
            while not stop.wait(1.0):
                pass
        except KeyboardInterrupt:
            pass


@islands.command("run", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    context: typer.Context,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many islands.")] = 2,
    min_islands: Annotated[
        int | None, typer.Option(min=1, help="Fewest islands that go on when others die; all when not given.")
    ] = None,
    join_timeout: JoinTimeout = 30.0,
    heartbeat_timeout: Heartbeat = 5.0,
) -> None:
    """Start a lighthouse and N islands of one command on this machine, for a try or a test.

    `{i}` in the command becomes the island's number; COMPOSER_ISLAND_INDEX holds it too. Give every island its own
    data and seed, and the same model and recipe otherwise.

    Example: `composer-rl islands run -n 2 -- composer-rl train recipe.yaml -o runs/island-{i} --set trainer.seed={i}`
    """
    import shutil
    import signal
    import sys

    from rich.console import Console

    from composer_plugins.errors import OuterLoopError
    from composer_torchft.doctor import LighthouseLimits
    from composer_torchft.islands import run_islands
    from composer_torchft.lighthouse import Lighthouse

    console = Console()
    if not context.args:
        raise OuterLoopError("Expected the command of an island after `--`; see composer-rl islands run --help.")
    if shutil.which(context.args[0]) is None:
        raise OuterLoopError(f"The command {context.args[0]!r} was not found.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the islands end with it
    fewest = min(min_islands or count, count)
    with Lighthouse("127.0.0.1:0", LighthouseLimits(join_timeout, heartbeat_timeout, fewest)) as server:
        codes = run_islands(
            context.args, count, server.address, fewest=fewest,
            write=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
        )  # fmt: skip
    if any(code != 0 for code in codes):
        failed = ", ".join(
            f"island {i}: " + ("ended, since too few were left" if code is None else f"exit code {code}")
            for i, code in enumerate(codes)
            if code != 0
        )
        raise OuterLoopError(f"{failed}. The lines above, marked with the island's number, say why.")
    console.print(f"{count} islands ended well.")


@islands.command("doctor")
def doctor(
    recipe: Annotated[
        Path, typer.Argument(help="Recipe with `composer.outer` (YAML), or a prime-rl TOML with COMPOSER_OUTER.")
    ],
    round_seconds: Annotated[
        float | None, typer.Option(min=0, help="How long the slowest island trains between two syncs.")
    ] = None,
    min_islands: MinIslands = 1,
    join_timeout: JoinTimeout = 30.0,
    heartbeat_timeout: Heartbeat = 5.0,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Change one key, as for train: --set composer.outer.start_with=2.")
    ] = None,
) -> None:
    """Check whether the time limits of a recipe and of the lighthouse fit together, and explain what would happen.

    Example: `composer-rl islands doctor recipe.yaml --round-seconds 900`
    """
    from rich.console import Console

    from composer_torchft.doctor import LighthouseLimits, problems, reach
    from composer_torchft.recipe import read_outer

    outer = read_outer(recipe, overrides)
    config, limits = outer.config, LighthouseLimits(join_timeout, heartbeat_timeout, min_islands)
    found = problems(config, limits, round_seconds=round_seconds, steps=outer.steps)
    if config.lighthouse and (failed := reach(config.lighthouse)):
        found.append(failed)
    console = Console()
    for problem in found:
        console.print(f"- {problem}", markup=False, highlight=False, soft_wrap=True)
    t = config.timeouts
    console.print(
        f"A crash stalls the others for about {heartbeat_timeout:g} s (heartbeat), a peer that stops inside an exchange "
        f"for {t.allreduce:g} s, a slow peer for up to {join_timeout:g} s (more than two islands) or until it comes "
        f"(two), at most {t.quorum:g} s; a lighthouse may be away for {0 if t.quorum_retries == 0 else t.quorum:g} s.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


@islands.command("table")
def table(
    files: Annotated[list[Path], typer.Argument(help="outer.jsonl of one or more islands' run folders.")],
) -> None:
    """Print what islands wrote about their rounds, also while they run or after one died.

    Example: `composer-rl islands table runs/island-0/outer.jsonl runs/island-1/outer.jsonl`
    """
    from rich.console import Console

    from composer_torchft import rounds

    console = Console()
    for file in files:
        console.print(rounds.table(rounds.read(file), str(file)))
