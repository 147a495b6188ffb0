"""`composer-rl recipes`: the recipes that ship with the package, listed or copied."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Annotated

import typer


def recipes(
    host: Annotated[str | None, typer.Argument(help="Only this host's: trl, verl or prime_rl.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Copy them into this folder, to be changed there.")
    ] = None,
    path: Annotated[bool, typer.Option("--path", help="Print the installed folder only, for use in scripts.")] = False,
) -> None:
    """List the recipes that ship with the package, or copy them to where you can change them.

    A file of yours is never overwritten: when one is in the way and differs, nothing is copied.

    Examples: `composer-rl recipes verl`, `composer-rl recipes -o recipes`,
    `rl @ base.toml @ $(composer-rl recipes --path)/prime_rl/composer_policy.toml`
    """
    from composer_plugins.shipped import recipes_dir

    root = recipes_dir()
    files = _of_host(root, host)
    if path:
        typer.echo(root)
    elif output is None:
        _show(root, files)
    else:
        _copy(root, files, output)


def _of_host(root: Path, host: str | None) -> list[Path]:
    """Return the recipes' paths, relative to the folder; `prime-rl` is as good as `prime_rl`."""
    from composer_plugins.errors import ConfigError

    files = sorted(p.relative_to(root) for p in root.rglob("*") if p.suffix in {".yaml", ".toml"})
    if host is None:
        return files
    of_host = [p for p in files if p.parts[0] == host.replace("-", "_")]
    if not of_host:
        hosts = sorted({p.parts[0] for p in files if len(p.parts) > 1})
        raise ConfigError(f"no recipes for {host!r}: expected one of {', '.join(hosts)}, or no host for all of them")
    return of_host


def _show(root: Path, files: list[Path]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "what it is", title=f"recipes in {root}", title_justify="left")
    for file in files:
        table.add_row(str(file), _summary(root / file))
    console = Console()
    console.print(table)
    console.print("copy them: composer-rl recipes -o recipes", markup=False, highlight=False)


def _summary(file: Path) -> str:
    """Return the first sentence of a recipe's leading comment."""
    lines = file.read_text(encoding="utf-8").splitlines()
    comment = []
    for line in lines:
        if not line.startswith("#") or not line.strip("# "):
            break
        comment.append(line.lstrip("# "))
    return re.split(r"(?<=\.) ", " ".join(comment), maxsplit=1)[0].rstrip(".")


def _copy(root: Path, files: list[Path], output: Path) -> None:
    from composer_plugins.errors import ConfigError

    try:
        differ = [output / f for f in files if (output / f).exists() and not _same(output / f, root / f)]
        if differ:
            raise ConfigError(
                f"{len(differ)} of your files differ from the recipes that would be written over them, so nothing was "
                f"copied: {', '.join(map(str, differ))}. Name another folder with -o, or move them"
            )
        for file in files:
            (output / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / file, output / file)
    except OSError as error:
        raise ConfigError(f"cannot write recipes to {output}: {error.strerror or error}") from None
    typer.echo(f"{len(files)} recipes copied to {output}")


def _same(mine: Path, recipe: Path) -> bool:
    return mine.is_file() and mine.read_bytes() == recipe.read_bytes()
