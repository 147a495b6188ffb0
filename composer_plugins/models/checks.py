"""What a model must be before it is trained: each check raises `ModelError` with the fix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from composer_plugins.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def check_chat_template(tokenizer: PreTrainedTokenizerBase, ref: str) -> None:
    """Refuse a tokenizer without a chat template: states could not be rendered."""
    if not tokenizer.chat_template:
        raise ModelError(
            f"{ref} has no chat template, so conversations cannot be rendered for it. Use the instruct version of "
            "the model, or save a template beside it (chat_template.jinja); for a ChatML model "
            "`composer_plugins.models.toolcalls.install_tool_template` has one."
        )


def check_generative(config: PreTrainedConfig, ref: str) -> None:
    """Refuse encoder-only and encoder-decoder models: the losses need one causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    fix = "Use a decoder-only language model (an instruct or chat model)."
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{ref} is an encoder-decoder model ({config.model_type}). {fix}")
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    # BERT and its kin are in both tables, and see both sides unless `is_decoder`. GPT-NeoX has the flag too, unused.
    encoder = config.model_type in (*MASKED, "bert-generation") and getattr(config, "is_decoder", None) is False
    if (config.model_type not in CAUSAL and not remote) or encoder:
        raise ModelError(f"{ref} is an encoder-only model ({config.model_type}): it cannot generate. {fix}")


def check_loading_report(info: Mapping[str, Any], ref: str) -> None:
    """Refuse a checkpoint that leaves any weight at its random initialisation.

    Args:
        info: what `from_pretrained(..., output_loading_info=True)` returns; a tied output head is not
            listed as missing there.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"The checkpoint of {ref} lacks {len(missing)} weight(s) of the model ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}); they would be random. Download it again, or save the "
            "model with all of its weights."
        )
    if mismatched := sorted(info.get("mismatched_keys") or []):
        name, found, expected = mismatched[0]
        raise ModelError(
            f"The checkpoint of {ref} does not fit its config.json: {len(mismatched)} weight(s) have another shape "
            f"({name} is {tuple(found)}, expected {tuple(expected)}). The two belong to different models."
        )
    if errors := info.get("error_msgs"):
        raise ModelError(f"The checkpoint of {ref} was not loaded whole: {errors[0]} Download the model again.")


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, ref: str) -> None:
    """Refuse a tokenizer that can produce ids beyond the model's embedding rows."""
    rows = model.get_input_embeddings().weight.shape[0]
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= rows:
        raise ModelError(
            f"The tokenizer of {ref} has token {token!r} with id {highest}, but the model's embeddings have {rows} "
            "rows. Use the model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer)) and save it."
        )
