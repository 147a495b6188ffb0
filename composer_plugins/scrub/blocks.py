"""Secrets with a form of their own that is more than a prefix: key blocks, URLs, webhooks, credential files.

Each rule names literals; its pattern runs only over texts that hold one of them.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from composer_plugins.scrub.spans import BREAK, Span, bounded, mixed

# Atomic groups and bounds: these run over whatever text there is, in linear time.
_GAP = (
    r"(?>[ \t]{0,40}[\"']?[ \t]{0,40}[+\\]?(?:\r?\n|(?:\\+r)?\\+n)[ \t>|]{0,80}(?:\d{1,6}(?:\t|\\+t|→|\\+u2192|[:|]))?"
    r"[ \t]{0,40}[\"']?)"
)
_SPACE = r"(?:\s|\\+[nrt]){1,64}"
_ROWS = rf"(?>(?:{_GAP}){{1,3}}(?:[A-Za-z0-9+/]{{16,}}={{0,2}}|[A-Za-z][A-Za-z-]{{2,20}}: [^\n\\]{{0,200}}))*+"
_LAST = rf"(?:(?:{_GAP}){{1,3}}[A-Za-z0-9+/]{{1,76}}={{0,2}}(?![\w ]))?"
_URL_PASSWORD = r"""((?!\d{1,5}(?:[/?#\\"']|$))(?!\[SECRET:)[^\s"'<>`/\\@]+(?:@[^\s"'<>`/\\@]+)*)"""
_NAME = r"[A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?"


def _always(value: str) -> bool:
    return True


def basic_credentials(value: str) -> bool:
    """True when the text is base64 of `user:password`."""
    try:
        decoded = base64.b64decode(value + "=" * (-len(value) % 4), validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        return False
    return ":" in decoded and decoded.isprintable()


def _literal_password(value: str) -> bool:
    """False for what stands for a password: a variable, a mask."""
    return not re.match(r"[$%{<\[*]|x{3,}$|\.{3}|\\[nrt]?$", value)


@dataclass(frozen=True)
class Block:
    """`pattern` finds it in texts that hold one of `literals`; the secret is group 1, or everything."""

    kind: str
    literals: tuple[str, ...]
    pattern: re.Pattern
    check: Callable[[str], bool] = _always

    def may_match(self, text: str) -> bool:
        """False when a text that has one of the literals can still have no match."""
        return self.kind != "url_password" or "@" in text or "%40" in text

    def spans(self, text: str) -> Iterator[Span]:
        """Yield where it stands."""
        for match in self.pattern.finditer(text):
            group = 1 if self.pattern.groups else 0
            if match.end(group) > match.start(group) and self.check(match.group(group)):
                yield Span(match.start(group), match.end(group), self.kind)


def _block(kind: str, literals: str, pattern: str, check: Callable[[str], bool] = _always, flags: int = 0) -> Block:
    return Block(kind, tuple(literals.split("␣")), re.compile(bounded(pattern), flags), check)


BLOCKS: tuple[Block, ...] = (
    _block("private_key", "-----BEGIN␣---- BEGIN", rf"-----? ?BEGIN (?P<n>{_NAME}|SSH2 ENCRYPTED PRIVATE KEY) ?-----?"
           r"(?:(?!-----? ?BEGIN)[\s\S]){20,40000}?-----? ?END (?P=n) ?-----?"),
    _block("private_key", "-----BEGIN", rf"-----BEGIN {_NAME}-----{_ROWS}{_LAST}", lambda v: len(v) > 80),  # cut off
    _block("private_key", "Private-Lines:", rf"(Private-Lines: \d+{_ROWS}{_LAST})"),  # PuTTY
    _block("private_key", '"kty', r'\\*"(?:d|p|q|dp|dq|qi|k)\\*"\s*:\s*\\*"([A-Za-z0-9_-]{20,})'),  # JSON web key
    _block("url_password", "://", rf"""://[^\s/:@"'<>`\\]{{0,256}}:{_URL_PASSWORD}@(?=[\w\[])""", _literal_password),
    _block("url_password", ":\\/", rf""":\\+/\\+/[^\s/:@"'<>`\\]{{0,256}}:{_URL_PASSWORD}@(?=[\w\[])""", _literal_password),
    _block("url_password", "%3A%2F%2F␣%3a%2f%2f", rf"""(?:%3A%2F%2F|%3a%2f%2f)[^\s/:@"'<>`\\%]{{0,256}}(?:%3A|%3a|:){_URL_PASSWORD}(?:%40|@)(?=[\w\[])""",
           _literal_password),
    _block("url_password", "://", r"""://([A-Za-z0-9_.~-]{20,})@(?=[\w\[])""", mixed),  # a token as the user
    _block("slack_webhook", "hooks.slack.com", r"hooks\.slack\.com\\*/(?:services|workflows|triggers)\\*/((?:[A-Za-z0-9_-]|\\*/){20,})"),
    _block("discord_webhook", "/webhooks/␣/webhooks\\/", r"discord(?:app)?\.com\\*/api\\*/(?:v\d+\\*/)?webhooks\\*/\d+\\*/([\w-]{40,})"),
    _block("teams_webhook", "webhook.office.com", r"webhook\.office\.com\\*/webhookb2\\*/((?:[\w@-]|\\*/){60,})"),
    _block("discord_token", ".", r"[MNO](?<![\w.-].)[\w-]{23,27}\.[\w-]{6,7}\.[\w-]{27,45}(?![\w-])", mixed),
    _block("telegram_token", ":AA", r"(?<!\d)\d{8,10}:AA[\w-]{33}(?![\w-])"),
    _block("azure_secret", "Q~", r"(?<![\w~.-])[\w~.-]{3}\dQ~[\w~.-]{31,34}(?![\w~-])"),
    _block("vault_token", "atlasv1", r"[A-Za-z0-9]{14}\.atlasv1\.[A-Za-z0-9_=-]{60,70}"),
    _block("mailchimp_key", "-us1␣-us2␣-us3␣-us4␣-us5␣-us6␣-us7␣-us8␣-us9", r"(?<![0-9a-f])[0-9a-f]{32}-us\d{1,2}(?!\w)"),
    _block("signature", "ig=␣ignature=␣ig%3D", r"""[?&;](?:amp;)?(?:sig|x-amz-signature|x-goog-signature|signature)=([\w%+/=~.-]{20,})""", flags=re.I),
    _block("signature", "Signature=", r"(?<![\w-])Signature=([0-9a-f]{64})"),
    _block("netrc_password", "machine ␣default ␣login ", rf"login{_SPACE}[^\s\\]+{_SPACE}(?:account{_SPACE}[^\s\\]+{_SPACE})?password{_SPACE}([^\s\\\"']+)",
           _literal_password),
    _block("netrc_password", "machine ", rf"machine{_SPACE}[^\s\\]+{_SPACE}password{_SPACE}([^\s\\\"']+)", _literal_password),
    _block("pgpass_password", ":543␣:6432:␣:*:␣pgpass", r"""(?:^|\\+n|["'`\s(]|\x1b\[[0-9;]{0,9}m)[\w.*-]+:(?:\d{4,5}|\*):(?=[\w$*-]*[A-Za-z*])[\w$*-]+:[\w.*-]+:((?:\\[:\\]|[^\s:\\"'`])+)"""
           r"""(?=[.,;)]?(?:$|\\+[nr]|[\s"'`\x1b]))""", flags=re.M),
    _block("docker_auth", "auth", r"""auth\\*["']?\s*[:=]\s*\\*["']?([A-Za-z0-9+/]{8,}={0,2})""", basic_credentials),
    _block("kubeconfig_data", "-data", r"""(?:client-key|client-certificate|certificate-authority)-data\\*["']?\s*:\s*\\*["']?"""
           r"""([A-Za-z0-9+/]{20,}(?:(?:\r?\n|\\+n)[ \t]*[A-Za-z0-9+/]{20,})*[A-Za-z0-9+/]*={0,2})"""),
    _block("curl_user", " -u␣ --user␣--proxy-user␣\n-u␣\t-u", r"""-(?<!\S-)(?:u|-user|-proxy-user)(?:[ =]|(?=["']))\s*\\*["']?[^\s:"'$\\]{1,128}:([^\s"'\\]{3,})""",
           _literal_password),
    _block("command_password", "sshpass␣mysql␣mariadb␣docker login␣mongo", r"""(?:sshpass|mysql\w*|mariadb\w*|docker login|mongo\w*)\b[^\n]{0,200}?\s-p[ =]?\\*["']?"""
           r"""([^\s"'\\-][^\s"'\\]{3,})""", lambda v: _literal_password(v) and (mixed(v) or not v.isalpha())),
)  # fmt: skip


_SECRET_MANIFEST = re.compile(r"""kind\\*["']?\s*:\s*\\*["']?Secret\b""")
_MANIFEST_VALUE = re.compile(
    r"""(?:^|\\+n)[ \t]+\\*["']?[\w.-]+\\*["']?[ \t]*:[ \t]*\\*["']?([A-Za-z0-9+/]{8,}={0,2})(?=\\*["']?,?[ \t]*(?:$|\r|\\+[nr]))""",
    re.M,
)
_AWS_KEY = re.compile(r"(?<![A-Za-z0-9+/])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])")
_AWS_SECRET = re.compile(r"(?<![A-Za-z0-9+/_.-])[A-Za-z0-9+/]{40}(?![A-Za-z0-9+/=_-])")
_KEY_END = re.compile(rf"-----END {_NAME}-----")
_KEY_ROW = re.compile(r"[A-Za-z0-9+/]{4,76}={0,2}")
_HEX = re.compile(r"[0-9a-fA-F]+")


def manifest_values(text: str) -> Iterator[Span]:
    """Yield the base64 values of a Kubernetes Secret manifest."""
    if "Secret" in text and _SECRET_MANIFEST.search(text):
        for match in _MANIFEST_VALUE.finditer(text):
            yield Span(match.start(1), match.end(1), "kubernetes_secret")


def beside_aws_keys(text: str) -> Iterator[Span]:
    """A secret access key has no prefix: 40 characters of base64 within 400 of an access key id."""
    done = 0
    for key in _AWS_KEY.finditer(text):
        start, done = max(done - 64, key.start() - 400, 0), key.end() + 400
        for match in _AWS_SECRET.finditer(text, start, done):
            value = match.group()
            kinds = (str.islower, str.isupper, str.isdigit)
            if all(any(map(test, value)) for test in kinds) and not _HEX.fullmatch(value):
                yield Span(match.start(), match.end(), "aws_secret_key")


def key_ends(text: str) -> Iterator[Span]:
    """Yield the rows before the end of a private key of which the beginning is missing."""
    for end in _KEY_END.finditer(text):
        start, low = end.start(), max(0, end.start() - 20_000)
        gaps = [gap.span() for gap in BREAK.finditer(text, low, end.start())]
        edge = end.start()
        for gap_start, gap_end in reversed(gaps):
            if gap_end != edge and not _KEY_ROW.fullmatch(text, gap_end, edge):
                break
            start, edge = gap_end, gap_start
        else:
            first = _KEY_ROW.search(text, max(low, edge - 78), edge)
            start = first.start() if first and first.end() == edge else start
        if start < end.start():
            yield Span(start, end.end(), "private_key")
