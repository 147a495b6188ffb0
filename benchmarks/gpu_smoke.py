"""50 steps in bf16 with all three channels on one GPU, without network: memory, step time, bf16 against fp32.

    python benchmarks/gpu_smoke.py                          # a CUDA device, at most 10 minutes
    python benchmarks/gpu_smoke.py --device cpu --steps 2 --size tiny   # the same code path on a CPU

Model and data are made here: a Llama of the given size with random weights, a small tokenizer, self-made states with
hints, and pairs. Random weights say nothing about learning; they are as good as trained ones for memory, time and
rounding. Prints a markdown table and writes it with `--out`.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import tempfile
import time
from pathlib import Path

SIZES = {"tiny": (64, 2, 4, 128), "135m": (576, 30, 9, 1536), "360m": (960, 32, 15, 2560), "1b": (2048, 24, 32, 8192)}
WORDS = [
    "read",
    "the",
    "file",
    "first",
    "then",
    "edit",
    "it",
    "and",
    "run",
    "the",
    "tests",
    "again",
    "because",
    "the",
    "last",
    "call",
    "failed",
    "with",
    "an",
    "error",
]


def make_tokenizer(vocabulary: int):
    """A byte-level BPE of `vocabulary` entries with the ChatML tool template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from composer_plugins.models.toolcalls import install_tool_template

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(
        WORDS,
        trainers.BpeTrainer(
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(vocabulary - len(tokenizer))])
    return install_tool_template(tokenizer)


def make_model(size: str, tokenizer, dtype: str):
    """A Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, intermediate = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=intermediate, max_position_embeddings=4096,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(getattr(torch, dtype))


def make_data(folder: Path, count: int, words: int):
    """Prompts with hints, and a pairs file."""
    from datasets import Dataset

    from composer_plugins.traces.schema import Message, Pair, Provenance, SourceRef, ToolCall
    from composer_plugins.traces.store import Manifest, write_stage

    text = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(words)) for i in range(count)]
    rows = [{"prompt": [{"role": "user", "content": t}], "hint": "Read the file before editing it."} for t in text]

    def action(name: str, i: int) -> Message:
        return Message(role="assistant", tool_calls=[ToolCall(id="0", name=name, arguments={"file_path": f"{i}.py"})])

    pairs = [
        Pair(
            id=str(i), state_id=str(i), messages=[Message(role="user", content=t)], chosen=action("Read", i),
            rejected=action("Edit", i), provenance=Provenance(
                rule="self-made", chosen_by=[], rejected_by=[], source_ref=SourceRef(file="self-made", line=i)
            ),
        )
        for i, t in enumerate(text)
    ]  # fmt: skip
    path = folder / "pairs.jsonl"
    write_stage(path, pairs, Manifest(stage="pairs", record="Pair", written=0))
    return Dataset.from_list(rows), path


def train(options: argparse.Namespace, dtype: str, steps: int) -> dict:
    """Run `steps` with all channels; return seconds per step, peak memory and the first step's figures."""
    import torch
    from composer_trl import ComposerGRPOConfig, ComposerGRPOTrainer
    from transformers import TrainerCallback

    folder = Path(tempfile.mkdtemp())
    tokenizer = make_tokenizer(options.vocabulary)
    data, pairs = make_data(folder, 64, options.prompt_words)
    cuda = options.device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            if cuda:
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    args = ComposerGRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=options.rollouts, num_generations=8,
        max_completion_length=options.completion_tokens, max_steps=steps, learning_rate=1e-6, report_to="none",
        save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=not cuda, bf16=False, seed=1,
        generation_kwargs={"min_new_tokens": options.completion_tokens}, gradient_checkpointing=False,
        composer={
            "policy": {"objective": "dr_grpo"},
            "sdpo": {"weight": 1.0, "hint": {"sources": ["recorded"]}},
            "replay_dpo": {"weight": 0.5, "pairs": str(pairs), "pairs_per_step": 8},
            "monitor": {"grad_norms_every": 10},
        },
    )  # fmt: skip

    def reward(completion_ids, **_):
        return [len(set(ids)) / len(ids) for ids in completion_ids]

    trainer = ComposerGRPOTrainer(
        make_model(options.size, tokenizer, dtype), reward, args, data, processing_class=tokenizer
    )
    trainer.add_callback(Clock())
    trainer.train()
    seconds = [b - a for a, b in itertools.pairwise(marks)] or [float("nan")]
    return {
        "seconds": statistics.median(seconds),
        "memory": torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan"),
        "log": trainer.state.log_history,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
    }


def channel_gradients(options: argparse.Namespace, dtype: str) -> dict:
    """Loss and flat gradient of each channel on one fixed batch, in `dtype`, from the same fp32 weights."""
    import torch
    from composer_trl.model_access import ModelAccess

    from composer_plugins.losses.divergence import full_divergence
    from composer_plugins.losses.dpo import dpo_loss

    tokenizer = make_tokenizer(options.vocabulary)
    model = make_model(options.size, tokenizer, "float32").to(options.device).to(getattr(torch, dtype))
    access, generator = ModelAccess(model), torch.Generator().manual_seed(0)
    ids = torch.randint(3, len(tokenizer), (4, 96), generator=generator).to(options.device)
    hidden = access.hidden(ids, torch.ones_like(ids))[:, 63:-1]
    logps = access.token_logprobs(hidden.flatten(0, 1), ids[:, 64:].flatten()).view(4, -1)
    with torch.no_grad():
        hinted = torch.cat([ids[:, :8].flip(1), ids], 1)
        teacher = access.logits(access.hidden(hinted, torch.ones_like(hinted))[:, 71:-1].flatten(0, 1))
    advantage = torch.tensor([[1.0], [-1.0], [0.5], [-0.5]], device=options.device)
    mask = torch.ones_like(logps[:2], dtype=torch.bool)
    losses = {
        "policy": -(logps * advantage).sum() / logps.numel(),
        "sdpo": full_divergence(access.logits(hidden.flatten(0, 1)), teacher, alpha=1.0).mean(),
        "replay_dpo": dpo_loss(
            chosen_logprobs=logps[:2], chosen_mask=mask, ref_chosen_logprobs=logps[:2].detach() - 0.1,
            rejected_logprobs=logps[2:], rejected_mask=mask, ref_rejected_logprobs=logps[2:].detach(), beta=0.1,
        ).values.mean(),
    }  # fmt: skip
    parameters = list(access.trainable().values())
    found = {}
    for name, loss in losses.items():
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        flat = torch.cat([g.float().flatten().cpu() for g in grads if g is not None])
        found[name] = (float(loss), flat)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", default="360m", choices=sorted(SIZES))
    parser.add_argument("--vocabulary", type=int, default=None, help="default: 49152 (tiny: 512)")
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--prompt-words", type=int, default=200)
    parser.add_argument("--completion-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.vocabulary = options.vocabulary or (512 if options.size == "tiny" else 49152)

    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("No CUDA device found. Run with --device cpu --size tiny --steps 2 to check the code path.")
    name = torch.cuda.get_device_name(0) if options.device == "cuda" else platform.processor() or "CPU"
    bf16, fp32 = train(options, "bfloat16", options.steps), train(options, "float32", max(2, options.steps // 10))
    exact, rounded = channel_gradients(options, "float32"), channel_gradients(options, "bfloat16")
    lines = [
        f"{name}, torch {torch.__version__}, {bf16['parameters'] / 1e6:.0f}M parameters, {options.rollouts} rollouts of "
        f"about {options.prompt_words} + {options.completion_tokens} tokens, all channels on, EMA teacher, {options.steps} steps",
        "",
        "| dtype | s/step (median) | peak memory GiB |",
        "|---|---|---|",
        f"| bf16 | {bf16['seconds']:.3f} | {bf16['memory']:.2f} |",
        f"| fp32 | {fp32['seconds']:.3f} | {fp32['memory']:.2f} |",
        "",
        "| channel | loss fp32 | loss bf16 | gradient, relative L2 | cosine |",
        "|---|---|---|---|---|",
    ]
    for channel, (loss, gradient) in exact.items():
        other_loss, other = rounded[channel]
        difference = (other - gradient).norm() / gradient.norm()
        cosine = torch.nn.functional.cosine_similarity(other, gradient, dim=0)
        lines.append(f"| {channel} | {loss:.6f} | {other_loss:.6f} | {difference:.2e} | {cosine:.6f} |")
    table = "\n".join(lines)
    print(table)
    if options.out:
        options.out.write_text(table + "\n")


if __name__ == "__main__":
    main()
