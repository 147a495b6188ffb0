"""The teachers file: which models replay the states.

A YAML file with one list, `teachers:`; each item's `kind` names a factory registered with
`register_teachers`, whose `Config` validates the rest. A key never stands in the file: it names an
environment variable.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator

from composer_plugins.config import Section, explain, read_yaml
from composer_plugins.errors import ConfigError, TeacherError
from composer_plugins.teachers.base import Teacher

_ENV_NAME = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")
_SECRET_KEY = re.compile(r"api[-_]?key|authorization|access[-_]?token|secret|password", re.IGNORECASE)


class TeacherConfig(Section):
    """What every teacher has. A plugin's `Config` extends it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.\-]*$", max_length=64)
    """Unique name, used in replays and in the provenance of pairs."""
    kind: str
    """Which factory builds it (`composer-rl plugins` lists them)."""
    samples: int = Field(1, ge=1, le=64)
    """Answers per state. They are not independent votes."""
    weights_id: str | None = None
    """Teachers with the same one cast one vote together; None: the factory decides."""

    def fingerprint_fields(self) -> dict[str, Any]:
        """Return the fields that can change an answer; stored answers are reused while they stay the same."""
        return self.model_dump(mode="json", exclude={"samples", "weights_id"})

    def problems(self) -> list[str]:
        """Return what can be seen to be wrong before anything is asked or loaded."""
        return []


class OpenAIConfig(TeacherConfig):
    """A server that speaks the OpenAI chat completions API."""

    base_url: str
    """Up to and including `/v1`."""
    model: str
    """The model's name on that server."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; None: the server wants none."""
    temperature: float | None = Field(0.0, ge=0, le=2)
    """None: not sent (some models refuse it)."""
    max_tokens: int | None = Field(1024, gt=0)
    """Longest answer in tokens; None: not sent."""
    timeout_s: float = Field(120.0, gt=0)
    """Seconds that one attempt may take without a byte arriving."""
    max_retries: int = Field(4, ge=0, le=20)
    """Further attempts after 408, 409, 429, 5xx, a timeout or a lost connection."""
    max_concurrency: int = Field(4, ge=1, le=256)
    """Requests in flight at once."""
    allow_unscrubbed: bool = False
    """Send states to a host that is not this machine, although nothing removes secrets from them."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the request body."""

    @field_validator("api_key_env", mode="before")
    @classmethod
    def _no_literal_key(cls, value: object) -> object:
        # The value is never repeated in the message: it may be the key itself.
        if value is not None and not (isinstance(value, str) and _ENV_NAME.fullmatch(value)):
            raise ValueError(
                "must be the NAME of an environment variable (capitals, digits, underscores), and this looks like "
                "a key itself. Put the key into the environment, and if it is real, revoke it: it stood in a file"
            )
        return value

    @field_validator("base_url", mode="before")
    @classmethod
    def _plain_url(cls, value: object) -> object:
        try:
            parts = urlsplit(value) if isinstance(value, str) else None
            bad = parts is None or parts.scheme not in ("http", "https") or not parts.hostname
            credentials = parts is not None and (parts.username or parts.password or parts.query)
            _ = parts and parts.port
        except ValueError:
            bad, credentials = True, False
        if credentials:
            raise ValueError("must hold no user, password or query: keys come from api_key_env only")
        if bad:
            raise ValueError("must be an address like http://127.0.0.1:8000/v1 or https://host/v1")
        return value

    @field_validator("extra_body")
    @classmethod
    def _no_hidden_key(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in _keys(value):
            if _SECRET_KEY.search(key):
                raise ValueError(f"holds {key!r}: keys come from api_key_env only")
        return value

    def fingerprint_fields(self) -> dict[str, Any]:
        """Everything but how the request travels."""
        travel = {"timeout_s", "max_retries", "max_concurrency", "allow_unscrubbed", "api_key_env"}
        return {k: v for k, v in super().fingerprint_fields().items() if k not in travel}

    def problems(self) -> list[str]:
        """States must not leave this machine unscrubbed by accident."""
        host = urlsplit(self.base_url).hostname or ""
        if is_loopback(host) or self.allow_unscrubbed:
            return []
        return [
            f"teacher {self.name!r} would send recorded states to {host}. They are sent as they were logged: this "
            "version has no scrubber, so secrets and personal data in the logs would go with them. Use a server on "
            "this machine (127.0.0.1), or, when the logs may leave it, set `allow_unscrubbed: true`."
        ]


class LocalConfig(TeacherConfig):
    """A transformers model in this process: a demonstration teacher."""

    model: str
    """Alias, hub name or path (docs/reference/models.md)."""
    temperature: float = Field(0.8, ge=0, le=5)
    """0: greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the smallest set of tokens with this much probability."""
    seed: int = 0
    """With the same seed, name, state and sample number the answer is the same."""
    max_tokens: int = Field(128, gt=0)
    """Longest answer in tokens."""
    warm_start: bool = False
    """Apply the tool-call warm start that ships with the package."""
    adapter: Path | None = None
    """A PEFT adapter folder to apply; a relative path is looked up from the working directory."""
    system: str | None = None
    """Extra instruction, appended to the system prompt of every state (for this teacher only)."""
    batch_size: int = Field(4, ge=1, le=64)
    """States generated together."""

    def fingerprint_fields(self) -> dict[str, Any]:
        """Everything but how many run together."""
        return {k: v for k, v in super().fingerprint_fields().items() if k != "batch_size"}


def is_loopback(host: str) -> bool:
    """True when `host` can only be this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def fingerprint(fields: dict[str, Any]) -> str:
    """Return a short hash of JSON-like fields."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]


def default_path() -> Path:
    """Return the teachers file that ships with the package: local demonstration teachers."""
    return Path(str(files("composer_plugins.teachers") / "default.yaml"))


def read_teachers(path: Path) -> list[TeacherConfig]:
    """Read and validate a teachers file; nothing is loaded or contacted.

    Raises:
        ConfigError: with one line per problem, over all teachers.
    """
    return parse_teachers(read_yaml(path), where=str(path))


def parse_teachers(data: dict[str, Any], *, where: str = "the teachers file") -> list[TeacherConfig]:
    """Validate the content of a teachers file, see `read_teachers`."""
    lines = [f"Unknown key `{key}`: {where} has one key, `teachers`." for key in data if key != "teachers"]
    items = data.get("teachers")
    if not isinstance(items, list) or not items:
        lines.append(f"{where} must hold a list `teachers:` with at least one item (see recipes/teachers.yaml).")
        items = []
    configs: list[TeacherConfig] = []
    for number, item in enumerate(items):
        try:
            configs.append(_parse_one(item, f"teachers.{number}"))
        except ConfigError as error:
            lines.append(str(error))
    names = [config.name for config in configs]
    lines += [
        f"`teachers`: the name {n!r} is used {names.count(n)} times." for n in sorted(set(names)) if names.count(n) > 1
    ]
    if "recorded" in names:
        lines.append("`teachers`: the name 'recorded' is taken; it stands for the logged agent in pairs.")
    if lines:
        raise ConfigError("\n".join(lines))
    return configs


def build_teachers(configs: list[TeacherConfig]) -> list[Teacher]:
    """Build every teacher, before any is asked: a missing key or model shows at once, not after an hour.

    Raises:
        TeacherError: a section would do something it must not (all of them are listed), or a key is missing.
        ModelError: a local model cannot be found.
    """
    from composer_plugins.plugins import get_plugin_manager

    if problems := [problem for config in configs for problem in config.problems()]:
        raise TeacherError("\n".join(problems))
    built: list[Teacher] = []
    try:
        for config in configs:
            built.append(get_plugin_manager().teachers.get(config.kind).load()(config))
    except BaseException:
        for teacher in built:
            teacher.close()
        raise
    return built


def _parse_one(item: object, where: str) -> TeacherConfig:
    from composer_plugins.plugins import get_plugin_manager

    if not isinstance(item, dict) or not isinstance(item.get("kind"), str):
        raise ConfigError(f"`{where}` must be a mapping with `kind` and `name`, found {type(item).__name__}.")
    if "api_key" in item:
        raise ConfigError(
            f"`{where}.api_key`: a key must not stand in a file. Export it as an environment variable and name that "
            "variable in `api_key_env`."
        )
    factory = get_plugin_manager().teachers.get(item["kind"]).load()
    try:
        return getattr(factory, "Config", TeacherConfig).model_validate(item)
    except ValidationError as error:
        raise ConfigError(explain(error, prefix=where)) from None


def _keys(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner)
