"""Time of one training step on TRL: ours with sdpo, stock GRPOTrainer, and TRL's experimental SDPOTrainer.

    python benchmarks/trl_step.py --steps 3

All three take the same model, prompts, seed, rollout and completion lengths, in one run, interleaved so that the
machine's mood hits all alike. The sdpo arms share mode (`--level`), teacher kind (ema) and the number of hinted
rows (all of them). Rollouts are forced to full length. Prints medians, ratios and peak memory of each arm's
process; nothing is asserted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import ClassVar

ARMS = ("stock", "ours_host", "ours", "ours_sdpo", "trl_sdpo")
LEVELS = {"full": "full_logits", "topk": "topk_logits", "sampled": "sampled_token"}


def rows(count: int, tokenizer, prompt_tokens: int) -> list[dict]:
    """Prompts of about `prompt_tokens` tokens, each with a hint."""
    filler = "The build log says that the module was compiled and the tests were started. " * 200
    ids = tokenizer(filler, add_special_tokens=False)["input_ids"]
    hint = "The file has not been read yet. Read it first, then edit it."
    text = [tokenizer.decode(ids[i : i + prompt_tokens - 12]) for i in range(count)]
    return [
        {"prompt": [{"role": "user", "content": t}], "hint": hint, "privileged_context": hint} for t in text
    ]  # fmt: skip


def reward(completion_ids, **_):
    """Any spread will do: distinct tokens per token."""
    return [len(set(ids)) / len(ids) for ids in completion_ids]


def run_arm(options: argparse.Namespace) -> None:
    """Run one arm in this process and print its figures as JSON."""
    import resource

    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from composer_plugins.models.loading import load_model
    from composer_plugins.models.resolve import resolve_model
    from composer_plugins.models.toolcalls import install_tool_template

    torch.set_num_threads(options.threads)
    model, tokenizer = load_model(resolve_model("smollm2-135m-instruct"))
    install_tool_template(tokenizer)
    tokenizer.padding_side = "left"
    n = options.completion_tokens
    common = dict(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=options.rollouts, num_generations=4,
        max_completion_length=n, max_steps=options.steps, learning_rate=1e-6, report_to="none", save_strategy="no",
        logging_steps=1000, use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False, seed=1,
        generation_kwargs={"min_new_tokens": n},
    )  # fmt: skip
    data = Dataset.from_list(rows(8, tokenizer, options.prompt_tokens))
    sdpo = {"weight": 0.5, "level": options.level, "top_k": 100, "hint": {"sources": ["recorded"]}}
    composer = {
        "ours_host": {"policy": {"objective": "host"}},
        "ours": {"policy": {"objective": "dr_grpo"}},
        "ours_sdpo": {"policy": {"objective": "dr_grpo"}, "sdpo": sdpo},
    }
    if options.arm == "stock":
        trainer = GRPOTrainer(
            model,
            reward,
            GRPOConfig(**common, loss_type="dr_grpo", scale_rewards="none"),
            data,
            processing_class=tokenizer,
        )
    elif options.arm == "trl_sdpo":
        from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

        args = SDPOConfig(
            **common, distillation_weight=0.5, distillation_mode=LEVELS[options.level], distillation_topk=100,
            distillation_add_tail=True, teacher_model_kind="ema", include_environment_feedback=True,
            use_successful_as_teacher=False, max_prompt_length=None, loss_type="dr_grpo", scale_rewards="none",
        )  # fmt: skip
        trainer = SDPOTrainer(model, reward, args=args, train_dataset=data, processing_class=tokenizer)
    else:
        from composer_trl import ComposerGRPOConfig, ComposerGRPOTrainer

        args = ComposerGRPOConfig(**common, composer=composer[options.arm])
        trainer = ComposerGRPOTrainer(model, reward, args, data, processing_class=tokenizer)

    class Clock(TrainerCallback):
        marks: ClassVar[list[float]] = []

        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.marks.append(time.perf_counter())

    clock, begin = Clock(), time.perf_counter()
    trainer.add_callback(clock)
    trainer.train()
    ends = [begin, *clock.marks]
    seconds = [b - a for a, b in itertools.pairwise(ends)][1:] or [ends[-1] - begin]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("RESULT " + json.dumps({"arm": options.arm, "seconds": seconds, "peak_mb": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="steps per round; the first of each is a warm-up")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--completion-tokens", type=int, default=48)
    parser.add_argument("--level", choices=sorted(LEVELS), default="full")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        run_arm(options)
        return
    found: dict[str, list[float]] = {arm: [] for arm in options.arms}
    peak: dict[str, float] = {}
    for _ in range(options.rounds):
        for arm in options.arms:
            output = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--arm", arm], capture_output=True, text=True
            )
            lines = [line for line in output.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                sys.exit(f"{arm} failed:\n{output.stderr[-3000:]}")
            result = json.loads(lines[-1].removeprefix("RESULT "))
            found[arm] += result["seconds"]
            peak[arm] = max(peak.get(arm, 0), result["peak_mb"])
            print(f"{arm}: {', '.join(f'{s:.1f}' for s in result['seconds'])} s", file=sys.stderr)
    medians = {arm: statistics.median(seconds) for arm, seconds in found.items()}
    print(f"{options.rollouts} x ({options.prompt_tokens} + {options.completion_tokens}) tokens, level {options.level}")
    print("| arm | s/step (median) | vs stock | vs trl_sdpo | peak MB |\n|---|---|---|---|---|")
    for arm, seconds in medians.items():
        ratios = [f"{seconds / medians[base]:.2f}" if base in medians else "-" for base in ("stock", "trl_sdpo")]
        print(f"| {arm} | {seconds:.2f} | {ratios[0]} | {ratios[1]} | {peak[arm]:.0f} |")


if __name__ == "__main__":
    main()
