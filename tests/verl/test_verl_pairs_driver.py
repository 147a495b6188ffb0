"""Channel 3 on verl's driver: which pairs a step draws, and what is refused before a worker starts."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

if importlib.util.find_spec("verl") is None:
    pytest.skip(
        "verl is not installed: it needs an environment of its own (docs/how-to/verl.md)", allow_module_level=True
    )

from composer_plugins.channels.pair_stream import REFERENCE_FILE
from composer_plugins.config import parse_section
from composer_plugins.errors import ConfigError, TraceError, UnsupportedError
from composer_plugins.models.tokenizer import tokenizer_fingerprint
from composer_plugins.traces.schema import Message, Pair, Provenance, SourceRef
from composer_plugins.traces.store import Manifest, manifest_path, write_stage

HERE = Path(__file__).parent
BASE = HERE.parents[1] / "recipes" / "verl" / "composer_base.yaml"
WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog"]


def pair(number, chosen, rejected):
    provenance = Provenance(rule="x", chosen_by=[], rejected_by=[], source_ref=SourceRef(file="f", line=1))
    return Pair(
        id=str(number), state_id=str(number), messages=[Message(role="user", content="say red please")],
        chosen=Message(role="assistant", content=chosen), rejected=Message(role="assistant", content=rejected),
        provenance=provenance,
    )  # fmt: skip


def write(path, records, **options):
    write_stage(path, records, Manifest(stage="pairs", record="Pair", written=0, options=options))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    sys.path.insert(0, str(HERE / "cpu_host" / "composer_cpu_host"))
    import tiny

    return AutoTokenizer.from_pretrained(tiny.write_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "pairs.jsonl", [pair(i, WORDS[i], f"{WORDS[i]} {WORDS[(i + 1) % 8]}") for i in range(8)])


@pytest.fixture
def build(tokenizer, pairs, tmp_path):
    """Build `PairRows` as the trainer does: `build({"beta": 0.2}, "actor...shuffle=true")`."""

    def make(section=None, *overrides, path=None):
        from composer_verl.host import compose
        from composer_verl.pair_rows import PairRows

        config = compose(
            BASE,
            [
                "data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=4", "actor_rollout_ref.rollout.n=2",
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4", "actor_rollout_ref.actor.strategy=fsdp2",
                f"trainer.default_local_dir={tmp_path / 'run'}", *overrides,
            ],
        )  # fmt: skip
        dpo = {"weight": 1.0, "pairs": str(path or pairs), "pairs_per_step": 3, **(section or {})}
        return PairRows(parse_section({"replay_dpo": dpo}), config, tokenizer)

    return make


def resumed(rows, *, step, total, reference=False):
    return SimpleNamespace(use_reference_policy=reference, global_steps=step, total_training_steps=total)


def test_every_optimizer_step_draws_the_next_pairs(build):
    rows = build()
    one, two = rows.draw(1, 16), rows.draw(2, 16)
    assert [len(pairs) for pairs in one + two] == [3, 3, 3, 3]  # two mini-batches of 4 x 2 rollouts a step
    drawn = [index for pairs in one + two for index in pairs]
    assert drawn == [rows.stream.order[i % 8] for i in range(12)]
    assert rows.draw(2, 16) == two  # from the step alone
    assert rows.draw(1, 24) == [*one, one[0]]  # a step with more rollouts repeats its pairs


def test_two_seeds_draw_in_other_orders(build):
    one, two = build(), build({}, "actor_rollout_ref.actor.data_loader_seed=7")
    assert one.stream.order != two.stream.order


def test_what_the_update_is_told(build):
    rows = build()
    rows._layout, rows._ranks = SimpleNamespace(slot_rows=12), 2
    assert rows.extra_info() == {
        "mini_batch_size": 24, "force_group_size": 2, "dataloader_kwargs": {"shuffle": False},
        "micro_batch_size_per_gpu": 2,
    }  # fmt: skip


@pytest.mark.parametrize("temperature", ["1.0", "0.7"])
def test_a_temperature_other_than_1_goes_into_the_rows(build, temperature):
    rows = build({}, f"actor_rollout_ref.rollout.temperature={temperature}")
    batch = SimpleNamespace(
        extra_info={"temperature": float(temperature), "mini_batch_size": 8, "global_batch_size": 8}
    )
    rows.override(batch)
    assert ("temperature" in batch.extra_info) == (temperature == "1.0")
    assert batch.extra_info["global_batch_size"] == 8  # what the policy divides by


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("actor_rollout_ref.actor.shuffle=true", "tears pairs apart"),
        ("actor_rollout_ref.actor.use_prefix_grouper=true", "set it to false"),
        ("+actor_rollout_ref.actor.fsdp2={router_replay: {mode: R3}}", "set it to disabled"),
    ],
)
def test_options_that_tear_pairs_apart_are_refused(build, override, message):
    with pytest.raises(UnsupportedError, match=message):
        build({}, override)


def test_fused_kernels_take_one_temperature(build):
    build({}, "actor_rollout_ref.model.use_fused_kernels=true")
    with pytest.raises(UnsupportedError, match="at temperature 1 and rollouts were sampled at"):
        build({}, "actor_rollout_ref.model.use_fused_kernels=true", "actor_rollout_ref.rollout.temperature=0.7")


def test_a_weight_without_pairs_is_refused():
    with pytest.raises(ConfigError, match=r"replay_dpo\.pairs names no file"):
        parse_section({"replay_dpo": {"weight": 1.0}})


def test_a_missing_file(build, tmp_path):
    with pytest.raises(TraceError, match="there is no such file"):
        build(path=tmp_path / "none.jsonl")


def test_a_file_whose_stage_did_not_finish(build, pairs):
    manifest_path(pairs).unlink()
    with pytest.raises(TraceError, match="did not finish"):
        build()


def test_an_empty_file(build, tmp_path):
    with pytest.raises(TraceError, match="the file is empty"):
        build(path=write(tmp_path / "empty.jsonl", []))


def test_no_pair_is_short_enough(build):
    with pytest.raises(TraceError, match=r"longer than max_length.*Raise replay_dpo.max_length"):
        build({"max_length": 3})


def test_a_pair_that_cannot_fit_into_a_micro_batch(build):
    budget = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
    dynamic = "actor_rollout_ref.actor.use_dynamic_bsz=true"
    assert len(build({}, dynamic, f"{budget}=40").stream.pairs) == 8
    with pytest.raises(TraceError, match=r"token budget.*tokens per device \(now 20\)"):
        build({}, dynamic, f"{budget}=20")
    sequence_parallel = "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2"
    assert len(build({}, dynamic, f"{budget}=20", sequence_parallel).stream.pairs) == 8


def test_words_of_another_tokenizer(build, tmp_path):
    path = write(tmp_path / "other.jsonl", [pair(0, "Qwertz uiop", "red")])
    with pytest.raises(TraceError, match=r"tokens unknown to this tokenizer.*made for another tokenizer"):
        build(path=path)


def test_pairs_that_were_filtered_with_another_tokenizer(build, tokenizer, tmp_path):
    records = [pair(0, "red", "blue")]
    other = {"model": "some/model", "sha256": "0" * 64}
    with pytest.raises(ConfigError, match="filtered with the tokenizer of 'some/model'"):
        build(path=write(tmp_path / "a.jsonl", records, tokenizer=other))
    own = {"model": "this", "sha256": tokenizer_fingerprint(tokenizer, template=False)}
    assert len(build(path=write(tmp_path / "b.jsonl", records, tokenizer=own)).stream.pairs) == 1


def test_a_resumed_run_needs_the_reference_of_the_first(build, tmp_path, pairs):
    rows, folder = build(), tmp_path / "run"
    with pytest.raises(ConfigError, match="has no composer_pair_reference"):
        rows.begin(resumed(rows, step=1, total=2))
    rows.begin(resumed(rows, step=1, total=2, reference=True))  # a frozen reference worker can be asked at any time

    rows.stream.reference = {i: ([-1.0], [-2.0, -3.0]) for i in rows.draw(1, 16)[0]}
    folder.mkdir()
    rows.stream.save(folder)
    with pytest.raises(ConfigError, match="would draw 5 pairs that the first run did not score"):
        build().begin(resumed(rows, step=1, total=3))

    rows.stream.reference = {i: ([-1.0], [-2.0, -3.0]) for i in range(8)}
    rows.stream.save(folder)
    again = build()
    again.begin(resumed(rows, step=1, total=3))
    assert again.stream.reference == rows.stream.reference

    write(pairs, [pair(i, "red", "blue") for i in range(8)])
    with pytest.raises(ConfigError, match="is not the pairs file"):
        build().begin(resumed(rows, step=1, total=2))


def test_a_reference_of_another_tokenizer(build, tmp_path):
    rows, folder = build(), tmp_path / "run"
    folder.mkdir()
    rows.stream.reference = {i: ([-1.0], [-2.0]) for i in range(8)}
    rows.stream.save(folder)
    payload = json.loads((folder / REFERENCE_FILE).read_text())
    (folder / REFERENCE_FILE).write_text(json.dumps({**payload, "tokenizer_sha256": "0" * 64}))
    with pytest.raises(ConfigError, match="another tokenizer or chat template"):
        build().begin(resumed(rows, step=1, total=2))


def test_resuming_from_a_named_checkpoint_looks_beside_it(build, tmp_path):
    first = tmp_path / "first"
    first.mkdir()
    build().stream.save(first)
    override = ("trainer.resume_mode=resume_path", f"trainer.resume_from_path={first / 'global_step_2'}")
    assert build({}, *override)._run_folder() == first


def test_tokens_that_rollout_correction_rejects_do_not_shrink_the_policys_metrics():
    """verl's `batch_num_tokens` counts `loss_mask`; `response_mask` has lost the rejected tokens by then."""
    import torch
    from composer_verl.pair_loss import weigh_by_tokens
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu
    from verl.utils.metric import AggregationType, Metric

    def nested(*rows):
        return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)

    loss, kept = nested([1, 1, 0, 1], [1, 1], [1]), nested([1, 0, 0, 0], [0, 0], [1])
    data = TensorDict({"loss_mask": loss, "response_mask": kept}, batch_size=3)
    tu.assign_non_tensor(data, batch_num_tokens=float(loss.values().sum()), dp_size=2)
    shares = []
    for rows in ([0, 1], [2]):
        part = tu.index_select_tensor_dict(data, rows)
        metrics = weigh_by_tokens({"m": Metric(AggregationType.MEAN, 3.0), "s": 5.0}, part, data)
        assert metrics["m"].aggregation is AggregationType.SUM and metrics["s"] == 5.0
        shares.append(metrics["m"].aggregate())
    assert shares == [pytest.approx(5.0), pytest.approx(1.0)]  # 3 x 5/6 and 3 x 1/6, on two ranks


def test_a_pair_row_is_neutral_for_everything_else(build, tokenizer):
    import torch
    from composer_verl.pair_fields import RowMaker, Side

    first = {
        "prompts": torch.ones(4, dtype=torch.long), "responses": torch.ones(3, dtype=torch.long),
        "input_ids": torch.ones(7, dtype=torch.long), "position_ids": torch.arange(7),
        "attention_mask": torch.ones(7, dtype=torch.long), "response_mask": torch.ones(3, dtype=torch.long),
        "loss_mask": torch.ones(3, dtype=torch.long), "advantages": torch.ones(3), "old_log_probs": -torch.ones(3),
        "per_token": torch.ones(7, 2), "sdpo_tokens": torch.tensor(5), "odd": torch.ones(11), "text": "x",
    }  # fmt: skip
    row = RowMaker(first, 3, 0.7).sample(Side([5, 6], [7, 8, 9, 3], [-1.0, -2.0, -3.0, -4.0], 0.5, 4))
    assert row["input_ids"].tolist() == [5, 6, 7, 8, 9, 3] and row["prompts"].tolist() == [5, 6]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 4, 5] and row["attention_mask"].tolist() == [1] * 6
    for name in ("response_mask", "loss_mask", "advantages", "old_log_probs", "sdpo_tokens", "per_token"):
        assert not row[name].any()
    assert row["advantages"].shape == (4,) and row["per_token"].shape == (6, 2) and row["sdpo_tokens"].dim() == 0
    assert row["pair_row"] == 4 and row["pair_weight"] == 0.5 and row["temperature"] == 1.0
    assert row["pair_ref_log_prob"].tolist() == [-1.0, -2.0, -3.0, -4.0]
    assert "odd" not in row and "text" not in row
    with pytest.raises(UnsupportedError, match="multi-modal"):
        RowMaker({**first, "position_ids": torch.ones(4, 7)}, 3, None)
