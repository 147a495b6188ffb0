"""TRL's own losses on the tensors of the conformance suite, for the parity report.

Stock `GRPOTrainer` through `compute_loss`, and the functions of its experimental SDPO trainer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from composer_plugins.conformance.expected import LENGTH_CONSTANT
from composer_plugins.conformance.files import table_tokenizer, words
from composer_plugins.conformance.problem import Layout, Problem
from composer_plugins.conformance.real_model import gradient_of
from composer_plugins.conformance.references import Reference, Run, Tensors
from composer_plugins.conformance.table_model import table_model
from composer_trl.conformance import make_batch
from composer_trl.trainer import TURNS

GSPO = {"loss_type": "grpo", "importance_sampling_level": "sequence"}


def grpo(**options: Any) -> Run:
    """Stock GRPOTrainer with these settings."""

    def run(problem: Problem):
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        rows = [{"prompt": [{"role": "user", "content": words(row.prompt)}]} for row in problem.rows]
        with tempfile.TemporaryDirectory() as folder:
            args = GRPOConfig(
                output_dir=str(Path(folder)), per_device_train_batch_size=len(rows), num_generations=problem.group_size,
                max_steps=1, temperature=problem.temperature, report_to="none", save_strategy="no", use_cpu=True, bf16=False,
                disable_tqdm=True, gradient_checkpointing=False, **{"max_completion_length": LENGTH_CONSTANT, **options},
            )  # fmt: skip
            trainer = GRPOTrainer(
                table_model(problem), lambda completions, **_: [0.0] * len(completions), args,
                Dataset.from_list(rows), processing_class=table_tokenizer(problem.vocabulary),
            )  # fmt: skip
        batch = make_batch(problem, list(problem.rows), Layout(()))
        del batch[TURNS]
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        return float(loss.detach()), gradient_of(trainer.model)[0]

    return run


def sdpo(mode: str, *, alpha: float = 1.0, tail: bool = True, is_clip: float | None = 2.0) -> Run:
    """The per-token functions of `trl.experimental.sdpo.loss_utils`, averaged over the hinted tokens."""

    def run(problem: Problem):
        from trl.experimental.sdpo import loss_utils as theirs

        t = Tensors(problem)
        if mode == "full_logits":
            values = theirs.compute_full_logit_self_distillation_loss(t.student, t.teacher, distillation_alpha=alpha)
        elif mode == "topk_logits":
            values = theirs.compute_topk_self_distillation_loss(
                t.student, t.teacher, distillation_topk=5, distillation_alpha=alpha, distillation_add_tail=tail
            )
        else:
            values = theirs.compute_sampled_token_self_distillation_loss(
                t.student, t.teacher, t.ids, distillation_alpha=alpha
            )
        if is_clip is not None:
            values = theirs.apply_importance_sampling_clipping(values, t.logprobs, t.old, is_clip)
        return t.finish((values * t.hinted).sum() / t.hinted.sum())

    return run


def sdpo_trainer(problem: Problem):
    """The same with the reduction of `SDPOTrainer._compute_self_distillation_loss`."""
    from trl.experimental.sdpo.sdpo_trainer import DistillationLogits, SDPOTrainer

    t = Tensors(problem)
    args = SimpleNamespace(distillation_mode="full_logits", distillation_alpha=1.0, distillation_is_clip=2.0)
    trainer = SimpleNamespace(
        args=args, accelerator=SimpleNamespace(gather=torch.as_tensor), _log_self_distillation_metric=lambda *_: None
    )
    logits = DistillationLogits(t.ids, t.mask, t.hinted, t.student, t.teacher)
    batch = {"old_per_token_logps": t.old}
    return t.finish(SDPOTrainer._compute_self_distillation_loss(trainer, t.model, batch, logits))


def references() -> Iterator[Reference]:
    """Every case that TRL's own losses can be compared with."""
    who = "TRL GRPOTrainer"
    for name in ("grpo", "bnpo", "dr_grpo"):
        yield Reference(f"policy {name}, off-policy", f"{who}: {name}", grpo(loss_type=name))
    yield Reference(
        "policy dr_grpo, off-policy", f"{who}: dr_grpo, max_completion_length 32", grpo(loss_type="dr_grpo", max_completion_length=32),
        "another constant: `policy.length_constant: 32`",
    )  # fmt: skip
    yield Reference(
        "policy dapo, off-policy", f"{who}: dapo, epsilon_high 0.28", grpo(loss_type="dapo", epsilon_high=0.28)
    )
    yield Reference(
        "policy dapo, far off-policy", f"{who}: dapo, epsilon_high 0.2 (default)", grpo(loss_type="dapo"),
        "the upper clip: `policy.clip_high: 0.2`",
    )  # fmt: skip
    yield Reference(
        "policy dapo, dual_clip 3", f"{who}: dapo, epsilon_high 0.28, delta 3",
        grpo(loss_type="dapo", epsilon_high=0.28, delta=3.0),
    )  # fmt: skip
    paper = grpo(**GSPO, epsilon=3e-4, epsilon_high=4e-4)
    yield Reference("policy gspo, off-policy", f"{who}: sequence level, epsilon 3e-4 / 4e-4", paper)
    yield Reference(
        "policy gspo, off-policy", f"{who}: sequence level, epsilon 0.2 (default)", grpo(**GSPO),
        "the clips: `policy.clip_low: 0.2`, `policy.clip_high: 0.2`",
    )  # fmt: skip
    yield Reference(
        "policy cispo, off-policy", f"{who}: cispo, epsilon_high 5", grpo(loss_type="cispo", epsilon_high=5.0)
    )
    yield Reference(
        "policy cispo, off-policy", f"{who}: cispo, epsilon_high 0.2 (default)", grpo(loss_type="cispo"),
        "0.2 is the cap of the ratio itself: `policy.cispo_bound: absolute`, `policy.clip_high: 0.2`",
    )  # fmt: skip
    yield Reference("policy cispo, absolute 0.2", f"{who}: cispo, epsilon_high 0.2 (default)", grpo(loss_type="cispo"))
    who = "TRL experimental SDPO"
    for alpha, case in ((1.0, "sdpo full, T = 1.0"), (0.0, "sdpo full, alpha 0"), (0.5, "sdpo full, alpha 0.5")):
        yield Reference(case, f"{who}: full_logits, alpha {alpha:g}", sdpo("full_logits", alpha=alpha))
    yield Reference("sdpo full, off-policy", f"{who}: full_logits, is_clip 2", sdpo("full_logits"))
    yield Reference(
        "sdpo full, off-policy", f"{who}: full_logits, its trainer's reduction", sdpo_trainer,
        "a mean per row, over all rows, those without a hint included; ours is over the hinted tokens of the step and no "
        "option gives theirs (the gradient shrinks with every row that has no hint)",
    )  # fmt: skip
    yield Reference("sdpo topk, T = 1.0", f"{who}: topk_logits and tail", sdpo("topk_logits"))
    yield Reference("sdpo topk, tail false", f"{who}: topk_logits, renormalised", sdpo("topk_logits", tail=False))
    yield Reference("sdpo sampled, T = 1.0", f"{who}: sampled_token", sdpo("sampled_token"))
    yield Reference("sdpo sampled, off-policy", f"{who}: sampled_token, is_clip 2", sdpo("sampled_token"))
