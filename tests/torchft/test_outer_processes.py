"""Islands as real processes: unequal before a sync, equal after it, equal to float64 worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from harness_torchft import reference


@pytest.mark.parametrize("count", [2, 3])
def test_islands_agree_with_the_reference_for_eight_rounds(lighthouse, islands, tmp_path, count):
    address = lighthouse(count).address
    started = [islands(address, i, outer={"sync_every": 3}, steps=24) for i in range(count)]
    for island in started:
        assert island.wait() == 0, island.output()
    rounds = [island.events("round") for island in started]
    assert [len(r) for r in rounds] == [8] * count
    for at_once in zip(*rounds, strict=True):
        assert len({r.before for r in at_once}) == count  # every island had gone its own way
        assert len({r.after for r in at_once}) == 1
        assert {r.islands for r in at_once} == {count}
    saved = [np.load(tmp_path / f"island{i}.npz") for i in range(count)]
    local = np.stack([s["local"] for s in saved], axis=1)
    expected = reference(local, saved[0]["globals"][0])
    worst = max(np.abs(s["globals"][1:] - expected).max() for s in saved)
    assert worst <= 1e-6, worst


@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_streaming_fragments_agree_with_the_reference(lighthouse, islands, tmp_path, alpha):
    """Three fragments, each synced every 6 steps, with the result applied one step after it was sent, and mixed in.

    Worked out in float64 from what each island's own optimizer did (arXiv:2501.18512, algorithm 2): the pseudo-gradient
    is taken at the end of an odd step, the result put in at the end of the next one.
    """
    address = lighthouse(2).address
    settings = {"sync_every": 6, "fragments": 3, "sync_delay": 1, "mixing_alpha": alpha}
    started = [islands(address, i, outer=settings, steps=54) for i in range(2)]
    for island in started:
        assert island.wait() == 0, island.output()
    rounds = [island.events("round") for island in started]
    assert [r.fragment for r in rounds[0]] == [0, 1, 2] * 9
    for at_once in zip(*rounds, strict=True):
        assert len({r.theta for r in at_once}) == 1  # the fragment that was synced is equal
    saved = [np.load(tmp_path / f"island{i}.npz") for i in range(2)]
    before, after = (np.stack([s["steps"][:, k] for s in saved], axis=1) for k in range(2))  # (steps, islands, values)
    sizes = [8 * 16 + 16, 16 * 16 + 16, 16 + 1]  # the model's three layers
    ends = np.cumsum([0, *sizes])
    theta, velocity = saved[0]["globals"][0].astype(np.float64), np.zeros(ends[-1])
    worst = 0.0
    for step in range(len(before)):
        number = step // 2 % 3
        part, expected = slice(ends[number], ends[number + 1]), before[step].copy()
        if step % 2:  # sent a step ago
            gradient = (theta[part] - before[step - 1][:, part]).mean(axis=0)
            velocity[part] = 0.9 * velocity[part] + gradient
            theta[part] -= 0.7 * (gradient + 0.9 * velocity[part])
            expected[:, part] = (1 - alpha) * theta[part] + alpha * before[step][:, part]
        worst = max(worst, np.abs(after[step] - expected).max())
    assert worst <= 1e-6, worst
    assert len({island.events("end")[0].hash for island in started}) == 1


def test_the_end_is_the_global_model_and_never_an_unsynced_island(lighthouse, islands):
    address = lighthouse(2).address
    started = [islands(address, i, outer={"sync_every": 4}, steps=10) for i in range(2)]
    for island in started:
        assert island.wait() == 0, island.output()
    ends = [island.events("end")[0] for island in started]
    assert {e.lost for e in ends} == {2}
    assert len({e.hash for e in ends}) == 1 and ends[0].hash == started[0].events("round")[-1].after


@pytest.mark.parametrize(
    ("outer", "save_at"),
    [
        ({"sync_every": 3}, 5),
        # written between the second fragment's sending and its applying: that exchange is made again
        ({"sync_every": 6, "fragments": 3, "sync_delay": 1, "mixing_alpha": 0.5}, 7),
    ],
)
def test_full_restart_from_checkpoints_is_the_run_that_was_not_interrupted(
    lighthouse, islands, tmp_path, outer, save_at
):
    """The checkpoint is from the middle of a round: local and global parameters differ, and both come back."""
    settings = {"outer": outer, "steps": 12}
    address = lighthouse(2).address
    whole = [islands(address, i, **settings, save_at=save_at) for i in range(2)]
    for island in whole:
        assert island.wait() == 0, island.output()
    expected = [dict(np.load(tmp_path / f"island{i}.npz")) for i in range(2)]
    address = lighthouse(2).address
    resumed = [islands(address, i, **settings, resume=True) for i in range(2)]
    for island in resumed:
        assert island.wait() == 0, island.output()
    for i, island in enumerate(resumed):
        found = np.load(tmp_path / f"island{i}.npz")
        count = len(found["local"])
        assert 0 < count < len(expected[i]["local"]), "the resumed run is the second part of the whole one"
        # bit for bit: what each island trained by itself, and what they agreed on
        np.testing.assert_array_equal(found["local"], expected[i]["local"][-count:])
        np.testing.assert_array_equal(found["globals"][1:], expected[i]["globals"][-count:])
        first, second = island.events("end")
        assert (first.hash, first.step) == (second.hash, second.step)
        assert island.events("attached")[1].hash != first.hash  # it did start from the middle
