"""E-mail addresses and home folders: whose machine a log comes from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from composer_plugins.scrub.placeholders import PSEUDONYM, Pseudonyms, canonical_user

_LETTER = "A-Za-z0-9\u00c0-\u024f"
#: One of them is in every address.
AT_SIGNS = ("@", "%40", "u0040", "&#64;")
_AT = re.compile(r"@|%40|\\u0040|&#64;")
_LOCAL = re.compile(rf"[{_LETTER}_](?:[{_LETTER}._%+'-]{{0,62}}[{_LETTER}_+-])?$")
_DOMAIN = re.compile(
    rf"(?:[{_LETTER}](?:[{_LETTER}-]{{0,61}}[{_LETTER}])?\.)+[A-Za-z\u00c0-\u024f]{{2,24}}(?![A-Za-z0-9(])"
)
#: RFC 2606 and RFC 6761: nobody's.
_RESERVED = re.compile(r"(?:^|\.)(?:example\.(?:com|org|net)|example|test|invalid|localhost)$", re.I)
#: Addresses of programs that stand in every log, and the login names of git servers.
_NOBODY = {"git", "noreply@anthropic.com", "noreply@github.com", "noreply@openai.com"}
_FILE_ENDINGS = {"png", "jpg", "jpeg", "gif", "svg", "webp", "css", "scss", "js", "mjs", "cjs", "ts", "tsx", "jsx", "json", "html", "htm", "xml", "yml", "yaml", "toml", "txt", "lock", "tgz", "gz", "whl", "jar"}  # fmt: skip


def scrub_emails(
    text: str, names: Pseudonyms, found: Callable[[str, str, str], None], keep: Callable[[str], bool]
) -> str:
    """Replace e-mail addresses.

    Args:
        found: called with (kind, address, replacement).
        keep: True for an address that the user allows.
    """

    out, done = [], 0
    for at in _AT.finditer(text):
        domain = _DOMAIN.match(text, at.end())
        local = domain and _LOCAL.search(text[max(done, at.start() - 64) : at.start()])
        if not local:
            continue
        start = at.start() - len(local.group())
        start += _escaped(text[max(0, start - 1) : start + 1])
        name, address = text[start : at.start()], f"{text[start : at.start()]}@{domain.group()}"
        if not name or text[start - 1 : start] == "@" or not_an_address(name, domain.group()) or keep(address):
            continue
        new = names.email(address)
        found("email", address, new)
        out += [text[done:start], new.replace("@", at.group())]
        done = domain.end()
    return "".join([*out, text[done:]]) if out else text


def _escaped(before: str) -> bool:
    """True when the last character of `before` belongs to an escape such as \\n."""
    return len(before) >= 2 and before[-2] == "\\" and before[-1] in "nrtbf"


def not_an_address(local: str, domain: str) -> bool:
    """True for reserved domains, bots, git's login, package versions and image names such as icon@2x.png."""
    ending = domain.rsplit(".", 1)[-1].lower()
    if _RESERVED.search(domain) or ending in _FILE_ENDINGS or re.match(r"v?\d+\.\d+", domain):
        return True
    return local.lower() in _NOBODY or f"{local}@{domain}".lower() in _NOBODY


# Home folders. A separator is / or \, as written in JSON, in a URL or in the name of a project folder.
_SEP = r"(?:\\*/|\\{1,4}|%2F|%5C)"
_BEFORE = r"(?:(?<![\w.~%-])|(?<=-[A-Za-z])|(?<=\\[nrtbf])|(?<=%[0-9A-Fa-f]{2})|(?<=\[0m)|(?<=\d\dm))"
_ROOTS = rf"(?:{_SEP}(?:private|host|rootfs|var|usr|export|mnt|media|net|Volumes{_SEP}[^/\\\s\"']{{1,40}}|mnt{_SEP}[a-z]|[a-z])(?={_SEP}))*"
_WSL = rf"\\{{2,8}}wsl(?:\$|\.localhost){_SEP}[\w.-]{{1,40}}"
_NAME = r"[^\W_][\w.+-]{0,63}|_[\w.-]{1,63}"
_HOME = re.compile(
    rf"(?P<lead>{_BEFORE}{_ROOTS}{_SEP}(?:Users|home){_SEP}|{_WSL}{_SEP}home{_SEP}|"
    rf"(?<![A-Za-z0-9])(?:[A-Za-z]:|[A-Za-z]%3A){_SEP}(?i:Users|Documents and Settings){_SEP})(?P<name>{_NAME})(?P<more>(?: [\w.-]{{1,30}}){{1,2}}(?=\\))?"
)
_PLAIN_HOME = re.compile(rf"(?P<lead>(?:Users|home){_SEP})(?P<name>{_NAME})(?P<more>(?: [\w.-]{{1,30}}){{1,2}}(?=\\))?")
_FOLDER = re.compile(r"(?P<lead>(?<![\w])(?:-mnt-[a-z]|[A-Za-z]-)?-(?:Users|home)-)(?P<name>[A-Za-z0-9_.]{1,64})")
#: What is in every home folder: a sign in lower case, and the words to look for where it was found.
HOME_SIGNS = {"users": ("Users", "users", "USERS"), "home": ("home",), "documents": ("Documents and Settings",)}
HOME_WORDS = tuple(word for words in HOME_SIGNS.values() for word in words)
#: Not a person: shared folders, and what documentation writes for a name.
NOT_A_NAME = {"shared", "public", "default", "all", "linuxbrew", "user", "username", "users", "you", "me", "yourname", "your-username", "your_username", "your-name", "name", "xxx"}  # fmt: skip


def scrub_homes(
    text: str,
    names: Pseudonyms,
    known: Iterable[str],
    found: Callable[[str, str, str], None],
    keep: Callable[[str], bool],
    words: Iterable[str] = HOME_WORDS,
) -> str:
    """Replace the user's name in home folders; the rest of the path stays.

    Args:
        known: names found before in canonical form; needed to tell where a name with a dash ends in the folder
            names of Claude Code (`-Users-jane-doe-project`).
        found: called with (kind, name, replacement).
        words: those of `HOME_WORDS` that the text may have.
    """

    def plain(match: re.Match) -> str:
        name = match["name"].rstrip(".") if match["more"] is None else match["name"] + match["more"]
        rest = match.group()[len(match["lead"]) + len(name) :]
        if is_nobody(name) or keep(name):
            return match.group()
        new = names.user(name)
        found("home_path", name, new)
        return match["lead"] + new + rest

    def folder(match: re.Match) -> tuple[str, int]:
        """The replacement and where it ends: a known name may hold dashes."""
        start = match.start("name")
        rest = canonical_user(text[start : start + 64])
        name = next((k for k in by_length if rest.startswith(k) and not rest[len(k) : len(k) + 1].isalnum()), None)
        name = text[start : start + len(name)] if name else match["name"]
        if is_nobody(name) or keep(name):
            return match.group(), match.end()
        new = names.user(name)
        found("home_path", name, new)
        return match["lead"] + new, start + len(name)

    out, end = [], 0
    for match in _homes(text, words):
        out += [text[end : match.start()], plain(match)]
        end = match.end()
    text = "".join([*out, text[end:]])
    if "-Users-" not in text and "-home-" not in text:
        return text
    by_length, out, end = sorted(known, key=len, reverse=True), [], 0
    for match in _FOLDER.finditer(text):
        if match.start() >= end:
            out.append(text[end : match.start()])
            new, end = folder(match)
            out.append(new)
    return "".join([*out, text[end:]])


def is_nobody(name: str) -> bool:
    """True for shared folders, documentation's stand-ins, and names that are pseudonyms already."""
    return name.casefold() in NOT_A_NAME or PSEUDONYM.fullmatch(name) is not None


def home_names(text: str) -> set[str]:
    """Return the users of a text's home folders, in canonical form."""
    names = (match["name"].rstrip(".") for match in _homes(text))
    return {canonical_user(name) for name in names if not is_nobody(name)}


def _homes(text: str, words: Iterable[str] = HOME_WORDS) -> Iterator[re.Match]:
    """The home folders of a text, in order: the slow pattern runs only around the words that are in all of them."""
    places = sorted({at for word in words for at in _all(text, word)})
    done = 0
    for at in places:
        if at < done:
            continue
        plain = at > 1 and text[at - 1] in "/\\" and not (text[at - 2].isalnum() or text[at - 2] in "_.~%-")
        match = _PLAIN_HOME.match(text, at) if plain else None
        if match is None:
            match = _HOME.search(text, max(done, at - 64), at + 160)
        if match is not None and match.start() <= at:
            yield match
            done = match.end()


def _all(text: str, word: str) -> Iterator[int]:
    position = text.find(word)
    while position >= 0:
        yield position
        position = text.find(word, position + len(word))


#: Part of the fingerprint of the rules.
PATTERNS = (_LOCAL.pattern, _DOMAIN.pattern, _HOME.pattern, _FOLDER.pattern, sorted(NOT_A_NAME), sorted(_NOBODY))
