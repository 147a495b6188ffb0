"""What differs between prime-rl's versions, found from the objects themselves: no version number is compared.

| | 0.4, 0.5 | 0.6 | 0.7, 0.8.0 | 0.8.1.dev53 and later |
|---|---|---|---|---|
| `LossInputs` | `teacher_logprobs` | `teacher_logprobs` | `ref_logprobs`, `loss_weights` | the same |
| components of the loss | one | one per batch | `rl`, `ce`, `ref_kl`, each by its own count | the same |
| an environment may stamp them per token | no | no | no | yes |
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from pydantic import ValidationError

from composer_plugins.config import explain
from composer_plugins.errors import ConfigError
from composer_plugins.losses.masking import safe


@dataclasses.dataclass
class LossOutputs:
    """Stands in for prime-rl's class of the same name where the inputs did not come from prime-rl."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


def reference_logprobs(inputs: Any) -> torch.Tensor | None:
    """Return `ref_logprobs` (0.7 and later) or `teacher_logprobs` (0.4 to 0.6) of a `LossInputs`."""
    for name in ("ref_logprobs", "teacher_logprobs"):
        if hasattr(inputs, name):
            return getattr(inputs, name)
    return None


def outputs_class(inputs: Any) -> type:
    """Return the `LossOutputs` of the module that defined these inputs, so no version of prime-rl is imported here."""
    return getattr(_module(inputs), "LossOutputs", LossOutputs)


def host_loss(inputs: Any, options: Mapping[str, Any], *, reference: bool) -> Any:
    """Return what prime-rl's own loss returns for these inputs (its `LossOutputs`).

    What lies under the mask is replaced by zeros first: prime-rl multiplies by the mask, and 0 * inf is nan.

    Args:
        inputs: prime-rl's `LossInputs`.
        options: fields of its `DefaultLossConfig` or, with `type: ipo`, of its `IPOLossConfig`.
        reference: False hides the reference log-probs, which 0.4 and 0.5 add to the advantage (`teacher_tau`).

    Raises:
        ConfigError: the inputs are not prime-rl's, this version has no such loss, or an option is not its.

    Source: src/prime_rl/trainer/rl/loss.py `default_loss_fn`, `ipo_loss_fn`.
    """
    module, kind = _module(inputs), options.get("type", "default")
    names = {
        "default": ("default_loss_fn", ("DefaultLossConfig", "LossConfig")),
        "ipo": ("ipo_loss_fn", ("IPOLossConfig",)),
    }
    if kind not in names:
        raise ConfigError(f"host.type must be default or ipo, found {kind!r}.")
    function_name, config_names = names[kind]
    function = getattr(module, function_name, None)
    config = next((c for c in (getattr(module, name, None) for name in config_names) if isinstance(c, type)), None)
    if function is None or config is None:
        raise ConfigError(
            f"objective: host with type {kind} calls prime-rl's own {function_name}, which {_module_name(inputs)} does "
            "not have: use an objective of the menu (dppo is prime-rl's default since 0.6)."
        )
    unknown = set(options) - set(config.model_fields)
    if unknown:  # 0.5 ignores them
        raise ConfigError(
            f"host: prime-rl's {config.__name__} has no {', '.join(sorted(unknown))}; it has "
            f"{', '.join(config.model_fields)}."
        )
    try:
        built = config(**options)
    except ValidationError as error:
        raise ConfigError(f"host: prime-rl's {config.__name__} refuses it: {explain(error, prefix='host')}") from error
    return function(_safe_inputs(inputs, reference), built)


def _safe_inputs(inputs: Any, reference: bool) -> Any:
    mask, changes = inputs.loss_mask, {}
    for field in dataclasses.fields(inputs):
        value = getattr(inputs, field.name)
        if field.name in ("ref_logprobs", "teacher_logprobs") and not reference:
            changes[field.name] = None
        elif isinstance(value, torch.Tensor) and value.dtype != torch.bool:
            changes[field.name] = safe(value, mask)
    return dataclasses.replace(inputs, **changes)


def _module(inputs: Any) -> ModuleType | None:
    return sys.modules.get(_module_name(inputs))


def _module_name(inputs: Any) -> str:
    return type(inputs).__module__
