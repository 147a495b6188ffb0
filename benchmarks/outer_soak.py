"""Random faults on three islands for a given time: no deadlock, no divergence, the loss falls.

    python benchmarks/outer_soak.py --minutes 30 --seed 1

Islands are the processes of the fault tests (`tests/torchft/island_worker.py`: a small model, AdamW, data of their own).
Every few seconds one fault, drawn by the seed: kill -9 and a restart from initial weights, SIGSTOP and SIGCONT, the
lighthouse killed and started again, or two of them at once. At least one island that has the state stays alive and
running (with all of them gone, only a checkpoint brings a run back). Exit code 1 and the reason when a promise breaks.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "tests" / "torchft" / "island_worker.py"
sys.path.insert(0, str(WORKER.parent))

from harness_torchft import free_port  # noqa: E402

COUNT, HEARTBEAT, JOIN = 3, 2.0, 6.0
LIMITS = {"quorum": 120, "allreduce": 5, "connect": 40}
#: Longest time without an outer step of any island, in seconds: two time limits of an exchange, a restart's imports on a
#: busy machine, the lighthouse's absence.
PATIENCE = 90.0


class Broken(Exception):
    """A promise did not hold."""


class Cluster:
    """A lighthouse and three islands that can be hurt."""

    def __init__(self, folder: Path, inner_seconds: float) -> None:
        self.folder, self.inner_seconds = folder, inner_seconds
        self.port = free_port()
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "RUST_LOG": "error"}
        self.light = self.start_lighthouse()
        self.islands = [self.start_island(i, barrier=COUNT) for i in range(COUNT)]
        self.since = [0] * COUNT  # events of an island before its last start

    def start_lighthouse(self) -> subprocess.Popen:
        command = [
            sys.executable, "-m", "composer_plugins.cli", "lighthouse", "--bind", f"127.0.0.1:{self.port}",
            "--min-islands", "2", "--join-timeout", str(JOIN), "--heartbeat-timeout", str(HEARTBEAT),
        ]  # fmt: skip
        return subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def start_island(self, index: int, **settings) -> subprocess.Popen:
        settings = {
            "index": index, "address": f"http://127.0.0.1:{self.port}", "folder": str(self.folder), "until": True,
            "inner_seconds": self.inner_seconds, "record": False, "lr": 0.003,
            "outer": {"sync_every": 5, "max_retries": 8, "start_with": COUNT, "timeouts": LIMITS}, **settings,
        }  # fmt: skip
        with (self.folder / f"island{index}.out").open("ab") as out:
            return subprocess.Popen(
                [sys.executable, str(WORKER), json.dumps(settings)], env=self.environment, stdout=out, stderr=out
            )

    def events(self, index: int) -> list[dict]:
        file = self.folder / f"island{index}.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def established(self, index: int) -> bool:
        """Return whether the island has made an outer step since it was last started."""
        return any(e["kind"] == "round" for e in self.events(index)[self.since[index] :])

    def can_meet(self, stopped: set[int]) -> bool:
        """Return whether a quorum is possible: the lighthouse listens, and two islands are there and not stopped."""
        there = [i for i in range(COUNT) if i not in stopped and self.islands[i].poll() is None and self.started(i)]
        if len(there) < 2 or self.light.poll() is not None:
            return False
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def started(self, index: int) -> bool:
        """Return whether the island is past its imports since it was last started."""
        return any(e["kind"] == "start" for e in self.events(index)[self.since[index] :])

    def check_alive(self, index: int) -> None:
        if self.islands[index].poll() is not None:
            tail = (self.folder / f"island{index}.out").read_text(errors="replace")[-1500:]
            raise Broken(f"island {index} ended by itself with code {self.islands[index].returncode}: {tail}")

    def close(self) -> None:
        for process in [*self.islands, self.light]:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()


class Faults:
    """Draws faults and carries them out; each has a second half that is due later."""

    def __init__(self, cluster: Cluster, rng: random.Random) -> None:
        self.cluster, self.rng = cluster, rng
        self.counts: Counter[str] = Counter()
        self.due: list[tuple[float, str, int]] = []  # (when, what, island)

    @property
    def hurt(self) -> set[int]:
        return {island for _, _, island in self.due if island >= 0}

    def strike(self) -> None:
        """Start one fault, if one is possible now."""
        cluster, rng = self.cluster, self.rng
        kind = rng.choice(["kill", "kill", "stop", "stop", "lighthouse"])
        seconds = rng.uniform(0.2, 8.0)
        if kind == "lighthouse":
            if any(what == "lighthouse" for _, what, _ in self.due):
                return
            cluster.light.kill()
            cluster.light.wait()
            self.due.append((time.time() + seconds, "lighthouse", -1))
        else:
            ready = [i for i in range(COUNT) if cluster.established(i) and i not in self.hurt]
            if len(ready) < 2:  # one has to stay that has the state
                return
            victim = rng.choice(ready)
            process = cluster.islands[victim]
            process.send_signal(signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
            if kind == "kill":
                process.wait()
                cluster.since[victim] = len(cluster.events(victim))
            self.due.append((time.time() + seconds, kind, victim))
        self.counts[kind] += 1

    def undo(self, *, everything: bool = False) -> None:
        """Carry out the second halves that are due."""
        for entry in list(self.due):
            when, what, island = entry
            if not everything and time.time() < when:
                continue
            self.due.remove(entry)
            if what == "lighthouse":
                self.cluster.light = self.cluster.start_lighthouse()
            elif what == "kill":
                self.cluster.islands[island] = self.cluster.start_island(island)
            else:
                self.cluster.islands[island].send_signal(signal.SIGCONT)


def newest(cluster: Cluster) -> int:
    """Return the highest outer step so far."""
    return max((e["step"] for i in range(COUNT) for e in cluster.events(i)[-20:] if e["kind"] == "round"), default=0)


def given_up(events: list[dict], place: int) -> bool:
    """Return whether the result at `place` was not kept: the island was healed, or died, right after it."""
    rest = [e for e in events[place + 1 :] if e["kind"] in ("round", "attached", "end")]
    return not rest or rest[0]["kind"] == "attached" or rest[0].get("healed", False)


def judge(cluster: Cluster) -> dict:
    """Check all records; return the figures."""
    results: dict[int, set[str]] = defaultdict(set)
    total = Counter()
    stalls, losses = [], []
    for i in range(COUNT):
        events = cluster.events(i)
        if events[-1]["kind"] != "end":
            raise Broken(f"island {i} did not reach the end")
        for place, e in enumerate(events):
            if e["kind"] != "round":
                continue
            total.update(rounds=1, retries=e["retries"], lost_inner_steps=e["lost"], healed=int(e["healed"]))
            total["given_up_rounds"] += not e["committed"]
            stalls.append(e["seconds"])
            losses.append((e["time"], e["loss"]))
            if e["committed"]:
                if given_up(events, place):
                    total["results_replaced"] += len(results[e["step"]] | {e["theta"]}) > 1
                else:
                    results[e["step"]].add(e["theta"])
    split = {step: thetas for step, thetas in results.items() if len(thetas) > 1}
    if split:
        raise Broken(f"different global parameters after outer steps {sorted(split)[:5]}")
    ends = {cluster.events(i)[-1]["hash"] for i in range(COUNT)}
    if len(ends) != 1:
        raise Broken("the islands ended on different parameters")
    losses.sort()
    tenth = max(5, len(losses) // 10)
    first, last = (sum(x for _, x in part) / len(part) for part in (losses[:tenth], losses[-tenth:]))
    if not last < 0.5 * first:
        raise Broken(f"the loss did not fall: {first:.4f} -> {last:.4f}")
    stalls.sort()
    return {
        "outer_steps": max(results), **total, "longest_stall_seconds": stalls[-1],
        "median_stall_seconds": stalls[len(stalls) // 2], "loss_first": round(first, 5), "loss_last": round(last, 5),
    }  # fmt: skip


def soak(minutes: float, seed: int, folder: Path, every: tuple[float, float], inner_seconds: float) -> dict:
    """Run the soak; return its figures. Raises `Broken`."""
    rng = random.Random(seed)
    cluster = Cluster(folder, inner_seconds)
    faults = Faults(cluster, rng)
    try:
        started = moved = could = time.time()
        longest, hindered, step, next_fault = 0.0, 0.0, 0, None
        while time.time() < started + 60 * minutes:
            time.sleep(0.1)
            for i in range(COUNT):
                if i not in faults.hurt:
                    cluster.check_alive(i)
            if (now := newest(cluster)) > step:
                longest = max(longest, time.time() - moved if step else 0.0)
                hindered = max(hindered, time.time() - could if step else 0.0)
                step, moved = now, time.time()
                could = moved
            elif time.time() > moved + 1 and not cluster.can_meet(faults.hurt):
                could = time.time()
            if time.time() > moved + PATIENCE:
                raise Broken(f"no outer step for {PATIENCE:.0f} s after step {step}: deadlock")
            faults.undo()
            if next_fault is None:
                next_fault = time.time() + 2 if all(map(cluster.established, range(COUNT))) else None
            elif time.time() > next_fault:
                faults.strike()
                next_fault = time.time() + rng.uniform(*every)
        faults.undo(everything=True)
        deadline = time.time() + PATIENCE
        while not all(cluster.established(i) for i in range(COUNT)) or newest(cluster) < step + 3:
            for i in range(COUNT):
                cluster.check_alive(i)
            time.sleep(0.2)
            if time.time() > deadline:
                raise Broken("the islands did not come together after the last fault")
        # they stop together at an outer step that none of them has passed
        part = folder / "rounds.part"
        part.write_text(str(newest(cluster) + 10))
        part.rename(folder / "rounds")
        for i, process in enumerate(cluster.islands):
            if process.wait(PATIENCE) != 0:
                cluster.check_alive(i)
        return {
            "minutes": minutes, "seed": seed, "faults": dict(faults.counts),
            "longest_without_outer_step": round(longest, 1),
            "longest_though_two_islands_and_the_lighthouse_were_there": round(hindered, 1), **judge(cluster),
        }  # fmt: skip
    finally:
        cluster.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=float, nargs=2, default=(3.0, 9.0), help="seconds between faults, from to")
    parser.add_argument("--inner-seconds", type=float, default=0.05, help="length of an inner step")
    parser.add_argument("--keep", type=Path, help="folder for the islands' logs (default: a temporary one)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the islands end with it
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            found = soak(options.minutes, options.seed, folder, tuple(options.every), options.inner_seconds)
        except (Broken, subprocess.TimeoutExpired) as error:
            print(f"BROKEN: {error}")
            return 1
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
