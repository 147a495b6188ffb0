"""verl's tool agent loop and its rollout correction in real runs of its v1 trainer, with our channels on.

    OMP_NUM_THREADS=1 python -m pytest -m slow tests/verl/test_verl_agent_run.py

About a minute and a half a run on 2 cores.
"""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("verl") is None:
    pytest.skip(
        "verl is not installed: it needs an environment of its own (docs/how-to/verl.md)", allow_module_level=True
    )

sys.path.insert(0, str(Path(__file__).parent / "cpu_host"))
from cpu_run import channel_overrides, run, variables

from composer_plugins.traces.schema import Status, Trace
from composer_plugins.traces.store import read_manifest, read_stage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TOOLS = '''
from verl.tools.function_tool import function_tool

@function_tool
def read_file(path: str) -> str:
    """Read a file.

    Args:
        path: the file.
    """
    if path == "missing.py":
        raise FileNotFoundError(2, "No such file or directory", path)
    return "content of " + path
'''
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):
    return float("content of a.py" in solution_str)
"""


def call(path):
    return f'<tool_call>\n{{"name": "read_file", "arguments": {{"path": "{path}"}}}}\n</tool_call>'


FAILS, WORKS = call("missing.py"), call("a.py")


def test_hints_at_the_turn_that_failed_in_verls_own_tool_agent(tmp_path):
    """`composer_sdpo` as it is: tool agent, EMA teacher, the tool's error as source; two ranks."""
    code = "import pathlib, sys; from composer_cpu_host.tiny import write_byte_model as w; w(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "bytes")], check=True, env=variables())
    (tmp_path / "tools.py").write_text(TOOLS)
    (tmp_path / "reward.py").write_text(REWARD)
    rollout = "actor_rollout_ref.rollout"
    code, output, steps = run(
        tmp_path, f"actor_rollout_ref.model.path={tmp_path / 'bytes'}",
        f"{rollout}.multi_turn.function_tool_path={tmp_path / 'tools.py'}",
        f"reward.custom_reward_function.path={tmp_path / 'reward.py'}", "reward.custom_reward_function.name=compute_score",
        "composer.sdpo.hint.sources=[rollout]", "composer.sdpo.denominator_floor=1", "data.max_prompt_length=1000",
        "data.max_response_length=400", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
        f"trainer.rollout_data_dir={tmp_path / 'rollouts'}",
        recipe="composer_sdpo", ranks=2, steps=2, COMPOSER_CPU_FIRST=json.dumps([FAILS, WORKS]),
    )  # fmt: skip
    assert code == 0, output[-6000:]
    assert len(steps) == 2
    for number, step in enumerate(steps, 1):
        traces = list(read_stage(tmp_path / "rollouts" / "traces" / f"step_{number:06d}.jsonl", Trace))
        assert len(traces) == 16 and all(len(trace.steps) == 2 for trace in traces)
        failed = [trace for trace in traces if trace.steps[0].status is Status.ERROR]
        assert len(failed) == 8
        for trace in traces:
            result, bad = trace.steps[0].results[0], trace in failed
            assert trace.action_of(trace.steps[0]).tool_calls[0].arguments == {"path": "missing.py" if bad else "a.py"}
            assert result.content.startswith("Error executing tool 'read_file'" if bad else "content of a.py")
            assert result.error_class == ("file_not_found" if bad else None)
            assert trace.reward == float(not bad) and all(s.history_exact for s in trace.steps)
            assert [m.role for m in trace.state_of(trace.steps[1])][-3:] == ["user", "assistant", "tool"]
        assert step["actor/sdpo/error_turns"] == step["actor/sdpo/hinted_turns"] == 8
        # a token per byte: the self-teacher scored the failed calls with their ends, and no other token
        assert step["actor/sdpo/tokens"] == 8 * (len(FAILS) + 1)
        assert 0 < step["actor/sdpo/active_tokens"] <= step["actor/sdpo/tokens"]
        assert step["actor/sdpo/loss"] != 0 and step["actor/grad_norm"] > 0
        assert step["training/rollout_probs_diff_max"] < 1e-5


def test_rollout_correction_reaches_rollouts_and_no_pair(tmp_path):
    """An engine whose log-probs are off: verl's weights multiply policy and sdpo, and leave DPO's first loss at ln 2."""
    own = channel_overrides(tmp_path)
    correction = (
        "algorithm.rollout_correction.rollout_is=token",
        "algorithm.rollout_correction.rollout_is_threshold=1.5",
    )
    code, output, steps = run(
        tmp_path, *own, *correction, "++composer.sdpo.is_clip=null", "actor_rollout_ref.actor.optim.lr=1e-12",
        recipe="composer_all", steps=2, COMPOSER_CPU_NOISE="0.4",
    )  # fmt: skip
    assert code == 0, output[-6000:]
    for step in steps:
        assert step["training/rollout_probs_diff_max"] > 0.01
        weight = step["rollout_corr/rollout_is_mean"]
        assert 0.8 < weight < 1.2 and step["rollout_corr/rollout_is_max"] == pytest.approx(1.5)
        # channel 2 has the same engine correction, over its own tokens: here those of all rollouts that are not all colors
        assert step["actor/sdpo/is_weight"] == pytest.approx(weight, rel=0.05) and step["actor/sdpo/is_weight"] != 1
        # the weights stand still, so pairs are at the reference: any weight on their tokens would show
        assert step["actor/replay_dpo/loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert step["actor/replay_dpo/pairs"] == 3 and abs(step["actor/replay_dpo/margin"]) < 1e-6
    manifest = read_manifest(tmp_path / "rollouts" / "traces" / "step_000001.jsonl")
    assert manifest.read == manifest.used == 16
