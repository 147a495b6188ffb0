"""SmolLM2-135M-Instruct with the tool template: the hint moves the teacher, on the error turn and nowhere else."""

import pytest
import torch

pytest.importorskip("trl")
pytestmark = pytest.mark.model

ERROR_STATE = [
    {"role": "user", "content": "Add a redirect to vercel.json"},
    {
        "role": "assistant",
        "content": '<tool_call>\n{"name": "Edit", "arguments": {"file_path": "vercel.json", "old_string": "a", '
        '"new_string": "b"}}\n</tool_call>',
    },
    {"role": "tool", "content": "File has not been read yet. Read it first before writing to it."},
]
HINT = "vercel.json has not been read in this session. Read vercel.json first, then change it."


@pytest.fixture(scope="module")
def smollm2():
    from composer_plugins.models.loading import load_model
    from composer_plugins.models.resolve import resolve_model
    from composer_plugins.models.toolcalls import install_tool_template

    model, tokenizer = load_model(resolve_model("smollm2-135m-instruct"))
    tokenizer.padding_side = "left"
    return model, install_tool_template(tokenizer)


def make(smollm2, tmp_path, composer, hint=HINT):
    import copy

    from composer_trl import ComposerGRPOConfig, ComposerGRPOTrainer
    from datasets import Dataset
    from peft import LoraConfig

    model, tokenizer = smollm2
    row = {"prompt": ERROR_STATE, **({"hint": hint} if hint else {})}
    args = ComposerGRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, num_generations=2, max_completion_length=12, max_steps=1,
        learning_rate=1e-3, report_to="none", save_strategy="no", logging_steps=1, use_cpu=True, bf16=False,
        disable_tqdm=True, gradient_checkpointing=False, seed=3, composer=composer,
    )  # fmt: skip
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights="gaussian")
    return ComposerGRPOTrainer(
        copy.deepcopy(model),
        reward_funcs=lambda completion_ids, **_: [float(i) for i in range(len(completion_ids))],
        args=args,
        train_dataset=Dataset.from_list([row, row]),
        processing_class=tokenizer,
        peft_config=lora,
    )


def trained(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.access.trainable().values()])


def test_the_hint_moves_the_teacher_on_the_error_turn_and_nowhere_else(smollm2, tmp_path):
    trainer = make(smollm2, tmp_path, {"policy": {"weight": 0.0}, "sdpo": {"weight": 1.0}})
    seen, terms = {}, trainer.sdpo_channel.terms

    def watched(inputs, logps, hidden, turns, denominator):
        hidden.retain_grad()
        seen.update(hidden=hidden, prompt=inputs["prompt_ids"].size(1), mask=inputs["completion_mask"])
        return terms(inputs, logps, hidden, turns, denominator)

    trainer.sdpo_channel.terms = watched
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["sdpo/divergence"] > 1e-3
    assert log["sdpo/active_tokens"] == log["sdpo/tokens"] == seen["mask"].sum()
    gradient = seen["hidden"].grad.abs().sum(-1)
    assert (gradient[:, : seen["prompt"] - 1] == 0).all()  # the context's own positions
    assert (gradient[:, -1] == 0).all()  # nothing is predicted after the last token


def test_without_a_hint_a_live_teacher_says_exactly_the_same(smollm2, tmp_path):
    from composer_plugins.channels.silence import SilentChannelWarning

    section = {"sdpo": {"weight": 1.0, "teacher": {"kind": "live"}}, "monitor": {"silent_after": 1}}
    trainer = make(smollm2, tmp_path, section)
    trainer.hint_sources._prefix = lambda row, rollout, before, hint: [*rollout.prompt_ids[row], *before]
    with pytest.warns(SilentChannelWarning, match="did not change the teacher"):
        trainer.train()
    assert trainer.state.log_history[0]["sdpo/divergence"] == 0.0


def test_sdpo_on_and_off_end_in_different_parameters_and_no_hint_is_reported(smollm2, tmp_path):
    from composer_plugins.channels.silence import SilentChannelWarning

    # one after the other: building a trainer seeds the rollouts that follow
    on = make(smollm2, tmp_path, {"sdpo": {"weight": 1.0}})
    on.train()
    off = make(smollm2, tmp_path, {"sdpo": {"weight": 0.0}})
    off.train()
    unhinted = make(smollm2, tmp_path, {"sdpo": {"weight": 1.0}, "monitor": {"silent_after": 1}}, hint=None)
    with pytest.warns(SilentChannelWarning, match="no turn of the rollouts had a hint"):
        unhinted.train()
    assert not torch.equal(trained(on), trained(off))
    assert torch.equal(trained(unhinted), trained(off))
