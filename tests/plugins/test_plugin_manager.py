"""The plugin manager: built-ins through the hooks, provenance, and errors that name who did it."""

import types

import pytest

from composer_plugins import hookimpl
from composer_plugins.errors import ConfigError, PluginError
from composer_plugins.plugins import Entry, PluginManager, hookspecs
from composer_plugins.plugins import builtin as builtin_plugin


def plugin_with(entry: Entry):
    class Plugin:
        @hookimpl
        def register_objectives(self, register):
            register(entry)

    return Plugin()


@pytest.fixture
def manager():
    manager = PluginManager(load_entry_points=False)
    manager.register(builtin_plugin, name="builtin")
    return manager


def test_every_builtin_target_can_be_loaded(manager):
    pytest.importorskip("torch")
    registries = [
        manager.objectives, manager.channels, manager.trace_readers, manager.hint_generators, manager.teachers,
        manager.rewards,
    ]  # fmt: skip
    assert all(len(registry) for registry in registries)
    for registry in registries:
        for entry in registry:
            assert entry.load() is not None


def test_the_menu_has_the_six_objectives(manager):
    assert {e.name for e in manager.objectives} == {"grpo", "dr_grpo", "bnpo", "dapo", "gspo", "cispo"}


def test_installed_plugins_are_found_through_the_entry_point_group():
    names = PluginManager().plugin_names()
    assert "composer-plugins:builtin" in names
    assert "composer-plugins:trl" in names


def test_a_third_party_entry_keeps_its_provenance(manager):
    manager.register(plugin_with(Entry("mine", "my own", object())), name="acme:objectives")
    assert manager.objectives.provenance("mine") == "acme:objectives"
    assert manager.objectives.provenance("grpo") == "builtin"


def test_a_duplicate_name_names_both_plugins(manager):
    manager.register(plugin_with(Entry("grpo", "another", object())), name="acme:objectives")
    with pytest.raises(PluginError, match=r"'grpo'.*'(builtin|acme:objectives)'.*'(builtin|acme:objectives)'"):
        _ = manager.objectives


def test_registering_after_first_use_is_seen(manager):
    assert "late" not in manager.objectives
    manager.register(plugin_with(Entry("late", "late", object())), name="acme:late")
    assert "late" in manager.objectives


def test_an_unknown_name_lists_what_there_is(manager):
    with pytest.raises(ConfigError, match=r"Unknown objective 'ppo'.*dr_grpo"):
        manager.objectives.get("ppo")


def test_a_hook_that_does_not_exist_is_refused(manager):
    class Plugin:
        @hookimpl
        def register_objektives(self, register): ...

    with pytest.raises(PluginError, match="register_objektives"):
        manager.register(Plugin(), name="acme:typo")


def test_a_plugin_that_fails_to_load_names_its_distribution(monkeypatch):
    def broken():
        raise ImportError("no module named numpyy")

    point = types.SimpleNamespace(name="bad", load=broken, dist=types.SimpleNamespace(name="acme-plugins"))
    monkeypatch.setattr("composer_plugins.plugins.manager.entry_points", lambda group: [point])
    with pytest.raises(PluginError, match=r"'bad' of distribution 'acme-plugins'.*numpyy"):
        PluginManager()


def test_an_entry_whose_target_is_gone_says_so():
    with pytest.raises(PluginError, match=r"composer_plugins\.nowhere"):
        Entry("x", "x", "composer_plugins.nowhere:THING").load()


def test_every_hook_is_documented():
    hooks = [f for n, f in vars(hookspecs).items() if n.startswith("register_")]
    assert len(hooks) >= 8
    assert all((hook.__doc__ or "").strip() for hook in hooks)
