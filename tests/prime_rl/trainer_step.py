"""prime-rl's own path from training samples to a loss, for any version from 0.4 on: packer, tensors, `compute_loss`.

Only what its trainer does between them is repeated here (src/prime_rl/trainer/rl/train.py): turning lists into tensors,
counting the tokens that it divides by, splitting a bin into its samples. The model is a table of log-probs by token id, so
that gradients can be compared whatever the packing.
"""

import dataclasses
import importlib
import inspect
import itertools
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass
class Sample:
    """A rollout as an orchestrator ships it: everything per token, None where there is none."""

    ids: list[int]
    mask: list[bool]
    inference: list[float]
    advantages: list[float]
    reference: list[float] | None = None
    rl_weights: list[float] | None = None
    ref_kl_weights: list[float] | None = None


def random_samples(rng, count=7, longest=11, references=(1, 4), weights=()):
    """Samples with prompts and tool results masked inside; those in `references` have reference log-probs on a turn."""
    samples, next_id = [], 1
    for i in range(count):
        n = int(rng.integers(3, longest + 1))
        mask = [t > 0 and bool(rng.random() < 0.8) for t in range(n)]
        mask[-1] = True
        inference = [float(np.float32(x)) if m else 0.0 for x, m in zip(-rng.random(n) * 2.5, mask, strict=True)]
        advantage = float(np.float32(rng.normal())) if i != 2 else 0.0
        reference = None
        if i in references:
            turn = range(n // 2, n)
            reference = [float(np.float32(-rng.random() * 2.5)) if t in turn else 0.0 for t in range(n)]
        sample = Sample(list(range(next_id, next_id + n)), mask, inference, [advantage] * n, reference)
        if i in weights:
            sample.rl_weights = [float(w) for w in rng.choice([0.0, 0.5, 2.0], size=n)]
        samples.append(sample)
        next_id += n
    return samples


def table_of(samples, rng, spread=0.3, dtype=torch.float64):
    """The "model": trained log-probs by token id, near the inference engine's."""
    size = max(max(s.ids) for s in samples) + 1
    table = np.zeros(size)
    for sample in samples:
        for token, value, counts in zip(sample.ids, sample.inference, sample.mask, strict=True):
            table[token] = value + rng.normal() * spread if counts else -1.0
    return torch.tensor(table.astype(np.float32), dtype=dtype, requires_grad=True)


def wire(samples):
    """Return prime-rl's `TrainingSample`s, in the shape of the version at hand."""
    kinds = _first("prime_rl.transports.rollouts", "prime_rl.transport")
    cls = kinds.TrainingSample
    fields = cls.__struct_fields__
    found = []
    for s in samples:
        values = {"token_ids": s.ids, "mask": s.mask, "logprobs": s.inference, "temperatures": [1.0] * len(s.ids)}
        values |= {"env_name": "toy", "advantages": s.advantages, "reward": 0.0, "advantage": s.advantages[0]}
        values |= {"ref_logprobs": s.reference, "teacher_logprobs": s.reference}
        values |= {"rl_weights": s.rl_weights, "ref_kl_weights": s.ref_kl_weights}
        values |= {"prompt_ids": s.ids[:1], "prompt_mask": [False], "completion_ids": s.ids[1:]}
        values |= {"completion_mask": s.mask[1:], "completion_logprobs": s.inference[1:]}
        values |= {"completion_temperatures": [1.0] * (len(s.ids) - 1)}
        found.append(cls(**{k: v for k, v in values.items() if k in fields}))
    return found


def pack(samples, seq_len=24, workers=1):
    """Return all micro-batches of an optimizer step, over all workers, from prime-rl's own packer.

    The packers of 0.4 and 0.5 lose the alignment of reference log-probs when a bin holds more than one sample, so there a
    step with references is packed one by one.
    """
    batch = importlib.import_module("prime_rl.trainer.batch")
    if not hasattr(batch, "_materialize_bin") and any(s.reference for s in samples):
        rows = [pack([dataclasses.replace(s, reference=None)], seq_len)[0] for s in samples]
        for row, sample in zip(rows, samples, strict=True):
            row.teacher_logprobs = sample.reference and list(sample.reference)
        return rows
    options = {
        "rollouts": wire(samples), "seq_len": seq_len, "num_train_workers": workers, "idxs": [0] * len(samples),
        "num_loras": 1, "bin_cost": sum,
    }  # fmt: skip
    wanted = inspect.signature(batch.prepare_batch).parameters
    per_worker = batch.prepare_batch(**{k: v for k, v in options.items() if k in wanted})
    return [micro_batch for worker in per_worker for micro_batch in worker]


def rl_loss(module, *, kwargs=None, config=None):
    """Return the rl loss function as prime-rl's trainer builds it from `[trainer.loss]`."""
    if config is None:
        config = module.CustomLossConfig(
            type="custom", import_path="composer_prime_rl.loss.composer_loss", kwargs=kwargs or {}
        )
    for name in ("setup_rl_loss_fn", "setup_loss_fns", "setup_loss_fn"):
        if hasattr(module, name):
            built = getattr(module, name)(config)
            return built["rl"] if isinstance(built, dict) else built
    raise AssertionError("prime-rl has none of the set-up functions that we know")


@dataclass
class Step:
    """What an optimizer step gives: the loss, d loss / d table, metrics per sample, and the inputs of every call."""

    loss: float
    gradient: np.ndarray
    metrics: dict[str, list[float]]
    inputs: list = field(default_factory=list)
    rl_tokens: int = 0


def step(module, micro_batches, table, loss_fn, *, garbage=None):
    """One optimizer step through the real `compute_loss`; `garbage` overwrites what no mask counts."""
    table.grad = None
    reference_name = "ref_logprobs" if hasattr(micro_batches[0], "ref_logprobs") else "teacher_logprobs"
    tensors = [_tensors(m, reference_name, table, garbage) for m in micro_batches]
    scales = {name: max(sum(t["counts"][name] for t in tensors), 1) for name in ("rl", "ce", "ref_kl")}
    result = Step(0.0, np.zeros(len(table)), {}, rl_tokens=scales["rl"])

    def watched(inputs):
        result.inputs.append(inputs)
        return loss_fn(inputs)

    wanted = inspect.signature(module.compute_loss).parameters
    for values in tensors:
        call = {
            **{k: v for k, v in values.items() if k in wanted},
            "loss_fn": watched, "rl_loss_fn": watched, "loss_fns": {"rl": watched}, "training_mode": "rl",
            "loss_scale": scales["rl"], "rl_scale": scales["rl"], "ce_scale": scales["ce"],
            "ref_kl_scale": scales["ref_kl"],
        }  # fmt: skip
        loss, metrics = module.compute_loss(**{k: v for k, v in call.items() if k in wanted})
        loss.backward()
        result.loss += float(loss.detach())
        for name, measured in metrics.items():
            result.metrics.setdefault(name, []).extend(measured.detach().flatten().tolist())
    result.gradient = np.zeros(len(table)) if table.grad is None else table.grad.double().numpy().copy()
    return result


def _tensors(micro_batch, reference_name, table, garbage):
    lengths = list(getattr(micro_batch, "sequence_lengths", None) or _lengths(micro_batch.position_ids))
    mask = torch.tensor(micro_batch.loss_mask, dtype=torch.bool)
    streams = {name: getattr(micro_batch, name, None) for name in ("rl_weights", "ce_weights", "ref_kl_weights")}
    streams = {k: None if v is None else torch.tensor(v, dtype=torch.float32) for k, v in streams.items()}
    reference = getattr(micro_batch, reference_name)
    trainer = table[torch.tensor(micro_batch.input_ids)]
    flat = {
        "inference_logprobs": torch.tensor(micro_batch.inference_logprobs, dtype=torch.float32),
        "advantages": torch.tensor([a or 0.0 for a in micro_batch.advantages], dtype=torch.float32),
        reference_name: None if reference is None else torch.tensor(reference, dtype=torch.float32),
    }
    if garbage is not None:
        flat = {k: v if v is None else torch.where(mask, v, garbage) for k, v in flat.items()}
        spare = mask.clone()
        spare[: lengths[0]] = True  # compute_loss itself adds trainer_logprobs[0].sum() * 0
        trainer = torch.where(spare, trainer, garbage)
    rl = mask if streams["rl_weights"] is None else mask & (streams["rl_weights"] != 0)
    counts = {"rl": int(rl.sum())}
    counts |= {
        name: 0 if (w := streams[f"{name}_weights"]) is None else int((w != 0).sum()) for name in ("ce", "ref_kl")
    }
    flat |= {"trainer_logprobs": trainer, "loss_mask": mask, **streams}
    return {"counts": counts, **{k: None if v is None else list(v.split(lengths)) for k, v in flat.items()}}


def _lengths(position_ids):
    """Samples of a bin begin where the positions begin anew (0.4 and 0.5, as their trainer does)."""
    starts = [i for i, p in enumerate(position_ids) if p == 0] + [len(position_ids)]
    return [b - a for a, b in itertools.pairwise(starts)]


def _first(*names):
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError(f"prime-rl has none of {', '.join(names)}")
