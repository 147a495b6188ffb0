"""Load a resolved model and its tokenizer, checked: never a random weight, never an untrainable model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer_plugins.errors import ModelError
from composer_plugins.models import checks
from composer_plugins.models.resolve import ResolvedModel, resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16", "float16", "auto")
_FAILURES = (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, ImportError)


def load_model(
    resolved: ResolvedModel | str, *, dtype: str = "float32", attn_implementation: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return (model, tokenizer), in evaluation mode on the CPU.

    Args:
        resolved: from `resolve_model`, or a reference for it.
        dtype: float32, bfloat16, float16, or auto (what the checkpoint says).
        attn_implementation: passed to transformers; None: its default.

    Raises:
        ModelError: no chat template, encoder-only, vocabulary beyond the embeddings, missing, damaged or
            half-downloaded weights. The message says how to fix it.
    """
    if isinstance(resolved, str):
        resolved = resolve_model(resolved)
    if dtype not in DTYPES:
        raise ModelError(f"dtype must be one of {', '.join(DTYPES)}; found {dtype!r}.")
    folder = model_dir(resolved)
    checks.check_generative(_read(_config_class(), folder, resolved), resolved.ref)
    tokenizer = read_tokenizer(resolved)
    checks.check_chat_template(tokenizer, resolved.ref)
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "use_safetensors": True}
    options["ignore_mismatched_sizes"] = True  # so that the report names them, and the check below refuses them
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    model, info = _read(_model_class(), folder, resolved, **options)
    checks.check_loading_report(info, resolved.ref)
    checks.check_vocabulary(tokenizer, model, resolved.ref)
    return model.eval(), tokenizer


def read_tokenizer(resolved: ResolvedModel) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a resolved model. Raises `ModelError` when it cannot be read."""
    from transformers import AutoTokenizer

    tokenizer = _read(AutoTokenizer, model_dir(resolved), resolved)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_dir(resolved: ResolvedModel) -> Path:
    """Return the directory that transformers can load: the model's own, or the converted copy of a GGUF."""
    if resolved.gguf_file is None:
        return resolved.path
    from composer_plugins.models.gguf import converted_dir

    return converted_dir(resolved)


def _config_class():
    from transformers import AutoConfig

    return AutoConfig


def _model_class():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def _read(factory: Any, folder: Path, resolved: ResolvedModel, **options: Any) -> Any:
    """Call `factory.from_pretrained`, its many exceptions turned into one kind with the fix."""
    from safetensors import SafetensorError

    try:
        return factory.from_pretrained(folder, trust_remote_code=resolved.trust_remote_code, **options)
    except (*_FAILURES, SafetensorError) as error:
        what = factory.__name__.removeprefix("Auto")
        text = str(error).strip()
        fix = "The files are damaged, half-downloaded or do not belong together: fetch the model again."
        if "trust_remote_code" in text:
            fix = "Read the code that comes with the model, then set trust_remote_code: true, or use another model."
        elif isinstance(error, ImportError) or "does not recognize this architecture" in text:
            fix = "This environment lacks what the model needs: install it, or use another model."
        first = text.splitlines()[0].strip().removesuffix(".") if text else "no message"
        where = resolved.ref if resolved.ref == str(folder) else f"{resolved.ref} ({folder})"
        raise ModelError(f"The {what} of {where} cannot be read: {type(error).__name__}: {first}. {fix}") from error
