"""One process of an island that shards its model with FSDP2 (gloo, CPU). Started by test_outer_fsdp.py."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from composer_torchft import links
from composer_torchft import loop as loops
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from composer_plugins.config import OuterConfig

settings = json.loads(sys.argv[1])
index, folder = settings["index"], Path(settings["folder"])
torch.set_num_threads(1)


def local(parameters) -> np.ndarray:
    """This process's part of all parameters."""
    return np.concatenate([p.detach().to_local().reshape(-1).double().numpy() for p in parameters])


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(settings["weights"])
    net = torch.nn.Sequential(torch.nn.Linear(8, 15), torch.nn.Tanh(), torch.nn.Linear(15, 1))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (net[0], net[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)  # the last bias has one value: rank 1 holds nothing of it
    parameters = list(net.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    config = OuterConfig(
        sync_every=3, fragments=settings["fragments"], lighthouse=settings["address"], island=f"isl-{index}",
        timeouts={"quorum": 90, "allreduce": 10, "connect": 20},
    )  # fmt: skip
    before: dict = {}

    def just_before_a_sync(*_):
        if settings.get("nan_at") == loop.manager.current_step() and loop._local_step == 2 and rank == 1:
            parameters[0].detach().to_local()[0, 0] = float("nan")  # on one process of the island
        before.update(theta=local(parameters))

    optimizer.register_step_post_hook(just_before_a_sync)
    start = local(parameters)
    load = links.HealTransport._load_from_address

    def cut_off(*args):
        """Once rank 1 does not get what rank 0 is healed with."""
        if settings.get("heal_fails") and rank == 1:
            settings.pop("heal_fails")
            raise ConnectionResetError("planted: cut off")
        return load(*args)

    links.HealTransport._load_from_address = staticmethod(cut_off)
    loop = loops.attach(optimizer, net.named_parameters(), config)
    assert not settings.get("heal_fails") or rank == 0
    assert loop.sharded
    exchange = loops.exchange

    def lost_on_one_process(manager, card):
        """Once the cards arrive at rank 0 only."""
        cards = exchange(manager, card)
        if settings.get("cards_lost_at") == manager.current_step() and rank == 1:
            settings.pop("cards_lost_at")
            manager.report_error(RuntimeError("planted: the cards were lost"))
            return None
        return cards

    loops.exchange = lost_on_one_process
    name = settings["name"]
    found = {"start": start, "attached": local(parameters), "first": loop.manager.current_step()}
    locals_, globals_, steps, seen = [], [], [], len(loop.log.rounds)
    data = torch.Generator().manual_seed(100 * index + rank)
    while True:
        x = torch.randn(16, 8, generator=data)
        ((net(x) - x.sum(1, keepdim=True)) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if len(loop.log.rounds) == seen:
            continue
        seen = len(loop.log.rounds)
        locals_.append(before["theta"])
        globals_.append(local(parameters))
        steps.append(loop.manager.current_step())
        if settings.get("slow") and steps[-1] >= settings["slow"]:
            time.sleep(0.2)
        if steps[-1] >= settings.get("die_at", float("inf")):  # an island that joins late starts beyond that step
            os._exit(7)
        end = folder / "rounds"
        if end.exists() and steps[-1] >= int(end.read_text()):
            break
        if rank == 0:
            (folder / f"{name}.step").write_text(f"{steps[-1]} {loop.log.rounds[-1].participants}")
    state = loop.state_dict()
    torch.save(state, folder / f"{name}-{rank}.pt")
    loop.load_state_dict(torch.load(folder / f"{name}-{rank}.pt", weights_only=True))  # plain tensors only
    loop.finish()
    np.savez(
        folder / f"{name}-{rank}.npz", local=np.array(locals_), globals=np.array(globals_), steps=np.array(steps),
        end=local(parameters), lost=np.array([r.discarded_inner_steps for r in loop.log.rounds]),
        retries=np.array([r.retries for r in loop.log.rounds]), **found,
    )  # fmt: skip


main()
os._exit(0)
