"""Secrets that only their name gives away: `password=...`, `"apiKey": "..."`, `--token ...`, headers, cookies.

The names are found by plain text search; then one pattern is matched at each place. A value counts when it is a
plausible literal: not a variable, a call, a path, a type, a mask or a plain word.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

from composer_plugins.scrub.blocks import basic_credentials
from composer_plugins.scrub.placeholders import PSEUDONYM
from composer_plugins.scrub.spans import BREAK, Span, bounded, entropy, jumbled, mixed, starts_here

_KEY_BEFORE = re.compile(
    r"(?:api|secret|access|private|auth|encrypt(?:ion)?|sign(?:ing)?|master|account|storage|service|client|shared|webhook|deploy|"
    r"license|subscription|app|admin|write|ingest|function|host|primary|secondary|crypt|jwt|hmac|ssh|session|cookie|root)s?[-_. ]?$"
)
_NAMES = {
    "pass": (re.compile(r"pass(?:word|wd|phrase|code|wort)?s?(?![a-z])", re.I), "password"),
    "pwd": (re.compile(r"pwd(?![a-z])", re.I), "password"),
    "secret": (re.compile(r"secrets?(?![a-z])(?:[-_. ]?(?:access[-_. ]?)?keys?(?![a-z]))?", re.I), "secret"),
    "token": (re.compile(r"token(?![a-z])", re.I), "token"),
    "key": (re.compile(r"key(?![a-z])", re.I), "api_key"),
    "credential": (re.compile(r"credentials?(?![a-z])", re.I), "secret"),
    "_pat": (re.compile(r"_pat(?![a-z])", re.I), "token"),
    "_sas": (re.compile(r"_sas(?![a-z])", re.I), "secret"),
    "auth": (re.compile(r"auth(?:orization|token)?(?![a-z])", re.I), "token"),
}
#: Lower-case texts of which every name has one in it.
ANCHORS = (*_NAMES, "cookie", "bearer", "basic")
#: What may follow in a name (PASSWORD_FOR_X, SECRET_KEY_BASE, tokenValue) and what makes it the name of something else.
_TAIL = re.compile(r"(?:[-_.]?[A-Za-z0-9]+){0,4}")
_NOT_A_VALUE = re.compile(
    r"(?:^|[-_.a-z])(?:file|path|dir|url|uri|endpoint|type|kind|id|name|names|length|len|count|counts|limit|size|max|min|usage|expiry|expires|"
    r"expire|expiration|ttl|env|field|label|regex|pattern|prefix|header|placeholder|hint|policy|reset|class|error|message|"
    r"index|ids|schema|version|format|list|map|test|tests|valid|required|rules?|manager|provider|budget|cost|costs|price)s?$",
    re.I,
)
_SEPARATOR = re.compile(
    bounded(
        r"""(?P<close>\\*["'`]?\]?\)?)(?:\s{0,8}(?::=|=>|={1,3}|->|:{1,2}|\\u003[dD]|%3[dD]|&#61;)|"""  # name = value
        r"""[ \t]*,(?:\s|\\+[nrt]){0,40}\\*["']?value\\*["']?\s*[:=]|(?:\s|\\+[nrt]){1,40}\\*["']?value\\*["']?:|"""  # {"name": NAME, "value": VALUE}
        r"""\\*["'][ \t]*,(?=[ \t]*\\*["'])|[ \t]*\((?=\\*["'])|>)"""  # ("name", "value"), name("value"), <name>value
        r"""(?:[ \t]|\\+[nt]|\r?\n[ \t]+(?=\\*["']))*"""
    )
)
_OPEN = re.compile(bounded(r"""(?:[fFbBrR@]{1,2}(?=["']))?(\\*(?:\"\"\"|'''|["'`]))"""))
_BARE = re.compile(r"""[^\s"'`]{4,4096}""")
_BARE_START = re.compile(r"""(?:[^\s"'`,;)}\]<>|\\]++|\\(?![nrt"'\\]))+""")
_NEXT_PARAMETER = re.compile(r"&(?=$|[\w.-]+=)")
_BARE_START = re.compile(r"""(?:[^\s"'`,;)}\]<>|\\]|\\(?![nrt"'\\])){4,1600}""")
_BARE_END = re.compile(
    bounded(r"""[,;)}\]&<>|](?=$|[\s"'\\,;)}\]&<>|]|[A-Za-z_][\w-]*=)|\\+[nrt]|[,;)}\]<>|]|&(?=[\w.-]+=)|\\+$""")
)
_ENV_LINE = re.compile(
    r"(?:^|\n|\\n)[ \t]*(?:export[ \t]+|set[ \t]+|ENV[ \t]+|ARG[ \t]+|-e[ \t]+)?[A-Z][A-Z0-9_]*[ \t]?=[ \t]?$"
)
_FLAG = re.compile(r"""(?:^|[\s"'`(\[,])--?[A-Za-z0-9-]*$""")

_EXPRESSION = re.compile(
    r"""[$%{<\[(*&!]|\\?[$]|\.{2,}|[A-Za-z_][\w]*(?:\.|->|::)[A-Za-z_]|[\w.]+[(\[]|(?:os|process|env|self|this|config|settings|args)\b|"""
    r"""(?:[A-Za-z]:)?(?:\.{0,2}|~)?[/\\]{1,2}(?![A-Za-z0-9+/]{36}[A-Za-z0-9+/=]{4})|~/|https?:|[a-z]+://|@\w+[(/]|0x[0-9a-f]{1,8}$|\[SECRET:|#\{"""
)
_INSERTED = re.compile(r"\$\{[^}]*\}|\{\{.*?\}\}|\$\([^)]*\)")
_DOTTED = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]")
_MASK = re.compile(r"(?:x{3,}|\*{2,}|\.{3,}|•{2,}|#{3,}|-{3,}|_{3,}|0+|1234?5?6?7?8?9?0?)$|.*(?:\*{3}|x{5}|\.{3}|…|redact|REDACT|<[a-z]|EXAMPLE_|example[-_]|"
                   r"your[-_ ]|YOUR[-_ ]|my[-_ ](?:secret|token|key|pass)|placeholder|changeme|dummy|-here|_here)", re.I)  # fmt: skip
_WORDS = re.compile(r"[A-Za-z]+(?:[-_ .:][A-Za-z]+)*[.!?]?")
_CODE_WORD = re.compile(
    r"[A-Za-z_]*(?:pass|pwd|token|key|secret|auth|value|string|str|int|sha|md5|utf|base|hash|hmac|var|arg|param|test|node|item|col|row|h)[A-Za-z_]*[-_]?\d{0,3}$",
    re.I,
)
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.I)


def plausible(value: str, kind: str, *, quoted: bool) -> bool:
    """True when `value` can be the literal value of a secret whose name says it is one.

    Args:
        kind: `password`, `secret`, `token` or `api_key`; people choose passwords, machines make the others.
        quoted: it stood in quotes, or in an environment file: it is no expression.
    """
    value = PSEUDONYM.sub("user", value) if "user" in value else value
    if not (6 if kind == "password" or quoted else 10) <= len(value) <= 4096 or _stands_for_one(value, kind, quoted):
        return False
    random = any(map(jumbled, re.split(r"[-_ .:=]", value)))
    if _CODE_WORD.fullmatch(value) and not random:
        return False
    if kind == "password":
        if value.isdigit() or random or _unpronounceable(value):
            return True
        if _WORDS.fullmatch(value):  # several-words-as-a-passphrase
            return quoted and len(value) >= 16 and re.search(r"[ _]", value) is None and "-" in value
        return mixed(value) or (quoted and not value.isalpha())
    if " " in value or not mixed(value):
        return random and len(value) >= 16 and value.isalpha()
    return len(value) >= (8 if quoted else 12) and (entropy(value) >= 2.5 or len(value) >= 24)


def _unpronounceable(value: str) -> bool:
    """True for ten letters or more with less than a fifth of vowels: no words."""
    letters = [c for c in value.lower() if c.isalpha()]
    return len(letters) >= 10 and sum(c in "aeiouy" for c in letters) < len(letters) / 5


def _stands_for_one(value: str, kind: str, quoted: bool) -> bool:
    """True for a variable, a call, a path, a type, a mask: what is written where a secret would be."""
    if _MASK.match(value):
        return True
    literal = _INSERTED.sub("", value)
    if literal != value:
        return not (len(literal) >= 8 and mixed(literal))
    if value[0] == "/" and any(
        len(p) >= 16 and mixed(p) and p.lower() != p != p.upper() for p in re.split(r"[/+]", value)
    ):
        return False  # base64 that begins like a path
    if not _EXPRESSION.match(value) or (_DOTTED.match(value) and _random_part(value)):
        return False
    return not (quoted and kind == "password" and value[0] in "!&*(<[%$" and _strong(value))


def _random_part(value: str) -> bool:
    """True when a dotted text is no path of names: a part of it looks random."""
    parts = value.split(".")
    return "(" not in value and any(
        jumbled(p) or (len(p) > 4 and re.search(r"\d[A-Za-z]", p) and p.lower() != p) for p in parts
    )


def _strong(value: str) -> bool:
    kinds = (str.islower, str.isupper, str.isdigit, lambda c: not c.isalnum() and c not in "{}")
    return (
        len(value) >= 8
        and sum(any(test(c) for c in value) for test in kinds) >= 3
        and not re.search(r"[(\[{]\w*[)\]}]|\s", value)
    )


def assignment_spans(text: str, low: str, anchors: tuple[str, ...] = ANCHORS) -> Iterator[Span]:
    """Yield values that are assigned to the name of a secret.

    Args:
        text: the text; low: the same in lower case, of the same length.
        anchors: those of `ANCHORS` that may be in it.
    """
    for anchor, (name, kind) in _NAMES.items():
        if anchor not in anchors:
            continue
        position = low.find(anchor)
        while position >= 0:
            match = name.match(text, position)
            if match is not None and (anchor != "key" or _KEY_BEFORE.search(low, max(0, position - 14), position)):
                span = _value_after(text, position, match.end(), kind)
                if span is not None:
                    yield span
            position = low.find(anchor, position + len(anchor))
    if "bearer" in anchors:
        yield from _bearer(text, low)
    if "basic" in anchors:
        yield from _basic(text, low)
    if "auth" in anchors:
        yield from _authorization(text, low)
    if "cookie" in anchors:
        yield from _cookies(text, low)


def _value_after(text: str, start: int, end: int, kind: str) -> Span | None:
    tail = _TAIL.match(text, end)
    if _NOT_A_VALUE.search(tail.group()[:40]):
        return None
    end = tail.end()
    separator = _SEPARATOR.match(text, end)
    if separator is None:
        if text[end : end + 1] not in (" ", "\t") or not _FLAG.search(text, max(0, start - 40), start):
            return None
        position, flag = end + 1, True
    else:
        position, flag = separator.end(), text[end : separator.end()] == "="
    opened = _OPEN.match(text, position)
    if opened is not None:
        return _quoted(text, opened, kind)
    sure = flag and bool(_FLAG.search(text, max(0, start - 40), start))
    sure = sure or bool(_ENV_LINE.search(text, max(0, start - 80), position))
    whole = sure and kind == "password"
    bare = (_BARE if whole else _BARE_START).match(text, position, position + 4096)
    if bare is None or (separator is not None and separator.group().endswith("(")):
        return None
    value = bare.group()
    if not whole and "&" in value and (cut := _NEXT_PARAMETER.search(value)):
        value = value[: cut.start()]
    value = value.rstrip(",;\\")
    if plausible(value, kind, quoted=sure):
        return Span(position, position + len(value), kind)
    return None


def _quoted(text: str, opened: re.Match, kind: str) -> Span | None:
    """The value between quotes; the closing quote is escaped as often as the opening one."""
    quote, begin = opened.group(1), opened.end()
    limit = min(len(text), begin + 4200)
    limit = limit if (stop := text.find("\0", begin, limit)) < 0 else stop
    end = text.find(quote, begin, limit)
    while end > 0 and len(quote) == 1 and text[end - 1] == "\\" and _odd_backslashes(text, end):
        end = text.find(quote, end + 1, limit)
    if end < 0:  # cut off: take what looks like one word
        bare = _BARE.match(text, begin)
        end = bare.end() if bare else begin
    value = text[begin:end]
    joined = BREAK.sub("", value) if "\n" in value or "\\n" in value else value
    if "\n" in joined or not plausible(joined, kind, quoted=True):
        return None
    return Span(begin, end, kind)


def _odd_backslashes(text: str, position: int) -> bool:
    count = 0
    while position > 0 and text[position - 1] == "\\":
        count, position = count + 1, position - 1
    return count % 2 == 1


_BEARER = re.compile(bounded(r"bearer(?:\s|%20|\+|\\u0020){1,4}(?:\\*[\"'])?([A-Za-z0-9._~+/-]{10,}={0,2})"), re.I)
_BASIC = re.compile(r"basic(?:\s|%20){1,4}([A-Za-z0-9+/]{6,}={0,2})", re.I)
_AUTHORIZATION = re.compile(
    bounded(
        r"""authorization\\*["'\]]{0,2}\s*(?:[:=,]|=>|\\u003d)+\s*\\*["'`]?(?:(?!basic|bearer)[A-Za-z][\w-]{1,20}\s+)?([^\s"'`,;}\\]{10,})"""
    ),
    re.I,
)
_COOKIE = re.compile(bounded(r"""(?:set-)?cookies?\\*["']?(?:\s*[:=,]\s*|\s+)\\*["'`]?(?=[^\s=;"']{1,128}=)"""), re.I)
_PAIR = re.compile(r"""([^\s=;,"'\\]{1,128})=([^\s;"'\\]{0,4096})(?:;[ ]?|)""")
_ATTRIBUTES = {"path", "domain", "expires", "max-age", "samesite", "priority", "version"}


def _bearer(text: str, low: str) -> Iterator[Span]:
    position = low.find("bearer")
    while position >= 0:
        match = _BEARER.match(text, position)
        if match and (mixed(match.group(1)) or (len(match.group(1)) >= 16 and jumbled(match.group(1)))):
            yield Span(match.start(1), match.end(1), "bearer_token")
        position = low.find("bearer", position + 6)


def _basic(text: str, low: str) -> Iterator[Span]:
    position = low.find("basic")
    while position >= 0:
        match = _BASIC.match(text, position)
        if match and basic_credentials(match.group(1)):
            yield Span(match.start(1), match.end(1), "basic_auth")
        position = low.find("basic", position + 5)


def _authorization(text: str, low: str) -> Iterator[Span]:
    position = low.find("authorization")
    while position >= 0:
        match = _AUTHORIZATION.match(text, position)
        if match and plausible(match.group(1), "token", quoted=False):
            yield Span(match.start(1), match.end(1), "authorization")
        position = low.find("authorization", position + 13)


def _cookies(text: str, low: str) -> Iterator[Span]:
    position = low.find("cookie")
    while position >= 0:
        start = position - 4 if low[max(0, position - 4) : position] == "set-" else position
        head = _COOKIE.match(text, start) if starts_here(text, start) else None
        end = head.end() if head else position
        while head is not None and (pair := _PAIR.match(text, end)):
            value = pair.group(2)
            if (
                pair.group(1).lower() not in _ATTRIBUTES
                and len(value) >= 8
                and mixed(value)
                and not _EXPRESSION.match(value)
            ):
                yield Span(pair.start(2), pair.end(2), "cookie")
            end = pair.end()
        position = low.find("cookie", max(end, position + 6))


def named_value(name: str, value: str) -> str | None:
    """Return the kind of secret that a field `name` holds when `value` is plausible for it, else None.

    For call arguments and other objects, in which name and value are not one text.
    """
    places = name_places(name)
    if not places or "\n" in value.strip() or len(value) > 4096:
        return None
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    probe = f'{name}="{quoted}"'
    for start, end, kind in places:
        if _value_after(probe, start, end, kind) is not None:
            return kind
    return None


@functools.lru_cache(4096)
def name_places(name: str) -> tuple[tuple[int, int, str], ...]:
    """Where in a field's name it says that it is a secret's: (start, end, kind)."""
    places, low = [], name.lower()
    for anchor, (pattern, kind) in _NAMES.items():
        start = low.rfind(anchor)
        if (
            start >= 0
            and (anchor != "key" or _KEY_BEFORE.search(low, 0, start))
            and (match := pattern.match(name, start))
        ):
            places.append((start, match.end(), kind))
    return tuple(places)
