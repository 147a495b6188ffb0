"""The fault matrix, with real processes that really die: who survives, for how long they stand still, what is lost.

Three islands, heartbeats expire after 1 s. The short cells are here; `pytest -m slow tests/torchft` has the rest.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from harness_torchft import free_port

HEARTBEAT = 1.0
LIMITS = {"quorum": 60, "allreduce": 4, "connect": 10}
OPEN = {"outer": {"sync_every": 4, "timeouts": LIMITS}, "until": True, "inner_seconds": 0.05}
SETTINGS = {**OPEN, "rounds": 8}


@pytest.fixture(autouse=True)
def measured(islands, request):
    """With COMPOSER_FAULT_TABLE=FILE, add one line per test: survivors, longest stop, inner steps lost."""
    yield
    if table := os.environ.get("COMPOSER_FAULT_TABLE"):
        ended = [i for i in islands.started if i.process.poll() == 0]
        unhurt = [i for i in ended if not i.faulty] or ended
        row = {
            "test": request.node.name, "islands": len(islands.started), "ended_well": len(ended),
            "stall": round(stall(unhurt), 2), "waited": round(max(r.waited for i in unhurt for r in i.events("round")), 2),
            "lost": {i.index: n for i in islands.started if (n := sum(r.lost for r in i.events("round")))},
            "retries": max(r.retries for i in unhurt for r in i.events("round")), "load": round(os.getloadavg()[0], 1),
        }  # fmt: skip
        with open(table, "a") as file:
            file.write(json.dumps(row) + "\n")


def start_all(islands, address: str, faults: dict[int, dict] | None = None, count: int = 3, **settings):
    settings = {**SETTINGS, "barrier": count, **settings}
    return [islands(address, i, **settings, fault=(faults or {}).get(i)) for i in range(count)]


def wait_until(condition, *running, seconds: float = 90) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "it did not happen in time"
        for island in running:
            assert island.process.poll() is None, island.output()
        time.sleep(0.05)


def end_soon(islands_, more: int = 4) -> int:
    """Let all islands stop together a few outer steps from now; return that step."""
    step = max(r.step for island in islands_ for r in island.events("round")) + more
    part = islands_[0].folder / "rounds.part"
    part.write_text(str(step))
    part.rename(islands_[0].folder / "rounds")
    return step


def survivors_agree(survivors, *, last: int = 8, besides: set[tuple[int, int]] = frozenset()) -> None:
    """All survivors ended well, on the same global parameters after every outer step.

    `besides`: (island, outer step) of results that were given up.
    """
    for island in survivors:
        assert island.wait() == 0, island.output()
    by_step = {}
    for island in survivors:
        for r in island.events("round"):
            if r.committed and (island.index, r.step) not in besides:
                by_step.setdefault(r.step, set()).add(r.theta)
    assert max(by_step) >= last
    assert {step: len(thetas) for step, thetas in by_step.items()} == dict.fromkeys(by_step, 1)


def stall(survivors) -> float:
    """The longest stop of any survivor, in seconds."""
    return max(r.seconds for island in survivors for r in island.events("round"))


def lost(survivors) -> int:
    return sum(r.lost for island in survivors for r in island.events("round"))


@pytest.mark.parametrize("at", ["mid_round", "quorum", "allreduce", "commit"])
def test_kill_9(lighthouse, islands, at, record_property):
    address = lighthouse(2, join=5, heartbeat=HEARTBEAT).address
    started = start_all(islands, address, {2: {"at": at, "round": 3}})
    assert started[2].wait() == -signal.SIGKILL
    survivors = started[:2]
    survivors_agree(survivors)
    record_property("stall", stall(survivors))
    assert [e.at for e in started[2].events("fault")] == [at]
    assert stall(survivors) <= HEARTBEAT + 2
    assert lost(survivors) == 0  # a failed exchange is made again with the same local parameters


def test_a_stopped_island_is_left_behind_and_heals(lighthouse, islands):
    address = lighthouse(2, join=5, heartbeat=HEARTBEAT).address
    fault = {"at": "mid_round", "round": 2, "how": "stop"}
    started = [islands(address, i, **OPEN, barrier=3, fault=fault if i == 2 else None) for i in range(3)]
    wait_until(lambda: started[2].events("fault"), *started)
    wait_until(lambda: any(r.islands == 2 and r.step > 2 for r in started[0].events("round")), *started)
    os.kill(started[2].process.pid, signal.SIGCONT)
    wait_until(lambda: any(r.healed for r in started[2].events("round")), *started)
    survivors_agree(started, last=end_soon(started))
    healed = [r for r in started[2].events("round") if r.healed]
    assert len(healed) == 1 and healed[0].lost <= 4 and healed[0].moments == 0
    assert stall(started[:2]) <= HEARTBEAT + 2 and lost(started[:2]) == 0


def test_a_stop_inside_the_exchange_costs_its_time_limit(lighthouse, islands):
    address = lighthouse(2, join=5, heartbeat=HEARTBEAT).address
    started = start_all(islands, address, {2: {"at": "allreduce", "round": 2, "how": "stop"}}, rounds=6)
    survivors_agree(started[:2], last=6)
    assert stall(started[:2]) <= LIMITS["allreduce"] + HEARTBEAT + 2
    assert lost(started[:2]) == 0


def test_a_commit_that_got_no_answer_in_time(lighthouse, islands):
    """An island that is stopped while it asks, and goes on after the time limit: the others have committed."""
    address = lighthouse(2, join=5, heartbeat=HEARTBEAT).address
    started = start_all(islands, address, {2: {"at": "commit_unanswered", "round": 3}})
    survivors_agree(started)
    assert len(started[2].events("fault")) == 1
    healed = [r for r in started[2].events("round") if r.healed]
    assert len(healed) == 1 and healed[0].lost == 4 and healed[0].retries == 1
    assert lost(started[:2]) == 0


def test_a_late_joiner_takes_over_everything(lighthouse, islands):
    address = lighthouse(2, join=5, heartbeat=HEARTBEAT).address
    started = [islands(address, i, **OPEN) for i in range(2)]
    wait_until(lambda: len(started[0].events("round")) >= 3, *started)
    # other initial weights: they are replaced, because the others are ahead
    started.append(islands(address, 2, **OPEN, init_seed=7))
    wait_until(lambda: len(started[2].events("round")) >= 2, *started)
    survivors_agree(started, last=end_soon(started))
    attached = started[2].events("attached")[0]
    assert attached.step >= 4
    donor = {r.step: r for r in started[0].events("round")}
    assert attached.hash == donor[attached.step].after
    written = [json.loads(line) for line in (started[2].folder / "rounds2.jsonl").read_text().splitlines()]
    assert [r["attach"] for r in written] == [True] + [False] * (len(written) - 1)
    first = started[2].events("round")[0]
    assert first.step == attached.step + 1
    # the step count of the donor came along
    assert first.global_step == donor[first.step].global_step
    assert lost(started) == 0


def test_a_killed_island_that_is_started_again_joins_in(lighthouse, islands):
    address = lighthouse(2, join=5, heartbeat=HEARTBEAT).address
    fault = {"at": "mid_round", "round": 2}
    started = [islands(address, i, **OPEN, barrier=3, fault=fault if i == 2 else None) for i in range(3)]
    assert started[2].wait() == -signal.SIGKILL
    again = islands(address, 2, **OPEN)
    running = [*started[:2], again]
    wait_until(lambda: len(again.events("attached")) == 2, *running)  # the log of the killed one goes on
    wait_until(lambda: started[0].events("round")[-1].islands == 3, *running)
    survivors_agree(running, last=end_soon(running))
    assert lost(running) == 0


def test_a_slow_island_is_waited_for(lighthouse, islands):
    address = lighthouse(3, join=20, heartbeat=HEARTBEAT).address
    settings = {**SETTINGS, "rounds": 4, "barrier": 3}
    fast = [islands(address, i, **settings) for i in range(2)]
    slow = islands(address, 2, **{**settings, "inner_seconds": 0.4})
    survivors_agree([*fast, slow], last=4)
    assert {r.islands for r in fast[0].events("round")} == {3} and lost([*fast, slow]) == 0


def lighthouse_process(port: int) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "composer_plugins.cli", "lighthouse", "--bind", f"127.0.0.1:{port}", "--min-islands", "2",
        "--join-timeout", "5", "--heartbeat-timeout", str(HEARTBEAT),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 30
    while time.time() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return process
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the lighthouse did not start")


@pytest.mark.parametrize("seconds", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_the_lighthouse_dies_and_comes_back(islands, seconds):
    """However long it was away, the islands call it again soon: torchft alone waits longer and longer."""
    port = free_port()
    process = lighthouse_process(port)
    try:
        started = start_all(islands, f"http://127.0.0.1:{port}", rounds=10)
        wait_until(lambda: len(started[0].events("round")) >= 3, *started)
        process.kill()
        process.wait()
        time.sleep(seconds)
        process = lighthouse_process(port)
        back = time.time()
        survivors_agree(started, last=10)
        first = min(r.time for island in started for r in island.events("round") if r.time > back)
        assert first - back < 8, "its join timeout of 5 s, and the next attempt"
        assert lost(started) <= 4  # the new lighthouse may start with the two that come first; the third heals
    finally:
        process.kill()


def test_a_restarted_island_waits_for_one_that_has_the_state(lighthouse, islands):
    """Of two islands one is killed and one stands still: the new one must not begin a run of its own."""
    address = lighthouse(1, join=3, heartbeat=HEARTBEAT).address
    settings = {**OPEN, "outer": {**OPEN["outer"], "start_with": 2}}
    stays, dies = (islands(address, i, **settings, barrier=2) for i in range(2))
    wait_until(lambda: len(dies.events("round")) >= 3, stays)
    os.kill(stays.process.pid, signal.SIGSTOP)
    dies.stop()
    again = islands(address, 1, **settings)
    seen = len(again.events("round"))
    time.sleep(HEARTBEAT + 7)  # the silence after which the other counts as dead, and the join timeout
    assert len(again.events("round")) == seen and len(again.events("attached")) == 1
    assert len(again.events("start")) == 2 and again.process.poll() is None  # it is there, and waits
    os.kill(stays.process.pid, signal.SIGCONT)
    wait_until(lambda: len(again.events("attached")) == 2, stays, again)
    assert again.events("attached")[1].step >= 3
    survivors_agree([stays, again], last=end_soon([stays, again]))


@pytest.mark.parametrize("count", [2, 3])
def test_a_result_that_only_some_received(lighthouse, islands, count):
    """torchft commits per island. One of three commits, the others make the same step without it: two results.

    The larger group is right, the other steps back and is healed. (Of two islands one waits for the other.)
    """
    address = lighthouse(2, join=4, heartbeat=HEARTBEAT).address
    fault = {"at": "result_lost", "round": 3}
    # longer than the others wait for it; then they come late, so that all meet again at the same outer step
    slow = {"pause_at": 4, "pause_seconds": 7.0}
    later = {"fault": fault, "pause_at": 4, "pause_seconds": 5.0} if count == 3 else {"fault": fault}
    started = [
        islands(address, i, **{**OPEN, "barrier": count, **(later if i < count - 1 else slow)}) for i in range(count)
    ]
    wait_until(lambda: len([r for r in started[-1].events("round") if r.step > 4]) >= 3, *started)
    last = end_soon(started)
    healed = {i.index: [r.lost for r in i.events("round") if r.healed] for i in started}
    if count == 2:
        assert healed == {0: [4], 1: []}  # one round of one island
        survivors_agree(started, last=last)
    else:
        assert healed == {0: [], 1: [], 2: [4]}
        alone = [r for r in started[2].events("round") if not r.healed and r.step == 4]
        with_others = [r for r in started[0].events("round") if r.step == 4]
        assert alone[0].theta != with_others[0].theta  # it did happen
        survivors_agree(started, last=last, besides={(2, 4)})


@pytest.mark.slow
@pytest.mark.parametrize("faults", [("mid_round", "allreduce"), ("commit", "quorum"), ("allreduce", "allreduce")])
def test_two_faults_at_once(lighthouse, islands, faults):
    """Of four islands two die in the same round."""
    address = lighthouse(2, join=5, heartbeat=HEARTBEAT).address
    planted = {2: {"at": faults[0], "round": 3}, 3: {"at": faults[1], "round": 3}}
    started = start_all(islands, address, planted, count=4)
    assert [s.wait() for s in started[2:]] == [-signal.SIGKILL] * 2
    survivors_agree(started[:2])
    assert stall(started[:2]) <= 2 * (HEARTBEAT + 2) and lost(started[:2]) == 0


def test_the_last_of_two_goes_on_alone(lighthouse, islands):
    address = lighthouse(1, join=5, heartbeat=HEARTBEAT).address
    started = [islands(address, i, **OPEN, fault={"at": "mid_round", "round": 3} if i else None) for i in range(2)]
    assert started[1].wait() == -signal.SIGKILL
    before = len(started[0].events("round"))
    wait_until(lambda: len(started[0].events("round")) >= before + 3, started[0])
    survivors_agree(started[:1], last=end_soon(started[:1]))
    assert [r.islands for r in started[0].events("round")][-1] == 1
    assert stall(started[:1]) <= HEARTBEAT + 2 and lost(started[:1]) == 0
