"""The shipped warm start: for the right model only, and it makes SmolLM2 write tool calls."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from composer_plugins.errors import ModelError
from composer_plugins.models.warm_start import apply_warm_start, warm_start_path


def test_the_adapter_ships_without_pickle():
    names = {p.name for p in warm_start_path().iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= names
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pkl"))]
    assert (warm_start_path() / "adapter_model.safetensors").stat().st_size < 6_000_000


def test_another_model_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ModelError, match=r"SmolLM2-135M-Instruct.*Leave `warm_start` off"):
        apply_warm_start(tiny)


@pytest.mark.model
def test_it_makes_calls_parsable_that_the_model_as_it_comes_never_writes():
    import torch

    from composer_plugins.models.loading import load_model
    from composer_plugins.models.resolve import resolve_model
    from composer_plugins.models.toolcalls import install_tool_template, parse_action

    tools = [
        {
            "type": "function",
            "function": {
                "name": name,
                "parameters": {
                    "type": "object",
                    "properties": {"file_path": {"type": "string"}},
                    "required": ["file_path"],
                },
            },
        }
        for name in ("Read", "Write")
    ]
    model, tokenizer = load_model(resolve_model("smollm2-135m-instruct"))
    install_tool_template(tokenizer)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Have a look at src/cache.py."}], tools=tools, add_generation_prompt=True,
        return_tensors="pt", return_dict=False,
    )  # fmt: skip

    def parsable(model) -> int:
        torch.manual_seed(0)
        output = model.generate(
            ids.repeat(6, 1), max_new_tokens=40, do_sample=True, temperature=1.0, top_k=0,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        texts = tokenizer.batch_decode(output[:, ids.size(1) :], skip_special_tokens=False)
        calls = [parse_action(text).tool_calls for text in texts]
        return sum(bool(c) and all(call.raw_arguments is None for call in c) for c in calls)

    before = parsable(model)
    merged = apply_warm_start(model)
    assert not hasattr(merged, "peft_config") or not merged.peft_config
    assert before == 0
    assert parsable(merged) >= 3
