"""`load_model`: a whole model is what was saved, and every bad one is refused with the fix."""

from __future__ import annotations

import json
import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from composer_plugins.errors import ModelError
from composer_plugins.models import load_model, load_tokenizer, token_counter
from composer_plugins.models.checks import check_generative

WEIGHTS = "model.safetensors"


def refuses(folder, *words: str) -> str:
    """Loading must fail, and the message must hold the words and the folder. Nothing may be left to chance."""
    with pytest.raises(ModelError) as caught:
        load_model(str(folder))
    text = str(caught.value)
    for word in (*words, str(folder)):
        assert word in text
    return text


def drop(folder, name: str) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights[name]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def test_a_whole_model_is_the_one_that_was_saved(tiny_model):
    model, tokenizer = load_model(str(tiny_model))
    saved = load_file(tiny_model / WEIGHTS)
    loaded = dict(model.named_parameters())
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer.chat_template and tokenizer.pad_token == "<|endoftext|>"


def test_a_tied_head_is_not_a_missing_weight(tiny_model):
    assert "lm_head.weight" not in load_file(tiny_model / WEIGHTS)
    model, _ = load_model(str(tiny_model))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_an_untied_head_that_is_missing_is_refused(save_tiny, build_llama):
    folder = save_tiny(build_llama(tie_word_embeddings=False), "untied")
    load_model(str(folder))  # whole it loads
    drop(folder, "lm_head.weight")
    refuses(folder, "lacks 1 weight", "lm_head.weight", "random", "Download it again")


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_a_missing_weight_is_never_random(tiny_model, name):
    drop(tiny_model, name)
    refuses(tiny_model, "lacks 1 weight", name, "random")


def test_weights_of_another_shape_are_refused(tiny_model):
    weights = load_file(tiny_model / WEIGHTS)
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, tiny_model / WEIGHTS, metadata={"format": "pt"})
    refuses(tiny_model, "1 weight(s) have another shape", "model.norm.weight is (7,), expected (16,)")


def test_a_cut_weight_file_is_refused(tiny_model):
    file = tiny_model / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    refuses(tiny_model, "damaged, half-downloaded", "fetch the model again")


def test_a_missing_shard_is_refused(tiny_model):
    weights = load_file(tiny_model / WEIGHTS)
    first, *rest = sorted(weights)
    save_file({first: weights[first]}, tiny_model / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file({n: weights[n] for n in rest}, tiny_model / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    shards = {n: f"model-0000{1 if n == first else 2}-of-00002.safetensors" for n in weights}
    (tiny_model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    (tiny_model / WEIGHTS).unlink()
    load_model(str(tiny_model))
    (tiny_model / "model-00002-of-00002.safetensors").unlink()
    refuses(tiny_model, "1 of 2 weight files", "model-00002-of-00002", "interrupted")
    (tiny_model / "model.safetensors.index.json").write_text("{")
    refuses(tiny_model, "is not a weight index")


def test_encoders_are_refused(save_tiny):
    from transformers import BertConfig, BertForMaskedLM

    sizes = dict(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    refuses(save_tiny(BertForMaskedLM(BertConfig(**sizes)), "bert"), "encoder-only", "bert", "decoder-only")


def test_encoder_decoders_are_refused(save_tiny):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    refuses(save_tiny(T5ForConditionalGeneration(T5Config(**sizes)), "t5"), "encoder-decoder", "decoder-only")


@pytest.mark.parametrize(
    "kind",
    ["llama", "qwen2", "qwen3", "gemma2", "mistral", "phi3", "gpt2", "gpt_neox", "opt", "bloom", "falcon", "mamba"],
)
def test_decoders_of_many_families_are_not_taken_for_encoders(kind):
    check_generative(AutoConfig.for_model(kind), kind)


def test_a_tokenizer_beyond_the_embeddings_is_refused(tiny_model):
    _, tokenizer = load_model(str(tiny_model))
    tokenizer.add_tokens(["<one>"])  # id 300: the first without a row
    tokenizer.save_pretrained(tiny_model)
    refuses(tiny_model, "'<one>' with id 300", "300 rows", "resize_token_embeddings")


def test_no_chat_template_is_refused(tiny_model):
    (tiny_model / "chat_template.jinja").unlink()
    refuses(tiny_model, "no chat template", "instruct version")
    with pytest.raises(ModelError, match="no chat template"):
        load_tokenizer(str(tiny_model))


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    refuses(tmp_path / "nothing", "There is no model at", "Expected a directory")


def test_pickled_weights_are_refused(tiny_model):
    torch.save(load_file(tiny_model / WEIGHTS), tiny_model / "pytorch_model.bin")
    (tiny_model / WEIGHTS).unlink()
    refuses(tiny_model, "pickled weights only", "safetensors")


def test_a_folder_with_a_config_and_no_weights_is_refused(tiny_model):
    (tiny_model / WEIGHTS).unlink()
    refuses(tiny_model, "no weights", "Expected model.safetensors")


def test_a_folder_with_weights_and_no_config_is_refused(tiny_model):
    (tiny_model / "config.json").unlink()
    refuses(tiny_model, "Expected config.json")


def test_an_adapter_is_not_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    refuses(tmp_path, "PEFT adapter", "base model")


def test_a_file_that_is_no_gguf_is_refused(tiny_model):
    refuses(tiny_model / WEIGHTS, "not a .gguf file", "directory")


def test_a_damaged_gguf_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setenv("COMPOSER_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "a.gguf"
    for content in (b"", b"not gguf at all", b"GGUF\x03\x00\x00\x00" + b"\x01" * 200):
        file.write_bytes(content)
        refuses(file, "cannot be read as a GGUF model", "fetch it again")
    assert not list((tmp_path / "cache" / "converted").iterdir())
    shutil.copy(file, tmp_path / "b.gguf")
    refuses(tmp_path, "holds 2 GGUF files", "a.gguf")


def test_code_of_a_model_is_not_run_unasked(tiny_model):
    config = json.loads((tiny_model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (tiny_model / "config.json").write_text(json.dumps(config))
    (tiny_model / "own.py").write_text(f"open({str(tiny_model / 'ran')!r}, 'w')\n")
    refuses(tiny_model, "trust_remote_code: true")
    assert not (tiny_model / "ran").exists()


def test_an_unknown_architecture_is_not_called_damaged(tiny_model):
    config = json.loads((tiny_model / "config.json").read_text()) | {"model_type": "from-the-future"}
    (tiny_model / "config.json").write_text(json.dumps(config))
    assert "damaged" not in refuses(tiny_model, "from-the-future", "use another model")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_damaged_json_is_refused(tiny_model, name):
    (tiny_model / name).write_text("{")
    refuses(tiny_model, "damaged, half-downloaded")


def test_an_unknown_dtype_is_refused(tiny_model):
    with pytest.raises(ModelError, match=r"float32, bfloat16, float16, auto; found 'fp8'"):
        load_model(str(tiny_model), dtype="fp8")


def test_a_missing_pad_token_becomes_the_end_token(tiny_model):
    file = tiny_model / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["pad_token"]
    file.write_text(json.dumps(config))
    assert load_tokenizer(str(tiny_model)).pad_token == "<|im_end|>"


def test_the_token_counter_counts_what_is_rendered(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model))
    messages = [{"role": "user", "content": "read a file"}]
    text = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    text += "<|im_start|>user\nread a file<|im_end|>\n<|im_start|>assistant\n"
    assert token_counter(tokenizer)(messages, []) == len(tokenizer(text)["input_ids"])
