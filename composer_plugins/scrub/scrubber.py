"""The scrubber: records in, the same records without secrets out."""

from __future__ import annotations

import hashlib
import re
from typing import Any, TypeVar

from composer_plugins.scrub import assignments, blocks, detectors, personal, records, tokens
from composer_plugins.scrub.gates import PERSONAL
from composer_plugins.scrub.placeholders import Pseudonyms, load_salt
from composer_plugins.scrub.report import ScrubReport
from composer_plugins.scrub.rules import UserRules
from composer_plugins.scrub.text import TextScrubber, worth_finding_again
from composer_plugins.traces.schema import Message, SourceRef, State, Trace
from composer_plugins.traces.store import Manifest

#: Raise it when the rules' code changes what is found (the tables are part of the fingerprint by themselves).
RULES_VERSION = 2
T = TypeVar("T", Trace, State)


class Scrubber:
    """Replaces secrets, e-mail addresses and users' names by stable placeholders.

    Args:
        rules: the user's rules and exceptions.
        salt: key of the placeholders; default: see `placeholders.load_salt`.

    A secret that one text gives away by its context (`password=...`) is replaced in the whole record, also where it
    stands alone. Scrubbing twice changes nothing.

    Raises:
        ConfigError: no salt can be had, or `detect-secrets` is not installed.
    """

    def __init__(self, rules: UserRules | None = None, *, salt: bytes | None = None) -> None:
        self._rules = rules or UserRules()
        self._salt = load_salt() if salt is None else salt
        self._names = Pseudonyms(self._salt)
        self._text = TextScrubber(self._names, self._rules)
        self.report = ScrubReport()

    def __reduce__(self) -> tuple:
        """Sent to another process of ours: the same rules and salt, so the same placeholders; a report of its own."""
        return _again, (self._rules, self._salt)

    def take_report(self) -> ScrubReport:
        """Return the report so far, and begin a new one."""
        report, self.report = self.report, ScrubReport()
        return report

    def add_report(self, report: ScrubReport) -> None:
        """Add what a copy of this scrubber replaced."""
        self.report.merge(report)

    @property
    def fingerprint(self) -> str:
        """Version of the rules, hash of all of them, and a check of the salt: equal when the results would be."""
        parts = [
            RULES_VERSION, detectors.version(), [(t.kind, t.prefix, t.body, t.least, t.most, t.edge) for t in tokens.TOKENS],
            [(b.kind, b.literals, b.pattern.pattern) for b in blocks.BLOCKS], assignments.ANCHORS,
            personal.PATTERNS, self._rules.model_dump_json(),
        ]  # fmt: skip
        digest = hashlib.blake2b(repr(parts).encode(), digest_size=6).hexdigest()
        return f"composer-scrub-{RULES_VERSION}:{digest}:{self._names.check}"

    def scrub_trace(self, trace: Trace) -> Trace:
        """Return the trace without secrets; unchanged parts are shared with the original."""
        return self._scrub(trace, trace.source_file)

    def scrub_state(self, state: State) -> State:
        """Return the state without secrets; unchanged parts are shared with the original."""
        return self._scrub(state, state.source_ref.file)

    def scrub_text(self, text: str) -> str:
        """Return one text without secrets (for text that is in no record)."""
        return self._text.scrub(
            text, self._text.prepare([text]), lambda kind, value, new: self.report.add(kind, new, None, 0, "text")
        )

    def scrub_manifest(self, manifest: Manifest, earlier: str | None = None) -> None:
        """Set `scrubbed`, note the counts, and replace users' names in the file names of a manifest.

        Args:
            earlier: the fingerprint under which the input was scrubbed already, if it was.
        """
        mine = self.fingerprint
        manifest.scrubbed = mine if earlier in (None, mine) else f"{earlier},{mine}"
        manifest.inputs = {self._path(name): digest for name, digest in manifest.inputs.items()}
        manifest.options = records.Walk(lambda text, how, name: self._path(text)).json(manifest.options)
        manifest.options["scrub"] = self.report.to_dict()

    def _path(self, text: str) -> str:
        return self._text.scrub_personal(text, PERSONAL, personal.home_names(text), _nothing)

    def _scrub(self, record: T, file: str | None) -> T:
        work = _Work(self, records.texts_of(record), self._path(file) if file else None)
        self.report.records += 1
        new = records.Walk(work.change, assignments.name_places, work.enter).record(record)
        again = work.second_pass()
        if again is not None:
            new = records.Walk(again, enter=work.enter).record(new)
        self.report.changed += new is not record
        return new


def _again(rules: UserRules, salt: bytes) -> Scrubber:
    return Scrubber(rules, salt=salt)


def _nothing(kind: str, value: str, new: str) -> None:
    pass


class _Work:
    """The scrubbing of one record: what was found in it, and where we are."""

    def __init__(self, scrubber: Scrubber, texts: set[str], file: str | None) -> None:
        self.text, self.report, self.file = scrubber._text, scrubber.report, file
        self.prepared = self.text.prepare(texts)
        self.done: dict[str, str] = {}
        self.known: dict[str, str] = {}
        self.users: dict[str, str] = {}
        self.record: Any = None
        self.placed: Any = None
        self.trace: Trace | None = None
        self.lines: dict[int, int] | None = None

    def enter(self, record: Any) -> None:
        """Note where the texts that follow stand; the line is looked up when something is found there."""
        self.record = record
        kind = type(record)
        if kind is Message:
            self.placed = record if self.trace is not None else self.placed
        elif kind is Trace:
            self.trace, self.lines = record, None
        elif kind is SourceRef or getattr(record, "source_ref", None) is not None:
            self.placed = record

    @property
    def line(self) -> int:
        """The line of the log where we are: that of the last record that has one."""
        record = self.placed
        if record is None:
            return 0
        if type(record) is Message:
            if self.lines is None:
                self.lines = _message_lines(self.trace)
            return self.lines[id(record)]
        return record.line if type(record) is SourceRef else record.source_ref.line

    def change(self, text: str, how: str, name: str | None) -> str:
        """The replacement of one text."""
        if name is not None and len(text) >= 6:
            kind = assignments.named_value(name, text)
            if kind is not None and not self.text.keep(text):
                new = self.known.get(text) or self.text.names.secret(kind, text)
                self.found(kind, text, new)
                return new
        new = self.done.get(text)
        if new is None:
            if how == "path":
                new = self.text.scrub_personal(text, PERSONAL, self.prepared.names, self.found)
            else:
                new = self.text.scrub(text, self.prepared, self.found)
            self.done[text] = new
        return new

    def found(self, kind: str, value: str, new: str) -> None:
        """Remember a find for the report and for the second pass."""
        self.report.add(kind, new, self.file, self.line, type(self.record).__name__)
        if kind == "home_path":
            self.users[value] = new
        elif kind != "email" and worth_finding_again(value):
            self.known.setdefault(value, new)

    def second_pass(self):
        """Return the change that replaces what was found wherever else it stands, or None when there is nothing."""
        if not self.known and not self.users:
            return None
        everything = "\n".join(self.done.values())
        if not any(value in everything for value in (*self.known, *self.users)):
            return None
        values = sorted(self.known, key=len, reverse=True)
        users = _beside_paths(self.users) if self.users else None
        done: dict[str, str] = {}

        def again(text: str, how: str, name: str | None) -> str:
            new = done.get(text)
            if new is None:
                new = text
                for value in values:
                    if value in new:
                        new = self._replace(new, value)
                if users is not None and any(user in new for user in self.users):
                    for _ in range(2):  # owner and group stand side by side
                        new = users.sub(lambda match: match[1] + self._user(match[2]), new)
                done[text] = new
            return new

        return again

    def _replace(self, text: str, value: str) -> str:
        edge = r"(?<![A-Za-z0-9]){}(?![A-Za-z0-9])" if len(value) < 16 else "{}"
        kind = self.known[value].split(":")[1]

        def replace(match: re.Match) -> str:
            self.report.add(kind, self.known[value], self.file, self.line, type(self.record).__name__)
            return self.known[value]

        return re.sub(edge.format(re.escape(value)), replace, text)

    def _user(self, name: str) -> str:
        new = self.users[name]
        self.report.add("user_name", new, self.file, self.line, type(self.record).__name__)
        return new


def _message_lines(trace: Trace) -> dict[int, int]:
    """The line of each message, by its identity: its own where the trace says it, else that of the next step."""
    own = {step.action: step.source_ref.line for step in trace.steps}
    results = {r.call_id: r.source_ref.line for step in trace.steps for r in step.results if r.source_ref is not None}
    lines, line = {}, 0
    for index in range(len(trace.messages) - 1, -1, -1):
        message = trace.messages[index]
        line = own.get(index, line)
        lines[id(message)] = results.get(message.tool_call_id or "", line)
    return lines


def _beside_paths(users: dict[str, str]) -> re.Pattern:
    """Where the name of a known user also stands: the owner in `ls -l`, a shell's prompt, a path after a letter."""
    names = "|".join(sorted(map(re.escape, users), key=len, reverse=True))
    return re.compile(
        rf"([-bcdlps][-rwxsStT]{{9}}[@+.]?\s+\d+\s+(?:user\d{{5}}\s+)?|/(?:Users|home)/|(?<![\w.])(?=(?:{names})@[\w.-]+[:~ ]))({names})(?![\w])"
    )
