"""`composer-rl`: one file per command in this package; every stage is usable alone from files."""

from __future__ import annotations

import importlib
import sys

import typer
from rich.console import Console

from composer_plugins import __version__
from composer_plugins.errors import ComposerError, PluginError

app = typer.Typer(
    name="composer-rl",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help=(
        "Agent logs in, a post-trained model out: Composer 2.5's recipe on the RL framework you already run.\n\n"
        "The stages are files: logs → `ingest` → traces → `hints` → states → `replay` → replays → `pairs` → pairs; "
        "`train` runs a recipe on them and `report` draws the result. (Unrelated to MosaicML Composer and to PHP's "
        "composer.)"
    ),
)

#: Order of the pipeline, which is also the order in `--help`.
COMMANDS = (
    "ingest",
    "scrub",
    "stats",
    "export",
    "hints",
    "replay",
    "pairs",
    "signal",
    "recipes",
    "train",
    "report",
    "validate",
    "plugins",
    "conformance",
)

#: Packages that come with an extra of the distribution.
EXTRAS = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "safetensors", "gguf", "numpy", "jmespath"}

console = Console(stderr=True)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        typer.echo(f"composer-rl {__version__}")
        raise typer.Exit


def build_app() -> typer.Typer:
    """Return the app with the built-in commands and those that plugins add."""
    if not app.registered_commands:
        for name in COMMANDS:
            module = importlib.import_module(f"composer_plugins.cli.{name}")
            app.command(name)(getattr(module, name))
        from composer_plugins.plugins import get_plugin_manager

        get_plugin_manager().add_commands(app)
    return app


def main() -> None:
    """Entry point: expected errors print one clear message and exit with the error's own code."""
    try:
        build_app()()
    except ComposerError as error:
        console.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in EXTRAS:
            raise
        console.print(
            f"This command needs {error.name}, which is not installed: pip install 'composer-plugins\\[trl]' "
            "(TRL and everything below it), or 'composer-plugins\\[torch]' for models only."
        )
        sys.exit(PluginError.exit_code)
