"""Log-probs of given token ids under the weights that prime-rl's inference server holds at this moment.

The request is the one that prime-rl's own opsd and opd algorithms send (`/inference/v1/generate` with
`prompt_logprobs`; src/prime_rl/utils/client.py `prefill_logprobs`, src/prime_rl/inference/vllm/serving_tokens.py).
A server that fails never fails the rollout: the caller gets a `ScoringError` with a reason that can be counted.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
from pydantic import Field

from composer_plugins.config import Section

Reason = Literal["timeout", "unreachable", "server_error", "refused", "garbage"]
#: What another attempt can mend.
_TRANSIENT = ("timeout", "unreachable", "server_error", "garbage")
#: vLLM's filler for a log-prob that it does not have.
_NO_LOGPROB = -9999.0
#: Rounding of a log-softmax can put a certain token this far above 0 (nats).
_ABOVE_ZERO = 1e-3


class ScoringOptions(Section):
    """How patient the wrapper is with the server that scores."""

    timeout: float = Field(60.0, gt=0)
    """Longest wait for one answer, in seconds."""
    retries: int = Field(2, ge=0)
    """Further attempts after a time-out, a 5xx, 408, 425 or 429, a broken connection or an answer without sense."""
    backoff: float = Field(0.5, ge=0)
    """Wait before the first further attempt, in seconds; it doubles each time."""
    deadline: float = Field(180.0, gt=0)
    """Longest time that scoring may add to one episode, in seconds; what is not scored by then stays unstamped."""
    max_concurrent: int = Field(16, gt=0)
    """Requests in flight, per environment worker."""


class ScoringError(Exception):
    """Why there are no log-probs. `reason` is one of `Reason`."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


@dataclass(frozen=True)
class Endpoint:
    """Where the policy is served.

    Args:
        base_url: with or without `/v1`.
        model: served name; prime-rl changes it when it serves a LoRA adapter.
        api_key, headers: as prime-rl's client sends them.
        cache_salt: prime-rl's mark of the weights' version, so that no cached keys and values of older ones are used.
    """

    base_url: str
    model: str
    api_key: str = "EMPTY"
    headers: dict[str, str] = field(default_factory=dict, hash=False)
    cache_salt: str | None = None

    @property
    def url(self) -> str:
        """The generate route: mounted at the server's root, not under `/v1`."""
        return f"{self.base_url.rstrip('/').removesuffix('/v1')}/inference/v1/generate"


class PrefillScorer:
    """Scores token ids; one per event loop, closed with `aclose`.

    Args:
        options: patience.
    """

    def __init__(self, options: ScoringOptions) -> None:
        self.options = options
        self.attempts = 0
        self._client = httpx.AsyncClient(timeout=options.timeout)
        self._slots = asyncio.Semaphore(options.max_concurrent)

    async def score(self, endpoint: Endpoint, token_ids: list[int], start: int) -> list[float]:
        """Return log p(token_ids[i] | token_ids[:i]) for i >= start, in nats at temperature 1.

        Args:
            endpoint: the server.
            token_ids: context and span.
            start: position of the first token of the span, at least 1.

        Raises:
            ScoringError: no usable answer after all attempts, or a refusal (4xx), which is not repeated.
            ValueError: `start` is not inside the ids.
        """
        if not 1 <= start < len(token_ids):
            raise ValueError(f"Expected 1 <= start < {len(token_ids)} tokens, found {start}.")
        for attempt in range(self.options.retries + 1):
            try:
                async with self._slots:
                    self.attempts += 1
                    return _span_logprobs(await self._ask(endpoint, token_ids), token_ids, start)
            except ScoringError as error:
                if error.reason not in _TRANSIENT or attempt == self.options.retries:
                    raise
            await asyncio.sleep(self.options.backoff * 2**attempt)
        raise AssertionError("unreachable")  # the last attempt returns or raises

    async def _ask(self, endpoint: Endpoint, token_ids: list[int]) -> Any:
        body: dict[str, Any] = {
            "model": endpoint.model,
            "token_ids": token_ids,
            "sampling_params": {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "prompt_logprobs": 1},
        }
        if endpoint.cache_salt is not None:
            body["cache_salt"] = endpoint.cache_salt
        headers = {"Authorization": f"Bearer {endpoint.api_key}", **endpoint.headers}
        try:
            # httpx's timeout is per read: a server that drips bytes would never meet it
            async with asyncio.timeout(self.options.timeout):
                response = await self._client.post(endpoint.url, json=body, headers=headers)
        except (httpx.TimeoutException, TimeoutError) as error:
            raise ScoringError("timeout", f"{endpoint.url} did not answer in {self.options.timeout:g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ScoringError("unreachable", f"{endpoint.url}: {error or type(error).__name__}") from error
        if response.status_code >= 500 or response.status_code in (408, 425, 429):
            raise ScoringError("server_error", f"{endpoint.url} answered {response.status_code}")
        if response.status_code >= 400:
            raise ScoringError("refused", f"{endpoint.url} answered {response.status_code}: {response.text[:300]}")
        try:
            return response.json()
        except ValueError as error:
            raise ScoringError("garbage", f"{endpoint.url} answered with something that is not JSON") from error

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()


def _span_logprobs(answer: Any, token_ids: list[int], start: int) -> list[float]:
    """Read the answer strictly: a wrong number here would be a wrong teacher."""
    entries = answer.get("prompt_logprobs") if isinstance(answer, dict) else None
    if not isinstance(entries, list) or len(entries) != len(token_ids):
        found = f"{len(entries)} of them" if isinstance(entries, list) else "none"
        raise ScoringError("garbage", f"expected {len(token_ids)} prompt_logprobs, one per token, found {found}")
    return [_logprob(entries[i], token_ids[i], i) for i in range(start, len(token_ids))]


def _logprob(entry: Any, token_id: int, position: int) -> float:
    found = entry.get(str(token_id)) if isinstance(entry, dict) else None
    value = found.get("logprob") if isinstance(found, dict) else None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value > _ABOVE_ZERO or value <= _NO_LOGPROB:
        raise ScoringError("garbage", f"token {token_id} at position {position} has no usable log-prob: {entry!r:.200}")
    return min(float(value), 0.0)
