"""One process of a verl island: verl's real ActorRolloutRefWorker (FSDP2, gloo, CPU) in a plain process, without Ray.

Started by test_verl_outer.py with one JSON argument. The driver's part (rollouts, advantages) is random numbers of this
island's own; `update_actor`, `update_weights` and the checkpoints are verl's. The rollout engine is a stand-in that
writes down what it receives. Writes `<name>-<rank>.pt`.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import sys
import time
from pathlib import Path

import torch

settings = json.loads(sys.argv[1])
INDEX, FOLDER, NAME = settings["index"], Path(settings["folder"]), settings["name"]
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.set_num_threads(1)

from composer_torchft.fingerprints import values_hash
from composer_verl import outer
from composer_verl.host import compose
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithValueHead
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker, TrainingWorkerConfig
from verl.workers.rollout import base

EngineRegistry.register(model_type="value_model", backend=["fsdp2"], device="cpu")(FSDPEngineWithValueHead)


class Receiver(base.BaseRollout):
    """The inference engine's end of verl's weight update: keeps what it is sent."""

    received: list[tuple[int, str, torch.Tensor]]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.received = []

    async def resume(self, tags) -> None: ...

    async def release(self) -> None: ...

    async def update_weights(self, weights, global_steps=None, **_) -> None:
        found = [tensor.detach().double().reshape(-1) for _, tensor in weights]
        self.received.append((global_steps, values_hash(found), torch.cat(found)))


sys.modules["outer_receiver"] = sys.modules[__name__]
base._ROLLOUT_REGISTRY[("receiver", "async")] = "outer_receiver.Receiver"


def batch(step: int) -> TensorDict:
    """Sequences, advantages and old log-probs of this island and rank: random, and the same for the same step."""
    draw = torch.Generator().manual_seed(1_000_000 * INDEX + 1000 * RANK + step)
    rows = []
    for _ in range(8 // WORLD):
        prompt, answer = (int(torch.randint(3, 8, (1,), generator=draw)) for _ in range(2))
        ids = torch.randint(7, 20, (prompt + answer,), generator=draw)
        rows.append(
            {
                "prompts": ids[:prompt], "responses": ids[prompt:], "input_ids": ids,
                "position_ids": torch.arange(len(ids)), "response_mask": torch.ones(answer, dtype=torch.long),
                "loss_mask": torch.ones(answer, dtype=torch.long),
                "old_log_probs": -3 + 0.1 * torch.randn(answer, generator=draw),
                "advantages": torch.randn(1, generator=draw).expand(answer).clone(),
            }
        )  # fmt: skip
    data = {key: torch.nested.as_nested_tensor([row[key] for row in rows], layout=torch.jagged) for key in rows[0]} | {
        "temperature": torch.ones(len(rows))
    }
    found = TensorDict(data, batch_size=len(rows))
    counts = {"global_batch_size": 4, "mini_batch_size": 4, "epochs": 1, "seed": 1, "calculate_entropy": False}
    tu.assign_non_tensor(found, **counts, dataloader_kwargs={"shuffle": False})
    return found


def local(parameters) -> torch.Tensor:
    """This process's part of all parameters."""
    return torch.cat([getattr(p, "_local_tensor", p).detach().double().reshape(-1) for p in parameters])


def critic(config) -> TrainingWorker:
    """verl's value model in the same process, as its trainer places it: an optimizer that is none of our business."""
    from transformers import AutoModelForTokenClassification
    from verl.utils.config import omega_conf_to_dataclass

    load = AutoModelForTokenClassification.from_pretrained  # verl asks for flash attention here, whatever is configured
    AutoModelForTokenClassification.from_pretrained = lambda *args, **options: load(
        *args, **{**options, "attn_implementation": "sdpa"}
    )
    actor = omega_conf_to_dataclass(config.actor)
    engine = copy.deepcopy(actor.engine)
    engine.use_dynamic_bsz, engine.micro_batch_size_per_gpu = False, 2
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="value_model", model_config=omega_conf_to_dataclass(config.model), engine_config=engine,
            optimizer_config=copy.deepcopy(actor.optim), checkpoint_config=actor.checkpoint,
        )
    )  # fmt: skip
    worker.reset()
    worker.set_loss_fn(lambda model_output, data, dp_group=None: (model_output["values"].values().pow(2).mean(), {}))
    return worker


def main() -> None:
    config = compose(Path(settings["recipe"]), settings["overrides"]).actor_rollout_ref
    config.actor.optim.total_training_steps = settings.get("total", settings["steps"])  # what verl's trainer sets
    worker = ActorRolloutRefWorker(config, role="actor_rollout")
    worker.init_model()
    value = critic(config) if settings.get("critic") else None
    engine = worker.actor.engine
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    if settings.get("weights"):  # another model than the others'
        with torch.no_grad():
            for parameter in parameters:
                parameter._local_tensor.mul_(1 + settings["weights"])
    if settings.get("resume"):
        worker.load_checkpoint(settings["resume"])
    before: dict = {}
    # registered before the outer loop's own hook: the parameters just before a sync
    engine.optimizer.register_step_post_hook(lambda *_: before.update(theta=local(parameters)))
    found: dict = {"local": [], "global": [], "hashes": [], "step": [], "rates": [], "critic": [], "reported": []}
    found["start"] = local(parameters)
    done = settings.get("first", 0)
    seen, attached = 0, None
    while done < settings["steps"]:
        done += 1
        if value is not None:
            value.train_mini_batch(batch(done))
            found["critic"].append(values_hash([local(value.engine.module.parameters())]))
        if done == settings.get("wait_at"):
            (FOLDER / "waiting").touch()
            while not (FOLDER / "late").exists():
                time.sleep(0.02)
            time.sleep(1.0)
        if done == 1 and settings.get("late"):
            while not (FOLDER / "waiting").exists():
                time.sleep(0.02)
            (FOLDER / "late").touch()
        found["rates"].append(engine.optimizer.param_groups[0]["lr"])
        rounds_before = seen
        metrics = tu.get(worker.update_actor(batch(done)), "metrics")
        found["reported"].append(
            {k: [float(v) for v in values] for k, values in metrics.items() if k.startswith("outer/")}
        )
        loop = outer._installed.loop
        if attached is None:
            attached = loop.log.rounds[0] if loop.log.rounds and loop.log.rounds[0].attach else False
            found["attached"] = bool(attached)
        rounds = [r for r in loop.log.rounds if not r.attach]
        seen = len(rounds)
        if seen > rounds_before:
            found["local"].append(before["theta"])
            found["global"].append(local(parameters))
            found["hashes"].append((values_hash([before["theta"]]), values_hash([local(parameters)])))
            found["step"].append((done, rounds[-1].outer_step, rounds[-1].participants))
        asyncio.run(worker.update_weights(global_steps=done))
        if done == settings.get("save_at"):
            worker.save_checkpoint(str(FOLDER / f"{NAME}.checkpoint"), global_step=done)
    found["received"] = worker.rollout.received
    found["end"] = local(parameters)
    found["metrics"] = outer.metrics()
    found["ours_only"] = outer._installed.loop.inner is engine.optimizer
    for key in ("local", "global"):
        found[key] = torch.stack(found[key]) if found[key] else torch.zeros(0)
    torch.save(found, FOLDER / f"{NAME}-{RANK}.pt")


main()
os._exit(0)  # torchft's threads must not hold the process
