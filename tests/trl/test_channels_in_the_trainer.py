"""Channels inside real GRPO runs of a tiny model: what contributes, what it costs, and who is told when nothing does."""

import itertools
import math
import warnings

import pytest
import torch

pytest.importorskip("trl")

from composer_plugins.channels.silence import SilentChannelWarning
from composer_plugins.errors import ConfigError, SilentChannelError, TraceError
from composer_plugins.traces.schema import Message, Pair, Provenance, SourceRef, ToolCall
from composer_plugins.traces.store import Manifest, write_stage

SDPO = {"weight": 1.0, "hint": {"sources": ["recorded"]}}
#: Plain gradient descent: the parameters after one step are the gradient.
DESCENT = dict(
    optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=1e9, max_steps=1, weight_decay=0.0
)


@pytest.fixture
def pairs(tmp_path):
    def action(name, i):
        call = ToolCall(id="0", name=name, arguments={"file_path": f"{i}.py", "limit": i})
        return Message(role="assistant", content="x" * i, tool_calls=[call])

    records = [
        Pair(
            id=str(i),
            state_id=str(i),
            messages=[Message(role="user", content=f"do {i}")],
            chosen=action("Read", i),
            rejected=action("Edit", 2 * i),
            provenance=Provenance(rule="x", chosen_by=[], rejected_by=[], source_ref=SourceRef(file="f", line=1)),
        )
        for i in range(5)
    ]
    path = tmp_path / "pairs.jsonl"
    write_stage(path, records, Manifest(stage="pairs", record="Pair", written=0))
    return str(path)


def parameters(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()])


def history(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_all_three_channels_carry_gradient(make_trainer, pairs):
    trainer = make_trainer(
        {"sdpo": SDPO, "replay_dpo": {"weight": 0.5, "pairs": pairs}, "monitor": {"grad_norms_every": 1}}, max_steps=3
    )
    trainer.train()
    for channel in ("policy", "sdpo", "replay_dpo"):
        assert max(history(trainer, f"{channel}/grad_norm")) > 0, channel
    assert history(trainer, "sdpo/hinted_turns") == [4, 4, 4]
    assert history(trainer, "replay_dpo/pairs") == [4, 4, 4]
    assert history(trainer, "replay_dpo/loss")[0] == pytest.approx(math.log(2), abs=1e-6)  # policy = reference


@pytest.mark.parametrize("channel", ["policy", "sdpo", "replay_dpo"])
def test_switching_a_channel_off_changes_the_parameters(make_trainer, pairs, channel):
    section = {
        "policy": {"weight": 1.0},
        "sdpo": dict(SDPO),
        "replay_dpo": {"weight": 0.5, "pairs": pairs},
    }
    on = make_trainer(section, **DESCENT)
    on.train()
    section[channel] = {**section[channel], "weight": 0.0}
    off = make_trainer(section, **DESCENT)
    off.train()
    assert not torch.equal(parameters(on), parameters(off))


def count_calls(trainer, owner, name):
    calls, original = [], getattr(owner, name)
    setattr(owner, name, lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    return calls


def test_weight_zero_is_not_computed_and_the_student_runs_once(make_trainer, pairs):
    trainer = make_trainer({"sdpo": SDPO, "replay_dpo": {"weight": 0.5, "pairs": pairs}}, max_steps=1)
    forwards = []
    trainer.access.backbone.register_forward_hook(
        lambda module, args, output: forwards.append(torch.is_grad_enabled() and module.training)
    )
    trainer.pair_channel.begin = lambda: trainer.pair_channel.stream.reference.update(
        {i: ([0.0] * len(p.chosen), [0.0] * len(p.rejected)) for i, p in enumerate(trainer.pair_channel.stream.pairs)}
    )
    trainer.train()
    assert sum(forwards) == 2  # with gradient: the student on its rollouts, and the pairs

    plain = make_trainer({"policy": {"objective": "dr_grpo"}}, max_steps=1)
    seen = []
    plain.access.backbone.register_forward_hook(lambda *a: seen.append(torch.is_grad_enabled()))
    plain.train()
    assert sum(seen) == 1
    assert plain.sdpo_channel is None and plain.pair_channel is None


def test_removing_the_hints_fires_the_silent_channel_warning(make_trainer, dataset):
    trainer = make_trainer(
        {"sdpo": SDPO, "monitor": {"silent_after": 2}}, train_dataset=dataset.remove_columns("hint"), max_steps=3
    )
    with pytest.warns(SilentChannelWarning, match=r"sdpo.*no turn of the rollouts had a hint"):
        trainer.train()
    assert history(trainer, "sdpo/active_tokens") == [0, 0, 0]


def test_a_silent_channel_can_stop_the_run(make_trainer, dataset):
    trainer = make_trainer(
        {"sdpo": SDPO, "monitor": {"silent_after": 1, "on_silence": "error"}},
        train_dataset=dataset.remove_columns("hint"),
    )
    with pytest.raises(SilentChannelError, match="sdpo"):
        trainer.train()


def test_equal_rewards_are_a_silent_policy(make_trainer):
    trainer = make_trainer(
        {"monitor": {"silent_after": 1}, "policy": {"objective": "grpo"}},
        reward_funcs=lambda completion_ids, **_: [1.0] * len(completion_ids),
        max_steps=1,
    )
    with pytest.warns(SilentChannelWarning, match=r"policy.*equal rewards"):
        trainer.train()


def test_a_channel_that_contributes_gives_no_warning(make_trainer):
    with warnings.catch_warnings():
        warnings.simplefilter("error", SilentChannelWarning)
        make_trainer({"sdpo": SDPO, "monitor": {"silent_after": 1}}, max_steps=2).train()


def test_an_empty_hint_and_a_live_teacher_diverge_by_exactly_zero(make_trainer, dataset):
    """Same layout, same weights, dropout off: the hinted context is the context itself."""
    blank = dataset.map(lambda row: {"hint": " "})
    section = {"sdpo": {**SDPO, "teacher": {"kind": "live"}}, "monitor": {"silent_after": 1}}
    trainer = make_trainer(section, train_dataset=blank, max_steps=1)
    trainer.hint_sources._prefix = lambda row, rollout, before, hint: [*rollout.prompt_ids[row], *before]
    with pytest.warns(SilentChannelWarning, match="did not change the teacher"):
        trainer.train()
    assert history(trainer, "sdpo/divergence") == [0.0]

    hinted = make_trainer(section, max_steps=1)
    hinted.train()
    assert history(hinted, "sdpo/divergence")[0] > 0


@pytest.mark.parametrize("objective", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_accumulation_and_micro_batches_leave_the_step_unchanged(make_trainer, make_model, pairs, objective):
    section = {
        "policy": {"objective": objective},
        "sdpo": SDPO,
        "replay_dpo": {"weight": 0.5, "pairs": pairs, "pairs_per_step": 4},
    }
    start = torch.cat([p.detach().flatten() for p in make_model().parameters()])
    moves = []
    for size, steps in ((8, 1), (4, 2), (2, 4)):
        trainer = make_trainer(section, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **DESCENT)
        trainer.train()
        moves.append(parameters(trainer) - start)
    for other in moves[1:]:
        assert (other - moves[0]).norm() / moves[0].norm() <= 1e-5


def test_generation_batches_larger_than_a_step_keep_exact_denominators(make_trainer):
    trainer = make_trainer(
        {"sdpo": SDPO}, per_device_train_batch_size=2, gradient_accumulation_steps=2, steps_per_generation=4
    )
    trainer.train()
    batches = trainer._buffered_inputs
    for step in (batches[:2], batches[2:]):
        tokens = sum(trainer.sdpo_channel.units(batch["composer_turns"]) for batch in step)
        assert [batch["composer_denominators"]["sdpo"] for batch in step] == [tokens, tokens]


def test_padding_width_leaves_the_step_unchanged(make_trainer, make_model, pairs):
    section = {"sdpo": SDPO, "replay_dpo": {"weight": 0.5, "pairs": pairs}}
    start = torch.cat([p.detach().flatten() for p in make_model().parameters()])
    moves = []
    for multiple in (None, 64):
        trainer = make_trainer(section, pad_to_multiple_of=multiple, **DESCENT)
        trainer.train()
        moves.append(parameters(trainer) - start)
    assert (moves[1] - moves[0]).norm() / moves[0].norm() <= 1e-5


def test_the_ema_teacher_follows_the_formula(make_trainer):
    trainer = make_trainer({"sdpo": {**SDPO, "teacher": {"kind": "ema", "ema_rate": 0.25}}}, max_steps=3)
    name, parameter = next(iter(trainer.access.trainable().items()))
    expected, seen = parameter.detach().double().clone(), []
    update = trainer.sdpo_channel.teacher.update

    def watched():
        seen.append(parameter.detach().double().clone())
        update()

    trainer.sdpo_channel.teacher.update = watched
    trainer.train()
    for weights in seen:
        expected = 0.75 * expected + 0.25 * weights
    assert len(seen) == 3 and not torch.equal(seen[0], seen[-1])
    torch.testing.assert_close(trainer.sdpo_channel.teacher.ema[name].double(), expected, rtol=1e-6, atol=1e-8)


def test_the_reference_teacher_never_moves(make_trainer):
    trainer = make_trainer({"sdpo": {**SDPO, "teacher": {"kind": "reference"}}}, max_steps=3, learning_rate=0.1)
    before = {k: v.clone() for k, v in trainer.sdpo_channel.teacher.reference.items()}
    trainer.train()
    after = trainer.sdpo_channel.teacher.reference
    assert all(torch.equal(before[k], after[k]) for k in before)
    live = trainer.access.trainable()
    assert any(not torch.equal(live[k], after[k]) for k in before)


@pytest.mark.parametrize(
    ("teacher", "level"), itertools.product(["live", "ema", "reference", "trust_region"], ["full", "topk", "sampled"])
)
def test_every_teacher_and_level_trains(make_trainer, teacher, level):
    sdpo = {**SDPO, "teacher": {"kind": teacher}, "level": level, "top_k": 20}
    if (teacher, level) == ("trust_region", "sampled"):
        with pytest.raises(ConfigError, match="trust_region"):
            make_trainer({"sdpo": sdpo})
        return
    trainer = make_trainer({"sdpo": sdpo, "monitor": {"grad_norms_every": 1}}, max_steps=1)
    trainer.train()
    assert history(trainer, "sdpo/grad_norm")[0] > 0


def test_the_trust_region_mixes_reference_and_live(make_trainer):
    """At mix 1 it is the live teacher, at mix 0 the frozen one: compare the first divergences of a moved policy."""
    found = {}
    for name, teacher in {
        "live": {"kind": "live"},
        "mix 1": {"kind": "trust_region", "mix": 1.0},
        "reference": {"kind": "reference"},
        "mix 0": {"kind": "trust_region", "mix": 0.0},
    }.items():
        trainer = make_trainer({"sdpo": {**SDPO, "teacher": teacher}}, max_steps=1)
        with torch.no_grad():
            for p in trainer.access.trainable().values():  # the policy has moved away from its reference
                p.mul_(1.3)
        trainer.train()
        found[name] = history(trainer, "sdpo/divergence")[0]
    assert found["mix 1"] == pytest.approx(found["live"], rel=1e-5)
    assert found["mix 0"] == pytest.approx(found["reference"], rel=1e-5)
    assert found["live"] != pytest.approx(found["reference"], rel=1e-3)


def test_only_the_hinted_turns_tokens_carry_the_kl(make_trainer):
    """The term's gradient with respect to the student's hidden states is zero outside the hinted span."""
    trainer = make_trainer({"policy": {"weight": 0.0}, "sdpo": SDPO}, max_steps=1)
    seen = {}
    terms = trainer.sdpo_channel.terms

    def watched(inputs, logps, hidden, turns, denominator):
        for row in turns:  # two tokens of each completion only
            for turn in row:
                turn.start, turn.end, turn.mask = 2, 4, [True, True]
                turn.prefix_ids = [*turn.prefix_ids, *inputs["completion_ids"][0, :2].tolist()]
        hidden.retain_grad()
        seen.update(hidden=hidden, prompt=inputs["prompt_ids"].size(1))
        return terms(inputs, logps, hidden, turns, denominator)

    trainer.sdpo_channel.terms = watched
    trainer.train()
    gradient = seen["hidden"].grad.abs().sum(-1)
    first = seen["prompt"] + 2 - 1  # the position that predicts completion token 2
    inside = gradient[:, first : first + 2]
    assert (inside > 0).all()
    assert (gradient > 0).sum() == inside.numel()


def test_feedback_of_the_reward_function_is_a_hint(make_trainer, dataset):
    def reward(completion_ids, log_extra=None, **_):
        if log_extra is not None:
            log_extra("feedback", [f"try {i}" if i % 2 else None for i in range(len(completion_ids))])
        return [len(set(ids)) / len(ids) for ids in completion_ids]

    trainer = make_trainer(
        {"sdpo": {"weight": 1.0, "hint": {"sources": ["feedback"]}}},
        reward_funcs=reward,
        train_dataset=dataset.remove_columns("hint"),
        max_steps=1,
    )
    trainer.train()
    turns = [turn for batch in trainer._buffered_inputs for row in batch["composer_turns"] for turn in row]
    assert sorted(t.hint[-5:] for t in turns) == ["try 1", "try 3"]
    assert {t.kind for t in turns} == {"feedback"}


def test_a_successful_sibling_is_a_hint_for_the_failed_ones(make_trainer, dataset, tokenizer):
    trainer = make_trainer(
        {"sdpo": {"weight": 1.0, "hint": {"sources": ["sibling"]}}},
        reward_funcs=lambda completion_ids, **_: [1.0 if i == 1 else 0.0 for i in range(len(completion_ids))],
        train_dataset=dataset.remove_columns("hint"),
        max_steps=1,
    )
    completions = []
    turns_of_rollout = trainer.hint_sources.turns
    trainer.hint_sources.turns = lambda inputs, rollout: (
        completions.extend(rollout.completion_ids),
        turns_of_rollout(inputs, rollout),
    )[1]
    trainer.train()
    rows = [row for batch in trainer._buffered_inputs for row in batch["composer_turns"]]
    assert sorted(len(row) for row in rows) == [0, 1, 1, 1]
    solution = tokenizer.decode(completions[1], skip_special_tokens=True)
    assert all(solution in turn.hint for row in rows for turn in row)


@pytest.mark.parametrize("placement", ["local", "leading_system", "last_user"])
def test_every_placement_trains_and_keeps_the_sampled_ids(make_trainer, placement, tokenizer):
    trainer = make_trainer({"sdpo": {"weight": 1.0, "hint": {"sources": ["recorded"], "placement": placement}}})
    trainer.train()
    for batch in trainer._buffered_inputs:
        for row, turns in enumerate(batch["composer_turns"]):
            for turn in turns:
                assert turn.token_ids == batch["completion_ids"][row, turn.start : turn.end].tolist()
                assert turn.hint in tokenizer.decode(turn.prefix_ids)
    assert history(trainer, "sdpo/divergence")[0] > 0


def test_plain_text_prompts_take_hints_too(make_trainer):
    from datasets import Dataset

    data = Dataset.from_list([{"prompt": f"count {w}", "hint": "use numbers"} for w in ("a", "bb", "ccc", "dd")])
    trainer = make_trainer({"sdpo": SDPO}, train_dataset=data, max_steps=1)
    trainer.train()
    assert history(trainer, "sdpo/divergence")[0] > 0


def test_engine_correction_scales_policy_and_sdpo_but_not_pairs(make_trainer, pairs):
    """vLLM's importance ratio (a factor per token in TRL's batch) reaches the first two channels only."""
    moves = {}
    for name, section in {
        "policy": {},
        "sdpo": {"policy": {"weight": 0.0}, "sdpo": SDPO},
        "pairs": {"policy": {"weight": 0.0}, "replay_dpo": {"weight": 1.0, "pairs": pairs}},
    }.items():
        for ratio in (1.0, 3.0):
            trainer = make_trainer(section, **DESCENT)
            start = parameters(trainer)
            generate = trainer._generate_and_score_completions

            def with_ratio(inputs, generate=generate, ratio=ratio):
                output = generate(inputs)
                output["importance_sampling_ratio"] = torch.full_like(
                    output["completion_ids"], ratio, dtype=torch.float
                )
                return output

            trainer._generate_and_score_completions = with_ratio
            trainer.train()
            moves[name, ratio] = parameters(trainer) - start
    for name, factor in (("policy", 3.0), ("sdpo", 3.0), ("pairs", 1.0)):
        torch.testing.assert_close(moves[name, 3.0], factor * moves[name, 1.0], rtol=1e-3, atol=1e-7)


def test_a_pairs_file_with_nothing_to_train_on_is_refused(make_trainer, pairs):
    with pytest.raises(TraceError, match=r"longer than max_length': 5"):
        make_trainer({"replay_dpo": {"weight": 1.0, "pairs": pairs, "max_length": 4}})


def test_options_of_trls_own_loss_are_refused_with_our_objectives(make_trainer):
    with pytest.raises(ConfigError, match=r"beta.*objective: host"):
        make_trainer({"policy": {"objective": "grpo"}}, beta=0.1)
    make_trainer({"policy": {"objective": "host"}, "sdpo": SDPO}, delta=2.0)


@pytest.mark.parametrize("kl", [{"coef": 0.1}, {"coef": 0.1, "estimator": "k3", "placement": "loss"}])
def test_kl_to_the_initial_policy_pulls_only_once_the_policy_has_moved(make_trainer, kl):
    """At the initial weights both estimators are zero; after moving away they change the step."""
    moves = {}
    for moved, section in itertools.product((False, True), ({}, {"policy": {"kl": kl}})):
        trainer = make_trainer(section, **DESCENT)
        if moved:
            with torch.no_grad():
                for p in trainer.access.trainable().values():
                    p.mul_(1.5)
        start = parameters(trainer)
        trainer.train()
        moves[moved, bool(section)] = parameters(trainer) - start
    torch.testing.assert_close(moves[False, True], moves[False, False], rtol=1e-3, atol=1e-6)
    assert (moves[True, True] - moves[True, False]).norm() / moves[True, False].norm() > 1e-3
