"""The weights that read the hint: live, EMA, reference or trust region, and what they say.

Initial and averaged weights are kept for the trained parameters only (a LoRA run keeps a few MB), and
are used through `functional_call`: the live parameters are never overwritten, so a backward pass that is
still pending sees what its forward saw.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from composer_plugins.config import TeacherWeights
from composer_plugins.errors import ConfigError
from composer_trl.hinted_turns import HintedTurn
from composer_trl.model_access import ModelAccess, Weights, eval_mode

EMA_FILE = "composer_ema.safetensors"


class SelfTeacher:
    """Scores error turns under the hint. Carries no gradient.

    Args:
        model: the unwrapped policy, at its initial weights.
        config: the `sdpo.teacher` section.
    """

    def __init__(self, model: nn.Module, config: TeacherWeights) -> None:
        self.model, self.config = model, config
        self.access = ModelAccess(model)
        self.ema: dict[str, torch.Tensor] | None = None
        self.reference: dict[str, torch.Tensor] | None = None
        if config.kind == "ema":
            # In fp32: at an update rate of 0.05 a bf16 average would round small changes away and stand still.
            self.ema = {name: p.detach().float().clone() for name, p in self.access.trainable().items()}
        elif config.kind in ("reference", "trust_region"):
            self.reference = {name: p.detach().clone() for name, p in self.access.trainable().items()}

    @property
    def weights(self) -> Weights | None:
        """The replacement weights of the main forward; None: the live ones."""
        if self.config.kind == "ema":
            return self.ema
        return self.reference if self.config.kind == "reference" else None

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights: ema += rate * (weights - ema). Once per optimizer step."""
        if self.ema is not None:
            for name, parameter in self.access.trainable().items():
                self.ema[name].lerp_(parameter.detach().float(), self.config.ema_rate)

    @torch.no_grad()
    def hidden(
        self, turns: list[HintedTurn], span_ids: list[torch.Tensor], pad_id: int, *, weights: Weights | None
    ) -> torch.Tensor:
        """Return the hidden states (N, H) that predict the spans' tokens after the hinted contexts.

        Args:
            turns: the error turns, in order.
            span_ids: the sampled ids of each span, 1-D.
            pad_id: padding token.
            weights: whose eyes; None: the live weights.

        Contexts are padded on the left and spans on the right, as TRL lays out its own batches.
        """
        device = span_ids[0].device
        context = max(len(t.prefix_ids) for t in turns)
        width = context + max(len(ids) for ids in span_ids)
        input_ids = torch.full((len(turns), width), pad_id, device=device)
        attention_mask = torch.zeros((len(turns), width), dtype=torch.long, device=device)
        rows, columns = [], []
        for row, (turn, ids) in enumerate(zip(turns, span_ids, strict=True)):
            start = context - len(turn.prefix_ids)
            input_ids[row, start:context] = torch.tensor(turn.prefix_ids, device=device)
            input_ids[row, context : context + len(ids)] = ids
            attention_mask[row, start : context + len(ids)] = 1
            rows.append(torch.full((len(ids),), row, device=device))
            columns.append(torch.arange(context - 1, context - 1 + len(ids), device=device))
        with eval_mode(self.model):
            hidden = self.access.hidden(input_ids, attention_mask, weights)
        return hidden[torch.cat(rows), torch.cat(columns)]

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint folder."""
        if self.ema is not None:
            save_file({k: v.contiguous().cpu() for k, v in self.ema.items()}, folder / EMA_FILE)

    def load(self, folder: Path) -> None:
        """Restore the average from a checkpoint folder. Raises `ConfigError` when it is not there or does not fit."""
        if self.ema is None:
            return
        path = folder / EMA_FILE
        if not path.exists():
            raise ConfigError(
                f"{folder} has no {EMA_FILE}, so the EMA self-teacher cannot be resumed exactly. It was saved without "
                "sdpo.teacher.kind: ema; resume with the recipe that made it, or start a new run from its weights."
            )
        saved = load_file(path)
        if saved.keys() != self.ema.keys():
            raise ConfigError(
                f"{path} holds other parameters than the model trains: resume with the same model and LoRA."
            )
        for name, tensor in saved.items():
            self.ema[name].copy_(tensor)


def fingerprint(parameters: Weights) -> str:
    """Return a SHA-256 over the names, shapes and first values of `parameters` (cheap at any model size)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(parameters.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().flatten()[:4096].float().cpu().numpy().tobytes())
    return digest.hexdigest()
