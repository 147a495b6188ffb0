"""Run verl's own `main_ppo` on this machine's CPU: command lines, and what a run printed and measured.

Imports nothing of verl: a test process asks a child for the settings.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

CPU_HOST = Path(__file__).parent
RECIPES = CPU_HOST.parents[2] / "recipes" / "verl"
#: Words that the tiny tokenizer knows.
PAIRS = [("say red please", "red", "two cat"), ("say a number", "one two", "dog"), ("the color", "green", "dog dog"),
         ("say blue please", "blue blue", "cat"), ("a cat", "cat", "number number red"), ("say one", "one", "please")]  # fmt: skip
#: What the recipes ask of a user, for the tiny run: single-turn answers with a reward that says what was wrong.
TINY = [
    "actor_rollout_ref.rollout.agent.default_agent_loop=single_turn_agent",
    "actor_rollout_ref.rollout.multi_turn.enable=false", "actor_rollout_ref.rollout.multi_turn.function_tool_path=null",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
    "reward.custom_reward_function.name=compute_score_with_feedback", "++composer.sdpo.denominator_floor=1",
]  # fmt: skip


def variables(*paths: Path) -> dict[str, str]:
    """The environment of a run; `paths` come before the CPU host on PYTHONPATH."""
    return {
        **os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*paths, CPU_HOST))), "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": "composer_cpu_host", "OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0",
        "RAY_memory_monitor_refresh_ms": "0", "RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip


def settings(folder: Path, *, ranks: int = 1, steps: int = 3) -> list[str]:
    """`cpu_overrides`, which also writes the tiny model and its data into `folder`."""
    arguments = f"pathlib.Path({str(folder)!r}), ranks={ranks}, steps={steps}"
    code = f"import pathlib; from composer_cpu_host.overrides import cpu_overrides; print(*cpu_overrides({arguments}), sep=chr(10))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=variables())
    return [line for line in done.stdout.splitlines() if re.match(r"\+?[a-z_]+\.", line)]


def command(*overrides: str, recipe: str = "composer_policy", recipes: Path = RECIPES) -> list[str]:
    """The documented command line of a recipe."""
    main = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-dir", str(recipes), "--config-name", recipe]
    return [*main, *overrides]


def metrics_of(folder: Path) -> list[dict]:
    """The metrics of every step that the run in `folder` wrote."""
    file = folder / "metrics.jsonl"
    return [json.loads(line)["data"] for line in file.read_text().splitlines()] if file.exists() else []


def run(folder: Path, *overrides, ranks=1, steps=3, recipe="composer_policy", paths=(), timeout=600, **environment):
    """Run `main_ppo` on a recipe (or on verl's `ppo_trainer` with recipe=None); (exit code, output, metrics per step)."""
    line = command(*settings(folder, ranks=ranks, steps=steps), *overrides, f"hydra.run.dir={folder / 'hydra'}",
                   recipe=recipe or "ppo_trainer")  # fmt: skip
    if recipe is None:
        line = [line[0], "-m", "verl.trainer.main_ppo", *line[7:]]
    environment = {**variables(*paths), "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"), **environment}
    output = folder / "output.log"
    with output.open("w") as log:
        process = subprocess.Popen(
            line, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=folder, start_new_session=True
        )
        try:
            code = process.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(output.read_text()[-4000:]) from None
    return code, output.read_text(), metrics_of(folder)


def write_pairs(path: Path) -> Path:
    """Save pairs in words that the tiny tokenizer knows."""
    from composer_plugins.traces.schema import Message, Pair, Provenance, SourceRef
    from composer_plugins.traces.store import Manifest, write_stage

    records = [
        Pair(
            id=f"p{i}", state_id=f"s{i}", messages=[Message(role="user", content=context)],
            chosen=Message(role="assistant", content=chosen), rejected=Message(role="assistant", content=rejected),
            provenance=Provenance(rule="x", chosen_by=[], rejected_by=[], source_ref=SourceRef(file="f", line=1)),
        )
        for i, (context, chosen, rejected) in enumerate(PAIRS)
    ]  # fmt: skip
    write_stage(path, records, Manifest(stage="pairs", record="Pair", written=0))
    return path


def channel_overrides(folder: Path, *, policy: bool = True, sdpo: bool = True, replay_dpo: bool = True) -> list[str]:
    """Settings of `composer_all` on top of `settings`, with the channels on or off."""
    return [
        *TINY, f"++composer.policy.weight={float(policy)}", f"++composer.sdpo.weight={0.1 if sdpo else 0.0}",
        f"++composer.replay_dpo.weight={0.1 if replay_dpo else 0.0}", "++composer.replay_dpo.pairs_per_step=3",
        f"composer.replay_dpo.pairs={write_pairs(folder / 'pairs.jsonl')}", "++composer.replay_dpo.max_length=64",
        f"trainer.rollout_data_dir={folder / 'rollouts'}",
    ]  # fmt: skip
