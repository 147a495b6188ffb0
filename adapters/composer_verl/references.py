"""verl's registered policy losses on the tensors of the conformance suite, for the parity report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from composer_plugins.conformance.expected import LENGTH_CONSTANT
from composer_plugins.conformance.problem import Problem
from composer_plugins.conformance.references import Reference, Run, Tensors

#: verl's own registered losses that are no entry of our menu; `policy.objective: host` keeps them.
OTHERS = ("sapo", "gpg", "clip_cov", "kl_cov", "geo_mean", "dppo_tv", "dppo_kl", "dro", "bypass_mode")


def registered(name: str, aggregation: str, *, factor: int | None = LENGTH_CONSTANT, **options: Any) -> Run:
    """A policy loss of verl's registry, called as `ppo_loss` calls it."""

    def run(problem: Problem):
        from verl.trainer.ppo.core_algos import get_policy_loss_fn
        from verl.workers.config import ActorConfig

        config = ActorConfig(strategy="fsdp2", rollout_n=2, ppo_micro_batch_size_per_gpu=2, **options)
        t = Tensors(problem)
        config.global_batch_info.update(
            dp_size=1, batch_num_tokens=int(t.mask.sum()), global_batch_size=len(problem.rows), loss_scale_factor=factor
        )
        loss, _ = get_policy_loss_fn(name)(
            old_log_prob=t.old, log_prob=t.logprobs, advantages=t.advantages, response_mask=t.mask.long(),
            loss_agg_mode=aggregation, config=config, rollout_is_weights=None,
        )  # fmt: skip
        return t.finish(loss)

    return run


def references() -> Iterator[Reference]:
    """Every case that a registered loss of verl can be compared with."""
    clips = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
    same = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}
    paper = {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}
    dual, width = (
        "dual clip at 3: `policy.dual_clip: 3`",
        "divides by the padded width: `policy.length_constant` set to it",
    )
    yield Reference(
        "policy dapo, off-policy",
        "verl vanilla: token-mean, clips 0.2 / 0.28",
        registered("vanilla", "token-mean", **clips),
    )
    yield Reference(
        "policy dapo, dual_clip 3",
        "verl vanilla: token-mean, clips 0.2 / 0.28",
        registered("vanilla", "token-mean", **clips),
    )
    yield Reference(
        "policy dapo, far off-policy",
        "verl vanilla: token-mean, clips 0.2 / 0.28",
        registered("vanilla", "token-mean", **clips),
        dual,
    )
    yield Reference(
        "policy grpo, dual_clip 3",
        "verl vanilla: seq-mean-token-mean",
        registered("vanilla", "seq-mean-token-mean", **same),
    )
    scaled = registered("vanilla", "seq-mean-token-sum-norm", **same)
    yield Reference(
        "policy dr_grpo, dual_clip 3", f"verl vanilla: seq-mean-token-sum-norm, factor {LENGTH_CONSTANT}", scaled
    )
    unscaled = registered("vanilla", "seq-mean-token-sum-norm", factor=None, **same)
    yield Reference(
        "policy dr_grpo, dual_clip 3", "verl vanilla: seq-mean-token-sum-norm, no factor (default)", unscaled, width
    )
    yield Reference(
        "policy gspo, off-policy",
        "verl gspo: seq-mean-token-mean, clips 3e-4 / 4e-4",
        registered("gspo", "seq-mean-token-mean", **paper),
    )
    yield Reference(
        "policy gspo, off-policy", "verl gspo: token-mean (default), clips 3e-4 / 4e-4", registered("gspo", "token-mean", **paper),
        "inherits token-mean: verl's `loss_agg_mode: seq-mean-token-mean` gives the paper's reduction",
    )  # fmt: skip
    yield Reference(
        "policy cispo, clips 0.2",
        "verl cispo: token-mean, clips 0.2 (default)",
        registered("cispo", "token-mean", **same),
    )
    yield Reference(
        "policy cispo, off-policy", "verl cispo: token-mean, clips 0.2 (default)", registered("cispo", "token-mean", **same),
        "the clips: `policy.clip_low: 0.2`, `policy.clip_high: 0.2`",
    )  # fmt: skip
