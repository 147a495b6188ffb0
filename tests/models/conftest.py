"""Tiny real models and tokenizers, written to disk as transformers writes them. No hub."""

from __future__ import annotations

import os
import shutil

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

SENTENCES = [
    "You read a file with the Read tool and edit it with the Edit tool.",
    '<tool_call>\n{"name": "Read", "arguments": {"file_path": "a.py"}}\n</tool_call>',
    "0 1 2 3 4 5 6 7 8 9 + - = a b c d e f g h i j k l m n o p q r s t u v w x y z",
]


def build_tokenizer():
    """A byte-level BPE with the ChatML tokens and no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
    )


@pytest.fixture(scope="session")
def tokenizer():
    """With our tool template."""
    from composer_plugins.models.toolcalls import install_tool_template

    return install_tool_template(build_tokenizer())


def tiny_llama(**options):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = dict(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**settings, **options}))


@pytest.fixture
def build_llama():
    """Build a tiny Llama; keyword arguments go to its config."""
    return tiny_llama


@pytest.fixture(scope="session")
def _saved(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_model(_saved, tmp_path):
    """The folder of a whole tiny Llama with tied embeddings and a chat template; a test may damage it."""
    return shutil.copytree(_saved, tmp_path / "tiny")


@pytest.fixture
def save_tiny(tokenizer, tmp_path):
    """`save_tiny(model, name)` writes any model with the tokenizer beside it and returns the folder."""

    def save(model, name: str):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save
