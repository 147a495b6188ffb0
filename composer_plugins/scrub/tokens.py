"""Secrets that can be told by how they begin: one table of prefixes, one way to walk over their bodies.

The forms are those that the providers publish (or show in their own examples); `docs/reference/scrubbing.md`
lists them. A body may be broken over lines.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from composer_plugins.scrub.spans import BREAK, Span, jumbled, mixed, starts_here

ALNUM, WORD, DOTTED, HEX, BASE64 = "A-Za-z0-9", "-A-Za-z0-9_", "-A-Za-z0-9_.", "A-Fa-f0-9", "A-Za-z0-9+/="


@dataclass(frozen=True)
class Token:
    """One form: `prefix`, then `least` to `most` characters of `body`.

    Args:
        edge: the prefix must begin a word (for prefixes that also occur inside words).
        check: extra condition on the body without line breaks.
    """

    kind: str
    prefix: str
    body: str = WORD
    least: int = 20
    most: int = 512
    edge: bool = False
    check: Callable[[str], bool] = mixed
    run: re.Pattern = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", re.compile(f"[{self.body}]{{0,{self.most}}}"))

    def spans(self, text: str) -> Iterator[Span]:
        """Yield where such a token stands."""
        position = text.find(self.prefix)
        while position >= 0:
            end = position + len(self.prefix)
            if not self.edge or starts_here(text, position):
                found = self._walk(text, end)
                if found is not None:
                    yield Span(position, found, self.kind)
                    end = found
            position = text.find(self.prefix, end)

    def _walk(self, text: str, position: int) -> int | None:
        """Return the end of the body that begins at `position`, or None when it is no body."""
        body, end = "", position
        while True:
            part = self.run.match(text, end).group()[: self.most - len(body)]
            body, end = body + part, end + len(part)
            gap = BREAK.match(text, end) if len(body) < self.most else None
            if gap is None:
                break
            following = self.run.match(text, gap.end()).group()
            another = following.startswith(self.prefix[:3])
            short = len(body) < self.least or not self.check(body)
            too_long = not short and len(body) + len(following) > self.most
            if (
                not following
                or another
                or too_long
                or not (short or _goes_on(text, gap.end() + len(following), part, following))
            ):
                break
            end = gap.end()
        trimmed = body.rstrip(".-") if self.body == DOTTED else body
        end -= len(body) - len(trimmed)
        if self.edge and len(body) == self.most and self.run.match(text, end).group():
            return None  # longer than such a token ever is
        return end if len(trimmed) >= self.least and self.check(trimmed) else None


def _goes_on(text: str, end: int, line: str, following: str) -> bool:
    """True when the next line is more of the same random text: after a good part of it, and no word."""
    if len(line) < 10 or len(following) < 4:
        return False
    if mixed(following) or jumbled(following) or following.isdigit() or _INNER_CAPITAL.search(following):
        return len(following) >= 8 or text[end : end + 1] in _LINE_END or text.startswith("\\n", end)
    return False


_INNER_CAPITAL = re.compile(r"[a-z0-9][A-Z]|[A-Z]{2}[a-z]")
_LINE_END = ("", "\n", "\r", '"', "'", "`")


def _random(body: str) -> bool:
    """Two digits, and no words joined by dashes as in CSS classes and file names."""
    return sum(c.isdigit() for c in body) >= 2 and ("-" not in body or body != body.lower())


def _any(body: str) -> bool:
    return True


def _jwt(body: str) -> bool:
    """The first part must decode to the beginning of a JSON object with a header's key."""
    head, dot, rest = ("eyJ" + body).partition(".")
    try:
        raw = base64.urlsafe_b64decode(head[: len(head) // 4 * 4])
    except (binascii.Error, ValueError):
        return False
    return bool(dot and rest) and raw.startswith(b'{"') and re.search(rb'"(alg|typ|kid|enc|cty)"', raw) is not None


def _tokens(kind: str, prefixes: str, *args, **kwargs) -> list[Token]:
    return [Token(kind, prefix, *args, **kwargs) for prefix in prefixes.split()]


TOKENS: tuple[Token, ...] = (
    *_tokens("anthropic_key", "sk-ant-"),
    *_tokens("openrouter_key", "sk-or-"),
    *_tokens("openai_key", "sk-proj- sk-svcacct- sk-admin- sk-None-"),
    *_tokens("api_key", "sk-", WORD, 20, edge=True, check=_random),  # legacy OpenAI, DeepSeek, proxies
    *_tokens("groq_key", "gsk_", ALNUM, 30),
    *_tokens("xai_key", "xai-", ALNUM, 40),
    *_tokens("perplexity_key", "pplx-", ALNUM, 30),
    *_tokens("replicate_token", "r8_", ALNUM, 30, edge=True),
    *_tokens("nvidia_key", "nvapi-", WORD, 40),
    *_tokens("fireworks_key", "fw_", ALNUM, 20, 64, edge=True),
    *_tokens("langsmith_key", "lsv2_pt_ lsv2_sk_", ALNUM + "_", 32),
    *_tokens("huggingface_token", "hf_ api_org_", ALNUM, 30, 64, edge=True, check=_any),
    *_tokens("github_token", "github_pat_", ALNUM + "_", 22, 255),
    *_tokens("github_token", "ghp_ gho_ ghu_ ghs_ ghr_", ALNUM + "_", 36, 255),
    *_tokens("gitlab_token", "glpat- gldt- glrt- glcbt- glptt- glft- glsoat- glimt- glagent- gloas- GR1348941", DOTTED),
    *_tokens("bitbucket_token", "ATBB ATCTT3 ATATT3", WORD + "=", 28, edge=True),
    *_tokens("slack_token", "xoxb- xoxp- xoxa- xoxr- xoxs- xoxo- xoxc- xoxd- xoxe- xoxe. xapp-", DOTTED + "%+/=", 15),
    *_tokens("stripe_key", "sk_live_ sk_test_ rk_live_ rk_test_ whsec_", ALNUM + "+/=", 20, 255),
    *_tokens("twilio_key", "SK AC", "a-f0-9", 32, 32, edge=True),
    *_tokens("sendgrid_key", "SG.", DOTTED, 50, 90, edge=True),
    *_tokens("mailgun_key", "key-", "a-f0-9", 32, 32, edge=True),
    *_tokens("brevo_key", "xkeysib- xsmtpsib-", WORD, 60),
    *_tokens("npm_token", "npm_", ALNUM, 36, 64, edge=True, check=_any),
    *_tokens("pypi_token", "pypi-", WORD, 60),
    *_tokens("rubygems_key", "rubygems_", HEX, 48, 48),
    *_tokens("crates_token", "cio", ALNUM, 32, 32, edge=True),
    *_tokens("dockerhub_token", "dckr_pat_ dckr_oat_", WORD),
    *_tokens("google_api_key", "AIza", WORD, 35, 39, edge=True, check=_any),
    *_tokens("google_oauth", "ya29.", DOTTED, 20),
    *_tokens("google_oauth", "GOCSPX-", WORD, 20, 64, check=_any),
    *_tokens("google_oauth", "1//0", WORD, 30, edge=True),
    *_tokens("aws_access_key_id", "AKIA ASIA ABIA ACCA", "A-Z0-9", 16, 16, edge=True, check=_any),
    *_tokens("aws_session_token", "IQoJb3JpZ2lu FwoGZXIvYXdz FQoGZXIvYXdz FQoDYXdz", BASE64, 60, 4096),
    *_tokens("aws_bedrock_key", "ABSK bedrock-api-key-", BASE64, 60, 2048, edge=True),
    *_tokens("digitalocean_token", "dop_v1_ doo_v1_ dor_v1_", HEX, 64, 64),
    *_tokens("databricks_token", "dapi", "a-f0-9", 32, 34, edge=True),
    *_tokens("vercel_token", "vercel_blob_rw_ vcp_ vci_ vca_ vcr_ vck_", ALNUM + "_", 20, edge=True),
    *_tokens("netlify_token", "nfp_ nfc_ nfo_ nfu_", ALNUM, 30, edge=True),
    *_tokens("supabase_key", "sbp_ sb_secret_ sb_publishable_ sba_", ALNUM + "_", 20, edge=True),
    *_tokens("heroku_key", "HRKU-", WORD, 30),
    *_tokens("cloudflare_key", "v1.0-", "a-f0-9-", 150),
    *_tokens("linear_key", "lin_api_ lin_oauth_", ALNUM, 32),
    *_tokens("notion_token", "ntn_ secret_", ALNUM, 40, 64, edge=True),
    *_tokens("shopify_token", "shpat_ shpca_ shppa_ shpss_", HEX, 32, 32),
    *_tokens("grafana_token", "glc_ glsa_", BASE64 + "_", 32, edge=True),
    *_tokens("sentry_token", "sntrys_ sntryu_", BASE64 + "_", 50),
    *_tokens("doppler_token", "dp.pt. dp.st. dp.ct. dp.sa.", DOTTED, 40, edge=True),
    *_tokens("vault_token", "hvs. hvb. hvr.", WORD, 24, edge=True),
    *_tokens("pulumi_token", "pul-", HEX, 40, 40, edge=True),
    *_tokens("postman_key", "PMAK-", "a-f0-9-", 59, 59),
    *_tokens("figma_token", "figd_", WORD, 40),
    *_tokens("airtable_token", "pat", ALNUM + ".", 79, 79, edge=True, check=lambda body: body[14] == "."),
    *_tokens("square_token", "sq0csp- sq0atp- sq0idp-", WORD, 22),
    *_tokens("newrelic_key", "NRAK- NRII-", ALNUM + "-", 27),
    *_tokens("planetscale_token", "pscale_tkn_ pscale_pw_ pscale_oauth_", DOTTED, 32),
    *_tokens("fly_token", "fo1_ fm2_ fm1r_ fm1a_", BASE64 + "_-", 40, 4096, edge=True),
    *_tokens("artifactory_token", "AKCp cmVmdGtu", ALNUM, 50, edge=True),
    *_tokens("age_key", "AGE-SECRET-KEY-1", "A-Z0-9", 58, 58),
    *_tokens("onepassword_token", "ops_eyJ", BASE64 + "_-", 100, 4096),
    *_tokens("buildkite_token", "bkua_ bkaj_ bkct_", ALNUM, 40, edge=True),
    *_tokens("circleci_token", "CCIPAT_ CCIPRJ_", ALNUM + "_", 40),
    *_tokens("contentful_token", "CFPAT-", WORD, 40),
    *_tokens("prefect_key", "pnu_ pnb_", ALNUM, 36, 36, edge=True),
    *_tokens("private_key", "LS0tLS1CRUdJTi", BASE64, 60, 1 << 20, check=_any),  # PEM in base64
    *_tokens("jwt", "eyJ", DOTTED, 24, 8192, edge=True, check=_jwt),
)  # fmt: skip

#: Makes every letter, digit, `_`, `.` and `-` of a UTF-8 text a w, and anything else a space.
ALIKE = bytes(ord("w") if (c < 128 and chr(c).isalnum()) or chr(c) in "_.-" else 32 for c in range(256))
