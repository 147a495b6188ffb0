"""What verl does otherwise on the same tensors, as formulas in NumPy, and our option that reproduces each.

(TRL's side runs TRL's own code, in test_losses_against_trl.py.) The table is in docs/reference/losses.md.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch

from composer_plugins.losses.advantages import group_advantages
from composer_plugins.losses.policy import CISPO, DR_GRPO, GRPO, GSPO, policy_loss
from composer_plugins.losses.reduction import Reduction, count_units, scale_elements


def ours(objective, log_ratio, advantages, mask=None, **options):
    log_ratio = torch.tensor(log_ratio, dtype=torch.float64)
    mask = torch.ones_like(log_ratio, dtype=torch.bool) if mask is None else torch.tensor(mask)
    zeros = torch.zeros_like(log_ratio)
    return policy_loss(
        objective, logprobs=log_ratio, old_logprobs=zeros, advantages=torch.tensor(advantages).double(), mask=mask, **options
    ).values  # fmt: skip


def test_verl_caps_the_loss_of_negative_advantages_at_three():
    assert ours(GRPO, [[math.log(10.0)]], [-1.0]).item() == pytest.approx(10.0)
    assert ours(GRPO, [[math.log(10.0)]], [-1.0], dual_clip=3.0).item() == pytest.approx(3.0)
    assert ours(GRPO, [[math.log(10.0)]], [1.0], dual_clip=3.0).item() == pytest.approx(-1.2)


def test_verl_clamps_the_log_ratio_at_twenty():
    assert ours(GRPO, [[30.0]], [-1.0]).item() == pytest.approx(math.exp(30.0))
    assert ours(GRPO, [[30.0]], [-1.0], log_ratio_clamp=20.0).item() == pytest.approx(math.exp(20.0))


def test_verl_clamps_the_log_ratio_of_gspo_from_above_only():
    options = {"log_ratio_clamp": (-math.inf, 10.0)}
    assert ours(GSPO, [[12.0]], [-1.0], **options).item() == pytest.approx(math.exp(10.0))
    assert ours(GSPO, [[-12.0]], [1.0], **options).item() == pytest.approx(-math.exp(-12.0))


def test_verl_bounds_the_cispo_ratio_on_both_sides():
    for log_ratio, bound in ((1.0, 1.2), (-1.0, 0.8)):
        got = ours(CISPO, [[log_ratio]], [1.0], clip_low=0.2, clip_high=0.2).item()
        assert got == pytest.approx(-bound * log_ratio)
    assert ours(CISPO, [[-1.0]], [1.0]).item() == pytest.approx(math.exp(-1.0)), "the paper has no lower bound"


def test_verl_adds_a_smaller_eps_to_the_deviation():
    rewards = torch.tensor([0.0, 1e-4], dtype=torch.float64)
    trl, verl = (group_advantages(rewards, 2, eps=eps) for eps in (1e-4, 1e-6))
    deviation = 1e-4 / math.sqrt(2)
    for got, eps in ((trl, 1e-4), (verl, 1e-6)):
        assert got[1].item() == pytest.approx(5e-5 / (deviation + eps))
    assert verl[1] > 2 * trl[1]


@pytest.mark.parametrize(("scale", "expected"), [("none", 0.8), ("group", 0.8 / (1 + 1e-6))])
def test_verl_takes_the_reward_of_a_group_of_one_as_its_advantage(scale, expected):
    reward = torch.tensor([0.8], dtype=torch.float64)
    assert group_advantages(reward, 1, scale=scale, eps=1e-6, singleton="reward").item() == pytest.approx(expected)
    assert group_advantages(reward, 1, scale=scale, eps=1e-6).item() == 0.0


def test_sigma_in_dr_grpo():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert group_advantages(rewards, 4, scale=DR_GRPO.advantage_scale)[0].item() == pytest.approx(0.75)
    assert group_advantages(rewards, 4, scale="group", eps=1e-4)[0].item() == pytest.approx(0.75 / 0.5001)


def test_verls_sum_norm_without_a_factor_divides_by_the_tensor_width():
    """Reproduced by a length_constant that changes with the batch; a constant one is the objective."""
    values = {}
    for width in (4, 40):
        mask = torch.zeros(2, width, dtype=torch.bool)
        mask[:, :4] = True
        loss = torch.ones(2, width)
        verl = (loss * mask).sum().item() / 2 / width
        values[width] = [
            scale_elements(loss, mask, DR_GRPO.reduction).sum()
            / count_units(mask, DR_GRPO.reduction, length_constant=c)
            for c in (width, 16)
        ]
        assert values[width][0].item() == pytest.approx(verl)
    assert values[4][0] != values[40][0]
    assert values[4][1] == values[40][1]


def test_verls_token_mean_can_flip_the_sign_of_the_gspo_loss():
    """A short good and a long bad sequence: per sequence they cancel in favour of one, per token of the other."""
    mask = np.array([[True] + [False] * 9, [True] * 10])
    values = ours(GSPO, np.zeros((2, 10)), [2.0, -1.0], mask)
    tokens = torch.tensor(mask)
    loss = {}
    for objective in (GSPO, dataclasses.replace(GSPO, reduction=Reduction.GLOBAL_TOKEN_MEAN)):
        units = count_units(tokens, objective.reduction)
        loss[objective.reduction] = (scale_elements(values, tokens, objective.reduction).sum() / units).item()
    assert loss[Reduction.SEQUENCE_MEAN] == pytest.approx((-2.0 + 1.0) / 2)
    assert loss[Reduction.GLOBAL_TOKEN_MEAN] == pytest.approx((-2.0 + 10.0) / 11)


def test_verl_leaves_rows_without_tokens_out():
    """Unless it is given global_batch_size. We count them, as TRL; drop the rows to get the other."""
    mask = torch.tensor([[True, True], [False, False]])
    assert count_units(mask, Reduction.SEQUENCE_MEAN) == 2
    assert count_units(mask[mask.any(-1)], Reduction.SEQUENCE_MEAN) == 1


def test_k1_differentiated_as_a_loss_has_no_expected_gradient():
    """Why the config refuses it: sum_y pi(y) d/dz log pi(y) = 0, whatever the reference."""
    z = torch.randn(7, dtype=torch.float64).requires_grad_()
    reference = torch.randn(7, dtype=torch.float64).log_softmax(-1)
    logp = z.log_softmax(-1)
    k1 = (logp.exp().detach() * (logp - reference)).sum()
    assert torch.autograd.grad(k1, z)[0].abs().max() < 1e-15
