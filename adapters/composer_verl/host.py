"""verl as a host of the `composer-rl` command line. Importing this module imports no verl."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from composer_plugins.channels.levels import SignalLevel
from composer_plugins.errors import ComposerError, ConfigError
from composer_verl.preflight import check_config

#: Where verl keeps its own configuration files, as Hydra's search path names it.
VERL_CONFIG = "pkg://verl.trainer.config"


class VerlHost:
    """See `composer_plugins.hosts.Host`. A recipe is a Hydra configuration on top of verl's `ppo_trainer.yaml`."""

    name = "verl"
    levels = (SignalLevel.TOPK, SignalLevel.SAMPLED)
    conformance = "composer_verl.conformance"

    def version(self) -> str | None:
        """Return the installed verl version, or None."""
        try:
            return metadata.version("verl")
        except metadata.PackageNotFoundError:
            return None

    def validate(self, recipe: Path) -> list[str]:
        """Return what is wrong with a recipe, composed by verl's own configuration system.

        Raises:
            ImportError: verl is not installed.
        """
        return [*environment_problems(), *problems(recipe, [])]

    def train(self, recipe: Path, *, output_dir: Path | None = None, overrides: list[str] | None = None) -> Path:
        """Run verl's own `main_ppo` on a recipe and return `trainer.default_local_dir`.

        Metrics are one JSON object per step in `verl_metrics.jsonl` there, when `trainer.logger` has `file`.

        Raises:
            ConfigError: the recipe is wrong; verl was not started.
            ComposerError: verl is not installed, or ended with another exit code than 0.
        """
        if self.version() is None:
            raise ComposerError("verl is not installed: pip install 'composer-plugins[verl]' (docs/how-to/verl.md).")
        overrides = [*(overrides or [])]
        if output_dir is not None:
            overrides += [f"trainer.default_local_dir={output_dir.absolute()}"]
        found = [*environment_problems(), *problems(recipe, overrides)]
        if found:
            raise ConfigError(f"{recipe}:\n" + "\n".join(found))
        folder = Path(compose(recipe, overrides).trainer.default_local_dir).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        environment = {"VERL_FILE_LOGGER_PATH": str(folder / "verl_metrics.jsonl"), **os.environ}
        command = main_ppo(recipe, [*overrides, f"hydra.run.dir={folder / 'hydra'}"])
        code = subprocess.run(command, env=environment).returncode
        if code != 0:
            raise ComposerError(
                f"verl ended with exit code {code}; its own messages are above. Run: {' '.join(command)}"
            )
        return folder


def main_ppo(recipe: Path, overrides: list[str]) -> list[str]:
    """Return the command line of verl's own entry point for a recipe."""
    where = ["--config-dir", str(recipe.parent), "--config-name", recipe.stem]
    return [sys.executable, "-m", "verl.trainer.main_ppo", *where, *overrides]


def compose(recipe: Path, overrides: list[str] | None = None):
    """Return the recipe as verl's `main_ppo` would see it (a DictConfig).

    Raises:
        ConfigError: no such file, or Hydra cannot compose it.
        ImportError: verl is not installed.
    """
    import verl.trainer.config  # noqa: F401  the search path below leads there
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if not recipe.is_file():
        raise ConfigError(f"Expected a recipe at {recipe}: there is no such file.")
    try:
        with initialize_config_dir(str(recipe.parent.absolute()), version_base=None):
            return hydra_compose(recipe.stem, overrides=[*(overrides or []), f"hydra.searchpath=[{VERL_CONFIG}]"])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{recipe} cannot be composed: {error}") from error


def environment_problems() -> list[str]:
    """Return what is wrong with this Python environment.

    verl 0.9.1 imports `AutoModelForCausalLMWithValueHead` from any TRL it finds; TRL 1.x dropped it along the way.
    """
    try:
        trl = metadata.version("trl")
    except metadata.PackageNotFoundError:
        return []
    folder = importlib.util.find_spec("trl").submodule_search_locations[0]
    if int(trl.split(".")[0]) < 1 or (Path(folder) / "experimental" / "ppo").exists():
        return []
    return [
        f"TRL {trl} is installed beside verl {metadata.version('verl')}, whose workers then fail with `cannot import name "
        "'AutoModelForCausalLMWithValueHead' from 'trl'`: give verl an environment of its own (docs/how-to/verl.md)."
    ]


def problems(recipe: Path, overrides: list[str]) -> list[str]:
    """Return what is wrong with a recipe under overrides, as sentences with the fix."""
    try:
        config = compose(recipe, overrides)
        found = [*_unregistered(config), *check_config(config)]
    except ComposerError as error:
        return str(error).splitlines()
    try:
        found += _section(config)
    except ComposerError as error:
        found += str(error).splitlines()
    return list(dict.fromkeys(found)) or _host_checks(config)


def _unregistered(config) -> list[str]:
    """Names that the recipe uses and verl's registries do not have."""
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY

    found = []
    for key, registry in (
        ("actor_rollout_ref.actor.policy_loss.loss_mode", POLICY_LOSS_REGISTRY),
        ("algorithm.adv_estimator", ADV_ESTIMATOR_REGISTRY),
    ):
        name = _select(config, key)
        if name in registry:
            continue
        found.append(f"{key}: verl has no {name!r}{_kept_out()}. It has: {', '.join(map(str, registry))}.")
    if not _select(config, "trainer.use_v1"):
        found.append("trainer.use_v1 must be true: verl's v0 trainer is deprecated and not supported here.")
        return found
    with warnings.catch_warnings(action="ignore"):  # of engines that are not installed
        import verl.trainer.ppo.v1  # noqa: F401  our trainer is registered when verl has imported its own
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    mode = _select(config, "trainer.v1.trainer_mode")
    if mode not in TRAINER_REGISTRY:
        found.append(
            f"trainer.v1.trainer_mode: verl has no {mode!r}{_kept_out()}. It has: {', '.join(TRAINER_REGISTRY)}."
        )
    return found


def _kept_out() -> str:
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
    return f"; VERL_USE_EXTERNAL_PLUGINS={policy} keeps ours out: unset it" if policy != "auto" else ""


def _section(config) -> list[str]:
    """What is wrong with our own section, at the two places where verl's parts read it."""
    from verl.utils.config import omega_conf_to_dataclass

    from composer_verl.policy_losses import constant_length
    from composer_verl.section import PREFIX, policy_options

    mode = str(_select(config, "actor_rollout_ref.actor.policy_loss.loss_mode"))
    if not mode.startswith(PREFIX):
        return []
    name = mode.removeprefix(PREFIX)
    actor = _instantiate(lambda: omega_conf_to_dataclass(config.actor_rollout_ref.actor))
    options, aggregation = policy_options(actor, name)
    if aggregation == "objective":
        constant_length(name, options)
    return []


def _host_checks(config) -> list[str]:
    """verl's own checks, its output kept to itself."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    with contextlib.redirect_stdout(io.StringIO()):
        try:
            validate_config(config, need_reference_policy(config), need_critic(config))
        except (AssertionError, ValueError, KeyError) as error:
            return [f"verl's own check: {error}"]
        except Exception as error:  # whatever Hydra or OmegaConf wrap it in
            return [f"verl's own check: {type(error).__name__}: {error}"]
    return []


def _instantiate(build) -> Any:
    """Build a dataclass of verl's; an error of ours inside comes out as it went in."""
    from hydra.errors import InstantiationException

    try:
        return build()
    except InstantiationException as error:
        cause = error.__cause__
        while cause is not None and not isinstance(cause, ComposerError):
            cause = cause.__cause__
        raise cause or ConfigError(f"verl's own check of the actor's configuration: {error.__cause__}") from error
    except (AssertionError, ValueError) as error:
        if isinstance(error, ComposerError):
            raise
        raise ConfigError(f"verl's own check of the actor's configuration: {error}") from error


def _select(config, key: str) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.select(config, key)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}: {error}") from error


HOST = VerlHost()
