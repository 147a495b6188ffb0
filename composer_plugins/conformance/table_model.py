"""The table of a problem as a causal language model of transformers, so that a host can run it like any other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from composer_plugins.conformance.files import table_tokenizer
from composer_plugins.conformance.problem import HINT, PAD, Problem


class TableConfig(PretrainedConfig):
    """`vocab_size` is the side of the table."""

    model_type = "composer_conformance_table"

    def __init__(self, vocab_size: int = 8, **kwargs) -> None:
        super().__init__(**kwargs)
        self.vocab_size = self.hidden_size = vocab_size
        self.num_hidden_layers = self.num_attention_heads = self.num_key_value_heads = 1


class TableBackbone(PreTrainedModel):
    """Hidden states that are the logits: (B, L) ids to (B, L, V)."""

    config_class, base_model_prefix = TableConfig, "model"
    _supports_sdpa = True

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)
        self.hinted = nn.Embedding(config.vocab_size, config.vocab_size)
        self.calls: Counter[str] = Counter()
        self.seen: list[torch.Tensor] = []
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def forward(self, input_ids=None, attention_mask=None, **_) -> BaseModelOutputWithPast:
        after_hint = (input_ids == HINT).cumsum(-1) > 0
        self.calls["teacher" if bool(after_hint.any()) else "student"] += 1
        if bool(after_hint.any()):
            self.seen.append(input_ids.detach().clone())
        hidden = self.table(input_ids) + self.hinted(input_ids) * after_hint[..., None]
        return BaseModelOutputWithPast(last_hidden_state=hidden)


class TableForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal LM whose logits after token i are row i of a table (plus row i of another one after a hint)."""

    config_class, base_model_prefix = TableConfig, "model"
    _supports_sdpa, _no_split_modules = True, ["Embedding"]

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        self.model = TableBackbone(config)
        self.lm_head = nn.Linear(config.vocab_size, config.vocab_size, bias=False)
        self.lm_head.weight.requires_grad_(False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.table

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, logits_to_keep: int = 0, **kwargs) -> CausalLMOutputWithPast:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        kept = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        return CausalLMOutputWithPast(logits=self.lm_head(kept))


def table_model(problem: Problem, dtype: torch.dtype = torch.float32) -> TableForCausalLM:
    """Return the model of a problem; its head is the identity and is not trained."""
    size = len(problem.table)
    model = TableForCausalLM(TableConfig(vocab_size=size, tie_word_embeddings=False, pad_token_id=0, eos_token_id=0))
    with torch.no_grad():
        model.model.table.weight.copy_(torch.from_numpy(problem.table))
        model.model.hinted.weight.copy_(torch.from_numpy(problem.hinted))
        model.lm_head.weight.copy_(torch.eye(size))
    return model.to(dtype)


def save_table_model(problem: Problem, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the model and a tokenizer, for hosts that load models by path (`know_table_model` in that process)."""
    table_model(problem, dtype).save_pretrained(folder)
    table_tokenizer(problem.vocabulary).save_pretrained(folder)


def know_table_model() -> None:
    """Let transformers' Auto classes load the table model in this process."""
    AutoConfig.register(TableConfig.model_type, TableConfig, exist_ok=True)
    AutoModelForCausalLM.register(TableConfig, TableForCausalLM, exist_ok=True)


def read_by_teacher(model: TableForCausalLM, problem: Problem) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Split every row that the model read after a hint into the hinted context and the turn; rows may be padded."""
    contexts = {row.hinted_context(turn) for row in problem.rows for turn in row.turns}
    found = []
    for ids in model.model.seen:
        for row in ids.tolist():
            kept = tuple(i for i in row if i != PAD)
            found += [(c, kept[len(c) :]) for c in contexts if kept[: len(c)] == c]
    return found


def token_logits(model: PreTrainedModel, context: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """Logits (T, V) that predict `ids` after `context`, float32 (float64 of such a model), with gradient."""
    logits = model(input_ids=torch.tensor([[*context, *ids]])).logits[0, len(context) - 1 : -1]
    return logits if logits.dtype == torch.float64 else logits.float()


def token_logprobs(
    model: PreTrainedModel, context: Sequence[int], ids: Sequence[int], *, temperature: float = 1.0
) -> torch.Tensor:
    """Log-probabilities (T,) of `ids` after `context`, with gradient: for hosts whose loss is given log-probs."""
    logits = token_logits(model, context, ids) / temperature
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(list(ids))[:, None])[:, 0]
