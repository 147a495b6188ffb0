"""Text actions (answers in words) as normalised text."""

from __future__ import annotations

import re
import unicodedata

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([^\n`]*)$", re.MULTILINE)
_CODE_SPAN = re.compile(r"(`+[^`\n]+`+)")
_BULLET = re.compile(r"^([ \t]*)[*+][ \t]+", re.MULTILINE)
_HEADING = re.compile(r"^(#{1,6})[ \t]+(.*?)(?:[ \t]+#+)?[ \t]*$", re.MULTILINE)
#: Only around several words: `__init__` is a name.
_STRONG = re.compile(r"(?<!\w)__(?=\S)([^_`\n]*[ ][^_`\n]*)(?<=\S)__(?!\w)")
_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u00a0": " "})


def normal_text(text: str) -> str:
    """Return one form for the ways to write the same answer.

    Unicode NFC, line ends, runs of blanks and of empty lines, typographic quotes, and how Markdown spells bullets,
    bold, headings and the language of a code block make no difference. Letters keep their case, because names have
    one. Code, in blocks or between backticks, stays as it is but for blanks at line ends.

    >>> normal_text("Done.  See:\\n\\n\\n* one\\n* __the two__ ") == normal_text("Done. See:\\n\\n- one\\n- **the two**")
    True
    """
    # The blanks around it go first: what they hide from a pattern would show in the result.
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n").strip()
    pieces, opened = [], ""
    for piece in _split(text):
        if isinstance(piece, str):
            pieces.append(_code(piece) if opened else _prose(piece))
            continue
        fence, language = piece
        if opened and not (fence.startswith(opened) and not language):  # a line of the block, not its end
            pieces.append(f"{fence}{language}")
            continue
        pieces.append("```" + ("" if opened else language.lower()))
        opened = "" if opened else fence
    return "\n".join(piece for piece in pieces if piece).strip()


def _split(text: str) -> list[str | tuple[str, str]]:
    """Return the text between fences, and each fence as (marks, language), in order."""
    found: list[str | tuple[str, str]] = []
    position = 0
    for match in _FENCE.finditer(text):
        found += [text[position : match.start()], (match[1], match[2].strip())]
        position = match.end()
    return [*found, text[position:]]


def _code(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")


def _prose(text: str) -> str:
    text = _HEADING.sub(r"\1 \2", _BULLET.sub(r"\1- ", text))
    lines = [_line(line) for line in text.split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def _line(line: str) -> str:
    """Collapse blanks outside code spans; the indentation stays, because it nests lists."""
    body = line.lstrip()
    indent = line[: len(line) - len(body)].expandtabs(4)
    parts = _CODE_SPAN.split(body.rstrip())
    parts[::2] = [_STRONG.sub(r"**\1**", re.sub(r"\s+", " ", part.translate(_QUOTES))) for part in parts[::2]]
    return indent + "".join(parts) if body else ""
