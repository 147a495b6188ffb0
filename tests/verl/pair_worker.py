"""One rank of verl's real TrainingWorker and FSDP2 engine on a CPU, without Ray: the update of a scenario file.

    RANK=0 WORLD_SIZE=1 ... python pair_worker.py SCENARIOS.json OUT.pt

A scenario names the model, the pairs file, the rollouts' seed and how verl cuts the batch; rank 0 writes, per inner
optimizer step, the parameters before it, the whole gradient, and verl's metrics.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "cpu_host"))
os.environ.setdefault("VERL_PLATFORM", "cpu")
os.environ.setdefault("VERL_USE_EXTERNAL_MODULES", "composer_cpu_host")

import torch

torch.set_num_threads(1)

import verl  # noqa: F401
from tensordict import TensorDict
from transformers import AutoTokenizer
from verl.utils import tensordict_utils as tu


def rollouts(count, vocabulary, seed, longest=14):
    """Rows of sampled tokens with tool tokens masked inside; the log-probs of sampling are near the model's own."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, size):
        return torch.randint(low, high, size, generator=generator)

    rows = []
    for _ in range(count):
        prompt, response = (int(integers(2, longest, (1,))) for _ in range(2))
        ids = integers(7, vocabulary, (prompt + response,))
        mask = (torch.rand(response, generator=generator) < 0.8).long()
        mask[0] = 1
        rows.append(
            {
                "prompts": ids[:prompt],
                "responses": ids[prompt:],
                "input_ids": ids,
                "position_ids": torch.arange(len(ids)),
                "response_mask": mask,
                "loss_mask": mask.clone(),
                "old_log_probs": -3.0 + 0.2 * torch.randn(response, generator=generator),
                "advantages": mask * torch.randn(1, generator=generator),
                "ref_log_prob": -3.0 + 0.2 * torch.randn(response, generator=generator),
                "rollout_is_weights": 0.5 + torch.rand(response, generator=generator),
            }
        )
    return rows


def stream(scenario, tokenizer):
    from composer_plugins.channels.pair_stream import PairStream

    found = PairStream(section(scenario), tokenizer, seed=3)
    generator = torch.Generator().manual_seed(scenario.get("reference_seed", 11))
    found.reference = {  # any numbers: the reference is a constant of the loss
        i: tuple((-3.0 + 0.5 * torch.randn(len(ids), generator=generator)).tolist() for ids in (p.chosen, p.rejected))
        for i, p in enumerate(found.pairs)
    }
    return found


def section(scenario):
    from composer_plugins.config import ReplayDPOConfig

    return ReplayDPOConfig(**scenario["replay_dpo"])


def batch(scenario, tokenizer, pairs):
    """The whole batch in verl's order, the extra info of the update, and the pairs of each mini-batch."""
    from composer_verl.pair_fields import RowMaker, rollout_fields, stacked, step_sides
    from composer_verl.pair_layout import lay_out

    rows = rollouts(scenario["rollouts"], len(tokenizer), scenario.get("seed", 5))
    if not scenario.get("pairs", True):
        per_rank = scenario["rollouts"] // scenario["mini_batches"]
        return stacked(rows), {"mini_batch_size": per_rank}, []
    drawn = [pairs.indices(number) for number in range(scenario["mini_batches"])]
    budget, micro = scenario.get("tokens"), scenario.get("micro", 2)
    layout = lay_out(
        [len(row["input_ids"]) for row in rows], drawn, ranks=torch.distributed.get_world_size(), token_budget=budget,
        groups_per_micro=1 if budget else max(1, micro // 2),
    )  # fmt: skip
    temperature = scenario.get("temperature", 1.0)
    own = None if temperature == 1.0 else temperature
    maker = RowMaker(rows[0], tokenizer.eos_token_id, own)
    extra = rollout_fields([len(row["responses"]) for row in rows], own)
    for i, row in enumerate(rows):
        row |= {name: extra[name][i] for name in extra.keys()}  # noqa: SIM118
    synthetic = iter([maker.sample(side) for side in step_sides(layout.rows, pairs.pairs, pairs.reference)])
    merged = [rows[row.rollout] if row.rollout is not None else next(synthetic) for row in layout.rows]
    merged = [merged[i] for i in scenario.get("order") or range(len(merged))]
    info = {
        "mini_batch_size": layout.slot_rows * torch.distributed.get_world_size(),
        "force_group_size": scenario.get("group", 2),
    }
    if not budget:
        info["micro_batch_size_per_gpu"] = max(1, micro // 2)
    return stacked(merged), info, drawn


def loss_function(scenario, actor):
    """The adapter's loss with both channels, or with one of them left out."""
    from composer_verl.channel_loss import composer_loss, policy_loss

    from composer_plugins.config import parse_section

    terms = scenario.get("terms", "both")
    if not scenario.get("pairs", True):
        own = parse_section({"policy": {"objective": "host"}})
        return lambda model_output, data, dp_group=None: composer_loss(actor, own, model_output, data, dp_group)
    weight = 0.0 if terms == "pairs" else 1.0
    own = parse_section({"policy": {"objective": "host", "weight": weight}, "replay_dpo": scenario["replay_dpo"]})
    function = policy_loss if terms == "policy" else composer_loss
    return lambda model_output, data, dp_group=None: function(actor, own, model_output, data, dp_group)


def build(scenario):
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import (
        FSDPEngineConfig,
        FSDPOptimizerConfig,
        HFModelConfig,
        TrainingWorkerConfig,
    )
    from verl.workers.engine_workers import TrainingWorker

    precision = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    budget = scenario.get("tokens")
    engine = FSDPEngineConfig(
        strategy="fsdp2", model_dtype="fp32", dtype="float32", mixed_precision=precision, use_torch_compile=False,
        fsdp_size=-1, use_dynamic_bsz=budget is not None, max_token_len_per_gpu=budget,
        micro_batch_size_per_gpu=scenario.get("micro", 2), infer_max_token_len_per_gpu=budget,
        infer_micro_batch_size_per_gpu=scenario.get("micro", 2),
    )  # fmt: skip
    model = HFModelConfig(
        path=scenario["model"], use_remove_padding=scenario.get("remove_padding", False),
        enable_gradient_checkpointing=False, override_config={"attn_implementation": "sdpa"},
    )  # fmt: skip
    optimizer = FSDPOptimizerConfig(
        optimizer="SGD", optimizer_impl="torch.optim", lr=scenario.get("lr", 0.0), weight_decay=0.0, clip_grad=1e9,
        total_training_steps=100, override_optimizer_config={"foreach": False},
    )  # fmt: skip
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model", model_config=model, engine_config=engine, optimizer_config=optimizer,
            checkpoint_config=CheckpointConfig(),
        )
    )  # fmt: skip
    worker.reset()
    return worker


def full(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def record(engine, kept, names):
    """Keep the parameters and the gradient of every inner step; `names`: of these parameters, None: of all."""
    step = engine.optimizer_step

    def recorded():
        chosen = {n: p for n, p in engine.module.named_parameters() if names is None or n in names}
        kept.append(
            {
                "parameters": {n: full(p) for n, p in chosen.items()},
                "gradient": {n: full(p.grad) for n, p in chosen.items() if p.grad is not None},
            }
        )
        return step()

    engine.optimizer_step = recorded


def share(data):
    """This rank's part of a batch, as verl's dispatch cuts it; a copy, as after Ray's transport."""
    from verl.protocol import BatchData

    part = BatchData(data).chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]
    return TensorDict(dict(part.items()), batch_size=len(part))


def run(scenario):
    """One update under a scenario; return what rank 0 saw."""
    worker = build(scenario)
    ranks = torch.distributed.get_world_size()
    tokenizer = AutoTokenizer.from_pretrained(scenario["model"])
    pairs = stream(scenario, tokenizer) if scenario.get("pairs", True) else None
    data, info, drawn = batch(scenario, tokenizer, pairs)

    from verl.workers.config import ActorConfig, PolicyLossConfig

    actor = ActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=2, policy_loss=PolicyLossConfig(loss_mode="vanilla"),
        entropy_coeff=scenario.get("entropy_coeff", 0.0), use_kl_loss=scenario.get("kl", False),
        loss_agg_mode=scenario.get("aggregation", "token-mean"),
    )  # fmt: skip
    worker.set_loss_fn(loss_function(scenario, actor))
    record(worker.engine, kept := [], scenario.get("keep"))
    watch_micro_batches(worker.engine, seen := [])
    options = dict(
        global_batch_size=scenario["rollouts"] // scenario["mini_batches"], epochs=scenario.get("epochs", 1), seed=1,
        dataloader_kwargs={"shuffle": scenario.get("shuffle", False)}, temperature=scenario.get("temperature", 1.0),
        calculate_entropy=bool(scenario.get("entropy_coeff")), **info,
    )  # fmt: skip
    if "temperature" in data:
        options.pop("temperature")
    part = share(data)
    tu.assign_non_tensor(part, **options)
    result = {"rows": len(data), "slot_rows": info["mini_batch_size"] // ranks, "drawn": drawn, "steps": kept}
    if pairs is not None:
        result["reference"] = pairs.reference
    try:
        result["metrics"] = tu.get(worker.train_mini_batch(part), "metrics")
    except Exception as error:  # what a wrong placement ends in is part of the scenario
        result["error"] = f"{type(error).__name__}: {error}"
    gathered = [None] * ranks
    torch.distributed.all_gather_object(gathered, seen)
    return result | {"micro_batches": gathered}


class Group:
    """verl's worker group for a worker in this process: splits a batch over the ranks and joins what they return."""

    def __init__(self, worker):
        self.worker, self._dispatch_info = worker, {"actor": list(range(torch.distributed.get_world_size()))}

    def compute_log_prob(self, data):
        output = self.worker.infer_batch(share(data))
        rows = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(rows, [row.clone() for row in output["log_probs"].unbind()])
        return {"log_probs": tu.nested_tensor_from_tensor_list([row for part in rows for row in part])}


def scored(scenario):
    """The reference log-probs of every pair, from verl's forward over the initial weights."""
    from types import SimpleNamespace

    from composer_verl.pair_reference import score

    tokenizer = AutoTokenizer.from_pretrained(scenario["model"])
    pairs, budget = stream(scenario, tokenizer), scenario.get("tokens")
    rollout = SimpleNamespace(
        log_prob_use_dynamic_bsz=budget is not None, log_prob_max_token_len_per_gpu=budget,
        log_prob_micro_batch_size_per_gpu=scenario.get("micro", 2),
    )  # fmt: skip
    trainer = SimpleNamespace(
        use_reference_policy=False, ref_in_actor=False, actor_rollout_wg=Group(build(scenario)),
        config=SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=rollout)),
    )  # fmt: skip
    return {"reference": score(trainer, pairs, list(range(len(pairs.pairs))), tokenizer.eos_token_id)}


def main(path, out):
    """Run all scenarios of a file with this number of ranks in one process."""
    results = {
        name: (scored if scenario.get("score") else run)(scenario)
        for name, scenario in json.loads(Path(path).read_text()).items()
    }
    if torch.distributed.get_rank() == 0:
        torch.save(results, out)
    torch.distributed.destroy_process_group()


def watch_micro_batches(engine, seen):
    """Keep the pair rows of every micro-batch that verl's own engine makes."""
    from composer_verl.pair_loss import PAIR_ROW

    step = engine.forward_step

    def watched(micro_batch, *args, **kwargs):
        rows = micro_batch[PAIR_ROW].tolist() if PAIR_ROW in micro_batch else []
        seen.append({"rows": rows, "tokens": int(micro_batch["input_ids"].offsets()[-1])})
        return step(micro_batch, *args, **kwargs)

    engine.forward_step = watched


if __name__ == "__main__":
    main(*sys.argv[1:])
