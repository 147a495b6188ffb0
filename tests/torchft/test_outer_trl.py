"""Islands of real GRPO training (a tiny model, real generation) as real processes, and stock transformers' Trainer.

Three processes do all runs in turn, so that the imports cost once; the tests look at what they recorded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL: pip install composer-plugins[trl]")

from composer_torchft.doctor import LighthouseLimits
from composer_torchft.lighthouse import Lighthouse
from harness_torchft import reference

from composer_plugins.errors import ConfigError, OuterLoopError

WORKER = Path(__file__).with_name("trl_island_worker.py")
EVERY_TWO = {"sync_every": 2}
# what a resumed GRPO run repeats exactly: neither TRL's sampling nor its shuffling over epochs
GREEDY = {"top_k": 1, "shuffle_dataset": False, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
RUNS = [
    {"name": "two", "islands": 2, "steps": 16, "outer": EVERY_TWO},
    {"name": "three", "islands": 3, "steps": 16, "outer": EVERY_TWO, "composer": {"policy": {"objective": "host"}}},
    {"name": "whole", "islands": 2, "steps": 9, "outer": {"sync_every": 3},
     "args": {**GREEDY, "save_strategy": "steps", "save_steps": 4}},
    {"name": "resumed", "islands": 2, "steps": 9, "outer": {"sync_every": 3}, "args": GREEDY,
     "resume": "whole-INDEX/checkpoint-4"},
    {"name": "stock", "islands": 2, "steps": 7, "outer": EVERY_TWO, "stock": True},
    {"name": "lora", "islands": 2, "steps": 16, "outer": EVERY_TWO, "lora": True, "args": {"learning_rate": 1e-2}},
    {"name": "late", "islands": 3, "steps": 16, "outer": EVERY_TWO, "late": 2, "wait_at": 5},
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Everything the islands recorded: `runs.two[0]` is island 0 of the first run."""
    folder = tmp_path_factory.mktemp("trl_islands")
    houses = [
        Lighthouse("127.0.0.1:0", LighthouseLimits(2.0, 3.0, 2 if "late" in run else run["islands"])) for run in RUNS
    ]
    plans = [{**run, "address": house.address} for run, house in zip(RUNS, houses, strict=True)]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CI": "true",
    }  # fmt: skip
    processes = []
    for i in range(3):
        mine = [{**p, "weights": 5} if p.get("late") == i else p for p in plans]  # the late one has other weights
        argument = json.dumps({"index": i, "folder": str(folder), "runs": mine})
        with (folder / f"{i}.out").open("wb") as out:
            processes.append(
                subprocess.Popen([sys.executable, str(WORKER), argument], env=environment, stdout=out, stderr=out)
            )
    try:
        for i, process in enumerate(processes):
            assert process.wait(400) == 0, (folder / f"{i}.out").read_text(errors="replace")[-4000:]
    finally:
        for process in processes:
            process.kill()
        for house in houses:
            house.close()
    found = {run["name"]: [torch.load(folder / f"{run['name']}-{i}.pt") for i in range(run["islands"])] for run in RUNS}
    return SimpleNamespace(**found, folder=folder)


def outer_callback(folder: Path, step: int = 0, **arguments):
    """What the Trainer hands to the callback when training begins."""
    from composer_trl.outer import OuterLoopCallback
    from transformers import TrainerState, TrainingArguments

    from composer_plugins.config import OuterConfig

    args = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", **arguments)
    state = TrainerState(global_step=step, max_steps=8)
    model = torch.nn.Linear(2, 2)
    callback = OuterLoopCallback(OuterConfig(sync_every=2))
    return lambda: callback.on_train_begin(
        args, state, None, model=model, optimizer=torch.optim.AdamW(model.parameters())
    )


def test_the_best_checkpoint_at_the_end_is_refused(tmp_path):
    begin = outer_callback(
        tmp_path, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", save_steps=2, eval_steps=2
    )
    with pytest.raises(ConfigError, match="unsynced weights over the global ones"):
        begin()


def test_a_checkpoint_without_the_outer_state_is_refused(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(OuterLoopError, match=r"needs the outer state, expected at .*checkpoint-4.outer\.pt"):
        outer_callback(tmp_path, step=4)()


def test_a_fresh_adapter_is_the_same_on_islands_with_different_seeds():
    peft = pytest.importorskip("peft")
    from composer_trl.outer import equal_adapter

    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = torch.nn.Sequential()
        model.add_module("part", torch.nn.Linear(8, 8))
        state = torch.get_rng_state()
        adapted = equal_adapter(model, peft.LoraConfig(r=4, target_modules=["part"]))
        found.append(next(p.detach() for n, p in adapted.named_parameters() if "lora_A" in n))
        assert torch.equal(state, torch.get_rng_state())  # the island's own random numbers go on
    assert torch.equal(*found) and found[0].abs().sum() > 0


@pytest.mark.parametrize("name", ["two", "three", "lora"])
def test_hashes_differ_before_every_sync_and_are_equal_after_it(runs, name):
    islands = getattr(runs, name)
    assert [len(i["before"]) for i in islands] == [8] * len(islands)
    for before, after in zip(zip(*(i["before"] for i in islands)), zip(*(i["after"] for i in islands)), strict=True):  # noqa: B905
        assert len(set(before)) == len(islands) and len(set(after)) == 1
    for island in islands:
        assert [r[1:] for r in island["rounds"]] == [(step, len(islands)) for step in range(1, 9)]
        assert [r[0] for r in island["rounds"]] == list(range(2, 17, 2))
        assert island["logged"][-1] == 8.0  # the figures are in the Trainer's log
    for number in range(len(islands)):  # the table at the end, of each island's main process
        assert f"outer loop of island isl-{number}" in (runs.folder / f"{number}.out").read_text()


@pytest.mark.parametrize("name", ["two", "three", "stock", "lora"])
def test_every_outer_step_equals_the_float64_reference(runs, name):
    islands = getattr(runs, name)
    start = islands[0]["start"].numpy()
    expected = reference(torch.stack([i["local"] for i in islands], dim=1).numpy(), start)
    assert len(expected) >= (3 if name == "stock" else 8)
    for island in islands:
        worst = abs(island["global"].numpy() - expected).max()
        assert worst <= 1e-6, worst


def test_a_run_resumed_in_mid_round_is_the_one_that_was_not_interrupted(runs):
    for whole, resumed in zip(runs.whole, runs.resumed, strict=True):
        assert [r[:2] for r in resumed["rounds"]] == [(6, 2), (9, 3)]
        torch.testing.assert_close(resumed["local"], whole["local"][1:], rtol=0, atol=1e-7)
        torch.testing.assert_close(resumed["global"], whole["global"][1:], rtol=0, atol=1e-7)
        # it began where the island stood, which is not where the islands had last met
        assert not torch.equal(resumed["start"], whole["global"][0])


def test_a_late_joiner_takes_over_weights_step_and_learning_rate(runs):
    donor, late = runs.late[0], runs.late[2]
    assert not torch.equal(late["start"], donor["start"])  # it came with other weights
    assert len(late["attach"]) == 1 and late["attach"][0] >= 3
    first, last = min(s for s in late["rates"] if s), max(late["rates"])
    assert first == 2 * late["attach"][0] and last == 15
    for step in range(first, last + 1):
        assert late["rates"][step] == pytest.approx(donor["rates"][step], rel=1e-12), step
    rounds = dict(zip([r[1] for r in donor["rounds"]], donor["after"], strict=True))
    for (step, outer_step, islands), after in zip(late["rounds"], late["after"], strict=True):
        assert islands == 3 and step == 2 * outer_step and after == rounds[outer_step]


def test_of_a_lora_only_the_adapter_travels(runs):
    """Islands have other seeds, and yet the same fresh adapter; the base model is neither sent nor moved."""
    assert len({hash for island in runs.lora for hash in island["frozen"]}) == 1  # before and after, on both
    for island in runs.lora:
        adapter = len(island["start"])
        assert torch.equal(island["start"], runs.lora[0]["start"]) and adapter < island["values"] / 2
        assert island["bytes"] == [4 * adapter] * 8  # fp32
        assert not torch.equal(island["end"], island["start"])


@pytest.mark.parametrize("name", ["two", "three", "whole", "resumed", "stock", "late", "lora"])
def test_what_is_saved_at_the_end_is_the_global_model(runs, name):
    """`stock` runs 7 steps and syncs every 2: its last step is given up."""
    from safetensors.torch import load_file

    islands = getattr(runs, name)
    file = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
    saved = [load_file(runs.folder / f"{name}-{i}" / "model" / file) for i in range(len(islands))]
    for other in saved[1:]:
        assert all(torch.equal(saved[0][k], other[k]) for k in saved[0])
    for island in islands:
        assert torch.equal(island["end"], island["global"][-1])
    assert sum(t.numel() for t in saved[0].values()) >= islands[0]["end"].numel()
