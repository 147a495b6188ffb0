"""What the verl adapter costs with channels 2 and 3 off: its loss and advantage functions, and whole steps, beside verl's.

    python benchmarks/verl_step.py                       # both parts, with a tiny model: about seven minutes on 2 cores
    python benchmarks/verl_step.py --part functions      # seconds

`functions`: verl's vanilla loss and ours (forward and backward) and verl's GRPO advantage and ours on the same fixed
tensors, interleaved, many repeats. The difference, times its calls in a step, is compared with the step; that is the
precise figure, because whole steps of a small machine scatter by more than 1 %.

`steps`: verl's real `main_ppo` on the CPU harness of tests/verl, the arms interleaved. `stock` is verl's own config
without any plugin, `composer_grpo` our loss and advantage on verl's own trainer, `composer_off` our trainer with
`sdpo` and `replay_dpo` at weight 0. Prints medians, ratios and the peak memory of a training process; nothing is
asserted. Needs an environment with verl (docs/how-to/verl.md).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "verl" / "cpu_host"))
ARMS = ("stock", "composer_grpo", "composer_off")
ACTOR = "actor_rollout_ref.actor"


def interleaved(calls: dict, repeats: int) -> dict[str, float]:
    """Return the median seconds of each call; they take turns so that the machine's mood hits all alike."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def functions(rows: int, width: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return median seconds per call, by function and side."""
    import numpy as np
    import torch
    import verl  # noqa: F401  registers our names
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
    from verl.workers.config import ActorConfig, PolicyLossConfig

    torch.set_num_threads(1)
    torch.manual_seed(0)
    log_probs = torch.randn(rows, width)
    old, mask = log_probs + 0.1 * torch.randn(rows, width), torch.ones(rows, width, dtype=torch.bool)
    advantages = torch.randn(rows, 1).expand(rows, width).clone()
    # verl's clip bounds, dual clip and reduction in ours too, so that both compute the same number
    same = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0, "log_ratio_clamp": 20.0}

    def loss(mode: str, options: dict):
        from composer_verl.options import ComposerPolicyLossConfig

        chosen = PolicyLossConfig(loss_mode=mode)
        if mode != "vanilla":
            chosen = ComposerPolicyLossConfig(loss_mode=mode, composer={"policy": options}, aggregation="host")
        config = ActorConfig(strategy="fsdp2", rollout_n=4, ppo_micro_batch_size_per_gpu=2, policy_loss=chosen)
        config.global_batch_info.update(dp_size=1, batch_num_tokens=rows * width, global_batch_size=rows)
        function = get_policy_loss_fn(mode)

        def call():
            leaf = log_probs.clone().requires_grad_()
            value, _ = function(
                old_log_prob=old, log_prob=leaf, advantages=advantages, response_mask=mask,
                loss_agg_mode="token-mean", config=config,
            )  # fmt: skip
            value.backward()

        return call

    rewards = torch.zeros(rows, width)
    rewards[:, -1] = torch.randn(rows)
    groups = np.array([str(i // 4) for i in range(rows)], dtype=object)

    def advantage(name: str):
        function = get_adv_estimator_fn(name)
        return lambda: function(token_level_rewards=rewards, response_mask=mask.float(), index=groups)

    return {
        "loss": interleaved({"verl": loss("vanilla", {}), "ours": loss("composer_grpo", same)}, repeats),
        "advantage": interleaved({"verl": advantage("grpo"), "ours": advantage("composer_grpo")}, repeats),
    }


class PeakMemory(threading.Thread):
    """Samples the resident memory of the training processes below this one."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.megabytes, self._done = 0.0, threading.Event()

    def run(self) -> None:
        import psutil

        while not self._done.wait(0.5):
            for process in psutil.Process().children(recursive=True):
                try:
                    if "WorkerDict" in "".join(process.cmdline()):
                        self.megabytes = max(self.megabytes, process.memory_info().rss / 2**20)
                except psutil.Error:
                    continue

    def stop(self) -> float:
        self._done.set()
        self.join()
        return self.megabytes


def arm(name: str, options: argparse.Namespace) -> tuple[list[dict], float]:
    """Run one arm; return the metrics of its steps without the first, and the peak memory in MB."""
    from cpu_run import run

    folder = Path(tempfile.mkdtemp(prefix="verl_step"))
    common = [f"{ACTOR}.ppo_micro_batch_size_per_gpu={options.micro}", "trainer.total_epochs=100"]
    memory = PeakMemory()
    memory.start()
    try:
        if name == "stock":
            own = ["algorithm.adv_estimator=grpo", "critic.enable=false"]
            code, output, steps = run(
                folder, *common, *own, steps=options.steps, recipe=None, VERL_USE_EXTERNAL_PLUGINS="none"
            )
        else:
            own = ["composer.policy.objective=grpo"]
            own += ["trainer.v1.trainer_mode=composer"] if name == "composer_off" else []
            code, output, steps = run(folder, *common, *own, steps=options.steps)
    finally:
        peak = memory.stop()
        shutil.rmtree(folder, ignore_errors=True)
    if code or len(steps) != options.steps:
        sys.exit(f"{name} failed:\n{output[-3000:]}")
    return steps[1:], peak


def whole_steps(options: argparse.Namespace) -> float:
    """Run the arms in turns, print the table, return stock's median seconds per step."""
    found: dict[str, list[dict]] = {name: [] for name in options.arms}
    peak = dict.fromkeys(options.arms, 0.0)
    for _ in range(options.rounds):
        for name in options.arms:
            steps, memory = arm(name, options)
            found[name] += steps
            peak[name] = max(peak[name], memory)
            seconds = [step["timing_s/step"] for step in steps]
            print(f"{name}: {', '.join(f'{s:.2f}' for s in seconds)} s", file=sys.stderr)

    def median(name: str, key: str) -> float:
        return statistics.median(step[key] for step in found[name])

    first = options.arms[0]
    print(f"| arm | s/step (median of {len(found[first])}) | vs {first} | update_actor s | vs {first} | peak MB |")
    print("|---|---|---|---|---|---|")
    for name in options.arms:
        cells = []
        for key in ("timing_s/step", "timing_s/update_actor"):
            cells += [f"{median(name, key):.3f}", f"{median(name, key) / median(first, key):.3f}"]
        print(f"| {name} | {' | '.join(cells)} | {peak[name]:.0f} |")
    return median(first, "timing_s/step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("functions", "steps", "both"), default="both")
    parser.add_argument("--steps", type=int, default=16, help="steps per run; the first of each is a warm-up")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--micro", type=int, default=4, help="rows per micro-batch")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rows", type=int, default=4, help="rows of the fixed tensors")
    parser.add_argument("--width", type=int, default=12, help="tokens per row of the fixed tensors")
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--step-seconds", type=float, help="a step to compare with, when none is run here")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    step = options.step_seconds if options.part == "functions" else whole_steps(options)
    if options.part == "steps":
        return
    calls = {"loss": 16 // options.micro, "advantage": 1}  # 4 prompts of 4 rollouts a step
    print(f"\n{options.rows} x {options.width} tokens, medians of {options.repeats}\n")
    print(
        "| function | verl ms | ours ms | difference ms | calls a step | share of a step |\n|---|---|---|---|---|---|"
    )
    for name, sides in functions(options.rows, options.width, options.repeats).items():
        more = sides["ours"] - sides["verl"]
        share = f"{100 * more * calls[name] / step:.3f} %" if step else "-"
        print(
            f"| {name} | {1e3 * sides['verl']:.3f} | {1e3 * sides['ours']:.3f} | {1e3 * more:.3f} | {calls[name]} | {share} |"
        )


if __name__ == "__main__":
    main()
