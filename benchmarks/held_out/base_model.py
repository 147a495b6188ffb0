"""The base model: a tiny Llama that can do every operation and read a hint, but is unsure what a name means.

Pre-training mixes three layouts, on digit strings that neither RL nor the evaluation ever sees:
no hint: the answer follows an operation drawn from the task's prior of the name;
hint: the error message names an operation drawn uniformly, and the answer follows it. The meaning of a name is
therefore never learned through hints: what a hinted model knows, it read;
uninformative hint: the message says only that the call failed; the answer is drawn as without a hint.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from composer_trl.hint_sources import FEEDBACK_HINT
from composer_trl.hinted_turns import HintSplicer
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.held_out.task import (
    CALL_LENGTH,
    INFORMATIVE,
    LENGTH,
    NAMES,
    OPERATIONS,
    UNINFORMATIVE,
    Task,
    prompt,
    strings,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>")
#: Share of the layouts: no hint, informative hint, uninformative hint.
SHARES = (0.45, 0.40, 0.15)
HINT_ROLE = "user"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of whole words and single digits that covers exactly the task's texts."""
    messages = [INFORMATIVE.format(name=n, operation=o) for n in NAMES for o in OPERATIONS]
    texts = [FEEDBACK_HINT.format(feedback=m) for m in [*messages, UNINFORMATIVE.format(name=NAMES[0])]]
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)} | {"user", "assistant"}
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *"0123456789", *sorted(words)])}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    backend.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", bos_token="<|im_start|>", eos_token="<|im_end|>",
        unk_token="<|unk|>", padding_side="left",
    )  # fmt: skip
    tokenizer.chat_template = CHATML
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return a Llama with random weights (2 layers, hidden size 64)."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.05, rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Contexts:
    """Renders calls to token ids, in the very layout that the trainer gives student and self-teacher."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.splicer = HintSplicer(tokenizer, role=HINT_ROLE)

    def ids(self, name: str, digits: str, feedback: str | None = None) -> list[int]:
        """Return the prompt's ids, with the error message spliced in as the trainer does for `feedback`."""
        rendered = self.tokenizer.apply_chat_template(
            prompt(name, digits), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return self.splicer.splice(list(rendered), FEEDBACK_HINT.format(feedback=feedback) if feedback else "")


class PretrainingData:
    """Batches of one layout each, so that no batch has padding.

    Args:
        task: with the prior that answers follow.
        contexts: renders the templates; digits are then filled in by position.
        seed: of the draws.
    """

    def __init__(self, task: Task, contexts: Contexts, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.task, self.contexts = task, contexts
        self.zero, self.eos = contexts.tokenizer.convert_tokens_to_ids(["0", "<|im_end|>"])
        self.functions = {op: contexts.tokenizer.convert_tokens_to_ids(op) for op in OPERATIONS}
        pool = strings("pretraining")
        self.strings = np.array([[int(c) for c in s] for s in pool])
        self.answers = {op: np.array([[int(c) for c in f(s)] for s in pool]) for op, f in OPERATIONS.items()}
        self.operations = list(OPERATIONS)
        self.prior = {name: [task.prior[name][op] for op in self.operations] for name in NAMES}
        self.templates = self._templates()

    def _templates(self) -> dict[tuple[str, str | None], list[int]]:
        """Rendered contexts of (name, operation of the hint | "" uninformative | None no hint), digits all 0."""
        result: dict[tuple[str, str | None], list[int]] = {}
        for name in NAMES:
            messages = {op: INFORMATIVE.format(name=name, operation=op) for op in OPERATIONS}
            messages |= {"": UNINFORMATIVE.format(name=name), None: None}
            for key, message in messages.items():
                result[name, key] = self.contexts.ids(name, "0" * LENGTH, message)
        return result

    def batch(self, size: int) -> tuple[torch.Tensor, int]:
        """Return ids (size, L) and the number of context tokens."""
        layout = self.rng.choice(3, p=SHARES)
        rows = []
        for name in self.rng.choice(NAMES, size=size):
            told = self.operations[self.rng.integers(len(self.operations))]
            believed = self.operations[self.rng.choice(len(self.operations), p=self.prior[name])]
            hint, followed = ((None, believed), (told, told), ("", believed))[layout]
            context = np.array(self.templates[name, hint])
            index = self.rng.integers(len(self.strings))
            context[context == self.zero] = self.strings[index] + self.zero
            call = [self.functions[followed], *(self.answers[followed][index] + self.zero), self.eos]
            rows.append(np.concatenate([context, call]))
        ids = torch.from_numpy(np.stack(rows))
        return ids, ids.shape[1] - CALL_LENGTH


def pretrain(task: Task, *, seed: int, steps: int, batch_size: int = 64, lr: float = 4e-3):
    """Train the base model from random weights by next-token prediction on the answers.

    Returns:
        (model in eval mode, tokenizer).
    """
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    data = PretrainingData(task, Contexts(tokenizer), seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * s / steps)))
    )
    model.train()
    for _ in range(steps):
        ids, context = data.batch(batch_size)
        hidden = model.model(input_ids=ids, use_cache=False)[0][:, context - 1 : -1]
        logits = model.lm_head(hidden).float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, context:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval(), tokenizer
