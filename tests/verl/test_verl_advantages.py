"""The advantage estimators against verl's own `grpo` and the float64 oracle, rows in any order."""

import importlib.util

import numpy as np
import pytest

from composer_plugins.errors import ConfigError

if importlib.util.find_spec("verl") is None:
    pytest.skip(
        "verl is not installed: it needs an environment of its own (docs/how-to/verl.md)", allow_module_level=True
    )


@pytest.fixture
def rollouts(rng):
    """Token rewards (B, T), response mask and uids of 6 groups of 4, rows shuffled."""
    import torch

    uids = np.repeat([f"uid-{i}" for i in range(6)], 4)[rng.permutation(24)].astype(object)
    mask = torch.tensor(rng.random((24, 7)) < 0.8)
    mask[:, 0] = True
    rewards = torch.zeros(24, 7)
    rewards[:, 3] = torch.tensor(rng.normal(size=24))
    return rewards, mask, uids


def ours(name, rewards, mask, uids, composer=None):
    from omegaconf import OmegaConf
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    algorithm = OmegaConf.create({"adv_estimator": name, **({"composer": composer} if composer else {})})
    OmegaConf.set_struct(algorithm, True)  # as verl's trainer hands it over
    advantages, returns = get_adv_estimator_fn(name)(
        token_level_rewards=rewards.clone(), response_mask=mask, index=uids, config=algorithm
    )
    assert advantages is returns
    return advantages


def theirs(rewards, mask, uids, std=True):
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    return compute_grpo_outcome_advantage(rewards.clone(), mask, uids, norm_adv_by_std_in_grpo=std)[0]


VERLS = {"policy": {"advantage": {"eps": 1e-6, "singleton": "reward"}}}


def test_with_verls_eps_composer_grpo_is_verls_grpo(rollouts):
    import torch

    torch.testing.assert_close(ours("composer_grpo", *rollouts, VERLS), theirs(*rollouts), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours("composer_grpo", *rollouts), theirs(*rollouts), rtol=1e-5, atol=1e-6)  # eps 1e-4


def test_composer_dr_grpo_is_verls_grpo_without_the_deviation(rollouts):
    import torch

    torch.testing.assert_close(ours("composer_dr_grpo", *rollouts), theirs(*rollouts, std=False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "scale"), [("grpo", "group"), ("gspo", "group"), ("dr_grpo", "none")])
def test_every_estimator_is_the_oracle_of_its_objective(name, scale, rollouts, oracle):
    rewards, mask, uids = rollouts
    order = np.argsort(uids, kind="stable")
    expected = np.empty(24)
    expected[order] = oracle.advantages(rewards.sum(-1).numpy()[order], 4, scale=scale)
    got = ours(f"composer_{name}", *rollouts).numpy()
    np.testing.assert_allclose(got, expected[:, None] * mask.numpy(), rtol=1e-5, atol=1e-6)


def test_the_order_of_rows_does_not_matter(rollouts, rng):
    import torch

    rewards, mask, uids = rollouts
    shuffle = rng.permutation(24)
    got = ours("composer_grpo", rewards[shuffle], mask[shuffle], uids[shuffle])
    torch.testing.assert_close(got, ours("composer_grpo", *rollouts)[shuffle], rtol=0, atol=0)


def test_groups_may_differ_in_size_and_a_group_of_one_gets_zero(rollouts):
    """verl gives a group of one its reward as advantage; so does `singleton: reward`."""
    import torch

    rewards, mask, uids = rollouts
    uids = uids.copy()
    uids[5] = "alone"
    got, verls = ours("composer_grpo", rewards, mask, uids), theirs(rewards, mask, uids)
    assert float(got[5].abs().max()) == 0.0
    torch.testing.assert_close(verls[5, 0], rewards[5].sum(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours("composer_grpo", rewards, mask, uids, VERLS), verls, rtol=1e-5, atol=1e-6)
    others = np.arange(24) != 5
    same = {"policy": {"advantage": {"eps": 1e-6}}}
    torch.testing.assert_close(
        ours("composer_grpo", rewards, mask, uids, same)[others], verls[others], rtol=1e-5, atol=1e-6
    )


def test_equal_rewards_give_exact_zeros(rollouts):
    rewards, mask, uids = rollouts
    rewards = rewards * 0
    rewards[:, 3] = 0.1
    assert float(ours("composer_grpo", rewards, mask, uids).abs().max()) == 0.0


def test_a_rollout_that_was_not_scored_gets_zero_and_leaves_its_group_alone(rollouts):
    import torch

    rewards, mask, uids = rollouts
    dirty = rewards.clone()
    dirty[2, 0] = float("nan")
    got = ours("composer_grpo", dirty, mask, uids)
    keep = np.arange(24) != 2
    assert float(got[2].abs().max()) == 0.0 and bool(got.isfinite().all())
    torch.testing.assert_close(got[keep], ours("composer_grpo", rewards[keep], mask[keep], uids[keep]))


def test_scale_and_batch_deviation_of_the_section(rollouts):
    import torch

    rewards, _, _ = rollouts
    batch = ours("composer_dr_grpo", *rollouts, {"policy": {"advantage": {"scale": "batch", "eps": 0.0}}})
    torch.testing.assert_close(batch, ours("composer_dr_grpo", *rollouts) / rewards.sum(-1).std())
    group = ours("composer_dr_grpo", *rollouts, {"policy": {"advantage": {"scale": "group"}}})
    torch.testing.assert_close(group, ours("composer_grpo", *rollouts))


@pytest.fixture
def padded(monkeypatch):
    """Have verl itself fill a batch of rewards up: (token rewards, response mask, uids) with its padding rows."""
    import torch
    from transfer_queue import KVBatchMeta
    from verl.trainer.ppo import padding_utils

    def fill(rewards, multiple):
        rows = torch.zeros(len(rewards), 3)
        rows[:, -1] = torch.tensor(rewards)
        mask, uids = torch.ones(len(rewards), 3), [f"uid-{i // 2}" for i in range(len(rewards))]
        source = {"uid": uids[0], "prompts": torch.tensor([1]), "responses": torch.tensor([1, 2, 3]),
                  "response_mask": mask[0], "rm_scores": rows[0]}  # fmt: skip
        put = {}
        monkeypatch.setattr(padding_utils.tq, "kv_batch_get", lambda keys, partition_id: [source])
        monkeypatch.setattr(padding_utils.tq, "kv_batch_put", lambda **given: put.update(given))
        keys = [f"{uid}_{i % 2}_0" for i, uid in enumerate(uids)]
        batch = KVBatchMeta(keys=keys, tags=[{} for _ in keys], partition_id="train")
        size = len(padding_utils.upsample_batch_to_divisible_size(batch, multiple, 0))
        more = list(put["fields"]["uid"])
        assert size == len(rewards) + len(more) == multiple
        empty = torch.zeros(len(more), 3)
        return torch.cat([rows, empty]), torch.cat([mask, empty]), np.array([*uids, *more], dtype=object)

    return fill


def test_verls_padding_rows_are_not_in_the_deviation_of_the_batch(padded):
    rewards, mask, uids = padded([1.0, 0.0, 1.0, 1.0], 8)
    batch = {"policy": {"advantage": {"scale": "batch"}}}
    got = ours("composer_dr_grpo", rewards, mask, uids, batch).numpy()
    expected = np.array([0.5, -0.5, 0.0, 0.0]) / (np.std([1, 0, 1, 1], ddof=1) + 1e-4)
    np.testing.assert_allclose(got[:4, 0], expected, rtol=1e-6)
    assert not got[4:].any()


def test_one_rollout_among_padding_rows_has_no_deviation_and_gets_zero(padded):
    rewards, mask, uids = padded([1.0], 4)
    for singleton in ("zero", "reward"):
        options = {"policy": {"advantage": {"scale": "batch", "singleton": singleton}}}
        assert not ours("composer_dr_grpo", rewards, mask, uids, options).any()


def test_a_rollout_whose_tokens_were_all_rejected_stays_in_the_deviation_as_in_its_groups_mean(padded):
    """Rollout correction takes its tokens out of the mask; its reward was earned like the others'."""
    rewards, mask, uids = padded([1.0, 0.0, 1.0, 1.0], 8)
    mask[1] = 0
    got = ours("composer_dr_grpo", rewards, mask, uids, {"policy": {"advantage": {"scale": "batch"}}}).numpy()
    np.testing.assert_allclose(got[0], 0.5 / (np.std([1, 0, 1, 1], ddof=1) + 1e-4), rtol=1e-6)
    assert not got[1].any()


def test_unknown_keys_and_missing_uids_are_refused(rollouts):
    rewards, mask, uids = rollouts
    with pytest.raises(ConfigError, match=r"Unknown key `composer.policy.advantage.epsilon`"):
        ours("composer_grpo", rewards, mask, uids, {"policy": {"advantage": {"epsilon": 1e-6}}})
    with pytest.raises(ConfigError, match="needs verl's `uid`"):
        ours("composer_grpo", rewards, mask, None)


def test_verls_v1_trainer_reaches_the_estimator(rollouts):
    """Through the function that the trainer calls, with its DataProto."""
    import torch
    from omegaconf import OmegaConf
    from verl.protocol import DataProto
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

    rewards, mask, uids = rollouts
    data = DataProto.from_dict({"token_level_rewards": rewards, "response_mask": mask.long()}, {"uid": uids})
    data = compute_advantage_for_multi_trajectories(
        data, [f"{u}_{i}_0" for i, u in enumerate(uids)], "composer_dr_grpo", config=OmegaConf.create({"composer": {}})
    )
    torch.testing.assert_close(data.batch["advantages"], ours("composer_dr_grpo", *rollouts))
