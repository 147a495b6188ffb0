"""GGUF files: convert once to safetensors, and repair what transformers' GGUF loader gets wrong.

What was found for SmolLM2-135M-Instruct (transformers 5.10) against the model on the hub:

- the tokenizer's end-of-text token came out as `<|im_start|>` and there was no padding token, so
  generation would never stop where it should: the special tokens are set from the file's own metadata;
- digits were not split before the byte-level step, so a number after blanks or line feeds was tokenized
  otherwise than in training: `tokenizer.ggml.pre = smollm` names the right pre-tokenizer;
- the maximum length was unbounded and tokenization clean-up was on (it drops blanks before punctuation);
- weights are dequantized from Q4_1 (embeddings Q8_0) and are not those of the hub: about 4.5 bits each.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer_plugins.errors import ModelError
from composer_plugins.models.wheel import cache_dir
from composer_plugins.traces.store import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from composer_plugins.models.resolve import ResolvedModel

logger = logging.getLogger(__name__)
#: Raised whenever the conversion changes, so that old copies are not taken for new ones.
CONVERSION = 2
#: Beside the converted files: their SHA-256 by name, so that a damaged copy is noticed and made again.
SEAL = "converted.json"
_SPECIAL = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def converted_dir(resolved: ResolvedModel) -> Path:
    """Return a directory with the GGUF model as float32 safetensors and a repaired tokenizer.

    Converted on first use into our cache, keyed by the file's SHA-256, and moved into place in one rename.
    A copy whose files are not the ones that were written (cut, edited, missing) is logged and made again.

    Raises:
        ModelError: the file is no GGUF file that transformers can read, or the cache cannot be written.
    """
    target = cache_dir() / "converted" / f"{resolved.sha256[:32]}-v{CONVERSION}"
    if _is_whole(target):
        return target
    if target.exists():
        logger.warning("%s is damaged and is made again from %s", target, resolved.path / resolved.gguf_file)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=".convert-"))
        try:
            _convert(resolved, folder / "new")
            _put(folder / "new", target, aside=folder / "old")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise ModelError(f"cannot write {target}: {error}. Set COMPOSER_CACHE to a writable folder.") from error
    return target


def _put(new: Path, target: Path, *, aside: Path) -> None:
    """Move `new` to `target`; a damaged copy that is there goes `aside`, a whole one stays."""
    (new / SEAL).write_text(json.dumps({f.name: file_sha256(f) for f in sorted(new.iterdir())}, indent=1))
    for _ in range(3):  # another process may put its own copy there between any two lines
        if _is_whole(target):
            return
        with contextlib.suppress(FileNotFoundError):
            target.replace(aside)
        try:
            new.replace(target)
            return
        except OSError as error:
            failure = error
            shutil.rmtree(aside, ignore_errors=True)
    raise failure


def _is_whole(folder: Path) -> bool:
    try:
        expected = json.loads((folder / SEAL).read_bytes())
        stats = tuple((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.iterdir()))
        return "model.safetensors" in expected and _hashes(folder, stats) == expected
    except (OSError, ValueError, TypeError):
        return False


@functools.lru_cache(maxsize=8)
def _hashes(folder: Path, stats: tuple[tuple[str, int, int], ...]) -> dict[str, str]:
    """SHA-256 of the files, read once per process as long as sizes and times stay the same."""
    return {name: file_sha256(folder / name) for name, _, _ in stats if name != SEAL}


def _convert(resolved: ResolvedModel, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from composer_plugins.models.checks import check_loading_report

    name = resolved.gguf_file
    try:
        metadata = read_metadata(resolved.path / name)
        model, info = AutoModelForCausalLM.from_pretrained(
            resolved.path, gguf_file=name, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(resolved.path, gguf_file=name)
    except ImportError as error:
        raise ModelError(f"Reading GGUF files needs the `gguf` package: pip install gguf ({error})") from error
    except (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, OverflowError) as error:
        raise ModelError(
            f"{resolved.path / name} cannot be read as a GGUF model ({type(error).__name__}: {error}). "
            "It is damaged or of an unsupported architecture: fetch it again, or use safetensors."
        ) from error
    check_loading_report(info, resolved.ref)
    repair_tokenizer(tokenizer, metadata)
    for ids, config in ((tokenizer, model.config), (tokenizer, model.generation_config)):
        config.bos_token_id, config.eos_token_id = ids.bos_token_id, ids.eos_token_id
        config.pad_token_id = ids.pad_token_id
    model.config._name_or_path = resolved.repo or resolved.ref
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the key-value pairs of a GGUF file, the token lists left out."""
    from gguf import GGUFReader

    lists = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type", "tokenizer.ggml.scores")
    return {key: field.contents() for key, field in GGUFReader(path).fields.items() if key not in lists}


def repair_tokenizer(tokenizer: PreTrainedTokenizerBase, metadata: dict[str, Any]) -> None:
    """Set in place what the GGUF metadata says and the loader missed (see the module's docstring)."""
    for attribute, key in _SPECIAL.items():
        if key in metadata:
            setattr(tokenizer, attribute, tokenizer.convert_ids_to_tokens(int(metadata[key])))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if context:
        tokenizer.model_max_length = int(context)
    if not tokenizer.chat_template and metadata.get("tokenizer.chat_template"):
        tokenizer.chat_template = metadata["tokenizer.chat_template"]
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.init_kwargs["clean_up_tokenization_spaces"] = False
    if metadata.get("tokenizer.ggml.pre") == "smollm":
        from tokenizers import decoders, pre_tokenizers

        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
