"""The teachers file: what is refused, and that no message repeats a key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from composer_plugins.errors import ConfigError, TeacherError
from composer_plugins.teachers.config import (
    LocalConfig,
    OpenAIConfig,
    build_teachers,
    default_path,
    parse_teachers,
    read_teachers,
)

KEY = "sk-proj-0123456789abcdef"
OPENAI = {"name": "a", "kind": "openai", "base_url": "http://127.0.0.1:1/v1", "model": "m"}
RECIPES = Path(__file__).parents[2] / "recipes"


def test_the_shipped_files_are_valid():
    assert [c.kind for c in read_teachers(default_path())] == ["local", "local"]
    assert [c.kind for c in read_teachers(RECIPES / "teachers.openai.yaml")] == ["openai", "openai"]
    assert (RECIPES / "teachers.yaml").read_bytes() == default_path().read_bytes()
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
    for key, value in same.items():
        assert OpenAIConfig(**OPENAI | {key: value}).fingerprint_fields() == base, key
    for key, value in {"model": "n", "temperature": 1, "max_tokens": 5, "extra_body": {"a": 1}, "name": "b"}.items():
        assert OpenAIConfig(**OPENAI | {key: value}).fingerprint_fields() != base, key


def test_every_forbidden_destination_is_named_before_anything_is_built():
    away = [OPENAI | {"name": n, "base_url": f"https://{n}.example.com/v1"} for n in ("b", "c")]
    with pytest.raises(TeacherError, match=r"(?s)b\.example\.com.*c\.example\.com"):
        build_teachers(parse_teachers({"teachers": away}))


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
