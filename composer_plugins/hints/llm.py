"""Hints by a language model behind any OpenAI-compatible endpoint.

The requests go through the replay service: bounded concurrency, retries, money reserved before it is spent, every
answer in an SQLite store before it counts. A run that was cut off, or that is repeated, asks only for what is missing.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from composer_plugins.config import explain
from composer_plugins.errors import ConfigError, TeacherError
from composer_plugins.hints.base import Source
from composer_plugins.hints.llm_prompt import read_prompt, request_state
from composer_plugins.hints.options import at_least, switch
from composer_plugins.hints.slots import Failure, clean, failure_of, shorten
from composer_plugins.teachers.base import RemoteTeacher, reason_of
from composer_plugins.teachers.config import OpenAIConfig, read_teachers
from composer_plugins.traces.schema import Hint, Message, Replay, SourceRef, State, Status

_OWN = "teachers, teacher, prompt, context_chars, max_chars, cache, max_usd, batch, give_up_after, allow_unscrubbed"


class LLMHints:
    """The `llm` hint generator.

    Args:
        teachers: a teachers file; `teacher` names the one to ask (optional when it has only one server).
            Without a file the keys of an `openai` teacher are given directly: base_url, model, api_key_env,
            temperature, max_tokens, usd_per_million_input, ... (docs/reference/teachers.md).
        prompt: a text file of your own with the instruction.
        context_chars: so much of the conversation's end is shown.
        max_chars: longest hint; a longer answer is cut at a sentence.
        cache: the answer store; default: beside the output.
        max_usd: cap on what the store's hints may cost, over all runs.
        batch: failed states that are held and asked about together.
        give_up_after: failures in a row after which the server is not asked any more.
        allow_unscrubbed: send texts from which no secrets were removed.

    Raises:
        ConfigError: an option is wrong, or the named teacher is no server.
    """

    name = "llm"

    def __init__(
        self,
        teachers: str | Path | None = None,
        teacher: str | None = None,
        prompt: str | Path | None = None,
        context_chars: int = 4000,
        max_chars: int = 600,
        cache: str | Path | None = None,
        max_usd: float | None = None,
        batch: int = 64,
        give_up_after: int = 20,
        allow_unscrubbed: bool = False,
        **endpoint: Any,
    ) -> None:
        self.context_chars = at_least("context_chars", context_chars, 0, "characters")
        self.max_chars = at_least("max_chars", max_chars, 40, "characters")
        self.batch_size = at_least("batch", batch, 1, "states")
        self.give_up_after = at_least("give_up_after", give_up_after, 1, "failures")
        self.allow_unscrubbed = switch("allow_unscrubbed", allow_unscrubbed)
        self.instruction = read_prompt(prompt)
        if max_usd is not None and (isinstance(max_usd, bool) or not isinstance(max_usd, int | float) or max_usd < 0):
            raise ConfigError(f"max_usd must be a number of dollars, found {max_usd!r}.")
        self.max_usd = max_usd
        self.cache = None if cache is None else Path(cache)
        self.teacher = _teacher(teachers, teacher, endpoint)
        self._check_price()
        self.misses: Counter = Counter()
        self.notes: list[str] = []
        self.spent_usd = 0.0
        self._scrubbed = False
        self._answered = False
        self._stopped: str | None = None

    def prepare(self, source: Source) -> None:
        """Refuse unscrubbed states, and keep the answers beside the output unless `cache` says otherwise."""
        if source.scrubbed is None and not self.allow_unscrubbed:
            raise TeacherError(
                f"{source.traces} was not scrubbed, and the llm hints would send what failed to "
                f"{self.teacher.config.base_url}. Scrub it (`composer-rl scrub`, or `ingest` without --no-scrub), or, when "
                "the logs may leave this process as they are, pass --option allow_unscrubbed=true."
            )
        self._scrubbed = True
        if self.cache is None:
            self.cache = source.output.with_name(source.output.name + ".hints.sqlite")

    def generate(self, state: State) -> Hint | None:
        """Return the hint for one state; None when nothing failed or no hint came back (see `misses`)."""
        return self.generate_many([state])[0] if state.status.failed else None

    def generate_many(self, states: list[State]) -> list[Hint | None]:
        """Return one hint or None for each state, in order."""
        failures = [failure_of(state) for state in states]
        return self._ask([(s, f) for s, f in zip(states, failures, strict=True)])

    def generate_for(self, tool: str | None, result_text: str, status: Status, error_class: str | None) -> Hint | None:
        """Return the hint for a live tool result. Live results are not scrubbed: `allow_unscrubbed` is needed."""
        if not status.failed:
            return None
        failure = Failure(tool, result_text, status, error_class)
        empty = State(
            id="live", trace_id="live", step=0, messages=[], action=Message(role="assistant"),
            source_ref=SourceRef(file="live", line=0), status=status,
        )  # fmt: skip
        if not self.allow_unscrubbed:
            raise TeacherError(
                "The llm hints would send live tool results as they are, and nothing scrubs those: pass the option "
                "allow_unscrubbed: true, or use another hint generator for rollouts."
            )
        return self._ask([(empty, failure)])[0]

    def _ask(self, wanted: list[tuple[State, Failure | None]]) -> list[Hint | None]:
        if not (self._scrubbed or self.allow_unscrubbed):
            raise TeacherError(
                "The llm hints do not know whether these states were scrubbed: use `composer-rl hints`, call `prepare` "
                "with the manifest's `scrubbed`, or pass the option allow_unscrubbed: true."
            )
        places = [i for i, (_, failure) in enumerate(wanted) if failure is not None]
        states = [
            request_state(*wanted[i], instruction=self.instruction, context_chars=self.context_chars, number=n)
            for n, i in enumerate(places)
        ]
        hints: list[Hint | None] = [None] * len(wanted)
        for i, replay in zip(places, self._replays(states), strict=True):
            hints[i] = self._hint(wanted[i][1], replay)
        return hints

    def _hint(self, failure: Failure, replay: Replay | str) -> Hint | None:
        reason = replay if isinstance(replay, str) else reason_of(replay.error) if replay.error else None
        text = "" if reason else _cut(clean(replay.action.content if replay.action else ""), self.max_chars)
        if not text:
            self.misses[reason or "empty_answer"] += 1
            return None
        return Hint(
            text=text, error_class=failure.error_class or "default", status=failure.status,
            generator=f"{self.name}:{self.teacher.model}", evidence=shorten(clean(failure.text), 200),
        )  # fmt: skip

    def _replays(self, states: list[State]) -> list[Replay | str]:
        """Ask for what the store does not have. A text instead of an answer: why there is none."""
        from composer_plugins.teachers.budget import Budget
        from composer_plugins.teachers.chat import request_key
        from composer_plugins.teachers.counts import TeacherCount
        from composer_plugins.teachers.desk import Desk
        from composer_plugins.teachers.gating import GateConfig
        from composer_plugins.teachers.prices import PICO, usd
        from composer_plugins.teachers.service import Service, run_async
        from composer_plugins.teachers.store import AnswerStore

        if not states:
            return []
        teacher = self.teacher
        keys = [[request_key(teacher.fingerprint, state, 0)] for state in states]
        if self.cache is None:
            self.cache = Path("hints.sqlite")
        with AnswerStore(self.cache, "hints") as store:
            count = TeacherCount(
                teacher.model, teacher.weights_id, False, teacher.fingerprint, wanted=len(states), stopped=self._stopped
            )
            ledger = store.ledger()
            service: Service | None = None

            async def work() -> None:
                nonlocal service
                cap = None if self.max_usd is None else round(self.max_usd * PICO)
                budget = Budget(cap, spent=ledger.spent, held=ledger.held)
                service = Service(
                    [Desk(teacher, count, keys)], store, budget, GateConfig(), give_up_after=self.give_up_after
                )
                await service.run(states)

            run_async(work)
            self.spent_usd += usd(store.ledger().spent - ledger.spent)
            found = [store.get(key) or service.failures.get(key) or "not_asked" for (key,) in keys]
        self._answered = self._answered or any(not isinstance(r, str) and r.error is None for r in found)
        self._after(count.stopped)
        return found

    def _after(self, stopped: str | None) -> None:
        """A server that cannot be asked at all is an error; one that stops half-way is reported."""
        if stopped is None or self._stopped is not None:
            return
        if not self._answered:
            raise TeacherError(
                f"No hint could be had: {stopped.rstrip('.')}. Nothing was written; the same command asks only what is missing."
            )
        self._stopped = stopped
        self.notes.append(f"The hint server was given up: {stopped}")

    def _check_price(self) -> None:
        config = self.teacher.config
        if self.max_usd is not None and (self.teacher.price is None or config.answer_limit() is None):
            raise ConfigError(
                "max_usd cannot be held without prices and a limit on the answer: set usd_per_million_input, "
                "usd_per_million_output (0 for a server of your own) and max_tokens."
            )


def _teacher(path: str | Path | None, name: str | None, endpoint: dict[str, Any]) -> RemoteTeacher:
    from composer_plugins.plugins import get_plugin_manager

    if path is None:
        if not {"base_url", "model"} <= set(endpoint) or name is not None:
            raise ConfigError(
                "The llm hints need a server: --option base_url=http://127.0.0.1:8000/v1 --option model=NAME, or --option "
                "teachers=teachers.yaml --option teacher=NAME."
            )
        try:
            config = OpenAIConfig.model_validate({"name": "hints", "kind": "openai", "max_tokens": 300} | endpoint)
        except ValidationError as error:
            raise ConfigError(f"{explain(error)}\nThe generator's own options: {_OWN}.") from None
    else:
        if endpoint:
            raise ConfigError(
                f"Unknown option of the llm hints with a teachers file: {', '.join(endpoint)}. Own: {_OWN}."
            )
        config = _named(read_teachers(Path(path)), name, path)
    if not isinstance(config, OpenAIConfig):
        raise ConfigError(
            f"The teacher {config.name!r} ({config.kind}) is no OpenAI-compatible server: name another one."
        )
    return get_plugin_manager().teachers.get(config.kind).load()(config)


def _named(configs: list, name: str | None, path: str | Path):
    servers = [c for c in configs if isinstance(c, OpenAIConfig)]
    found = [c for c in configs if c.name == name] if name is not None else servers
    if len(found) != 1:
        names = ", ".join(c.name for c in configs)
        raise ConfigError(f"Say which teacher of {path} writes the hints: --option teacher=NAME, one of {names}.")
    return found[0]


def _cut(text: str, limit: int) -> str:
    """Return `text` up to the last sentence that ends within `limit` characters."""
    if len(text) <= limit:
        return text
    head = text[:limit]
    end = max(head.rfind(mark) for mark in (". ", "! ", "? "))
    return head[: end + 1] if end > limit // 3 else head.rstrip() + " ..."
