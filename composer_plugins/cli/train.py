"""`composer-rl train`: run a recipe on its host."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from composer_plugins.config import read_yaml
from composer_plugins.errors import ConfigError
from composer_plugins.hosts import host_by_suffix
from composer_plugins.plugins import get_plugin_manager


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe file with a `host:` key, e.g. recipes/trl/quickstart.yaml.")],
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", help="Run folder; default: the recipe's.")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Change one key: --set composer.sdpo.weight=0.5 (repeatable).")
    ] = None,
) -> None:
    """Train a model with a recipe, on the host that the recipe names.

    Examples:

    `composer-rl train recipes/trl/quickstart.yaml`

    `composer-rl train recipes/trl/quickstart.yaml --set composer.replay_dpo.weight=0 -o runs/no_pairs`

    Several processes: `accelerate launch --num_processes 2 -m composer_plugins.cli train RECIPE`.
    """
    name = host_by_suffix(recipe) or read_yaml(recipe).get("host")
    if not isinstance(name, str):
        raise ConfigError(f"{recipe} has no `host:` key; add e.g. `host: trl` (`composer-rl plugins` lists the hosts).")
    folder = get_plugin_manager().hosts.get(name).load().train(recipe, output_dir=output_dir, overrides=override)
    drawable = (folder / "metrics.jsonl").exists()  # some hosts keep their own metrics
    typer.echo(f"Run folder: {folder}." + (f" Draw it with: composer-rl report {folder}" if drawable else ""))
