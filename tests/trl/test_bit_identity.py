"""With `policy: host` and the other channels off, our trainer is stock `GRPOTrainer`, bit for bit."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

#: Logged values that measure time: no two runs share them.
TIMINGS = ("runtime", "per_second", "step_time", "profiling/")
HOST = {"policy": {"objective": "host"}}
MODEL = "tiny-LlamaForCausalLM-3.2"


@pytest.fixture(scope="module")
def standins():
    spec = importlib.util.spec_from_file_location("trl_standins", Path(__file__).with_name("standins.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model_folder(standins, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    standins.save(MODEL, folder)
    return folder


def vowels(completions, **_):
    """A graded reward without a model: the share of vowels."""
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]


def run(side: str, folder: Path, standins, output: Path, section=None, peft=False, **options):
    """Train 3 optimizer steps; return (initial state, final state, logged metrics without timings)."""
    from composer_trl import ComposerGRPOConfig, ComposerGRPOTrainer
    from trl import GRPOConfig, GRPOTrainer

    values = {
        "output_dir": str(output / side), "max_steps": 3, "per_device_train_batch_size": 4, "num_generations": 4,
        "gradient_accumulation_steps": 2, "num_iterations": 2, "max_completion_length": 12, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False, "seed": 11,
    } | options  # fmt: skip
    keywords = {}
    if peft:
        from peft import LoraConfig

        keywords["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    config, trainer = (GRPOConfig, GRPOTrainer) if side == "stock" else (ComposerGRPOConfig, ComposerGRPOTrainer)
    if side != "stock":
        values["composer"] = HOST if section is None else section
    dataset = standins.load_dataset("trl-internal-testing/zen", "standard_prompt_only", split="train")
    made = trainer(str(folder), reward_funcs=vowels, args=config(**values), train_dataset=dataset, **keywords)
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    made.train()
    logs = [{k: v for k, v in e.items() if not any(t in k for t in TIMINGS)} for e in made.state.log_history]
    return before, made.model.state_dict(), logs


def equal(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"beta": 0.04, "loss_type": "grpo"}, id="reference-kl"),
        pytest.param({"importance_sampling_level": "sequence", "scale_rewards": "none"}, id="sequence-ratio"),
        pytest.param({"peft": True, "beta": 0.04}, id="lora"),
    ],
)
def test_host_policy_alone_is_stock(model_folder, standins, tmp_path, options):
    start, stock, stock_logs = run("stock", model_folder, standins, tmp_path, **options)
    our_start, ours, our_logs = run("composer", model_folder, standins, tmp_path, **options)
    assert equal(start, our_start)
    assert not equal(start, stock), "nothing was trained, so nothing was compared"
    assert equal(stock, ours)
    assert stock_logs == our_logs
    assert any(entry.get("reward_std", 0.0) > 0 for entry in stock_logs)


def test_a_composer_objective_is_not_stock(model_folder, standins, tmp_path):
    """The comparison above can fail: another objective leaves other parameters."""
    _, stock, _ = run("stock", model_folder, standins, tmp_path)
    _, ours, _ = run("composer", model_folder, standins, tmp_path, section={"policy": {"objective": "grpo"}})
    assert not equal(stock, ours)


def test_sdpo_without_hints_leaves_the_host_policy_alone(model_folder, standins, tmp_path):
    """The path with channels on (hidden states captured, terms added) keeps TRL's own gradient, bit for bit."""
    section = {**HOST, "sdpo": {"weight": 0.5}}
    _, stock, stock_logs = run("stock", model_folder, standins, tmp_path)
    _, ours, our_logs = run("composer", model_folder, standins, tmp_path, section=section)
    assert equal(stock, ours)
    for mine, theirs in zip(our_logs, stock_logs, strict=True):
        shared = {name: mine[name] for name in theirs}
        assert shared == theirs
