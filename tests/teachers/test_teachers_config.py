"""The teachers file: what is refused, and that no message repeats a key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from composer_plugins.errors import ConfigError
from composer_plugins.teachers.config import (
    LocalConfig,
    OpenAIConfig,
    build_teachers,
    default_path,
    parse_teachers,
    read_gate,
    read_teachers,
)
from composer_plugins.teachers.gating import GateConfig

KEY = "sk-proj-0123456789abcdef"
OPENAI = {"name": "a", "kind": "openai", "base_url": "http://127.0.0.1:1/v1", "model": "m"}
RECIPES = Path(__file__).parents[2] / "recipes"


def test_the_shipped_files_are_valid():
    assert [c.kind for c in read_teachers(default_path())] == ["local", "local"]
    real = read_teachers(RECIPES / "teachers.openai.yaml")
    assert [(c.kind, c.tier) for c in real] == [("openai", 1), ("openai", 2), ("openai", 2)]
    assert all(c.price() is not None and c.answer_limit() for c in real), "an example that --max-usd accepts"
    assert read_gate(RECIPES / "teachers.openai.yaml").audit == 0.05 and read_gate(default_path()) == GateConfig()
    assert default_path() == RECIPES / "teachers.yaml"
    demo = read_teachers(default_path())
    assert all(isinstance(c, LocalConfig) and c.warm_start for c in demo) and len({c.model for c in demo}) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"api_key": KEY}, "must not stand in a file"),
        ({"api_key_env": KEY}, "looks like a key itself"),
        ({"api_key_env": 12345678}, "looks like a key itself"),
        ({"base_url": f"http://u:{KEY}@127.0.0.1/v1"}, "no user, password or query"),
        ({"base_url": f"http://127.0.0.1/v1?key={KEY}"}, "no user, password or query"),
        ({"extra_body": {"x": [{"Api-Key": KEY}]}}, "keys come from api_key_env"),
    ],
)
def test_literal_keys_are_refused_and_not_repeated(change, message):
    with pytest.raises(ConfigError, match=message) as error:
        parse_teachers({"teachers": [OPENAI | change]})
    assert KEY not in str(error.value) and "12345678" not in str(error.value)
    assert error.value.__cause__ is None  # pydantic's own text would show the input


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "must hold a list"),
        ({"teachers": []}, "at least one"),
        ({"teachers": [OPENAI], "other": 1}, "Unknown key `other`"),
        ({"teachers": ["x"]}, "must be a mapping"),
        ({"teachers": [OPENAI | {"kind": "martian"}]}, r"Unknown teacher kind 'martian'.*local, openai"),
        ({"teachers": [OPENAI | {"temprature": 1}]}, r"Unknown key `teachers\.0\.temprature`"),
        ({"teachers": [OPENAI, OPENAI]}, "'a' is used 2 times"),
        ({"teachers": [OPENAI | {"name": "recorded"}]}, "'recorded' is taken"),
        ({"teachers": [OPENAI | {"base_url": "ftp://x"}]}, "must be an address"),
        ({"teachers": [OPENAI | {"base_url": "http://x:port/v1"}]}, "must be an address"),
        ({"teachers": [OPENAI | {"samples": 0}]}, "samples"),
        ({"teachers": [OPENAI | {"allow_unscrubbed": True}]}, "--allow-unscrubbed"),
        ({"teachers": [OPENAI | {"usd_per_million_input": 1}]}, "come together"),
        ({"teachers": [OPENAI | {"usd_per_request": 1}]}, "a price needs"),
        ({"teachers": [OPENAI | {"usd_per_million_input": -1, "usd_per_million_output": 1}]}, "usd_per_million_input"),
        (
            {"teachers": [OPENAI | {"usd_per_million_input": float("nan"), "usd_per_million_output": 1}]},
            "usd_per_million_input",
        ),
        ({"teachers": [OPENAI | {"extra_body": {"n": 4, "stream": True}}]}, "must not set n, stream"),
    ],
)
def test_bad_files(data, message):
    with pytest.raises(ConfigError, match=message):
        parse_teachers(data)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        parse_teachers({"teachers": [OPENAI | {"x": 1}, OPENAI | {"y": 1}], "z": 1})
    assert len(str(error.value).splitlines()) == 3


def test_the_fingerprint_follows_what_can_change_an_answer():
    base = OpenAIConfig(**OPENAI).fingerprint_fields()
    same = {"timeout_s": 1, "max_retries": 0, "max_concurrency": 9, "samples": 3, "api_key_env": "K", "weights_id": "w"}
    same |= {"tier": 3, "usd_per_request": 1.0}
    prices = {"usd_per_million_input": 1, "usd_per_million_output": 2}
    for key, value in same.items():
        assert OpenAIConfig(**OPENAI | prices | {key: value}).fingerprint_fields() == base, key
    for key, value in {"model": "n", "temperature": 1, "max_tokens": 5, "extra_body": {"a": 1}, "name": "b"}.items():
        assert OpenAIConfig(**OPENAI | {key: value}).fingerprint_fields() != base, key


def test_the_longest_answer_is_the_largest_limit_that_is_sent():
    def limit(**options):
        return OpenAIConfig(**OPENAI | options).answer_limit()

    assert limit() == 1024 and limit(max_tokens=None) is None
    assert limit(max_tokens=None, extra_body={"max_completion_tokens": 2048}) == 2048
    assert limit(max_tokens=10, extra_body={"max_completion_tokens": 2048}) == 2048
    assert limit(max_tokens=None, extra_body={"max_completion_tokens": "many"}) is None


def test_prices_are_exact():
    config = OpenAIConfig(**OPENAI, usd_per_million_input=0.15, usd_per_million_output=0.6, usd_per_request=0.000001)
    price = config.price()
    assert price.cost(prompt=1_000_000, completion=0) == 150_000_000_000 + 1_000_000
    assert sum(price.cost(prompt=1, completion=1) for _ in range(10**5)) == 10**5 * (150_000 + 600_000 + 1_000_000)
    assert price.cost(prompt=10, completion=0, cached=99) == price.cost(prompt=10, completion=0), (
        "no more than there is"
    )
    assert OpenAIConfig(**OPENAI).price() is None


def test_a_third_party_kind_is_validated_by_its_own_config(monkeypatch):
    from composer_plugins import plugins
    from composer_plugins.plugins import Entry, PluginManager
    from composer_plugins.teachers.config import TeacherConfig

    class Echo:
        class Config(TeacherConfig):
            volume: int

        def __init__(self, config):
            self.config = config

    class Plugin:
        from composer_plugins import hookimpl

        @hookimpl
        def register_teachers(self, register):
            register(Entry("echo", "says it again", Echo))

    manager = PluginManager()
    manager.register(Plugin(), name="echo-plugin")
    monkeypatch.setattr(plugins, "get_plugin_manager", lambda: manager)
    text = "teachers: [{name: e, kind: echo, volume: 3}]"
    [teacher] = build_teachers(parse_teachers(yaml.safe_load(text)))
    assert teacher.config.volume == 3
    with pytest.raises(ConfigError, match="volume"):
        parse_teachers({"teachers": [{"name": "e", "kind": "echo", "volume": "loud"}]})
