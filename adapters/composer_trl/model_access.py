"""Hidden states and log-probabilities of a causal LM, without materialising the full logits.

TRL 1.16 scores completions through a fused LM head that returns no logits. Channels that need a
distribution take the backbone's hidden states (captured on TRL's own forward) and project only the
tokens they use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from composer_plugins.errors import UnsupportedError

#: Tokens projected at once: 1024 x 152k vocabulary entries in fp32 are 0.6 GB.
CHUNK = 1024

Weights = Mapping[str, torch.Tensor]


class ModelAccess:
    """One causal LM seen as backbone + head, with optional replacement weights.

    Args:
        model: the unwrapped model (PEFT or not).

    Raises:
        UnsupportedError: the model has no separate backbone or output embedding.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.backbone: nn.Module = self.model.base_model
        self.head: nn.Module = self.model.get_output_embeddings()
        if self.backbone is self.model or self.head is None:
            raise UnsupportedError(
                f"{type(self.model).__name__} exposes no backbone with a separate output embedding, which the sdpo "
                "and replay_dpo channels need. Use a decoder-only causal LM of transformers."
            )
        text = self.model.config.get_text_config()
        self.softcap: float | None = getattr(text, "final_logit_softcapping", None)
        self.scale: float = _logit_scale(text)
        self.max_positions: int = getattr(text, "max_position_embeddings", None) or 1 << 30

    def trainable(self) -> dict[str, torch.Tensor]:
        """Return the trained parameters by name, tied ones once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @contextmanager
    def capture_hidden(self) -> Iterator[list[torch.Tensor]]:
        """Collect the backbone's last hidden states, each (B, L, H) with its graph, of forwards run inside."""
        seen: list[torch.Tensor] = []
        handle = self.backbone.register_forward_hook(lambda module, args, output: seen.append(output[0]))
        try:
            yield seen
        finally:
            handle.remove()

    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, weights: Weights | None = None):
        """Return the last hidden states (B, L, H), under `weights` in place of the model's own if given."""
        kwargs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if weights is None:
            return self.backbone(**kwargs)[0]
        prefix = next(n for n, m in self.model.named_modules() if m is self.backbone) + "."
        own = {
            name.removeprefix(prefix): tensor.to(self.model.get_parameter(name).dtype)
            for name, tensor in weights.items()
            if name.startswith(prefix)
        }
        return functional_call(self.backbone, own, args=(), kwargs=kwargs)[0]

    def head_weight(self, weights: Weights | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output embedding (V, H) and bias, under `weights` if given (tied ones followed)."""
        weight, bias = self.head.weight, getattr(self.head, "bias", None)
        if weights is None:
            return weight, bias
        replaced = {id(p): weights[name].to(p.dtype) for name, p in self.model.named_parameters() if name in weights}
        return replaced.get(id(weight), weight), None if bias is None else replaced.get(id(bias), bias)

    def logits(self, hidden: torch.Tensor, weights: Weights | None = None) -> torch.Tensor:
        """Project hidden states (N, H) to float32 logits (N, V), with the model's own scale and soft cap."""
        weight, bias = self.head_weight(weights)
        logits = nn.functional.linear(hidden.to(weight.dtype), weight, bias).float() * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def token_logprobs(self, hidden: torch.Tensor, token_ids: torch.Tensor, *, temperature: float = 1.0):
        """Return log-probabilities (N,) of `token_ids` (N,) from the hidden states (N, H) that predict them."""

        def one(h: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return torch.log_softmax(self.logits(h) / temperature, dim=-1).gather(-1, ids[:, None])[:, 0]

        return in_chunks(one, hidden, token_ids)


def in_chunks(function: Callable[..., Any], hidden: torch.Tensor, *others: torch.Tensor) -> Any:
    """Apply `function` to chunks of rows, recomputing logits in the backward pass instead of keeping them.

    Args:
        function: takes the chunks in order and returns a tensor (N,) or a tuple of such.
        hidden: (N, H); the first argument of `function`.
        others: further tensors with N rows.
    """
    outputs = []
    for start in range(0, max(len(hidden), 1), CHUNK):
        parts = [x[start : start + CHUNK] for x in (hidden, *others)]
        if len(hidden) > CHUNK and torch.is_grad_enabled():
            outputs.append(checkpoint(function, *parts, use_reentrant=False))
        else:
            outputs.append(function(*parts))
    if isinstance(outputs[0], tuple):
        return tuple(torch.cat(column) for column in zip(*outputs, strict=True))
    return torch.cat(outputs)


def _logit_scale(config: Any) -> float:
    """The factor between projection and logits (Cohere, Falcon-H1, Granite, ... as TRL's fused head applies it)."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a teacher's forward and restore every module's own mode afterwards."""
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
