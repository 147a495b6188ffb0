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
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator

from composer_plugins.config import Section, explain, read_yaml
from composer_plugins.errors import ConfigError, TeacherError
from composer_plugins.shipped import recipes_dir
from composer_plugins.teachers.base import RemoteTeacher, Teacher
from composer_plugins.teachers.gating import GateConfig
from composer_plugins.teachers.prices import Price

_ENV_NAME = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")
#: Fields of the request body that are the service's.
_OURS = {"messages", "model", "n", "stream", "stream_options", "tools"}
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
    tier: int = Field(1, ge=1, le=9)
    """The lowest tier is asked about every state, each further one where the file's `gate` says so."""

    def fingerprint_fields(self) -> dict[str, Any]:
        """Return the fields that can change an answer; stored answers are reused while they stay the same."""
        return self.model_dump(mode="json", exclude={"samples", "weights_id", "tier"})

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
    """Longest answer in tokens; None: not sent (then `extra_body` may hold the server's own name for it)."""
    timeout_s: float = Field(120.0, gt=0)
    """Seconds that one attempt may take."""
    max_retries: int = Field(4, ge=0, le=20)
    """Further attempts after 408, 409, 425, 429, 5xx, a timeout or a lost connection."""
    max_concurrency: int = Field(4, ge=1, le=256)
    """Requests in flight at once."""
    usd_per_million_input: float | None = Field(None, ge=0, lt=1e6, allow_inf_nan=False)
    """Price of a million prompt tokens in $; None: unknown (0 for a server of your own)."""
    usd_per_million_output: float | None = Field(None, ge=0, lt=1e6, allow_inf_nan=False)
    """Price of a million answer tokens in $ (thinking included, as servers count it)."""
    usd_per_million_cached_input: float | None = Field(None, ge=0, lt=1e6, allow_inf_nan=False)
    """Price of a million prompt tokens that the server took from its cache; None: as the others."""
    usd_per_request: float = Field(0.0, ge=0, lt=1e6, allow_inf_nan=False)
    """Price of each request in $, on top."""
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

    @field_validator("extra_body")
    @classmethod
    def _nothing_that_is_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        if ours := sorted(set(value) & _OURS):
            raise ValueError(
                f"must not set {', '.join(ours)}: a state is asked about with its own messages and tools, without "
                "streaming, one answer per request (`samples` asks for more)"
            )
        return value

    @model_validator(mode="after")
    def _both_prices(self) -> OpenAIConfig:
        both = (self.usd_per_million_input, self.usd_per_million_output)
        if both.count(None) == 1:
            raise ValueError("usd_per_million_input and usd_per_million_output come together")
        if both.count(None) == 2 and (self.usd_per_million_cached_input is not None or self.usd_per_request):
            raise ValueError("a price needs usd_per_million_input and usd_per_million_output (0 is a price)")
        return self

    def fingerprint_fields(self) -> dict[str, Any]:
        """Everything but how the request travels and what it costs."""
        travel = {"timeout_s", "max_retries", "max_concurrency", "api_key_env"}
        fields = super().fingerprint_fields().items()
        return {k: v for k, v in fields if k not in travel and not k.startswith("usd_per_")}

    def price(self) -> Price | None:
        """Return what a request costs, or None when the file does not say."""
        if self.usd_per_million_input is None:
            return None
        return Price.of(**{key: value for key, value in self.model_dump().items() if key.startswith("usd_per_")})

    def answer_limit(self) -> int | None:
        """Return the longest answer in tokens that the request asks for, or None when it sets no limit."""
        named = [self.extra_body.get(key) for key in ("max_completion_tokens", "max_tokens", "max_output_tokens")]
        limits = [n for n in (*named, self.max_tokens) if isinstance(n, int) and not isinstance(n, bool) and n > 0]
        return max(limits) if limits else None


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
    return recipes_dir() / "teachers.yaml"


def read_teachers(path: Path) -> list[TeacherConfig]:
    """Read and validate a teachers file; nothing is loaded or contacted.

    Raises:
        ConfigError: with one line per problem, over all teachers.
    """
    return parse_teachers(read_yaml(path), where=str(path))


def read_gate(path: Path) -> GateConfig:
    """Return the `gate` of a teachers file that `read_teachers` accepts."""
    return GateConfig.model_validate(read_yaml(path).get("gate") or {})


def parse_teachers(data: dict[str, Any], *, where: str = "the teachers file") -> list[TeacherConfig]:
    """Validate the content of a teachers file, see `read_teachers`."""
    lines = [
        f"Unknown key `{key}`: {where} has two keys, `teachers` and `gate`."
        for key in data
        if key not in ("teachers", "gate")
    ]
    try:
        GateConfig.model_validate(data.get("gate") or {})
    except ValidationError as error:
        lines.append(explain(error, prefix="gate"))
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


def build_teachers(configs: list[TeacherConfig]) -> list[Teacher | RemoteTeacher]:
    """Build every teacher, before any is asked: a missing model shows at once, not after an hour.

    Raises:
        TeacherError: a section would do something it must not (all of them are listed).
        ModelError: a local model cannot be found.
    """
    from composer_plugins.plugins import get_plugin_manager

    if problems := [problem for config in configs for problem in config.problems()]:
        raise TeacherError("\n".join(problems))
    built: list[Teacher | RemoteTeacher] = []
    try:
        for config in configs:
            built.append(get_plugin_manager().teachers.get(config.kind).load()(config))
    except BaseException:
        for teacher in built:
            if hasattr(teacher, "close"):  # one that sends has opened nothing yet
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
    if "allow_unscrubbed" in item:
        raise ConfigError(
            f"`{where}.allow_unscrubbed` is no key of a teacher any more: states are scrubbed (`composer-rl scrub`), or "
            "sent as they are with `composer-rl replay --allow-unscrubbed`. Remove the line."
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
