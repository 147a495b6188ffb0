"""Our parts of a prime-rl recipe, checked without prime-rl: the loss's arguments, the sources', and that they agree."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from composer_plugins.config import parse_section
from composer_plugins.errors import ComposerError, ConfigError

#: How prime-rl names the loss: `[trainer.loss] import_path`.
IMPORT_PATH = "composer_prime_rl.loss.composer_loss"
#: The id of our environment and of our taskset.
ENV_ID = "composer-prime-rl"


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a recipe. Raises `ConfigError` when it is missing or no TOML."""
    if not path.is_file():
        raise ConfigError(f"Expected a TOML recipe at {path}: there is no such file.")
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def section_problems(data: dict[str, Any]) -> list[str]:
    """Return what is wrong with our sections of a recipe, as sentences with the fix."""
    from composer_prime_rl.section import loss_options

    loss, outer = _table(data, "trainer", "loss"), _table(data, "trainer", "env_vars").get("COMPOSER_OUTER")
    problems: list[str] = []
    if outer is not None:
        _checked(lambda: _outer(outer), "trainer.env_vars.COMPOSER_OUTER", problems)
        if not loss:
            return problems  # an overlay on one that names the loss
    if loss.get("type") != "custom" or loss.get("import_path") != IMPORT_PATH:
        return [
            *problems,
            f'trainer.loss: expected type = "custom" and import_path = "{IMPORT_PATH}", found type {loss.get("type")!r} and '
            f"import_path {loss.get('import_path')!r}.",
        ]
    kwargs = _table(loss, "kwargs")
    options = _checked(lambda: loss_options(kwargs), "trainer.loss.kwargs", problems)
    for where, table in our_tables(data):
        section = {key: table[key] for key in ("composer", "sdpo_route") if key in table}
        found = _checked(lambda section=section: loss_options(section), where, problems)
        if options is not None and found is not None and found.composer.sdpo.weight > 0:
            problems += _disagreements(where, found, options)
    return problems


def our_tables(data: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every table outside of the loss that holds a `composer` section of ours, with its key."""
    orchestrator = _table(data, "orchestrator")
    if _table(orchestrator, "algo").get("type") == "composer":
        yield "orchestrator.algo", orchestrator["algo"]
    sources = _table(orchestrator, "train").get("source", [])
    for number, source in enumerate(sources if isinstance(sources, list) else []):
        if not isinstance(source, dict):
            continue
        where = f"orchestrator.train.source.{number}"
        env, taskset, algo = _table(source, "env"), _table(source, "env", "taskset"), _table(source, "algo")
        if algo.get("type") == "composer":
            yield f"{where}.algo", algo
        if env.get("id") == ENV_ID:
            yield f"{where}.env", env
        if taskset.get("id") == ENV_ID:
            yield f"{where}.env.taskset", taskset


def names_our_algorithm(data: dict[str, Any]) -> bool:
    """Whether a recipe asks for the algorithm `composer`, which prime-rl's own launcher does not know."""
    return any(where.endswith("algo") for where, _ in our_tables(data))


def _disagreements(where: str, source: Any, loss: Any) -> list[str]:
    """A source that stamps for one route while the loss expects another counts channel 2 twice, or never."""
    problems = []
    weight = loss.composer.sdpo.weight
    if source.sdpo_route != loss.sdpo_route and (weight > 0 or source.sdpo_route == "loss"):
        problems.append(
            f"{where}.sdpo_route is {source.sdpo_route} and trainer.loss.kwargs.sdpo_route is {loss.sdpo_route}: channel 2 "
            f"would count {'twice' if loss.sdpo_route == 'loss' else 'nowhere'}; set both to the same."
        )
    elif source.sdpo_route == "loss" and weight == 0:
        problems.append(
            f"{where} scores hinted turns for sdpo_route: loss, but trainer.loss.kwargs.composer.sdpo.weight is 0, so they "
            "would count nowhere; set it, or use ref_kl."
        )
    elif weight not in (0, source.composer.sdpo.weight):
        problems.append(
            f"{where}.composer.sdpo.weight is {source.composer.sdpo.weight} and trainer.loss.kwargs.composer.sdpo.weight "
            f"is {weight}: set both to the same."
        )
    return problems


def _outer(text: Any) -> None:
    """Check what the trainer will read from the environment variable."""
    try:
        section = yaml.safe_load(str(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"trainer.env_vars.COMPOSER_OUTER is no YAML: {error}") from error
    if not isinstance(section, dict):
        raise ConfigError(f"trainer.env_vars.COMPOSER_OUTER: expected text such as {{sync_every: 20}}, found {text!r}.")
    parse_section({"outer": section})


def _checked(parse: Any, where: str, problems: list[str]) -> Any:
    try:
        return parse()
    except ComposerError as error:
        problems += [line.replace("trainer.loss.kwargs", where) for line in str(error).splitlines()]
        return None


def _table(data: Any, *keys: str) -> dict[str, Any]:
    """The table at a path, an empty one where there is none."""
    for key in keys:
        data = data.get(key, {}) if isinstance(data, dict) else {}
    return data if isinstance(data, dict) else {}
