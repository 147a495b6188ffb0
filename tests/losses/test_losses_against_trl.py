"""Our losses against TRL's own functions, and its disagreements with the papers reproduced by options."""

import dataclasses
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")
from trl.experimental.sdpo import loss_utils
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import nanstd

from composer_plugins.losses import divergence as d
from composer_plugins.losses.advantages import group_advantages
from composer_plugins.losses.policy import BNPO, CISPO, DAPO, DR_GRPO, GRPO, GSPO, policy_loss, reference_kl
from composer_plugins.losses.reduction import count_units, scale_elements

ROWS, WIDTH, VOCABULARY, MAX_LENGTH = 5, 7, 11, 16


class OneProcess:
    """The two collective calls that TRL's loss makes for its metrics."""

    num_processes = 1

    def gather(self, x):
        return x

    def reduce(self, x, reduction):
        return x


def trl_loss(logprobs, batch, *, loss_type, low=0.2, high=0.2, level="token", delta=None, beta=0.0, vllm=None):
    """Call the real `GRPOTrainer._compute_loss` with our log-probabilities as the model's."""
    zeros = torch.zeros_like(logprobs)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, zeros.detach(), None),
        accelerator=OneProcess(), model=SimpleNamespace(training=True), _metrics=defaultdict(lambda: defaultdict(list)),
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
        loss_type=loss_type, epsilon_low=low, epsilon_high=high, importance_sampling_level=level, beta=beta,
        max_completion_length=MAX_LENGTH, current_gradient_accumulation_steps=1, aux_loss_enabled=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=vllm is not None,
        vllm_importance_sampling_correction=vllm is not None, _entropy_bonus_enabled=False,
    )  # fmt: skip
    ids = torch.zeros(ROWS, WIDTH, dtype=torch.long)
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": batch["mask"].long(),
        "advantages": batch["advantages"], "old_per_token_logps": batch["old"], "ref_per_token_logps": batch["ref"],
        "num_items_in_batch": batch["mask"].sum(), "importance_sampling_ratio": vllm,
    }  # fmt: skip
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def our_loss(objective, logprobs, batch, *, weights=None, kl=0.0, **options):
    mask = batch["mask"]
    values = policy_loss(
        objective, logprobs=logprobs, old_logprobs=batch["old"], advantages=batch["advantages"], mask=mask, **options
    ).values
    if weights is not None:
        values = values * weights
    if kl:
        values = values + kl * reference_kl(logprobs, batch["ref"], mask)
    units = count_units(mask, objective.reduction, length_constant=MAX_LENGTH)
    return scale_elements(values, mask, objective.reduction).sum() / units


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(ROWS, WIDTH, generator=g) < 0.7
    mask[:, 0] = True
    logprobs = -torch.rand(ROWS, WIDTH, generator=g, dtype=torch.float64) * 3
    noise = torch.randn(2, ROWS, WIDTH, generator=g, dtype=torch.float64)
    return {
        "logprobs": logprobs.requires_grad_(), "old": logprobs.detach() + 0.8 * noise[0],
        "ref": logprobs.detach() + noise[1], "mask": mask,
        "advantages": torch.randn(ROWS, generator=g, dtype=torch.float64),
    }  # fmt: skip


def assert_same(ours, theirs, logprobs):
    torch.testing.assert_close(ours, theirs)
    (got,), (expected,) = (torch.autograd.grad(x, logprobs, retain_graph=True) for x in (ours, theirs))
    assert expected.count_nonzero() > 0
    torch.testing.assert_close(got, expected)


MENU = [
    (GRPO, {"loss_type": "grpo"}, {}),
    (DR_GRPO, {"loss_type": "dr_grpo"}, {}),
    (BNPO, {"loss_type": "bnpo"}, {}),
    (DAPO, {"loss_type": "dapo", "high": 0.28}, {}),
    (GSPO, {"loss_type": "grpo", "level": "sequence", "low": 3e-4, "high": 4e-4}, {}),
    (GSPO, {"loss_type": "grpo", "level": "sequence"}, {"clip_low": 0.2, "clip_high": 0.2}),
    (CISPO, {"loss_type": "cispo", "high": 5.0}, {}),
    (CISPO, {"loss_type": "cispo", "high": 0.2}, {"cispo_bound": "absolute", "clip_high": 0.2}),
    (GRPO, {"loss_type": "grpo", "delta": 1.5}, {"dual_clip": 1.5}),
    (GRPO, {"loss_type": "grpo", "beta": 0.3}, {"kl": 0.3}),
    (DAPO, {"loss_type": "dapo", "low": 0.1, "high": 0.4}, {"clip_low": 0.1, "clip_high": 0.4}),
]


@pytest.mark.parametrize(("objective", "theirs", "ours"), MENU, ids=lambda x: getattr(x, "name", str(x)))
def test_policy(objective, theirs, ours, batch):
    expected = trl_loss(batch["logprobs"], batch, **theirs)
    assert_same(our_loss(objective, batch["logprobs"], batch, **ours), expected, batch["logprobs"])


@pytest.mark.parametrize("shape", [(ROWS, WIDTH), (ROWS, 1)])
def test_the_engine_correction_multiplies_the_policy_loss_and_not_the_kl(shape, batch):
    weights = torch.rand(shape, dtype=torch.float64)
    expected = trl_loss(batch["logprobs"], batch, loss_type="grpo", vllm=weights, beta=0.1)
    assert_same(our_loss(GRPO, batch["logprobs"], batch, weights=weights, kl=0.1), expected, batch["logprobs"])


def test_an_empty_row_counts_as_in_trl(batch):
    batch["mask"][2] = False
    expected = trl_loss(batch["logprobs"], batch, loss_type="grpo")
    assert_same(our_loss(GRPO, batch["logprobs"], batch), expected, batch["logprobs"])


def test_trl_caps_the_cispo_ratio_at_epsilon_high_itself(batch):
    """Its default 0.2 caps the ratio at 0.2: not what the paper's [1 - low, 1 + high] gives."""
    theirs = trl_loss(batch["logprobs"], batch, loss_type="cispo", high=0.2)
    paper = our_loss(CISPO, batch["logprobs"], batch, clip_low=0.2, clip_high=0.2)
    assert not torch.isclose(theirs, paper, rtol=0.1)


def trl_advantages(rewards, size, scale):
    """The lines of `_generate_and_score_completions`, with TRL's own nanstd."""
    grouped = rewards.view(-1, size)
    mean = torch.nanmean(grouped, dim=1).repeat_interleave(size)
    std = nanstd(rewards).expand_as(rewards) if scale == "batch" else nanstd(grouped, dim=1).repeat_interleave(size)
    advantages = rewards - mean
    if scale != "none":
        advantages = advantages / (std + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(scale):
    rewards = torch.randn(20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rewards[[1, 8, 9, 10]] = torch.nan
    rewards[12:16] = torch.nan
    rewards[16:] = 1.0
    torch.testing.assert_close(group_advantages(rewards, 4, scale=scale), trl_advantages(rewards, 4, scale))


def test_trl_keeps_sigma_in_dr_grpo_unless_told_otherwise():
    """`scale_rewards` defaults to "group" there; `advantage.scale: group` reproduces it, our default is none."""
    rewards = torch.tensor([0.0, 0.2, 0.1, 0.5], dtype=torch.float64)
    assert DR_GRPO.advantage_scale == "none"
    with_sigma = group_advantages(rewards, 4, scale="group")
    torch.testing.assert_close(with_sigma, trl_advantages(rewards, 4, "group"))
    assert not torch.allclose(with_sigma, group_advantages(rewards, 4, scale=DR_GRPO.advantage_scale), rtol=0.5)


@pytest.fixture
def logits():
    g = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 20, VOCABULARY, generator=g, dtype=torch.float64) * 2
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_full_divergence(alpha, logits):
    student, teacher = logits
    theirs = loss_utils.compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=alpha).sum()
    assert_same(d.full_divergence(student, teacher, alpha=alpha).sum(), theirs, student)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("k", [1, 4, VOCABULARY])
def test_topk_divergence(alpha, tail, k, logits):
    student, teacher = logits
    theirs = loss_utils.compute_topk_self_distillation_loss(
        student, teacher, distillation_topk=k, distillation_alpha=alpha, distillation_add_tail=tail
    ).sum()
    ours = d.topk_divergence(student, teacher, alpha=alpha, k=k, tail=tail).sum()
    if k == 1 and not tail:
        assert ours == 0
        assert abs(theirs) < 1e-12
    else:
        assert_same(ours, theirs, student) if k < VOCABULARY else torch.testing.assert_close(
            ours, theirs, atol=1e-4, rtol=0
        )


def test_the_tail_bucket_of_k_logprobs(logits):
    student, teacher = (x.log_softmax(-1)[:, :4] for x in logits)
    theirs = loss_utils.compute_divergence(
        loss_utils.add_tail_bucket(student), loss_utils.add_tail_bucket(teacher), 0.5
    ).sum()
    ours = d.topk_divergence_from_logprobs(student, teacher, alpha=0.5).sum()
    assert_same(ours, theirs, logits[0])


def test_sampled_reverse_kl_and_importance_weight(logits):
    student, teacher = logits
    ids = torch.arange(20) % VOCABULARY
    theirs = loss_utils.compute_sampled_token_self_distillation_loss(
        student[None], teacher[None], ids[None], distillation_alpha=1.0
    )[0]
    logp, teacher_logp = (x.log_softmax(-1).gather(-1, ids[:, None])[:, 0] for x in logits)
    mask, old = torch.ones(20, dtype=torch.bool), logp.detach() + torch.linspace(-2, 2, 20, dtype=torch.float64)
    ours = d.sampled_reverse_kl(logp, teacher_logp, mask)
    assert_same(ours.sum(), theirs.sum(), student)
    theirs = loss_utils.apply_importance_sampling_clipping(theirs, logp, old, 2.0)
    ours = d.sampled_reverse_kl(logp, teacher_logp, mask) * d.importance_weight(logp, old, mask, cap=2.0)
    torch.testing.assert_close(ours, theirs)


def test_ruled_out_entries_make_trl_nan_and_not_us(logits):
    """Both sides mask the same entry, as for a padded vocabulary: 0 log 0 = 0."""
    student, teacher = (x.detach().clone() for x in logits)
    student[:, 3] = teacher[:, 3] = -torch.inf
    student.requires_grad_()
    theirs = loss_utils.compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=0.5)
    assert theirs.isnan().all()
    ours = d.full_divergence(student, teacher, alpha=0.5)
    assert ours.isfinite().all()
    assert torch.autograd.grad(ours.sum(), student)[0].isfinite().all()


def test_an_objective_of_a_host_is_a_replaced_field(batch):
    """TRL's dapo with a sequence-level ratio: no entry of the menu, one `dataclasses.replace` away."""
    objective = dataclasses.replace(DAPO, ratio_level="sequence")
    expected = trl_loss(batch["logprobs"], batch, loss_type="dapo", level="sequence", high=0.28)
    assert_same(our_loss(objective, batch["logprobs"], batch), expected, batch["logprobs"])
