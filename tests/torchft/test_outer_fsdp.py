"""Islands of two processes each that shard their model (FSDP2): rank r exchanges with rank r of the other island."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from harness_torchft import reference

WORKER = Path(__file__).with_name("fsdp_island_worker.py")


def island(folder: Path, address: str, index: int, *, name: str, **settings) -> list[subprocess.Popen]:
    """Start the two processes of one island, in a torch.distributed world of their own."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    argument = json.dumps(
        {"index": index, "folder": str(folder), "address": address, "name": name, "weights": 0, "fragments": 1}
        | settings
    )
    processes = []
    for rank in range(2):
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        with (folder / f"{name}-{rank}.out").open("wb") as out:
            processes.append(
                subprocess.Popen([sys.executable, str(WORKER), argument], env=environment, stdout=out, stderr=out)
            )
    return processes


def wait(folder: Path, name: str, processes: list[subprocess.Popen], code: int = 0) -> None:
    for rank, process in enumerate(processes):
        found = process.wait(120)
        assert found == code, (folder / f"{name}-{rank}.out").read_text(errors="replace")[-3000:]


def parts(folder: Path, name: str) -> list[dict]:
    return [dict(np.load(folder / f"{name}-{rank}.npz")) for rank in range(2)]


@pytest.fixture
def started():
    """Processes that end with the test."""
    all_of_them: list[subprocess.Popen] = []
    yield all_of_them
    for process in all_of_them:
        process.kill()


def test_sharded_islands_equal_the_reference(lighthouse, tmp_path, started):
    """In the sixth round one process of the second island has NaN: both of its processes give the round up.

    In the fourth one process of the first island does not get the cards: both meet the others once more.
    """
    (tmp_path / "rounds").write_text("9")
    address = lighthouse(2).address
    faults = [{"cards_lost_at": 3}, {"nan_at": 5}]
    islands = [island(tmp_path, address, i, name=f"i{i}", **faults[i]) for i in range(2)]
    started.extend(islands[0] + islands[1])
    for i, processes in enumerate(islands):
        wait(tmp_path, f"i{i}", processes)
    first, second = parts(tmp_path, "i0"), parts(tmp_path, "i1")
    for rank in range(2):
        a, b = first[rank], second[rank]
        assert not np.array_equal(a["local"], b["local"])
        np.testing.assert_array_equal(a["globals"], b["globals"])
        assert [np.isnan(rows).any() for rows in b["local"]] == [rank == 1 and n == 5 for n in range(9)]
        b["local"][5] = b["globals"][4]
        expected = reference(np.stack([a["local"], b["local"]], axis=1), a["start"])
        assert len(expected) == 9 and np.abs(a["globals"] - expected).max() <= 1e-6
        np.testing.assert_array_equal(a["end"], a["globals"][-1])
        assert a["retries"].tolist() == [0] * 3 + [1] + [0] * 5
        assert a["lost"].tolist() == [0] * 9 and b["lost"].tolist() == [0] * 5 + [3] + [0] * 3
    assert first[0]["start"].shape != first[1]["start"].shape  # the parts are uneven


def test_a_sharded_island_that_died_joins_in_again(lighthouse, tmp_path, started):
    """At first only one of its processes gets the others' state; then both do."""
    address = lighthouse(1, join=3, heartbeat=2).address
    stays = island(tmp_path, address, 0, name="stays", slow=3)
    dies = island(tmp_path, address, 1, name="dies", die_at=3)
    started.extend(stays + dies)
    wait(tmp_path, "dies", dies, code=7)
    back = island(tmp_path, address, 1, name="back", weights=5, heal_fails=True)  # other weights, which are replaced
    started.extend(back)
    deadline = time.time() + 90
    while not (tmp_path / "back.step").exists():
        assert time.time() < deadline and stays[0].poll() is None and back[0].poll() is None
        time.sleep(0.1)
    step = int((tmp_path / "stays.step").read_text().split()[0]) + 4
    (tmp_path / "part").write_text(str(step))
    (tmp_path / "part").rename(tmp_path / "rounds")
    wait(tmp_path, "stays", stays)
    wait(tmp_path, "back", back)
    for rank, (a, b) in enumerate(zip(parts(tmp_path, "stays"), parts(tmp_path, "back"), strict=True)):
        assert b["first"] > 3, rank
        of = dict(zip(a["steps"].tolist(), a["globals"], strict=True))
        np.testing.assert_array_equal(b["attached"], of[b["first"].item()])
        for at, theta in zip(b["steps"].tolist(), b["globals"], strict=True):
            np.testing.assert_array_equal(theta, of[at])
        np.testing.assert_array_equal(a["end"], b["end"])
