"""Hashes that islands compare: of the configuration, of the parameters' layout, of their values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import torch

from composer_plugins.config import OuterConfig
from composer_torchft.fragments import ParameterFragment

#: What may differ between islands.
_OWN = {"island", "interface", "lighthouse", "timeouts", "max_retries", "min_islands", "start_with", "log"}


def config_hash(config: OuterConfig) -> str:
    """Return the hash of everything in the configuration that must be equal on all islands."""
    shared = config.model_dump(mode="json", exclude=_OWN)
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()


def layout_hash(fragments: Iterable[ParameterFragment]) -> str:
    """Return the hash of names, shapes, types and order of the parameters, fragment by fragment."""
    digest = hashlib.sha256()
    for number, fragment in enumerate(fragments):
        for name, parameter in fragment.named_parameters():
            digest.update(f"{number}|{name}|{tuple(parameter.shape)}|{parameter.dtype}\n".encode())
    return digest.hexdigest()


def values_hash(tensors: Iterable[torch.Tensor]) -> str:
    """Return the SHA-256 of the tensors' bytes: equal if and only if every bit is."""
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(flat.numpy()))
    return digest.hexdigest()


def as_integer(digest: str) -> int:
    """Return the first 62 bits of a hexadecimal digest, which fit an int64 tensor."""
    return int(digest[:16], 16) >> 2
