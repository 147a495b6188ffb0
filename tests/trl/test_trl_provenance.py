"""A run's summary says of every channel whose it is, a plugin's too."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")

from composer_trl.run import _origin

from composer_plugins.plugins import Entry, get_plugin_manager


def test_each_channel_says_where_it_comes_from(monkeypatch):
    entry = Entry("acme_drift", "keeps the policy near", "acme.drift:SPEC")
    monkeypatch.setitem(get_plugin_manager().channels._entries, "acme_drift", (entry, "acme-agent:acme"))
    assert "plugin acme-agent:acme, neither Cursor's nor ours: keeps the policy near." in _origin("acme_drift")
    assert "Cursor's published" in _origin("sdpo") and "not Cursor's" in _origin("replay_dpo")
