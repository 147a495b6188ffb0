"""LocalTeacher: sampling against its definition, seeds per answer, sharing, and the real SmolLM2."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from composer_plugins.errors import ModelError, TeacherError
from composer_plugins.teachers.config import LocalConfig

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from composer_plugins.teachers import local


def config(**options) -> LocalConfig:
    return LocalConfig(**({"name": "l", "kind": "local", "model": "smollm2-135m-instruct"} | options))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A two-layer random Llama with a word tokenizer, saved as any model is."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"w{i}" for i in range(45))]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    tokenizer.chat_template = "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=48, num_key_value_heads=2, max_position_embeddings=512, eos_token_id=2, **shape)
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(12)  # spread the logits
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_noise_plus_argmax_is_sampling_at_temperature_and_top_p():
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])
    options = config(temperature=0.7, top_p=0.9)
    n = 40_000
    process = local._gumbel([1], options)
    counts = torch.zeros(5)
    for _ in range(n):
        counts[process(None, logits[None])[0].argmax()] += 1
    p = (logits.double() / 0.7).softmax(-1)
    keep, mass = [], 0.0
    for i in p.argsort(descending=True).tolist():  # the definition: smallest set with at least top_p
        if mass < 0.9:
            keep.append(i)
        mass += p[i].item()
    expected = torch.zeros(5, dtype=torch.float64)
    expected[keep] = p[keep] / p[keep].sum()
    assert counts[expected == 0].sum() == 0
    inside = expected > 0
    chi2 = (((counts - n * expected) ** 2)[inside] / (n * expected[inside])).sum().item()
    assert inside.sum() == 2 and chi2 < 15.1  # 1 degree of freedom, p = 1e-4


def test_an_answer_does_not_depend_on_its_batch_but_on_seed_name_state_and_sample(tiny, make_state):
    options = {"model": str(tiny), "max_tokens": 12, "temperature": 1.0}
    states = [make_state(i) for i in range(5)]
    states[2].messages[1].content = " ".join(f"w{i}" for i in range(30))  # another length: padding

    def texts(batches, sample=0, **changes):
        teacher = local.LocalTeacher(config(**options | changes))
        found = [r.action.content for batch in batches for r in teacher.ask(batch, sample=sample)]
        teacher.close()
        return found

    together = texts([states])
    assert together == texts([[s] for s in states]) == texts([states[:2], states[2:]])
    assert together == texts([states]), "and again"
    assert len(set(together)) > 1
    for changes in ({"seed": 1}, {"name": "other"}):
        assert texts([states], **changes) != together
    assert texts([states], sample=1) != together
    assert texts([states], temperature=0.0) == texts([states], temperature=0.0, seed=9)


def test_identity_and_sharing(tiny):
    one, two = (local.LocalTeacher(config(name=n, model=str(tiny))) for n in "ab")
    sha = hashlib.sha256((tiny / "model.safetensors").read_bytes()).hexdigest()
    assert one.weights_id == two.weights_id == f"sha256:{sha[:16]}" and one.demonstration
    assert one._weights is two._weights and one.fingerprint != two.fingerprint
    assert one._weights.get() is two._weights.get(), "loaded once"
    one.close()
    assert two._weights.get()[0] is not None
    with pytest.raises(TeacherError, match="closed"):
        one.ask([])
    two.close()
    assert not local._SHARED, "the last teacher lets the weights go"


def test_a_state_that_does_not_fit_is_an_error_of_its_own(tiny, make_state):
    long = make_state(0)
    long.messages[1].content = "w1 " * 600
    teacher = local.LocalTeacher(config(model=str(tiny), max_tokens=8))
    bad, good = teacher.ask([long, make_state(1)])
    assert bad.error.startswith("too_long: ") and "512" in bad.error and bad.action is None
    assert good.error is None and good.completion_tokens >= 1
    teacher.close()


def test_the_end_of_turn_is_found(tiny, make_state):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all logits equal: greedy takes id 0, which ends nothing
    from composer_plugins.models.resolve import resolve_model
    from composer_plugins.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve_model(str(tiny)))
    options = config(max_tokens=5, temperature=0.0)
    [cut] = local.generate(model, tokenizer, [[3, 4]], [0], options)
    assert cut.choices[0].finish_reason == "length" and cut.used().completion_tokens == 5
    model.generation_config.eos_token_id = [0]
    [stopped] = local.generate(model, tokenizer, [[3, 4]], [0], options)
    assert stopped.choices[0].finish_reason == "stop" and stopped.used().completion_tokens == 1
    assert stopped.choices[0].message.content == ""


def test_bad_models_and_adapters(tiny, tmp_path):
    with pytest.raises(ModelError):
        local.LocalTeacher(config(model=str(tmp_path / "nowhere")))
    with pytest.raises(TeacherError, match="expected a PEFT adapter folder"):
        local.LocalTeacher(config(model=str(tiny), adapter=tmp_path))
    pytest.importorskip("peft", reason="peft is not installed (it comes with the extra trl)")
    (tmp_path / "adapter_config.json").write_text("{}")
    teacher = local.LocalTeacher(config(model=str(tiny), adapter=tmp_path))
    with pytest.raises(TeacherError, match="does not fit"):
        teacher._weights.get()
    teacher.close()


def test_an_adapter_changes_the_answers_and_the_fingerprint_but_not_the_vote(tiny, tmp_path, make_state):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    wrapped = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny), peft.LoraConfig(r=4, target_modules="all-linear")
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    wrapped.save_pretrained(tmp_path)
    plain = local.LocalTeacher(config(model=str(tiny), max_tokens=12))
    adapted = local.LocalTeacher(config(model=str(tiny), max_tokens=12, adapter=tmp_path))
    state = [make_state(0)]
    assert plain.ask(state)[0].action != adapted.ask(state)[0].action
    assert plain.weights_id == adapted.weights_id and plain.fingerprint != adapted.fingerprint
    plain.close(), adapted.close()


@pytest.mark.model
def test_the_real_smollm2_answers_two_states(make_state):
    teacher = local.LocalTeacher(config(max_tokens=24, temperature=0.7, system="Call one tool."))
    states = [make_state(0), make_state(1)]
    states[1].messages[1].content = "What is the capital of France? Answer with one word, no tool."
    found = teacher.ask(states)
    assert [r.error for r in found] == [None, None] and all(r.demonstration for r in found)
    assert all(0 < r.completion_tokens <= 24 and r.prompt_tokens > 40 for r in found)
    assert all(r.finish_reason in ("stop", "length") for r in found)
    assert [r.action for r in teacher.ask(states[1:])] == [found[1].action], "resume gives the same answer"
    greedy = local.LocalTeacher(config(name="g", max_tokens=8, temperature=0.0))
    assert greedy.weights_id == teacher.weights_id
    states[1].tools = {}
    assert "Paris" in greedy.ask([states[1]])[0].action.content
    teacher.close(), greedy.close()
