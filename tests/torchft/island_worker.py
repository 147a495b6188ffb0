"""One island: a small model on data of its own, AdamW inside, the outer loop around it.

Started by the tests with one JSON argument. Writes one JSON line per event, and at the end the local and global
parameters of every round for an independent check. `fault` kills or stops this very process at a named point.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from composer_torchft import loop as loops
from composer_torchft.fingerprints import values_hash
from composer_torchft.links import CommitClient
from torchft._torchft import ManagerClient

from composer_plugins.config import OuterConfig
from composer_plugins.outer import HostState

settings = json.loads(sys.argv[1])
index, folder = settings["index"], Path(settings["folder"])
log = (folder / f"island{index}.jsonl").open("a")
torch.set_num_threads(1)


def write(kind: str, **values) -> None:
    log.write(json.dumps({"kind": kind, "time": time.time(), **values}) + "\n")
    log.flush()


def model() -> torch.nn.Module:
    torch.manual_seed(settings.get("init_seed", 0))
    width = settings.get("width", 16)
    return torch.nn.Sequential(
        torch.nn.Linear(8, width), torch.nn.Tanh(), torch.nn.Linear(width, width), torch.nn.Tanh(),
        torch.nn.Linear(width, 1),
    )  # fmt: skip


def flat(tensors) -> np.ndarray:
    return np.concatenate([t.detach().reshape(-1).double().numpy() for t in tensors])


def hash_now(net) -> str:
    return values_hash(net.parameters())[:16]


fault = settings.get("fault") or {}


def strike() -> None:
    """End or stop this process the hard way, once."""
    fault["done"] = True
    write("fault", at=fault["at"])
    os.kill(os.getpid(), signal.SIGSTOP if fault.get("how") == "stop" else signal.SIGKILL)


def due(loop) -> bool:
    return bool(fault) and not fault.get("done") and loop.manager.current_step() >= fault["round"]


def plant(loop) -> None:
    """Put the fault where it belongs, around the real functions."""
    if fault.get("at") == "quorum":
        quorum = loop.link.quorum

        def waiting():
            if due(loop):
                threading.Timer(0.2, strike).start()
            quorum()

        loop.link.quorum = waiting
    if fault.get("at") == "allreduce":
        allreduce, seen = loop.manager.allreduce, []

        def half(tensor, **options):
            work = allreduce(tensor, **options)
            if due(loop) and tensor.is_floating_point():
                seen.append(1)
                if len(seen) == 2:
                    strike()
            return work

        loop.manager.allreduce = half
    if fault.get("at") == "commit":
        commit = loop.manager.should_commit

        def before(*args, **options):
            if due(loop):
                strike()
            return commit(*args, **options)

        loop.manager.should_commit = before
    if fault.get("at") == "commit_unanswered":
        commit = loop.manager.should_commit

        def unanswered(*args, **options):
            """Ask a server that never answers, once: the time limit passes, as for a process that was stopped meanwhile."""
            if not due(loop):
                return commit(*args, **options)
            fault["done"] = True
            write("fault", at=fault["at"])
            real, silent = loop.manager._client, socket.create_server(("127.0.0.1", 0))
            there = f"http://127.0.0.1:{silent.getsockname()[1]}"
            loop.manager._client = CommitClient(ManagerClient(there, timedelta(seconds=5)))
            try:
                return commit(*args, **options)
            finally:
                loop.manager._client = real
                silent.close()

        loop.manager.should_commit = unanswered
    if fault.get("at") == "result_lost":
        wait = loops.IslandFragment.perform_sync

        def lost(fragment):
            """The exchange went well for others, and this island sees it fail: torchft commits per island."""
            if due(loop):
                fault["done"] = True
                for work in fragment._allreduce_work:
                    work.wait()
                loop.manager.report_error(RuntimeError("planted: the result was lost"))
                time.sleep(1)  # the others commit meanwhile
            return wait(fragment)

        loops.IslandFragment.perform_sync = lost


def last_round() -> int:
    """Where all islands stop: given, or written into a file by the test while they run."""
    file = folder / "rounds"
    return settings["rounds"] if "rounds" in settings else int(file.read_text()) if file.exists() else sys.maxsize


def wait_for_all() -> None:
    """Start together, however long the imports took."""
    (folder / f"ready{index}").touch()
    while not all((folder / f"ready{i}").exists() for i in range(settings.get("barrier", 0))):
        time.sleep(0.02)


def main() -> None:
    write("start")
    wait_for_all()
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.get("lr", 0.01))
    config = OuterConfig(**settings["outer"], lighthouse=settings["address"], island=f"island-{index}")
    steps_done = {"global_step": 0}
    local_rounds: list[np.ndarray] = []
    every_step: list[tuple[np.ndarray, np.ndarray]] = []  # before and after the outer loop's hook
    global_rounds: list[np.ndarray] = [flat(net.parameters())]
    resume, start = None, 0
    checkpoint = folder / f"island{index}.pt"
    if settings.get("resume"):
        saved = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        resume, start = saved["outer"], saved["step"]
    # runs before the outer loop's own hook: what the parameters are just before a sync
    before: dict = {"theta": None, "hash": None}
    if settings.get("record", True):
        optimizer.register_step_post_hook(lambda *_: before.update(theta=flat(net.parameters()), hash=hash_now(net)))
    host = HostState(lambda: dict(steps_done), lambda s, ahead: steps_done.update(global_step=s["global_step"] + ahead))
    loop = loops.attach(
        optimizer, net.named_parameters(), config, host_state=host, resume=resume, log=folder / f"rounds{index}.jsonl"
    )
    write("attached", step=loop.manager.current_step(), hash=hash_now(net))
    plant(loop)
    data = torch.Generator()
    torch.manual_seed(0)
    truth = torch.randn(8, 1)
    seen = len(loop.log.rounds)
    steps_done["global_step"] = steps_done["global_step"] or start
    count = start
    while loop.manager.current_step() < last_round() if settings.get("until") else count < settings["steps"]:
        count += 1
        # the batch depends on island and step alone, so that a resumed run sees what the whole one saw
        x = torch.randn(32, 8, generator=data.manual_seed(1_000_000 * (index + 1) + count))
        loss = ((net(x) - x @ truth) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        if fault.get("at") == "mid_round" and due(loop) and loop._local_step == 1:
            strike()
        if settings.get("inner_seconds"):
            time.sleep(settings["inner_seconds"])
        if settings.get("pause_at") == loop.manager.current_step():
            time.sleep(settings.pop("pause_seconds", 0))  # once
        optimizer.step()
        steps_done["global_step"] += 1
        if settings.get("record", True):
            every_step.append((before["theta"], flat(net.parameters())))
        if len(loop.log.rounds) > seen:
            seen = len(loop.log.rounds)
            last = loop.log.rounds[-1]
            if settings.get("record", True):
                local_rounds.append(before["theta"])
                global_rounds.append(flat(net.parameters()))
            write(
                "round", step=last.outer_step, committed=last.committed, healed=last.healed, islands=last.participants,
                retries=last.retries, lost=last.discarded_inner_steps, seconds=last.seconds, waited=last.waited,
                before=before["hash"], after=hash_now(net), theta=last.theta, fragment=last.fragment, loss=loss.item(),
                moments=len(optimizer.state), global_step=steps_done["global_step"],
            )  # fmt: skip
        if settings.get("save_at") == count:
            torch.save(
                {
                    "model": net.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "outer": loop.state_dict(),
                    "step": count,
                },
                checkpoint,
            )
    np.savez(
        folder / f"island{index}.npz", local=np.array(local_rounds), globals=np.array(global_rounds),
        steps=np.array(every_step),
    )  # fmt: skip
    lost = loop.finish()
    write("end", step=loop.manager.current_step(), hash=hash_now(net), lost=lost)


try:
    main()
except Exception as error:
    write("error", type=type(error).__name__, message=str(error))
    raise
os._exit(0)  # torchft's threads must not hold the process
