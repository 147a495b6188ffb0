"""LoRA, checkpoints and resume: the second half of an interrupted run is the second half of the whole run."""

import pytest
import torch

pytest.importorskip("trl")

from composer_plugins.errors import ConfigError

SDPO = {"weight": 1.0, "hint": {"sources": ["recorded"]}, "teacher": {"kind": "ema", "ema_rate": 0.2}}


@pytest.fixture
def pairs(tmp_path):
    from composer_plugins.traces.schema import Message, Pair, Provenance, SourceRef
    from composer_plugins.traces.store import Manifest, write_stage

    records = [
        Pair(
            id=str(i),
            state_id=str(i),
            messages=[Message(role="user", content=f"do {i}")],
            chosen=Message(role="assistant", content=f"yes {i}"),
            rejected=Message(role="assistant", content=f"no {i} {i}"),
            provenance=Provenance(rule="x", chosen_by=[], rejected_by=[], source_ref=SourceRef(file="f", line=1)),
        )
        for i in range(7)
    ]
    path = tmp_path / "pairs.jsonl"
    write_stage(path, records, Manifest(stage="pairs", record="Pair", written=0))
    return str(path)


def lora():
    from peft import LoraConfig

    return LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="gaussian"
    )


def trained(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("with_lora", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(make_trainer, pairs, tmp_path, with_lora):
    section = {"sdpo": SDPO, "replay_dpo": {"weight": 0.5, "pairs": pairs, "pairs_per_step": 2}}
    extra = {"trainer_kwargs": {"peft_config": lora()}} if with_lora else {}
    options = dict(
        max_steps=4, save_strategy="steps", save_steps=2, learning_rate=1e-2, lr_scheduler_type="constant", top_k=1
    )  # greedy rollouts: the sampling generator's state is TRL's business, not ours

    def reward(completion_ids, **_):
        return [float(i) for i in range(len(completion_ids))]

    whole = make_trainer(section, output_dir=str(tmp_path / "whole"), reward_funcs=reward, **options, **extra)
    whole.train()
    half = make_trainer(section, output_dir=str(tmp_path / "half"), reward_funcs=reward, **options, **extra)
    half.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))

    expected, found = trained(whole), trained(half)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-7)
    for name, tensor in whole.sdpo_channel.teacher.ema.items():
        torch.testing.assert_close(half.sdpo_channel.teacher.ema[name], tensor, rtol=1e-6, atol=1e-7)
    assert half.pair_channel.stream.reference.keys() == whole.pair_channel.stream.reference.keys()


def test_lora_keeps_the_teacher_small_and_the_base_untouched(make_trainer, make_model):
    trainer = make_trainer({"sdpo": SDPO}, trainer_kwargs={"peft_config": lora()}, max_steps=2, learning_rate=1e-2)
    size = sum(t.numel() for t in trainer.sdpo_channel.teacher.ema.values())
    assert size == sum(p.numel() for p in trained(trainer).values())
    before = trained(trainer)
    trainer.train()
    after = trained(trainer)
    assert any(not torch.equal(before[n], after[n]) for n in before)
    base = dict(make_model().named_parameters())["model.layers.0.mlp.up_proj.weight"]
    kept = trainer.access.model.get_parameter("model.layers.0.mlp.up_proj.base_layer.weight")
    assert torch.equal(base, kept)


def test_a_checkpoint_without_the_teacher_is_refused(make_trainer, tmp_path):
    plain = make_trainer({}, output_dir=str(tmp_path / "plain"), max_steps=1, save_strategy="steps", save_steps=1)
    plain.train()
    resumed = make_trainer({"sdpo": SDPO}, max_steps=2)
    with pytest.raises(ConfigError, match=r"composer_ema\.safetensors"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-1"))


def test_another_pairs_file_is_refused_on_resume(make_trainer, pairs, tmp_path):
    section = {"replay_dpo": {"weight": 0.5, "pairs": pairs}}
    first = make_trainer(section, output_dir=str(tmp_path / "first"), max_steps=1, save_strategy="steps", save_steps=1)
    first.train()
    second = make_trainer(section, max_steps=2)
    second.pair_channel.stream.sha256 = "another"
    with pytest.raises(ConfigError, match="SHA-256 differs"):
        second.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-1"))


def test_the_reference_log_probs_are_those_of_the_initial_weights(make_trainer, make_model, pairs, tokenizer):
    """Against transformers' own logits, not our projection."""
    trainer = make_trainer({"replay_dpo": {"weight": 0.5, "pairs": pairs}}, max_steps=3, learning_rate=0.05)
    trainer.train()
    stream, model = trainer.pair_channel.stream, make_model()
    assert stream.reference
    for index, (chosen, rejected) in stream.reference.items():
        pair = stream.pairs[index]
        for action, stored in ((pair.chosen, chosen), (pair.rejected, rejected)):
            ids = torch.tensor([pair.context + action])
            with torch.no_grad():
                logits = model(ids).logits.double()
            expected = logits.log_softmax(-1)[0, len(pair.context) - 1 : -1].gather(-1, torch.tensor(action)[:, None])
            torch.testing.assert_close(torch.tensor(stored).double(), expected[:, 0], rtol=1e-5, atol=1e-5)
        assert tokenizer.decode(pair.chosen).endswith("<|im_end|>")
