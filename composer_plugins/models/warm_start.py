"""The shipped warm start: a small LoRA that teaches SmolLM2-135M-Instruct the shape of a tool call.

Without it SmolLM2 writes no parsable call at temperature 1, so groups have no reward spread and there is
nothing to train on. How it was made and what it does: `composer_plugins/data/warm_start/README.md`.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer_plugins.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What the adapter was trained on, and must be merged into.
EXPECTED = {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152}


def warm_start_path() -> Path:
    """Return the folder of the adapter (peft format, safetensors)."""
    return Path(str(files("composer_plugins") / "data" / "warm_start"))


def apply_warm_start(model: PreTrainedModel, path: Path | None = None) -> PreTrainedModel:
    """Merge the adapter into `model`'s weights and return the model; it has no adapter left.

    Args:
        model: SmolLM2-135M-Instruct, from any source.
        path: another adapter for the same model; default: the shipped one.

    Raises:
        ModelError: another architecture than the one it was trained on, or the adapter is not there.
    """
    path = path or warm_start_path()
    found = {name: getattr(model.config, name, None) for name in EXPECTED}
    if found != EXPECTED:
        raise ModelError(
            f"The warm start is for SmolLM2-135M-Instruct ({_text(EXPECTED)}), found {_text(found)}. "
            "Leave `warm_start` off: a model that can call tools needs none."
        )
    if not (path / "adapter_model.safetensors").is_file():
        raise ModelError(f"No adapter in {path}: make it with `python examples/make_warm_start.py`.")
    from peft import LoraConfig, PeftModel

    config = LoraConfig.from_pretrained(str(path))
    return PeftModel.from_pretrained(model, str(path), config=config).merge_and_unload()


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)
