"""One rank of verl's real TrainingWorker and FSDP2 engine on a CPU, without Ray: teacher forwards and updates.

    RANK=0 WORLD_SIZE=1 ... python sdpo_worker.py SCENARIOS.json OUT.pt

A scenario names the model, the rollouts, the hint and how verl cuts the batch. Rank 0 writes what the test compares
with its own float64 computation: parameters, whole gradients, teacher log-probs, verl's metrics.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent / "cpu_host"))
os.environ.setdefault("VERL_PLATFORM", "cpu")
os.environ.setdefault("VERL_USE_EXTERNAL_MODULES", "composer_cpu_host")

import torch

torch.set_num_threads(1)

import verl  # noqa: F401
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu


def rollouts(count, vocabulary, seed, hinted):
    """Rows of two sampled turns with tool tokens between them; the hinted turn of each row (start, end), or None."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, size=()):
        return torch.randint(low, high, size, generator=generator)

    rows = []
    for number in range(count):
        prompt, first, tool, second = (int(integers(2, 7)) for _ in range(4))
        response = first + tool + second
        ids = integers(7, vocabulary, (prompt + response,))
        mask = torch.tensor([1] * first + [0] * tool + [1] * second)
        span = [(0, first), (first + tool, response), None][number % 3]
        span = span if hinted is None or number in hinted else None
        rows.append(
            {
                "prompts": ids[:prompt], "responses": ids[prompt:], "input_ids": ids,
                "position_ids": torch.arange(len(ids)), "response_mask": mask, "loss_mask": mask.clone(),
                "old_log_probs": -3.0 + 0.3 * torch.randn(response, generator=generator),
                "advantages": mask * torch.randn(1, generator=generator),
                "rollout_is_weights": 0.5 + torch.rand(response, generator=generator), "span": span,
            }
        )  # fmt: skip
    return rows


def nested(rows):
    data = {}
    for name in rows[0]:
        if name != "span":
            data[name] = torch.nested.as_nested_tensor([row[name] for row in rows], layout=torch.jagged)
    return TensorDict(data, batch_size=len(rows))


def build(scenario):
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker

    bf16 = scenario.get("bf16", False)
    precision = {"param_dtype": "bf16" if bf16 else "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    budget, micro = scenario.get("tokens"), scenario.get("micro", 2)
    engine = FSDPEngineConfig(
        strategy="fsdp2", model_dtype="fp32", dtype="bfloat16" if bf16 else "float32", mixed_precision=precision,
        use_torch_compile=False,
        fsdp_size=-1, use_dynamic_bsz=budget is not None, max_token_len_per_gpu=budget, micro_batch_size_per_gpu=micro,
        infer_max_token_len_per_gpu=budget, infer_micro_batch_size_per_gpu=micro,
    )  # fmt: skip
    object.__setattr__(engine, "strategy", scenario.get("strategy", "fsdp2"))  # as verl's FSDPActorConfig does
    model = HFModelConfig(
        path=scenario["model"], use_remove_padding=scenario.get("remove_padding", False),
        enable_gradient_checkpointing=False, override_config={"attn_implementation": "sdpa"},
        lora_rank=scenario.get("lora", 0), lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"],
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


class Group:
    """verl's worker group as the driver sees it, every rank being its own driver: chunk, run, collect."""

    def __init__(self, worker):
        self.worker = worker
        self._dispatch_info = {"actor": list(range(torch.distributed.get_world_size()))}

    def compute_log_prob(self, batch):
        found = self.worker.infer_batch(self.part(batch))
        output = {k: list(v.unbind()) for k, v in found.items() if isinstance(v, torch.Tensor) and v.is_nested}
        gathered = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, output)
        whole = {
            name: torch.nested.as_nested_tensor([row for own in gathered for row in own[name]], layout=torch.jagged)
            for name in output
        }
        return TensorDict(whole, batch_size=len(batch))

    @staticmethod
    def part(batch):
        from verl.protocol import BatchData

        size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        own = BatchData(batch).chunk(size)[rank]
        return TensorDict(dict(own.items()), batch_size=len(batch) // size)


def teacher_of(scenario, worker):
    from composer_verl.teachers import Teacher
    from omegaconf import OmegaConf

    from composer_plugins.config import TeacherWeights

    config = {
        "actor_rollout_ref": {
            "rollout": {
                "temperature": scenario.get("temperature", 1.0),
                "log_prob_use_dynamic_bsz": scenario.get("tokens") is not None,
                "log_prob_micro_batch_size_per_gpu": scenario.get("micro", 2),
            }
        }
    }
    trainer = SimpleNamespace(
        config=OmegaConf.create(config), actor_rollout_wg=Group(worker), ref_in_actor=bool(scenario.get("lora")),
        tokenizer=SimpleNamespace(eos_token_id=3),
    )  # fmt: skip
    return Teacher(TeacherWeights(kind=scenario.get("teacher", "live")), trainer)


def hinted_turns(rows, hint):
    from composer_verl.error_turns import HintedTurn

    found = []
    for number, row in enumerate(rows):
        if row["span"] is not None:
            start, end = row["span"]
            prefix = row["prompts"].tolist() + row["responses"][:start].tolist()
            prefix = prefix[:-1] + hint + prefix[-1:]
            found.append(HintedTurn(number, start, end, [True] * (end - start), prefix, "h", "rollout"))
    return found


def entry_fields(sdpo, scenario, worker, rows, turns, mini_batches):
    """What the driver's `HintedRows` puts into TransferQueue at level topk."""
    from composer_verl.hinted_rows import HintedRows

    from composer_plugins.channels.levels import SignalLevel

    made = object.__new__(HintedRows)
    made.config, made.level, made._mini_batches = sdpo, SignalLevel.TOPK, lambda count: mini_batches
    made.teacher, made.student = teacher_of(scenario, worker), teacher_of({**scenario, "teacher": "live"}, worker)
    ids = [SimpleNamespace(prompt_ids=r["prompts"].tolist(), response_ids=r["responses"].tolist()) for r in rows]
    return made._fields(ids, turns)


def run(scenario):
    from composer_verl.channel_loss import composer_loss
    from composer_verl.fields import EMA_RATE
    from composer_verl.hinted_rows import mini_batch_of, sdpo_fields
    from verl.workers.config import ActorConfig, PolicyLossConfig

    from composer_plugins.config import parse_section

    torch.manual_seed(0)
    worker, ranks = build(scenario), torch.distributed.get_world_size()
    if "load" in scenario:
        worker.load_checkpoint(scenario["load"])
    rows = rollouts(
        scenario["rows"], worker.model_config.hf_config.vocab_size, scenario.get("seed", 5), scenario.get("hinted")
    )
    turns, teacher = hinted_turns(rows, scenario.get("hint", [])), teacher_of(scenario, worker)
    readings = [(t.prefix_ids, rows[t.attempt]["responses"][t.start : t.end].tolist()) for t in turns]
    size = scenario["rows"] // scenario.get("mini_batches", 1)
    section = parse_section(
        {"policy": {"weight": scenario.get("policy", 0.0), "objective": "host"}, "sdpo": scenario["sdpo"]}
    )
    actor = ActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=2, policy_loss=PolicyLossConfig(loss_mode="vanilla")
    )
    worker.set_loss_fn(partial(composer_loss, actor, section))
    result = {"steps": [], "teacher": [], "metrics": []}
    record(worker.engine, result["steps"])
    for _ in range(scenario.get("updates", 1)):
        teacher.begin()
        log_probs = teacher.log_probs(readings)
        result["teacher"].append(log_probs)
        data = nested(rows)
        if not scenario.get("engine_weights", False):
            data.pop("rollout_is_weights")
        lengths = [len(row["responses"]) for row in rows]
        own = sdpo_fields(lengths, turns, log_probs, mini_batch_of(len(rows), ranks, size))
        topk = section.sdpo.level == "topk"
        if topk:
            own = entry_fields(section.sdpo, scenario, worker, rows, turns, mini_batch_of(len(rows), ranks, size))
        for name in own.keys():  # noqa: SIM118
            data[name] = own[name]
        part = Group.part(data)
        options = {} if "rate" not in scenario else {EMA_RATE: scenario["rate"]}
        tu.assign_non_tensor(
            part, mini_batch_size=size, global_batch_size=size, epochs=1, seed=1, calculate_entropy=False,
            dataloader_kwargs={"shuffle": False}, temperature=scenario.get("temperature", 1.0),
            distillation_use_topk=topk, **options,
        )  # fmt: skip
        result["metrics"].append(tu.get(worker.train_mini_batch(part), "metrics"))
    result["parameters"] = {n: full(p) for n, p in worker.engine.module.named_parameters()}
    result["teacher"].append(teacher.log_probs(readings))
    result["after"] = {n: full(p) for n, p in worker.engine.module.named_parameters()}
    live = teacher_of({**scenario, "teacher": "live"}, worker)
    result["live"] = live.log_probs(readings)
    if "save" in scenario:
        worker.save_checkpoint(scenario["save"])
        result["files"] = sorted(p.name for p in Path(scenario["save"]).iterdir())
    result["rows"], result["readings"] = rows, readings
    return result


def full(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def record(engine, kept):
    """Keep the parameters and the gradient of every optimizer step."""
    step = engine.optimizer_step

    def recorded():
        named = dict(engine.module.named_parameters())
        kept.append(
            {
                "parameters": {n: full(p) for n, p in named.items()},
                "gradient": {n: full(p.grad) for n, p in named.items() if p.grad is not None},
            }
        )
        return step()

    engine.optimizer_step = recorded


def main(path, out):
    """Run all scenarios of a file with this number of ranks in one process."""
    results = {}
    for name, scenario in json.loads(Path(path).read_text()).items():
        try:
            results[name] = run(scenario)
        except Exception as error:
            if not scenario.get("may_fail"):
                raise
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    if torch.distributed.get_rank() == 0:
        torch.save(results, out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
