"""The silent-channel detector."""

import json
import logging
import math
import warnings

import pytest

from composer_plugins.channels.silence import SilenceMonitor, SilentChannelWarning
from composer_plugins.errors import ConfigError, SilentChannelError


def feed(monitor, activity, channel="sdpo", why="no turn had a hint"):
    """Return in which steps (from 1) the monitor warned, and the messages."""
    spoke, messages = [], []
    for step, active in enumerate(activity, 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            returned = monitor.update(channel, active, why=why)
        assert returned == bool(caught)
        if caught:
            assert issubclass(caught[0].category, SilentChannelWarning)
            spoke.append(step)
            messages.append(str(caught[0].message))
    return spoke, messages


def test_it_warns_after_n_silent_steps_and_again_every_n(caplog):
    with caplog.at_level(logging.WARNING):
        spoke, messages = feed(SilenceMonitor(3, "warn"), [0.0] * 7)
    assert spoke == [3, 6]
    assert "'sdpo'" in messages[0]
    assert "3 optimizer steps" in messages[0]
    assert "no turn had a hint" in messages[0]
    assert "6 optimizer steps" in messages[1]
    assert [record.getMessage() for record in caplog.records] == messages


def test_one_active_step_starts_the_count_again():
    assert feed(SilenceMonitor(3, "warn"), [0, 0, 1, 0, 0, 2, 0, 0])[0] == []


def test_channels_are_counted_apart():
    monitor = SilenceMonitor(2, "warn")
    monitor.update("sdpo", 0, why="x")
    monitor.update("replay_dpo", 0, why="y")
    assert feed(monitor, [0], channel="replay_dpo")[0] == [1]


def test_nan_is_silence():
    assert feed(SilenceMonitor(1, "warn"), [math.nan])[0] == [1]


def test_error_stops_the_run():
    monitor = SilenceMonitor(2, "error")
    monitor.update("replay_dpo", 0, why="no pair was drawn")
    with pytest.raises(SilentChannelError, match=r"replay_dpo.*2 optimizer steps.*no pair was drawn"):
        monitor.update("replay_dpo", 0, why="no pair was drawn")


def test_state_survives_a_checkpoint():
    monitor = SilenceMonitor(3, "warn")
    feed(monitor, [1, 0, 0])
    resumed = SilenceMonitor(3, "warn")
    resumed.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert feed(resumed, [0])[0] == [1]
    assert resumed.summary()["sdpo"] == {
        "steps": 4, "silent_steps": 3, "silent_in_a_row": 3, "last_reason": "no turn had a hint",
    }  # fmt: skip


def test_bad_settings():
    with pytest.raises(ConfigError, match="silent_after"):
        SilenceMonitor(0, "warn")
    with pytest.raises(ConfigError, match="on_silence"):
        SilenceMonitor(1, "ignore")
