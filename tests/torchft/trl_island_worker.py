"""One island of TRL (or stock transformers) training on a tiny Llama; several runs in turn, so that imports cost once.

Started by test_outer_trl.py with one JSON argument: this island's number, a folder and the runs. Per run it writes
`<name>-<index>.pt`: parameters before and after every sync, learning rates by step, and hashes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "trl"))

import torch
from composer_torchft.fingerprints import values_hash
from composer_trl import ComposerGRPOConfig, ComposerGRPOTrainer
from composer_trl.outer import OuterLoopCallback, equal_adapter
from conftest import build_model, build_tokenizer  # of tests/trl
from datasets import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from composer_plugins.config import OuterConfig

settings = json.loads(sys.argv[1])
INDEX, FOLDER = settings["index"], Path(settings["folder"])
WORDS = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff", "ggggggg", "hhhhhhhh", "iiiiiiiii"]


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters() if p.requires_grad])


class Recorder(TrainerCallback):
    """Stands before the outer loop's callback, so its hook sees the parameters just before a sync."""

    def __init__(self, run: dict) -> None:
        self.run, self.before, self.rounds = run, None, 0
        self.found: dict = {"local": [], "global": [], "before": [], "after": [], "rates": {}, "rounds": []}

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **_):
        self.model = model
        self.found["start"] = flat(model)

        def hook(*_):
            self.before = flat(model), values_hash(model.parameters())

        getattr(optimizer, "optimizer", optimizer).register_step_post_hook(hook)

    def on_step_begin(self, args, state, control, optimizer=None, **_):
        self.found["rates"][state.global_step] = optimizer.param_groups[0]["lr"]

    def on_step_end(self, args, state, control, **_):
        log = self.outer.loop.log.rounds
        if len([r for r in log if not r.attach]) > self.rounds:
            self.rounds += 1
            self.found["local"].append(self.before[0])
            self.found["before"].append(self.before[1])
            self.found["global"].append(flat(self.model))
            self.found["after"].append(values_hash(self.model.parameters()))
            self.found["rounds"].append((state.global_step, log[-1].outer_step, log[-1].participants))
        if state.global_step == self.run.get("wait_at"):
            (FOLDER / "waiting").touch()
            while not (FOLDER / "late").exists():
                time.sleep(0.02)
            time.sleep(0.5)


def arguments(run: dict, kind, **more):
    given = dict(
        output_dir=str(FOLDER / f"{run['name']}-{INDEX}"), per_device_train_batch_size=4, report_to="none",
        save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False, seed=7 + INDEX,
        learning_rate=2e-3, logging_steps=1, max_steps=run["steps"],
    )  # fmt: skip
    return kind(**{**given, **more, **run.get("args", {})})


def outer(run: dict) -> dict:
    limits = {"quorum": 90, "allreduce": 20, "connect": 20}
    return {"lighthouse": run["address"], "island": f"isl-{INDEX}", "timeouts": limits, **run["outer"]}


def grpo(run: dict, tokenizer, recorder: Recorder):
    words = WORDS[INDEX::3]  # disjoint data
    rows = [{"prompt": [{"role": "user", "content": f"count the letters in {w}"}]} for w in words]

    def reward(completion_ids, **_):
        return [(sum(ids) % 13) / 13 + 0.01 * i for i, ids in enumerate(completion_ids)]

    composer = {**run.get("composer", {}), "outer": outer(run)}
    args = arguments(run, ComposerGRPOConfig, num_generations=4, max_completion_length=8, composer=composer)
    model = build_model(tokenizer, seed=run.get("weights", 0))
    if run.get("lora"):
        from peft import LoraConfig

        torch.manual_seed(100 + INDEX)
        model = equal_adapter(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = ComposerGRPOTrainer(
        model, reward, args, Dataset.from_list(rows), processing_class=tokenizer, callbacks=[recorder]
    )
    recorder.outer = trainer.outer_loop
    return trainer


def stock(run: dict, tokenizer, recorder: Recorder):
    """transformers' own Trainer; the outer loop is one callback."""
    ids = torch.randint(3, len(tokenizer), (16, 12), generator=torch.Generator().manual_seed(INDEX))
    rows = [{"input_ids": r.tolist(), "labels": r.tolist()} for r in ids]
    callback = OuterLoopCallback(OuterConfig(**outer(run)))
    recorder.outer = callback
    return Trainer(
        build_model(tokenizer, seed=0), arguments(run, TrainingArguments), train_dataset=Dataset.from_list(rows),
        callbacks=[recorder, callback],
    )  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    for run in settings["runs"]:
        if run["islands"] <= INDEX:
            continue
        recorder = Recorder(run)
        trainer = (stock if run.get("stock") else grpo)(run, tokenizer, recorder)
        trainer.remove_callback(PrinterCallback)
        if run.get("late") == INDEX:
            while not (FOLDER / "waiting").exists():
                time.sleep(0.02)
            (FOLDER / "late").touch()
        frozen = values_hash(p for p in trainer.model.parameters() if not p.requires_grad)
        resume = run.get("resume")
        trainer.train(resume_from_checkpoint=str(FOLDER / resume.replace("INDEX", str(INDEX))) if resume else None)
        model = trainer.accelerator.unwrap_model(trainer.model)
        trainer.save_model(str(FOLDER / f"{run['name']}-{INDEX}" / "model"))
        found = recorder.found
        for key in ("local", "global"):
            found[key] = torch.stack(found[key])
        found["end"] = flat(model)
        found["logged"] = [e["outer/step"] for e in trainer.state.log_history if "outer/step" in e]
        found["bytes"] = [r.bytes for r in recorder.outer.loop.log.rounds]
        found["frozen"] = [frozen, values_hash(p for p in model.parameters() if not p.requires_grad)]
        found["values"] = sum(p.numel() for p in model.parameters())
        found["attach"] = [r.outer_step for r in recorder.outer.loop.log.rounds if r.attach]
        torch.save(found, FOLDER / f"{run['name']}-{INDEX}.pt")


main()
os._exit(0)  # torchft's threads must not hold the process
