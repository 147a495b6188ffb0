"""A teacher behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp, Ollama, hosted APIs).

The `openai` client sends, retries (408, 409, 429 with Retry-After, 5xx, timeouts, lost connections) and
backs off; the body is decoded by us, because servers differ and the client's types accept nearly anything.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from composer_plugins.errors import TeacherError
from composer_plugins.teachers.base import TeacherStopped, answer
from composer_plugins.teachers.chat import ChatReply, action_of, request_of
from composer_plugins.teachers.config import OpenAIConfig, fingerprint, is_loopback
from composer_plugins.traces.schema import Replay, State

if TYPE_CHECKING:
    import openai

T = TypeVar("T")

#: The longest wait that a client honours in a Retry-After header, in seconds.
_LONGEST_BACKOFF = 125.0
#: What no further request can get past: key refused, no permission, no such model or path.
_FATAL = (401, 403, 404)


class OpenAITeacher:
    """See `composer_plugins.teachers.base.Teacher`.

    Raises:
        TeacherError: states would leave this machine without `allow_unscrubbed`, or the environment
            variable of the key is not set.
    """

    Config = OpenAIConfig
    demonstration = False

    def __init__(self, config: OpenAIConfig) -> None:
        if problems := config.problems():
            raise TeacherError("\n".join(problems))
        self.config = config
        self.name, self.model, self.samples = config.name, config.model, config.samples
        # Two endpoints that serve one model name are taken for one set of weights: the careful reading.
        self.weights_id = config.weights_id or f"model:{config.model}"
        self.fingerprint = fingerprint(config.fingerprint_fields())
        self.batch_size = 4 * config.max_concurrency
        self._key = _read_key(config)
        self._loop = _LoopThread()
        self._client = self._loop.run(self._open())
        self._decoder = msgspec.json.Decoder(ChatReply)

    async def _open(self) -> openai.AsyncOpenAI:
        import openai

        loopback = is_loopback(urlsplit(self.config.base_url).hostname or "")
        # A proxy from the environment would carry loopback traffic off this machine; a redirect would send
        # the states to another host than the one that was allowed.
        transport = openai.DefaultAsyncHttpxClient(trust_env=not loopback, follow_redirects=False)
        return openai.AsyncOpenAI(
            api_key=self._key or "none",
            base_url=self.config.base_url,
            timeout=self.config.timeout_s,
            max_retries=self.config.max_retries,
            http_client=transport,
        )

    def ask(self, states: list[State], *, sample: int = 0) -> list[Replay]:
        """Answer each state once, `max_concurrency` at a time, see the protocol."""
        replays, fatal = self._loop.run(self._ask_all(states, sample))
        if fatal:
            raise TeacherStopped(fatal, [replay for replay in replays if replay is not None])
        return [replay for replay in replays if replay is not None]

    def close(self) -> None:
        """Close connections and the event loop."""
        self._loop.run(self._client.close())
        self._loop.close()

    async def _ask_all(self, states: list[State], sample: int) -> tuple[list[Replay | None], str | None]:
        gate, fatal = asyncio.Semaphore(self.config.max_concurrency), []

        async def one(state: State) -> Replay | None:
            async with gate:
                if fatal:
                    return None
                try:
                    return await self._ask_one(state, sample)
                except TeacherError as error:
                    fatal.append(str(error))
                    return None

        replays = await asyncio.gather(*(one(state) for state in states))
        return replays, fatal[0] if fatal else None

    async def _ask_one(self, state: State, sample: int) -> Replay:
        start = time.perf_counter()
        try:
            reply = await self._request(state)
        except TeacherError:
            raise
        except Exception as error:
            # One state's failure is data, whatever it was; what it was is kept.
            return answer(self, state, sample, error=self._explain(error), seconds=time.perf_counter() - start)
        seconds = time.perf_counter() - start
        usage = reply.usage
        common: dict[str, Any] = {
            "finish_reason": reply.choices[0].finish_reason if reply.choices else None,
            "prompt_tokens": usage.prompt_tokens if usage else None,
            "completion_tokens": usage.completion_tokens if usage else None,
            "seconds": seconds,
        }
        if not reply.choices:
            return answer(self, state, sample, error="malformed: the reply has no choices", **common)
        return answer(self, state, sample, action=action_of(reply.choices[0].message), **common)

    async def _request(self, state: State) -> ChatReply:
        config, request = self.config, request_of(state)
        optional = {"max_tokens": config.max_tokens, "temperature": config.temperature, "tools": request.tools or None}
        body: dict[str, Any] = {key: value for key, value in optional.items() if value is not None}
        call = self._client.chat.completions.with_raw_response.create(
            model=config.model, messages=request.wire_messages(), extra_body=config.extra_body or None, **body
        )
        # `timeout_s` bounds the silence between two bytes; this bounds a server that trickles.
        deadline = (config.max_retries + 1) * (config.timeout_s + _LONGEST_BACKOFF)
        response = await asyncio.wait_for(call, deadline)
        return self._decoder.decode(response.content)

    def _explain(self, error: Exception) -> str:
        """Return "<reason>: <detail>" for one failed request. Raises `TeacherError` when none can work."""
        import openai

        detail = self._redact(" ".join(str(error).split()))[:500]
        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            if status in _FATAL:
                raise TeacherError(self._refusal(status, detail))
            if status == 429:
                return f"rate_limited: {detail}"
            return f"{'server_error' if status >= 500 else 'refused'}: HTTP {status}: {detail}"
        if isinstance(error, openai.APITimeoutError | TimeoutError):
            return f"timeout: nothing for {self.config.timeout_s:g} s, {self.config.max_retries + 1} attempts"
        if isinstance(error, openai.APIConnectionError):
            cause = error.__cause__
            why = f" ({type(cause).__name__}: {self._redact(str(cause))})" if cause else ""
            return f"connection: {detail}{why}"
        if isinstance(error, msgspec.MsgspecError | UnicodeDecodeError):
            return f"malformed: the reply is no chat completion ({detail})"
        return f"internal: {type(error).__name__}: {detail}"

    def _refusal(self, status: int, detail: str) -> str:
        variable = self.config.api_key_env
        if status == 404:
            fix = f"Check `base_url` ({self.config.base_url}) and `model` ({self.model})."
        elif variable:
            fix = f"Check the key in the environment variable {variable}."
        else:
            fix = "The server wants a key: put it into an environment variable and name that in `api_key_env`."
        return f"Teacher {self.name!r} was refused with HTTP {status}: {detail} {fix}"

    def _redact(self, text: str) -> str:
        """Servers repeat keys in their errors."""
        return text.replace(self._key, "[key]") if self._key else text


def _read_key(config: OpenAIConfig) -> str | None:
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise TeacherError(
            f"Teacher {config.name!r} takes its key from the environment variable {config.api_key_env}, which is not "
            f"set. Export it (`export {config.api_key_env}=...`) and run again."
        )
    if not (key.isascii() and key.isprintable()):
        raise TeacherError(f"The environment variable {config.api_key_env} holds characters that no key has.")
    return key


class _LoopThread:
    """An event loop in a thread of its own, so that `ask` also works where a loop already runs (notebooks)."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="openai-teacher", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C included: nothing stays in flight
            future.cancel()
            raise

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
