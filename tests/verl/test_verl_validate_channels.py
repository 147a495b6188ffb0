"""The full recipe's checks on the driver: what would train something else than it says does not start."""

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("verl") is None:
    pytest.skip(
        "verl is not installed: it needs an environment of its own (docs/how-to/verl.md)", allow_module_level=True
    )

from composer_verl.host import compose, problems
from composer_verl.preflight import check_config

from composer_plugins.errors import ComposerError, ConfigError, UnsupportedError
from composer_plugins.traces.schema import Message, Pair, Provenance, SourceRef
from composer_plugins.traces.store import Manifest, write_stage

RECIPES = Path(__file__).parents[2] / "recipes" / "verl"
POLICY, SDPO, REPLAY = (RECIPES / f"composer_{arm}.yaml" for arm in ("policy", "sdpo", "replay_dpo"))
COMPOSER = "trainer.v1.trainer_mode=composer"


def data(tmp_path, **columns):
    """A training file of one row with further columns."""
    import pandas as pd

    row = {"prompt": [[{"role": "user", "content": "x"}]], "data_source": "d", "extra_info": [{"index": 0}], **columns}
    path = tmp_path / "train.parquet"
    pd.DataFrame(row).to_parquet(path)
    return f"data.train_files={path}"


def pairs(path, *, tokenizer=None, chosen="red"):
    """A pairs file of one pair, with the fingerprint of a tokenizer that filtered it."""
    pair = Pair(
        id="p", state_id="s", messages=[Message(role="user", content="say a color")],
        chosen=Message(role="assistant", content=chosen), rejected=Message(role="assistant", content="blue"),
        provenance=Provenance(rule="agreement", chosen_by=["t"], rejected_by=["recorded"],
                              source_ref=SourceRef(file="f", line=1)),
    )  # fmt: skip
    options = {} if tokenizer is None else {"tokenizer": tokenizer}
    write_stage(path, [pair], Manifest(stage="pairs", record="Pair", written=0, options=options))
    return f"composer.replay_dpo.pairs={path}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+composer.sdpo.weihgt=1"], "Unknown key `composer.sdpo.weihgt`"),
        (["composer.policy.objective=grpo", "actor_rollout_ref.actor.policy_loss.loss_mode=composer_dr_grpo"], "grpo"),
        (["actor_rollout_ref.actor.policy_loss.loss_mode=vanilla"], "loss_mode=vanilla trains another one"),
        (["+composer.sdpo.level=full"], "full"),
        (["+composer.sdpo.alpha=0.5"], "alpha"),
        (["composer.sdpo.teacher.kind=trust_region"], "trust_region"),
        (["actor_rollout_ref.actor.shuffle=true"], "shuffle"),
        (["composer.sdpo.hint.sources=[]"], "composer.sdpo.hint.sources is empty"),
        (["actor_rollout_ref.actor.strategy=fsdp"], "ema"),
        (
            ["model_engine=megatron", "actor_rollout_ref.actor.strategy=megatron"],
            "actor_rollout_ref.actor.strategy=megatron: sdpo",
        ),
        (["distillation.enabled=true"], "distillation"),
        (["+composer.monitor.grad_norms_every=1"], "grad_norms_every"),
    ],
    ids=lambda x: str(x)[:60],
)
def test_what_the_self_distillation_arm_cannot_do_is_said(overrides, message):
    found = check_config(compose(SDPO, overrides))
    assert any(message in line for line in found), found


def test_policy_options_that_verls_own_trainer_and_loss_would_not_read_are_said():
    own = ["~actor_rollout_ref.actor.policy_loss", "+actor_rollout_ref.actor.policy_loss.loss_mode=vanilla"]
    assert check_config(compose(POLICY, [*own, "composer.policy.objective=host"])) == []
    found = check_config(compose(POLICY, [*own, "+composer.policy.weight=0.5", "+composer.policy.clip_low=0.1"]))
    assert "objective is dr_grpo" in found[0] and "composer.policy (clip_low, weight) has no effect" in found[1]


#: A user's own configuration on verl's stock trainer: losses of ours that are not pointed at the section.
POINTED = ["actor_rollout_ref.actor.policy_loss.composer=${composer}", "algorithm.composer=${composer}"]
ALONE = ["actor_rollout_ref.actor.policy_loss.composer={}", "algorithm.composer=null"]
DAPO = ["composer.policy.objective=dapo"]
LOSS, ESTIMATOR = (
    "policy_loss.composer.policy (with loss_mode composer_dapo) is not",
    "what the advantage estimator reads",
)


@pytest.mark.parametrize("trainer", ["sync", "composer"])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], []),
        (["+composer.policy.clip_high=0.4"], [LOSS]),
        (["+composer.policy.weight=0.5"], [LOSS]),
        (["+composer.policy.advantage={scale: group}"], [ESTIMATOR]),
        (["+composer.policy.clip_high=0.4", "+composer.policy.advantage={scale: group}"], [LOSS, ESTIMATOR]),
    ],
    ids=str,
)
def test_losses_of_ours_that_are_not_pointed_at_the_section_are_said(trainer, given, said):
    """Else the run would train with the paper's clips, weight 1 and the default advantage, on any trainer."""
    overrides = [*DAPO, *given, f"trainer.v1.trainer_mode={trainer}"]
    assert check_config(compose(POLICY, [*overrides, *POINTED])) == []
    found = check_config(compose(POLICY, [*overrides, *ALONE]))
    assert len(found) == len(said) and all(text in line for text, line in zip(said, found, strict=True)), found


def test_what_the_two_readers_are_told_themselves_is_read():
    """Options at the readers alone, without `composer.policy`; and loss options that leave the advantage to its reader."""
    bare = [*ALONE, "~composer", "actor_rollout_ref.actor.policy_loss.loss_mode=composer_dapo",
            "algorithm.adv_estimator=composer_dapo"]  # fmt: skip
    clip = ["+actor_rollout_ref.actor.policy_loss.composer.policy.clip_high=0.4"]
    assert check_config(compose(POLICY, bare)) == [] and check_config(compose(POLICY, [*bare, *clip])) == []
    scale = ["+composer.policy.advantage={scale: group}", "algorithm.composer=${composer}"]
    assert check_config(compose(POLICY, [*DAPO, ALONE[0], *scale])) == []
    unnamed = ["~composer.policy.objective", "+composer.policy.clip_high=0.4", *bare[3:], *POINTED]
    assert check_config(compose(POLICY, unnamed)) == []


def test_verls_own_loss_needs_no_objective_in_the_section_and_may_have_an_advantage_of_ours():
    """On both trainers: `composer.policy` left out, or with the options of the estimator only."""
    own = ["~actor_rollout_ref.actor.policy_loss", "+actor_rollout_ref.actor.policy_loss.loss_mode=vanilla",
           "algorithm.adv_estimator=composer_grpo"]  # fmt: skip
    scale = ["composer.policy.objective=host", "+composer.policy.advantage={scale: batch}"]
    for trainer in ("sync", "composer"):
        mode = f"trainer.v1.trainer_mode={trainer}"
        assert check_config(compose(POLICY, [*own, "~composer.policy.objective", mode])) == []
        assert check_config(compose(POLICY, [*own, *scale, mode])) == []
        found = check_config(compose(POLICY, [*own, *scale, "algorithm.composer=null", mode]))
        assert len(found) == 1 and ESTIMATOR in found[0]


def test_an_estimator_of_verls_own_that_reads_no_advantage_is_said_by_the_trainer_too():
    overrides = ["+composer.policy.advantage={scale: group}", "algorithm.adv_estimator=grpo"]
    for trainer in ("sync", "composer"):
        found = check_config(compose(POLICY, [*overrides, f"trainer.v1.trainer_mode={trainer}"]))
        assert len(found) == 1 and "no effect on verl's own algorithm.adv_estimator=grpo" in found[0], found


def test_verls_stock_trainer_raises_the_same_when_it_asks_for_the_first_advantages():
    """`main_ppo` without `composer-rl`: the estimator is given `config.algorithm` and finds the whole configuration."""
    import cloudpickle
    import torch
    from omegaconf import OmegaConf
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    def ask(overrides):
        config = cloudpickle.loads(cloudpickle.dumps(compose(POLICY, overrides)))  # as Ray hands it to verl's task
        OmegaConf.resolve(config)  # as verl's task does
        return get_adv_estimator_fn("composer_dapo")(
            token_level_rewards=torch.eye(2), response_mask=torch.ones(2, 2), index=["a", "a"], config=config.algorithm
        )

    given = [*DAPO, "+composer.policy.clip_high=0.4", "+composer.policy.advantage={scale: group}"]
    with pytest.raises(ConfigError) as raised:
        ask([*given, *ALONE])
    assert LOSS in str(raised.value) and ESTIMATOR in str(raised.value)
    ask([*given, *POINTED])


def test_the_recipe_as_it_is_has_no_problem():
    assert check_config(compose(SDPO)) == []


@pytest.mark.parametrize(
    ("sources", "columns", "overrides"),
    [
        ("recorded", {"hint": ["do x"]}, []),
        ("recorded", {"extra_info": [{"index": 0, "hint": "do x"}]}, []),
        ("rollout", {}, ["actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent"]),
        ("rollout", {"agent_name": ["tool_agent"]}, []),
        ("feedback", {}, ["reward.custom_reward_function.path=reward.py"]),
        ("sibling", {}, ["actor_rollout_ref.rollout.n=2"]),
    ],
)
def test_a_hint_source_that_cannot_give_a_hint_is_a_problem(sources, columns, overrides, tmp_path):
    bare = ["actor_rollout_ref.rollout.agent.default_agent_loop=single_turn_agent", "actor_rollout_ref.rollout.n=1",
            "reward.custom_reward_function.path=null", f"composer.sdpo.hint.sources=[{sources}]"]  # fmt: skip
    without = check_config(compose(SDPO, [*bare, data(tmp_path)]))
    assert len(without) == 1 and f"can give a hint: {sources}: " in without[0]
    assert check_config(compose(SDPO, [*bare, data(tmp_path, **columns), *overrides])) == []


def test_recorded_hints_that_nothing_reads_are_remarked(tmp_path, caplog):
    hints = data(tmp_path, extra_info=[{"index": 0, "hint": "do x"}])
    for recipe, overrides, said in (
        (SDPO, ["composer.sdpo.hint.sources=[rollout]"], "hint.sources does not name `recorded`"),
        (POLICY, [], "composer.sdpo.weight is 0"),
        (SDPO, ["composer.sdpo.hint.sources=[rollout,recorded]"], None),
    ):
        caplog.clear()
        assert check_config(compose(recipe, [hints, *overrides])) == []
        found = [r.getMessage() for r in caplog.records if "none of them is used" in r.getMessage()]
        assert len(found) == (said is not None) and (said is None or said in found[0])
    caplog.clear()
    assert check_config(compose(POLICY, [data(tmp_path)])) == [] and not caplog.records


def test_a_reference_of_another_precision_is_remarked(tmp_path, caplog):
    reference = ["composer.sdpo.teacher.kind=reference", "actor_rollout_ref.ref.log_prob_use_dynamic_bsz=true"]
    paired = [pairs(tmp_path / "pairs.jsonl")]
    kl = "actor_rollout_ref.actor.use_kl_loss=true"
    fp32 = "+actor_rollout_ref.{}.fsdp_config.mixed_precision={{param_dtype: {}}}"
    actor, ref, same = fp32.format("actor", "fp32"), fp32.format("ref", "float32"), fp32.format("ref", "fp16")
    for recipe, overrides, said in (
        (SDPO, reference, None),
        (SDPO, [*reference, actor], "in bf16 and the actor in fp32"),
        (SDPO, [*reference, actor, ref], None),
        (SDPO, [*reference, same], "in fp16 and the actor in bf16"),
        (SDPO, [actor], None),
        (SDPO, [*reference, actor, "actor_rollout_ref.model.lora_rank=8"], None),
        (REPLAY, [*paired, actor], None),
        (REPLAY, [*paired, actor, kl], "in bf16 and the actor in fp32"),
    ):
        caplog.clear()
        assert check_config(compose(recipe, overrides)) == [], overrides
        found = [r.getMessage() for r in caplog.records if "reference worker computes" in r.getMessage()]
        assert len(found) == (said is not None) and (said is None or said in found[0]), overrides


def test_one_source_that_can_is_enough_and_unreadable_data_is_no_problem(tmp_path):
    both = "composer.sdpo.hint.sources=[recorded,rollout]"
    assert check_config(compose(SDPO, [both, data(tmp_path)])) == []
    recorded = "composer.sdpo.hint.sources=[recorded]"
    assert check_config(compose(SDPO, [recorded, "data.train_files=/nowhere/train.parquet"])) == []
    assert check_config(compose(SDPO, [recorded, data(tmp_path)])) != []


@pytest.mark.parametrize("channel", ["sdpo", "replay_dpo"])
def test_a_channel_on_verls_own_trainer_is_refused_everywhere(channel, tmp_path):
    """In validate, and in the dataclass that main_ppo builds on the driver before Ray starts."""
    from verl.utils.config import omega_conf_to_dataclass

    overrides = [f"+composer.{channel}.weight=0.1", "+" + pairs(tmp_path / "pairs.jsonl")]
    expected = f"composer.{channel}.weight is 0.1, but verl's own trainers do not know this channel"
    assert any(expected in line for line in problems(POLICY, overrides))
    stock = compose(POLICY, overrides).actor_rollout_ref.actor
    with pytest.raises(Exception, match="do not know this channel"):
        omega_conf_to_dataclass(stock)
    allowed = compose(POLICY, [*overrides, COMPOSER]).actor_rollout_ref.actor
    assert omega_conf_to_dataclass(allowed).policy_loss.composer[channel]["weight"] == 0.1


def test_a_pairs_file_that_is_missing_broken_or_empty(tmp_path):
    path = tmp_path / "pairs.jsonl"
    override = pairs(path)
    assert check_config(compose(REPLAY, [override])) == []
    path.write_text(path.read_text()[:40])
    assert "not a Pair record" in check_config(compose(REPLAY, [override]))[0]
    write_stage(path, [], Manifest(stage="pairs", record="Pair", written=0))
    assert "holds no pair" in check_config(compose(REPLAY, [override]))[0]
    path.unlink()
    assert "does not exist" in check_config(compose(REPLAY, [override]))[0]


def test_pairs_filtered_with_another_tokenizer_are_refused_before_the_run(tmp_path, monkeypatch):
    from composer_plugins.models.tokenizer import tokenizer_fingerprint

    monkeypatch.syspath_prepend(Path(__file__).parent / "cpu_host")
    spec = importlib.util.spec_from_file_location(
        "tiny_model_of_validate", Path(__file__).parent / "cpu_host" / "composer_cpu_host" / "tiny.py"
    )
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    from transformers import AutoTokenizer

    model = tiny.write_model(tmp_path / "model")
    sizes = [f"actor_rollout_ref.model.path={model}"]
    own = {"model": "tiny", "sha256": tokenizer_fingerprint(AutoTokenizer.from_pretrained(model), template=False)}
    assert check_config(compose(REPLAY, [*sizes, pairs(tmp_path / "own.jsonl", tokenizer=own)])) == []
    other = pairs(tmp_path / "other.jsonl", tokenizer={"model": "another", "sha256": "0" * 64})
    assert "tokenizer" in check_config(compose(REPLAY, [*sizes, other]))[0]
    same = pairs(tmp_path / "same.jsonl", chosen="blue")
    assert "no pair of" in check_config(compose(REPLAY, [*sizes, same]))[0]


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        (SDPO, ["+composer.sdpo.weihgt=1"], "Unknown key `composer.sdpo.weihgt`"),
        (SDPO, ["actor_rollout_ref.actor.shuffle=true"], "shuffle"),
        (SDPO, ["composer.sdpo.hint.sources=[sibling]", "actor_rollout_ref.rollout.n=1"], "can give a hint"),
        (REPLAY, [], "pairs.jsonl does not exist"),
    ],
)
def test_the_trainer_itself_refuses_for_those_who_start_main_ppo(recipe, overrides, message):
    """Without `composer-rl`: the trainer's constructor raises before verl builds anything."""
    import verl.trainer.ppo.v1  # noqa: F401
    from verl.trainer.ppo.v1.trainer_base import get_trainer_cls

    with pytest.raises(ComposerError, match=message) as raised:
        get_trainer_cls("composer")(compose(recipe, overrides))
    assert isinstance(raised.value, ConfigError | UnsupportedError)


def test_a_trainer_that_is_not_registered_is_an_error_and_no_vanilla_run(monkeypatch):
    """A plugin that failed to load, or was kept out: verl itself would only say that it does not know the name."""
    import verl.trainer.ppo.v1  # noqa: F401
    from verl.trainer.ppo.v1 import trainer_base

    monkeypatch.setattr(
        trainer_base, "TRAINER_REGISTRY", {k: v for k, v in trainer_base.TRAINER_REGISTRY.items() if k != "composer"}
    )
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    found = problems(SDPO, [])
    assert any("verl has no 'composer'; VERL_USE_EXTERNAL_PLUGINS=none keeps ours out" in line for line in found), found
