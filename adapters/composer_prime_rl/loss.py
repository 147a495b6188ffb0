"""The loss that prime-rl's trainer calls: `[trainer.loss] type = "custom"`, `import_path` = this `composer_loss`.

prime-rl calls it once per packed sample and divides the sum of the results by the number of tokens of the rl component
in the whole optimizer step, over all ranks. So a sum over tokens becomes a global mean over tokens, exactly; what a mean
over sequences becomes is in the table of docs/how-to/prime-rl.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from composer_plugins.channels.levels import SignalLevel
from composer_plugins.channels.sdpo import ACTIVE_NATS, sdpo_values
from composer_plugins.losses.masking import full_precision, masked, safe
from composer_plugins.losses.policy import Objective, PolicyLoss, policy_loss
from composer_plugins.losses.reduction import Reduction, scale_elements
from composer_prime_rl import outer
from composer_prime_rl.activity import watch
from composer_prime_rl.section import LossOptions, loss_options, objective_of
from composer_prime_rl.trust_region import trust_region_loss
from composer_prime_rl.versions import host_loss, outputs_class, reference_logprobs

# prime-rl imports this module before it builds its optimizer, and that is when an outer loop can be hung in.
outer.install()


def composer_loss(inputs: Any, **kwargs: Any) -> Any:
    """Return one sample's share of the loss, a sum, and metrics.

    Args:
        inputs: prime-rl's `LossInputs` (0.4 to 0.8.x), every tensor of shape (seq,): `trainer_logprobs` (nats, at the
            rollout temperature, receives gradient), `inference_logprobs`, `advantages` (None or nan: 0),
            `loss_mask` (bool), `ref_logprobs` or `teacher_logprobs` (None or exactly 0.0: the token has none),
            `loss_weights` (None: 1).
        kwargs: see `composer_prime_rl.section.LossOptions`; strings are parsed.

    Returns:
        prime-rl's `LossOutputs`: `loss` 0-dim, a differentiable zero when nothing counts; `metrics` per sample, of
        which prime-rl logs mean, median and so on over the step. `sdpo/divergence` is per token.

    Raises:
        ConfigError: unknown or contradictory keyword arguments, or what prime-rl cannot give.
        ValueError: the tensors' shapes differ.

    Source: prime-rl src/prime_rl/trainer/rl/loss.py `LossInputs`, `compute_loss`.
    """
    options = loss_options(kwargs)
    mask = inputs.loss_mask.bool()
    loss = masked(inputs.trainer_logprobs, torch.zeros_like(mask)).sum()  # the anchor of an empty sample
    metrics: dict[str, torch.Tensor] = {}
    for weight, term in ((options.composer.policy.weight, _policy), (_sdpo_weight(options), _sdpo)):
        if weight > 0:
            values, measured = term(options, inputs, mask)
            loss = loss + (values if weight == 1 else weight * values)
            metrics |= measured
    watch(options, metrics)
    metrics |= {name: loss.detach().new_tensor(float(value)) for name, value in outer.metrics().items()}
    return outputs_class(inputs)(loss=loss, metrics=metrics)


def _sdpo_weight(options: LossOptions) -> float:
    """With `ref_kl` prime-rl's own component counts the reference log-probs; they reach us all the same."""
    return options.composer.sdpo.weight if options.sdpo_route == "loss" else 0.0


def _policy(options: LossOptions, inputs: Any, mask: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Channel 1: the summed loss of a sample, and its metrics."""
    advantages = _advantages(inputs)
    counts = {
        "policy/tokens": mask.sum().float(),
        "policy/active_tokens": ((safe(advantages, mask) != 0) & mask).sum().float(),
    }
    objective = objective_of(options.composer.policy)
    if objective is None:
        outputs = host_loss(inputs, options.host, reference=options.composer.sdpo.weight == 0)
        return outputs.loss, {**outputs.metrics, **counts}
    tensors = {
        "logprobs": inputs.trainer_logprobs,
        "old_logprobs": inputs.inference_logprobs,
        "advantages": advantages,
        "mask": mask,
    }
    if isinstance(objective, Objective):
        loss = _menu(options, objective, {name: tensor[None] for name, tensor in tensors.items()})
    else:
        loss = trust_region_loss(options.region(objective), **tensors)
    tokens = mask.sum().clamp(min=1)
    counts["policy/ratio"] = loss.ratio.sum() / tokens
    counts["policy/clip_fraction"] = loss.clipped.sum() / tokens
    return _weighted(loss.values, inputs, mask).sum(), counts


def _menu(options: LossOptions, objective: Objective, tensors: Mapping[str, torch.Tensor]) -> PolicyLoss:
    """An objective of the core on one row, scaled so that prime-rl's division gives its reduction (or says what)."""
    policy = options.composer.policy
    loss = policy_loss(
        objective,
        clip_low=policy.clip_low,
        clip_high=policy.clip_high,
        dual_clip=policy.dual_clip,
        log_ratio_clamp=policy.log_ratio_clamp,
        cispo_bound=policy.cispo_bound,
        **tensors,
    )
    if options.aggregation == "host":
        return PolicyLoss(*(part[0] for part in loss))
    values = scale_elements(loss.values, tensors["mask"], objective.reduction)
    if options.tokens_per_sample is not None:
        constant = objective.reduction is Reduction.CONSTANT_LENGTH
        values = values * (options.tokens_per_sample / (policy.length_constant if constant else 1))
    return PolicyLoss(values[0], loss.ratio[0], loss.clipped[0])


def _sdpo(options: LossOptions, inputs: Any, mask: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Channel 2 at level `sampled`, on the tokens that have a reference log-prob.

    prime-rl fills with 0.0 where a sample, or a turn of it, has none; a log-prob of exactly 0.0 is therefore "none",
    and whoever stamps a teacher that is certain writes a number just below (`composer_prime_rl.reference.stamped`).
    """
    reference = reference_logprobs(inputs)
    if reference is None:
        reference = torch.zeros_like(inputs.trainer_logprobs)
    present = mask & (reference != 0) & reference.isfinite()
    values, divergence = sdpo_values(
        options.composer.sdpo,
        SignalLevel.SAMPLED,
        logprobs=full_precision(inputs.trainer_logprobs),
        teacher_logprobs=reference,
        old_logprobs=inputs.inference_logprobs,
        mask=present,
    )
    return _weighted(values, inputs, present).sum(), {
        "sdpo/tokens": present.sum().float(),
        "sdpo/active_tokens": (divergence.abs() > ACTIVE_NATS).sum().float(),
        "sdpo/divergence": divergence[present],
    }


def _advantages(inputs: Any) -> torch.Tensor:
    """Advantages, 0 where there are none: None (ref_kl samples) or nan (not scored)."""
    if inputs.advantages is None:
        return torch.zeros_like(inputs.inference_logprobs)
    return torch.where(inputs.advantages.isnan(), 0.0, inputs.advantages)


def _weighted(values: torch.Tensor, inputs: Any, mask: torch.Tensor) -> torch.Tensor:
    """Multiply by the component's weights, as prime-rl's own losses do."""
    weights = getattr(inputs, "loss_weights", None)
    return values if weights is None else values * safe(weights.detach(), mask)
