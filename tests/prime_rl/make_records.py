"""Writes tests/prime_rl/data/loss_inputs_<version>.json from a prime-rl source tree (Python 3.12, `make test-prime-rl`).

    python tests/prime_rl/make_records.py /path/to/prime-rl [--commit SHA] [--version NAME]

The samples are random; what is recorded is what prime-rl makes of them: its packer's micro-batches, the `LossInputs` that
its `compute_loss` hands to a loss (fields, dtypes, shapes, values), the token count that it divides by, and the loss and
gradient of its own loss functions on them. The tests without prime-rl read these files; none is written by hand.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tree", type=Path, help="prime-rl's source tree")
    parser.add_argument("--commit", help="commit of the tree; default: asked from git there")
    parser.add_argument("--version", help="name in the file; default: the tree's pyproject.toml")
    options = parser.parse_args()
    tree = options.tree.absolute()
    sys.path[:0] = [str(tree / "src"), *map(str, sorted(tree.glob("packages/*/src"))), str(HERE)]
    commit = options.commit or subprocess.check_output(["git", "-C", tree, "rev-parse", "HEAD"], text=True).strip()
    version = options.version or tomllib.loads((tree / "pyproject.toml").read_text())["project"]["version"]
    record = {"prime_rl": {"version": version, "commit": commit}, **steps()}
    target = HERE / "data" / f"loss_inputs_{version}.json"
    target.write_text(json.dumps(record, separators=(",", ":")) + "\n")
    print(f"{target.name}: {len(record['steps'])} steps, fields {', '.join(record['fields'])}")


def steps() -> dict:
    """All recorded steps of the version on the path."""
    import numpy as np
    import prime_rl.trainer.rl.loss as module
    import trainer_step

    has_weights = any(f.name == "loss_weights" for f in dataclasses.fields(module.LossInputs))
    scenes = {
        "plain": {"references": ()},
        "hinted": {},
        "empty": {"references": (), "count": 3},
        **({"weighted": {"references": (1,), "weights": (0, 1, 3)}} if has_weights else {}),
    }
    found = []
    for seed, (name, scene) in enumerate(scenes.items()):
        rng = np.random.default_rng(seed)
        samples = trainer_step.random_samples(rng, **scene)
        if name == "empty":
            samples[0].mask = [False] * len(samples[0].mask)
        table = trainer_step.table_of(samples, rng, spread=0.6).detach().float().requires_grad_(True)
        # More workers than samples: prime-rl fills up with dummy batches that no mask counts.
        micro_batches = trainer_step.pack(samples, workers=5 if name == "empty" else 2)
        found.append({"name": name, **recorded(module, trainer_step, micro_batches, table)})
    return {"fields": [f.name for f in dataclasses.fields(module.LossInputs)], "steps": found}


def recorded(module, trainer_step, micro_batches, table) -> dict:
    """One step under each of prime-rl's own losses: calls once, loss and gradient per loss."""
    configs = {"default": getattr(module, "DefaultLossConfig", None) or module.LossConfig}
    if hasattr(module, "IPOLossConfig"):
        configs["ipo"] = module.IPOLossConfig
    results, calls, tokens = {}, [], 0
    for name, config in configs.items():
        kept = []

        def loss_fn(inputs, name=name, config=config, kept=kept):
            inputs.trainer_logprobs.retain_grad()
            kept.append(inputs)
            return trainer_step.rl_loss(module, config=config())(inputs)

        step = trainer_step.step(module, micro_batches, table, loss_fn)
        gradients = [i.trainer_logprobs.grad for i in kept]
        results[name] = {
            "loss": step.loss,
            "options": json.loads(config().model_dump_json()),
            "gradients": [
                [0.0] * len(i.loss_mask) if g is None else g.tolist() for g, i in zip(gradients, kept, strict=True)
            ],
        }
        calls, tokens = [written(inputs) for inputs in kept], step.rl_tokens
    return {"rl_tokens": tokens, "calls": calls, "results": results}


def written(inputs) -> dict:
    """A `LossInputs` as JSON."""
    entry = {}
    for field in dataclasses.fields(inputs):
        value = getattr(inputs, field.name)
        entry[field.name] = value if value is None else {
            "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "values": value.tolist(),
        }  # fmt: skip
    return entry


if __name__ == "__main__":
    main()
