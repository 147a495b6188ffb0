"""Fixtures of the environment, pair and wire tests: import the ones that a file uses.

`POLICY = "tiny"` in a test module takes a small random model with SmolLM2's tokenizer in place of SmolLM2 itself.
"""

from __future__ import annotations

import pytest
from prime_policy_server import PolicyServer


@pytest.fixture(scope="module")
def smollm2(request):
    """(model, tokenizer with our tool template), of SmolLM2-135M-Instruct; see `POLICY`."""
    from composer_plugins.models import install_tool_template, load_model

    if getattr(request.module, "POLICY", "smollm2") == "tiny":
        model, tokenizer = _tiny()
    else:
        model, tokenizer = load_model("smollm2-135m-instruct")
    install_tool_template(tokenizer)
    return model, tokenizer


def _tiny():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from composer_plugins.models import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m-instruct")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), tokenizer


@pytest.fixture(scope="module")
def tokenizer_dir(smollm2, tmp_path_factory):
    """A folder with the tokenizer and the model's config, as prime-rl's `model.name`."""
    model, tokenizer = smollm2
    folder = tmp_path_factory.mktemp("smollm2")
    tokenizer.save_pretrained(folder)
    model.config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def serving(smollm2):
    server = PolicyServer(*smollm2, "policy")
    yield server
    server.close()


@pytest.fixture
def server(serving):
    """The policy's server with nothing left over from another test."""
    serving.script.clear()
    serving.faults.clear()
    serving.requests.clear()
    return serving


def scoring_requests(server) -> list[dict]:
    return [r for r in server.requests if "prompt_logprobs" in r["sampling_params"]]
