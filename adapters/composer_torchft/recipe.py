"""What a recipe of any host says about the outer loop: for the doctor, without the host and without torch."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from composer_plugins.config import OuterConfig, apply_override, parse_section, read_yaml
from composer_plugins.errors import ConfigError, OuterLoopError
from composer_plugins.outer import LIGHTHOUSE_ENV, OUTER_ENV


@dataclass(frozen=True)
class Outer:
    """The `outer` section, with the address of the lighthouse if anything names one.

    `steps`: inner steps of the run; None where the recipe does not say it in optimizer steps.
    """

    config: OuterConfig
    steps: int | None


def read_outer(path: Path, overrides: list[str] | None = None) -> Outer:
    """Read the `composer` section of a YAML recipe (TRL, verl), or COMPOSER_OUTER of a prime-rl TOML.

    Args:
        path: the recipe.
        overrides: `composer.outer.start_with=2`, as for `composer-rl train`.

    Raises:
        ConfigError: the file or the section is malformed.
        OuterLoopError: there is no outer loop in it.
    """
    data = _from_toml(path) if path.suffix == ".toml" else read_yaml(path)
    for override in overrides or []:
        apply_override(data, override)
    config = parse_section(data.get("composer")).outer
    if not config.sync_every:
        raise OuterLoopError(f"{path} has no outer loop: composer.outer.sync_every is 0 or missing.")
    trainer = data.get("trainer")
    steps = trainer.get("max_steps") if isinstance(trainer, dict) else None
    lighthouse = config.lighthouse or data.get("lighthouse") or os.environ.get(LIGHTHOUSE_ENV)
    return Outer(
        config.model_copy(update={"lighthouse": lighthouse}), steps if isinstance(steps, int) and steps > 0 else None
    )


def _from_toml(path: Path) -> dict[str, Any]:
    """Return prime-rl's settings under the names that the other hosts use."""
    if not path.is_file():
        raise ConfigError(f"Expected a TOML file at {path}: there is no such file.")
    try:
        data = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    trainer = data.get("trainer", data)  # the trainer's own file has no such table
    variables = trainer.get("env_vars", {}) if isinstance(trainer, dict) else {}
    section: Any = {}
    if isinstance(variables, dict) and variables.get(OUTER_ENV):
        try:
            section = yaml.safe_load(str(variables[OUTER_ENV]))
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: {OUTER_ENV} is no YAML: {error}. Write it as {{sync_every: 20}}.") from error
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: {OUTER_ENV} must be a mapping such as {{sync_every: 20}}, found {section!r}.")
    steps = data.get("max_steps", trainer.get("max_steps") if isinstance(trainer, dict) else None)
    return {
        "composer": {"outer": section}, "trainer": {"max_steps": steps},
        "lighthouse": variables.get(LIGHTHOUSE_ENV) if isinstance(variables, dict) else None,
    }  # fmt: skip
