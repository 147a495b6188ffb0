"""Held-out evidence: does distilling from a hint-reading self help on prompts that were never trained on?

    python -m benchmarks.held_out.run --seeds 8 --out benchmarks/held_out/results.json

For every seed: draw the task, pre-train the base model, measure what hints are worth to it, then train each arm
from that same base with the same number of rollouts, and measure on held-out prompts. Prints the tables, writes
every number to `--out` and, with `--readme`, the tables into README.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.held_out.arms import ARMS, Training

for _name, _value in {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CI": "true"}.items():
    os.environ.setdefault(_name, _value)


@dataclass(frozen=True)
class Settings:
    """The size of the experiment.

    Args:
        training: what all arms share.
        pretraining_steps: of the base model, 64 sequences each.
        per_name: held-out prompts per name (12 names).
        samples: completions per held-out prompt for the sampled figure.
        curve: how often the accuracy is measured on the way.
    """

    training: Training = field(default_factory=Training)
    pretraining_steps: int = 800
    per_name: int = 25
    samples: int = 4
    curve: int = 4


def make_base(seed: int, settings: Settings, folder: Path) -> dict[str, Any]:
    """Pre-train the base model of a seed, save it, and return its accuracy without and with each kind of hint."""
    from benchmarks.held_out.base_model import pretrain
    from benchmarks.held_out.measure import accuracy
    from benchmarks.held_out.task import make_task

    _one_thread()
    task = make_task(seed)
    model, tokenizer = pretrain(task, seed=seed, steps=settings.pretraining_steps)
    model.save_pretrained(folder / str(seed))
    measured = {
        feedback or "none": accuracy(
            model, tokenizer, task, per_name=settings.per_name, samples=settings.samples, feedback=feedback, seed=seed
        )
        for feedback in (None, "informative", "uninformative", "random")
    }
    return measured


def run_arm(seed: int, arm: str, settings: Settings, folder: Path) -> dict[str, Any]:
    """Train one arm from the base model of a seed; return its final accuracy, its curve and its totals."""
    from transformers import LlamaForCausalLM

    from benchmarks.held_out.arms import train
    from benchmarks.held_out.base_model import make_tokenizer
    from benchmarks.held_out.measure import accuracy
    from benchmarks.held_out.task import make_task

    _one_thread()
    task, tokenizer, training = make_task(seed), make_tokenizer(), settings.training
    model = LlamaForCausalLM.from_pretrained(folder / str(seed))
    measured_at = {training.steps * i // settings.curve for i in range(1, settings.curve + 1)}
    curve: dict[str, Any] = {}

    def on_step(step: int) -> None:
        if step in measured_at:
            curve[str(step)] = accuracy(
                model, tokenizer, task, per_name=settings.per_name, samples=settings.samples, seed=seed
            )

    started = time.perf_counter()
    totals = train(model, tokenizer, task, ARMS[arm], training, seed=seed, on_step=on_step)
    if totals["rollouts"] != training.rollouts:
        raise RuntimeError(f"{arm} sampled {totals['rollouts']} completions, not the {training.rollouts} all arms get.")
    return {"final": copy.deepcopy(curve[str(training.steps)]), "curve": curve, **totals,
            "seconds": round(time.perf_counter() - started, 1)}  # fmt: skip


def experiment(seeds: list[int], arms: list[str], settings: Settings, *, jobs: int) -> dict[str, Any]:
    """Run every arm on every seed in `jobs` processes of one thread each; return what `results.json` holds."""
    started = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    trained = [arm for arm in arms if arm != "none"]
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(jobs, mp_context=context) as pool:
        folder = Path(name)
        futures = [pool.submit(make_base, seed, settings, folder) for seed in seeds]
        base = {}
        for seed, future in zip(seeds, futures, strict=True):
            base[str(seed)] = future.result()
            _say(f"seed {seed}: base {_short(base[str(seed)]['none'])}, with hint "
                 f"{_short(base[str(seed)]['informative'])}", started)  # fmt: skip
        runs: dict[str, Any] = {arm: {} for arm in arms}
        if "none" in runs:
            runs["none"] = {
                s: {"final": b["none"], "curve": {}, "rollouts": 0, "hinted_turns": 0} for s, b in base.items()
            }
        pending = {(s, a): pool.submit(run_arm, s, a, settings, folder) for s in seeds for a in trained}
        for (seed, arm), future in pending.items():
            runs[arm][str(seed)] = future.result()
            _say(f"seed {seed}: {ARMS[arm].label} {_short(runs[arm][str(seed)]['final'])}", started)
    return {
        "seeds": seeds,
        "rollouts": settings.training.rollouts,
        "settings": asdict(settings),
        "versions": versions(),
        "seconds": round(time.perf_counter() - started),
        "base": base,
        "runs": runs,
    }


def versions() -> dict[str, str]:
    """Return what the figures depend on."""
    packages = {name: version(name) for name in ("composer-plugins", "torch", "transformers", "trl")}
    return {"python": platform.python_version(), **packages, "machine": f"{platform.machine()}, CPU"}


def _one_thread() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)  # the processes share the cores, and sums keep their order
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _short(accuracy: dict[str, float]) -> str:
    return f"greedy {100 * accuracy['greedy']:.0f} %, sampled {100 * accuracy['sampled']:.0f} %"


def _say(text: str, started: float) -> None:
    print(f"[{time.perf_counter() - started:5.0f} s] {text}", file=sys.stderr, flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.held_out.run", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8, help="number of seeds, 2 to 20 (default 8)")
    parser.add_argument(
        "--first-seed", type=int, default=1, help="the seeds are this one and the following (default 1)"
    )
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="default: all")
    parser.add_argument("--steps", type=int, default=Training().steps, help="optimizer steps of each arm")
    parser.add_argument("--lr", type=float, default=Training().lr, help="learning rate of every arm")
    parser.add_argument("--sdpo-weight", type=float, default=Training().sdpo_weight, help="in the arms that have sdpo")
    parser.add_argument("--denominator-floor", type=int, default=0, help="sdpo.denominator_floor (default 0)")
    parser.add_argument("--teacher", default="ema", choices=["ema", "live", "reference"], help="sdpo.teacher.kind")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default 2)")
    parser.add_argument("--out", type=Path, help="write every number to this JSON file")
    parser.add_argument("--readme", type=Path, help="write the tables between the markers of this file")
    options = parser.parse_args(argv)
    if not 2 <= options.seeds <= 20:
        parser.error(f"--seeds must be 2 to 20 (an interval needs at least two), found {options.seeds}")
    if "grpo" not in options.arms or options.steps < 4 or options.jobs < 1:
        parser.error("--arms must hold grpo (differences are taken to it), --steps be 4 or more, --jobs 1 or more")
    return options


def main(argv: list[str] | None = None) -> None:
    """Run the experiment from the command line."""
    options = parse(argv)
    from benchmarks.held_out.report import render, write_section

    training = Training(
        steps=options.steps, lr=options.lr, sdpo_weight=options.sdpo_weight,
        denominator_floor=options.denominator_floor, teacher=options.teacher,
    )  # fmt: skip
    settings = Settings(training=training)
    seeds = list(range(options.first_seed, options.first_seed + options.seeds))
    results = experiment(seeds, options.arms, settings, jobs=options.jobs)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    section = render(results)
    if options.readme:
        write_section(options.readme, section)
    print(section)


if __name__ == "__main__":
    main()
