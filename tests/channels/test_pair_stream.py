"""The pairs of a run, as every host reads them: whose tokenizer they fit, what is left out, in which order."""

import pytest
from typer.testing import CliRunner

from composer_plugins.channels.pair_stream import PairStream
from composer_plugins.config import ReplayDPOConfig
from composer_plugins.errors import ConfigError, TraceError
from composer_plugins.models.tokenizer import tokenizer_fingerprint
from composer_plugins.traces.schema import (
    Message,
    Pair,
    Provenance,
    Replay,
    SourceRef,
    State,
    Status,
    ToolCall,
    ToolResult,
)
from composer_plugins.traces.store import Manifest, read_manifest, write_stage

pytest.importorskip("transformers")
SOURCE = SourceRef(file="f", line=1)


def build_tokenizer(words, template=None):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from composer_plugins.models.toolcalls import install_tool_template

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(
        [words],
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    install_tool_template(tokenizer)
    if template:
        tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("read a file and list it")


def pair(number, chosen="yes", rejected="no", **changes):
    fields = dict(
        id=str(number), state_id=str(number), messages=[Message(role="user", content="go")],
        chosen=Message(role="assistant", content=chosen), rejected=Message(role="assistant", content=rejected),
        provenance=Provenance(rule="x", chosen_by=[], rejected_by=[], source_ref=SOURCE),
    )  # fmt: skip
    return Pair(**{**fields, **changes})


def stream(tmp_path, tokenizer, records, options=None, **config):
    path = tmp_path / "pairs.jsonl"
    write_stage(path, records, Manifest(stage="pairs", record="Pair", written=0, options=options or {}))
    return PairStream(ReplayDPOConfig(weight=1.0, pairs=path, **config), tokenizer, seed=0)


def test_pairs_that_the_command_filtered_belong_to_that_tokenizer(tmp_path, tokenizer):
    from composer_plugins.cli import build_app

    folder = tmp_path / "model"
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    state = State(
        id="s", trace_id="t", step=0, messages=[Message(role="user", content="go")], source_ref=SOURCE,
        action=Message(role="assistant", tool_calls=[ToolCall(id="c", name="Read", arguments={"path": "a"})]),
        tools={"Read": {"name": "Read"}}, status=Status.OK, results=[ToolResult(call_id="c", content="", status=Status.OK)],
    )  # fmt: skip
    broken = Message(role="assistant", tool_calls=[ToolCall(id="c", name="Read", raw_arguments='{"path": ')])
    replay = Replay(state_id="s", teacher="x", model="m", weights_id="x", action=broken, finish_reason="stop")
    write_stage(tmp_path / "states.jsonl", [state], Manifest(stage="states", record="State", written=0))
    write_stage(tmp_path / "replays.jsonl", [replay], Manifest(stage="replay", record="Replay", written=0))
    output = tmp_path / "pairs.jsonl"
    command = ["pairs", tmp_path / "states.jsonl", tmp_path / "replays.jsonl", "-o", output]
    for more in (["--model", folder, "--max-action-tokens", "500"], []):
        result = CliRunner().invoke(build_app(), [str(a) for a in [*command, *more]], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        made_with = read_manifest(output).options.get("tokenizer")
        config = ReplayDPOConfig(weight=1.0, pairs=output)
        assert len(PairStream(config, tokenizer, seed=0).pairs) == 1
        if more:
            assert made_with == {"model": str(folder), "sha256": tokenizer_fingerprint(tokenizer, template=False)}
            with pytest.raises(ConfigError, match="filtered with the tokenizer of"):
                PairStream(config, build_tokenizer("other words entirely, many of them"), seed=0)
        else:
            assert made_with is None  # nothing was counted in tokens: any tokenizer may read them


def test_a_fingerprint_is_the_vocabulary_and_the_template(tokenizer):
    other = build_tokenizer("read a file and list it", template="{{ messages }}")
    assert tokenizer_fingerprint(tokenizer, template=False) == tokenizer_fingerprint(other, template=False)
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(other)
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(other, tokenizer.chat_template)
    different = build_tokenizer("quite another text")
    assert tokenizer_fingerprint(tokenizer, template=False) != tokenizer_fingerprint(different, template=False)


def test_a_template_that_cannot_write_the_conversation_leaves_the_pair_out(tmp_path):
    picky = build_tokenizer(
        "a b",
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}",
    )
    system = [Message(role="system", content="be brief"), Message(role="user", content="go")]
    found = stream(tmp_path, picky, [pair(0), pair(1, messages=system)])
    assert [p.id for p in found.pairs] == ["0"]
    assert dict(found.skipped) == {"not renderable by this chat template": 1}
    with pytest.raises(TraceError, match="made for another chat template"):
        stream(tmp_path, picky, [pair(1, messages=system)])


def test_steps_draw_on_through_the_order_and_parts_share_a_step(tmp_path, tokenizer):
    found = stream(tmp_path, tokenizer, [pair(i, "yes" * (i + 1)) for i in range(5)], pairs_per_step=3)
    assert sorted(found.order) == [0, 1, 2, 3, 4] and found.order != [0, 1, 2, 3, 4]
    drawn = [index for step in range(5) for index in found.indices(step)]
    assert drawn == found.order * 3
    for slots in (1, 2, 4):
        parts = [found.indices(1, slot=slot, slots=slots) for slot in range(slots)]
        assert sorted(index for part in parts for index in part) == sorted(found.indices(1))
    assert found.unscored(0, 1) == sorted(found.indices(0)) and found.unscored(0, 9) == [0, 1, 2, 3, 4]
    found.reference = {found.order[0]: ([], [])}
    assert found.unscored(0, 1) == sorted(found.order[1:3])
