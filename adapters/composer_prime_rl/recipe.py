"""Our parts of a prime-rl recipe, checked without prime-rl: the loss's arguments, the sources', and that they agree."""

from __future__ import annotations

import tomllib
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import yaml

from composer_plugins.config import parse_section
from composer_plugins.errors import ComposerError, ConfigError

#: How prime-rl names the loss: `[trainer.loss] import_path`.
IMPORT_PATH = "composer_prime_rl.loss.composer_loss"
#: The id of our environment and of our taskset.
ENV_ID = "composer-prime-rl"
#: Where the loss's own section stands.
LOSS = "trainer.loss.kwargs"
#: What gives a channel its tokens, said where it is missing.
_GIVERS = {
    "sdpo": f'no source is wrapped (env.id = "{ENV_ID}" with composer.sdpo)',
    "replay_dpo": f'no source plays pairs (env.taskset.id = "{ENV_ID}" with composer.replay_dpo)',
}


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
    options = _checked(lambda: loss_options(kwargs), LOSS, problems)
    places = {LOSS: options}
    for where, table in our_tables(data):
        section = {key: table[key] for key in ("composer", "sdpo_route") if key in table}
        places[where] = _checked(lambda section=section: loss_options(section), where, problems)
    for where, found in places.items():
        if options is not None and found is not None and where != LOSS:
            problems += _disagreements(where, _given_by(where, places), found, options)
    return problems if None in places.values() else problems + _not_given(data, places)


def our_tables(data: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every table outside of the loss that holds a `composer` section of ours, with its key."""
    orchestrator = _table(data, "orchestrator")
    if _table(orchestrator, "algo").get("type") == "composer":
        yield "orchestrator.algo", orchestrator["algo"]
    for number, source in enumerate(_sources(data)):
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


def _sources(data: dict[str, Any]) -> list[dict[str, Any]]:
    sources = _table(data, "orchestrator", "train").get("source", [])
    return [source if isinstance(source, dict) else {} for source in sources] if isinstance(sources, list) else []


def _given_by(where: str, places: Container[str]) -> str | None:
    """The channel that a table of ours gives to the run; an environment that plays pairs stamps nothing."""
    if where.endswith(".taskset"):
        return "replay_dpo"
    return None if where == LOSS or f"{where}.taskset" in places else "sdpo"


def _not_given(data: dict[str, Any], places: dict[str, Any]) -> list[str]:
    """Channels that a section of the recipe weighs and that none of its sources gives: they would train nothing.

    Without sources it is an overlay, or a trainer that gets its pairs from `composer_prime_rl.pair_sender`.
    """
    sources, problems = _sources(data), []
    unused = {"orchestrator.algo"} if all(_table(source, "algo") for source in sources) else set()
    foreign = any(_table(source, "env").get("id") not in (None, "", ENV_ID) for source in sources)
    for channel, wanted in _GIVERS.items():
        asking = [where for where, found in places.items() if getattr(found.composer, channel).weight > 0]
        given = any(_given_by(where, places) == channel for where in asking if where not in unused)
        if channel == "sdpo" and foreign and places[LOSS].sdpo_route == "loss":
            given = True  # perhaps by an environment of the user's own: the loss watches whether references come
        if sources and asking and not given:
            problems.append(
                f"{asking[0]}.composer.{channel}.weight is above 0, but {wanted}, so the channel would train nothing: add "
                "one (docs/how-to/prime-rl.md), or set the weight to 0."
            )
    return problems


def _disagreements(where: str, channel: str | None, source: Any, loss: Any) -> list[str]:
    """What a table that gives `channel` says otherwise than the loss's section."""
    if channel is None:
        return []
    weight, own = (getattr(options.composer, channel).weight for options in (loss, source))
    if own == 0:
        return []
    if channel == "sdpo" and (problems := _routes(where, source, loss)):
        return problems
    if weight in (0, own):
        return []
    return [
        f"{where}.composer.{channel}.weight is {own} and {LOSS}.composer.{channel}.weight is {weight}: set both to the same."
    ]


def _routes(where: str, source: Any, loss: Any) -> list[str]:
    """A source that stamps for one route while the loss expects another counts channel 2 twice, or never."""
    weight = loss.composer.sdpo.weight
    if source.sdpo_route != loss.sdpo_route and (weight > 0 or source.sdpo_route == "loss"):
        return [
            f"{where}.sdpo_route is {source.sdpo_route} and {LOSS}.sdpo_route is {loss.sdpo_route}: channel 2 would count "
            f"{'twice' if loss.sdpo_route == 'loss' else 'nowhere'}; set both to the same."
        ]
    if source.sdpo_route == "loss" and weight == 0:
        return [
            f"{where} scores hinted turns for sdpo_route: loss, but {LOSS}.composer.sdpo.weight is 0, so they would count "
            "nowhere; set it, or use ref_kl."
        ]
    return []


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
