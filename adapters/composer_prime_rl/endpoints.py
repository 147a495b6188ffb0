"""Where a verifiers client configuration sends its requests."""

from __future__ import annotations

import os
from typing import Any

from verifiers.v1.configs.client import resolve_api_key

from composer_prime_rl.scoring import Endpoint


def endpoint_of(client: Any, model: str, sampling: Any = None) -> Endpoint:
    """Return the endpoint of a client configuration.

    Args:
        client: `vf.ClientConfig`.
        model: the served name at this moment.
        sampling: `vf.SamplingConfig` of the rollout; prime-rl puts the cache salt of the weights' version there.
    """
    extra = getattr(sampling, "extra_body", None) or {}
    key = os.environ.get(client.api_key_var) or resolve_api_key(client)
    return Endpoint(client.base_url, model, key, dict(client.headers), extra.get("cache_salt"))
