"""PyPI `detect-secrets`: its regex plugins, run on the lines that can matter to them.

Only `RegexBasedDetector`s: the entropy plugins fire on ids and hashes. Nothing is ever verified with a provider
(that would send the secret), so its `requests` is imported and never used.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from composer_plugins.errors import ConfigError
from composer_plugins.scrub.spans import Span

#: Addresses are no secrets; of a private key that plugin knows only the first line; the basis of the others.
SKIPPED = {"IPPublicDetector", "PrivateKeyDetector", "RegexBasedDetector"}

#: Kinds of long words that some rules need, and how many letters, digits, `_`, `.` and `-` they have.
LONG_WORD, DOTTED = "(long word)", "(long word with two dots)"
LENGTHS = {LONG_WORD: 34, DOTTED: 57}
#: Texts of which every match has one in it, in lower case (with a space between them, or a kind of long word), and a
#: pattern that holds near every match (`tests/scrub` checks both). A plugin that is not listed sees every line.
_CLOUDANT = map("".join, itertools.product(["cl", "clou"], ["", "_", "-"], ["", "api"], ["key", "pw", "pass", "token"]))
GATES: dict[str, tuple[str, str]] = {
    "ArtifactoryDetector": (" ".join(["akc", *(f"ap{c}" for c in "0123456789abcdef")]), "a(?:kc[a-z0-9]{10}|p[0-9a-f][a-z0-9]{8})"),
    "AWSKeyDetector": ("a3t abia acca akia asia aws", "a(?:(?:3t.|bia|cca|kia|sia)[0-9a-z]{16}|ws)"),
    "AzureStorageKeyDetector": ("accountkey", "accountkey"),
    "BasicAuthDetector": ("://", "://"),
    "CloudantDetector": (" ".join(["cloudant", *_CLOUDANT]), "cl(?:ou(?:dant)?)?[_-]?(?:api)?(?:key|pw|pass|token)|cloudant"),
    "DiscordBotTokenDetector": (DOTTED, "[.]"),
    "GitHubTokenDetector": ("ghp_ gho_ ghu_ ghs_ ghr_", "gh[pousr]_"),
    "GitLabTokenDetector": (
        "glpat- gldt- glft- glsoat- glrt- glcbt- glimt- glptt- glagent- gloas- gr1348941",
        "g(?:l(?:pat|dt|ft|soat|rt|cbt|imt|ptt|agent|oas)-|r1348941)",
    ),
    "IbmCloudIamDetector": ("key pwd pass token", "key|pwd|pass|token"),
    "IbmCosHmacDetector": ("secret", "secret"),
    "JwtTokenDetector": ("eyj", "eyj"),
    "MailchimpDetector": (" ".join(f"-us{c}" for c in "0123456789"), "-us[0-9]"),
    "NpmDetector": ("_authtoken", "_authtoken"),
    "OpenAIDetector": ("t3blbkfj", "t3blbkfj"),
    "PypiTokenDetector": ("pypi-ag", "pypi-ag"),
    "SendGridDetector": ("sg.", "sg[.][a-z0-9_-]{22}[.]"),
    "SlackDetector": ("xox hooks.slack", "(?:xox|hooks[.]slack)"),
    "SoftlayerDetector": (
        "softlayer slapi slkey slpwd slpass sltoken sl_ sl-", "s(?:oftlayer|l[_-]{0,2}(?:api|key|pwd|pass|token))"
    ),
    "SquareOAuthDetector": ("sq0csp-", "sq0csp-"),
    "StripeDetector": ("k_live_", "k_live_"),
    "TelegramBotTokenDetector": (LONG_WORD, ":[0-9a-z_-]{35}"),
    "TwilioKeyDetector": (LONG_WORD, "[as][ck][a-z0-9]{32}"),
}  # fmt: skip
#: Every match has a run of letters, digits, _ and - that is at least this long.
LONGEST = {
    "ArtifactoryDetector": 11, "AzureStorageKeyDetector": 10, "CloudantDetector": 24, "DiscordBotTokenDetector": 27,
    "GitHubTokenDetector": 40, "GitLabTokenDetector": 24, "IbmCloudIamDetector": 44, "IbmCosHmacDetector": 48, "JwtTokenDetector": 4,
    "MailchimpDetector": 36, "OpenAIDetector": 48, "PypiTokenDetector": 80, "SendGridDetector": 43, "SoftlayerDetector": 64, "StripeDetector": 32, "TelegramBotTokenDetector": 35, "TwilioKeyDetector": 34,
}  # fmt: skip
#: The pattern holds inside the long word itself.
IN_WORD = {"TwilioKeyDetector", "GitHubTokenDetector", "PypiTokenDetector", "SendGridDetector"}
_WIDE = 2000
#: Words that are this long are rare in texts without secrets; up to `_FEW` of them are looked up one by one.
LONG, _FEW = 20, 40


@dataclass(frozen=True)
class Detector:
    """One plugin: `kind` is the name in our placeholders."""

    kind: str
    plugin: Any
    longest: int = 0
    literals: frozenset[str] = frozenset()
    gate: re.Pattern | None = None
    in_word: bool = False

    def spans(self, text: str, low: str, words: list[str] | None = None) -> Iterator[Span]:
        """Yield what the plugin finds, line by line as it is meant to be used (long lines in windows).

        Args:
            text: the text; low: the same in lower case, of the same length.
            words: the long words of the text (`LONG`): where only they can make a match, only their lines are read.
        """
        long = [] if words is None or self.longest < LONG else [word for word in words if len(word) >= self.longest]
        if words is not None and self.longest >= LONG and not long:
            return
        few = 0 < len(long) <= _FEW
        if few and self.in_word:
            long = [word for word in long if self.gate.search(word.lower())]
        for start, end in self._lines_of(text, long) if few else self._windows(low):
            line = text[start:end]
            if few or longest_word(line) >= self.longest:
                for begin, stop in self._found(line):
                    yield Span(start + begin, start + stop, self.kind)

    def _lines_of(self, text: str, words: list[str]) -> Iterator[tuple[int, int]]:
        seen = set()
        for word in words:
            place = text.find(word)
            while place >= 0:
                window = _line_at(text, place)
                if window not in seen:
                    seen.add(window)
                    yield window
                place = text.find(word, max(window[1], place + len(word)))

    def _found(self, line: str) -> Iterator[tuple[int, int]]:
        values: set[str] | None = None
        for pattern in self.plugin.denylist:
            for match in pattern.finditer(line):
                groups = [n for n in range(1, pattern.groups + 1) if match[n]] or [0]
                if values is None:
                    values = set(self.plugin.analyze_string(line))  # plugins may refuse what their pattern matches
                if any(match[n] in values for n in groups) or (groups == [0] and "" in values):
                    begin, stop = match.span(groups[0])  # a group that is short or comes first is a prefix: take all
                    yield (begin, stop) if stop - begin > 3 and begin > match.start() else match.span()

    def _windows(self, low: str) -> Iterator[tuple[int, int]]:
        places = re.finditer(r"[^\n]+", low) if self.gate is None else self.gate.finditer(low)
        done = -1
        for place in places:
            if place.start() >= done:
                start, done = _line_at(low, place.start())
                yield start, done


def _line_at(text: str, position: int) -> tuple[int, int]:
    """Where the line around a place begins and ends; of a very long line, what is near."""
    start = max(text.rfind("\n", 0, position) + 1, position - _WIDE)
    end = text.find("\n", position)
    return start, min(len(text) if end < 0 else end, position + _WIDE)


_NOT_WORD = bytes(c if (c < 128 and chr(c).isalnum()) or chr(c) in "_-" else 32 for c in range(256))


def longest_word(text: str) -> int:
    """Return the length of the longest run of letters, digits, _ and -: short words rule most plugins out."""
    return max(map(len, text.encode("utf-8", "surrogatepass").translate(_NOT_WORD).split()), default=0)


@functools.cache
def detectors() -> tuple[Detector, ...]:
    """Return the regex plugins of the installed detect-secrets.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import detect_secrets.plugins
        from detect_secrets.plugins.base import RegexBasedDetector
    except ModuleNotFoundError as error:
        raise ConfigError(f"Scrubbing needs {error.name}: pip install detect-secrets.") from error
    found: dict[str, Detector] = {}
    for module in pkgutil.iter_modules(detect_secrets.plugins.__path__):
        for name, cls in vars(importlib.import_module(f"detect_secrets.plugins.{module.name}")).items():
            regex = isinstance(cls, type) and issubclass(cls, RegexBasedDetector)
            if regex and name not in SKIPPED:
                kind = re.sub(r"[^a-z0-9]+", "_", cls.secret_type.lower()).strip("_")
                literals, gate = GATES.get(name, ("", None))
                signs = frozenset([literals] if literals in LENGTHS else literals.split())
                found[name] = Detector(
                    kind, cls(), LONGEST.get(name, 0), signs, gate and re.compile(gate), name in IN_WORD
                )
    return tuple(found[name] for name in sorted(found))


def version() -> str:
    """Return the version of detect-secrets."""
    from detect_secrets.__version__ import VERSION

    return VERSION
