"""One process of a prime-rl island: prime-rl's own `train` on a CPU (see cpu_host/), and a recorder around it.

Started by test_prime_outer.py: `outer_worker_prime.py RECORD.pt @ trainer.toml`, one process per rank. The orchestrator's
part, the batches, lies in the run's folder already. The recorder stands before the outer loop's hooks, and so sees the
parameters just before a sync; it writes what it saw at the end, also when `train` fails.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "cpu_host"))

import prime_cpu

RECORD = Path(sys.argv.pop(1))


def main() -> None:
    prime_cpu.install()
    import torch

    torch.Tensor.pin_memory = lambda self: self  # prime-rl keeps the optimizer's state in pinned memory by default

    torch.set_num_threads(1)
    from composer_prime_rl import outer
    from composer_torchft.fingerprints import values_hash
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    found = {"local": [], "global": [], "hashes": [], "step": [], "rates": [], "steps": 0}
    before: dict = {}
    inner: list = []
    seen = 0

    def local(optimizer):
        parts = [
            getattr(p, "_local_tensor", p).detach().double().reshape(-1)
            for g in optimizer.param_groups
            for p in g["params"]
        ]
        return torch.cat(parts)

    def first(optimizer, args, kwargs):
        if not any(g["lr"] for g in optimizer.param_groups):
            return  # a checkpoint that is being loaded makes a step of its own
        if not inner:
            inner.append(optimizer)
            factor = float(os.environ.get("TEST_OTHER_WEIGHTS", "0"))
            if factor:
                with torch.no_grad():
                    for group in optimizer.param_groups:
                        for parameter in group["params"]:
                            parameter._local_tensor.mul_(1 + factor)
            found["start"] = local(optimizer)
            optimizer.register_step_post_hook(lambda optimizer, *_: before.update(theta=local(optimizer)))
        if optimizer is inner[0]:  # and not the outer loop's
            found["rates"].append(optimizer.param_groups[0]["lr"])

    def after(optimizer, args, kwargs):
        nonlocal seen
        if optimizer not in inner or outer._installed.loop is None:
            return
        found["steps"] += 1
        loop = outer._installed.loop
        found["attached"] = [r.outer_step for r in loop.log.rounds if r.attach]
        rounds = [r for r in loop.log.rounds if not r.attach]
        if len(rounds) > seen:
            seen = len(rounds)
            found["local"].append(before["theta"])
            found["global"].append(local(optimizer))
            found["hashes"].append((values_hash([before["theta"]]), values_hash([local(optimizer)])))
            found["step"].append((found["steps"], rounds[-1].outer_step, rounds[-1].participants))
        found["end"] = local(optimizer)
        progress = RECORD.with_suffix(".progress")
        progress.write_text(str(found["steps"]))
        time.sleep(float(os.environ.get("TEST_SLOW", "0")))
        stop = Path(os.environ.get("TEST_UNTIL", "/nonexistent"))
        if stop.exists() and rounds and rounds[-1].outer_step >= int(stop.read_text()):
            raise SystemExit(0)

    register_optimizer_step_pre_hook(first)  # before the outer loop's, which the import of the loss registers
    register_optimizer_step_post_hook(after)
    prime_cpu.fit_host()
    from prime_rl.trainer.rl.train import main as trainer

    try:
        trainer()
    finally:
        found["metrics"] = outer.metrics()
        found["left"] = bool(outer._installed and outer._installed._left)
        for key in ("local", "global"):
            found[key] = torch.stack(found[key]) if found[key] else torch.zeros(0)
        torch.save(found, RECORD)


if __name__ == "__main__":
    main()
