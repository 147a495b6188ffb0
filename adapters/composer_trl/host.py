"""TRL as a host of the `composer-rl` command line."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from composer_plugins.channels.levels import SignalLevel
from composer_plugins.errors import ComposerError
from composer_trl.recipe import load_recipe, trainer_arguments


class TRLHost:
    """See `composer_plugins.hosts.Host`."""

    name = "trl"
    levels = (SignalLevel.FULL, SignalLevel.TOPK, SignalLevel.SAMPLED)
    conformance = "composer_trl.conformance"

    def version(self) -> str | None:
        """Return the installed TRL version, or None."""
        try:
            return metadata.version("trl")
        except metadata.PackageNotFoundError:
            return None

    def validate(self, recipe: Path) -> list[str]:
        """Return what is wrong with a recipe, files it names included."""
        try:
            loaded = load_recipe(recipe)
            trainer_arguments(loaded)
            if loaded.composer.channels:  # building a plugin's channel imports torch
                from composer_plugins.channels.extra import extra_channels

                extra_channels(loaded.composer)
        except ComposerError as error:
            return str(error).splitlines()
        files = [
            loaded.data.states,
            loaded.data.traces,
            loaded.data.replays,
            loaded.composer.replay_dpo.pairs,
        ]
        return [f"{path} does not exist: run the stage that writes it." for path in files if path and not path.exists()]

    def train(self, recipe: Path, *, output_dir: Path | None = None, overrides: list[str] | None = None) -> Path:
        """Run a recipe and return its run folder."""
        overrides = [*(overrides or []), *([f"output_dir={output_dir}"] if output_dir else [])]
        loaded = load_recipe(recipe, overrides)  # a typo shows before TRL is imported, which takes seconds
        from composer_trl.run import run

        return run(loaded, command=f"composer-rl train {recipe}")


HOST = TRLHost()
