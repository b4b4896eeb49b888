"""Replaces secrets in source text by fixed dummies: tokens, private keys, passwords, e-mail and IP addresses.

In: cleaned texts. Out: the texts with dummies, and how many of each kind were replaced. Only strings and comments are
changed, a dummy never starts inside an escape sequence, and redacting a redacted text changes nothing.

The plugins of `detect-secrets` recognise tokens, `email-validator` checks e-mail domains, `ipaddress` IP addresses. Not
searched for: strings of high entropy (hashes and identifiers would be lost), and what only a dictionary can tell from
prose: names, street addresses, passwords made of letters.

A prefilter keeps this cheap: RE2 runs one alternation over the Arrow buffer of a whole batch, then again over the lines
of the few texts that match. Only lines that match reach a detector.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import email_validator
import pyarrow as pa
import pyarrow.compute as pc
from detect_secrets.filters import heuristic
from detect_secrets.plugins.aws import AWSKeyDetector
from detect_secrets.plugins.azure_storage_key import AzureStorageKeyDetector
from detect_secrets.plugins.base import RegexBasedDetector
from detect_secrets.plugins.basic_auth import BasicAuthDetector
from detect_secrets.plugins.discord import DiscordBotTokenDetector
from detect_secrets.plugins.github_token import GitHubTokenDetector
from detect_secrets.plugins.gitlab_token import GitLabTokenDetector
from detect_secrets.plugins.ip_public import IPPublicDetector
from detect_secrets.plugins.jwt import JwtTokenDetector
from detect_secrets.plugins.keyword import KeywordDetector
from detect_secrets.plugins.mailchimp import MailchimpDetector
from detect_secrets.plugins.openai import OpenAIDetector
from detect_secrets.plugins.pypi_token import PypiTokenDetector
from detect_secrets.plugins.sendgrid import SendGridDetector
from detect_secrets.plugins.slack import SlackDetector
from detect_secrets.plugins.square_oauth import SquareOAuthDetector
from detect_secrets.plugins.stripe import StripeDetector
from detect_secrets.plugins.telegram_token import TelegramBotTokenDetector
from detect_secrets.plugins.twilio import TwilioKeyDetector

from cert_ray.config import Config
from cert_ray.corpus.cleaning import LITERALS
from cert_ray.possessive import compile_pattern


class SecretKind(StrEnum):
    """What is searched for. Tokens are counted by their issuer, e.g. `github_token`."""

    EMAIL = "email"
    IP_ADDRESS = "ip_address"
    PASSWORD = "password"
    PRIVATE_KEY = "private_key"
    TOKEN = "token"


class SecretsConfig(Config):
    """Which kinds of secrets are replaced."""

    kinds: tuple[SecretKind, ...] = tuple(SecretKind)


@dataclass(frozen=True, slots=True)
class Redacted:
    """`text` without secrets, and how many were replaced, by the name used in counts."""

    text: str
    counts: Counter[str]


@dataclass(frozen=True, slots=True)
class _Finding:
    start: int
    end: int
    name: str
    dummy: str

    def shifted(self, by: int) -> _Finding:
        return _Finding(self.start + by, self.end + by, self.name, self.dummy)


# What must occur for each detector to find something, in the syntax that RE2 and `re` share. `test_secrets.py` checks
# it against what the detectors find.
_CANDIDATES: dict[SecretKind, tuple[str, ...]] = {
    SecretKind.EMAIL: (r"[A-Za-z0-9_%+-]@[A-Za-z0-9-]+\.[A-Za-z]",),
    SecretKind.IP_ADDRESS: (r"[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]", r"\b[23][0-9a-fA-F]{3}:[0-9a-fA-F]{0,4}:"),
    SecretKind.PRIVATE_KEY: (r"PRIVATE KEY",),
    SecretKind.PASSWORD: (
        r"""://[^\s:/"']+:[^\s@/"']+@""",
        r"(?i:api_?key|(?:auth|service|account|db|database|priv|private|client|secret)_?key|(?:db|database|key)_?pass"
        r"|password|passwd|pwd|secret|contraseña|contrasena)(?i:s|_?[0-9]+)?"
        r"""["'\]]{0,2}[ ]*(?::[ ]*[A-Za-z. |\[\]]{0,24}=|=>?|:|==|!=)[ ]*[bru]{0,2}["']""",
        r"""["'][ ]*[!=]=[ ]*[A-Za-z0-9_]*(?i:password|passwd|pwd|secret|api_?key)""",
    ),
    SecretKind.TOKEN: (
        r"(?:A3T[A-Z0-9]|ABIA|ACCA|AKIA|ASIA)[0-9A-Z]{16}",
        r"(?i:aws).{0,20}(?i:key|pwd|pw|pass|token)",
        r"AccountKey=",
        r"[MNO][A-Za-z0-9_-]{23,25}\.[A-Za-z0-9_-]{6}\.",
        r"gh[pousr]_[A-Za-z0-9_]{36}",
        r"gl(?:pat|dt|ft|soat|rt|cbt|imt|ptt|agent)-|gloas-|GR1348941",
        r"eyJ[A-Za-z0-9_=-]+\.",
        r"[0-9a-z]{32}-us[0-9]",
        r"T3BlbkFJ",
        r"pypi-AgE",
        r"SG\.[A-Za-z0-9_-]{22}\.",
        r"(?i:xox[abpors]-[0-9]|hooks\.slack\.com)",
        r"[rs]k_live_",
        r"sq0csp-",
        r"[0-9]{8}:[0-9A-Za-z_-]{35}",
        r"(?:AC|SK)[a-z0-9]{32}",
    ),
}


def redact(texts: Sequence[str], config: SecretsConfig) -> list[Redacted]:
    """Each of `texts` without secrets, in order."""
    redacted = [Redacted(text, Counter()) for text in texts]
    if not config.kinds:
        return redacted
    detectors = [_OF_LINE[kind] for kind in config.kinds if kind in _OF_LINE]
    suspects = _matching(texts, config.kinds)
    lines = [line for index in suspects for line in texts[index].split("\n")]
    suspect_lines = iter(_matching(lines, config.kinds))
    number, first = next(suspect_lines, None), 0
    for index in suspects:
        findings: list[_Finding] = []
        start = 0  # of the line in its text
        for line_number, line in enumerate(texts[index].split("\n"), start=first):
            if line_number == number:
                findings += (found.shifted(start) for find in detectors for found in find(line))
                number = next(suspect_lines, None)
            start += len(line) + 1
        first = line_number + 1
        if SecretKind.PRIVATE_KEY in config.kinds:
            findings += _private_keys(texts[index])
        if findings:
            redacted[index] = _replaced(texts[index], findings)
    return redacted


def _matching(texts: Sequence[str], kinds: tuple[SecretKind, ...]) -> list[int]:
    """Which of `texts` a detector might find something in."""
    pattern = "|".join(part for kind in kinds for part in _CANDIDATES[kind])
    found = pc.match_substring_regex(pa.array(texts, pa.large_string()), pattern=pattern)
    indices: list[int] = pc.indices_nonzero(found).to_pylist()
    return indices


def _replaced(text: str, findings: list[_Finding]) -> Redacted:
    """`text` with dummies for `findings` in strings and comments. Of overlapping ones, the first and longest counts."""
    pieces: list[str] = []
    counts: Counter[str] = Counter()
    position = 0
    for finding in _inside_literals(text, sorted(findings, key=lambda finding: (finding.start, -finding.end))):
        start = _after_escape(text, finding.start)
        if start < position or start >= finding.end or _DUMMY.search(text, start, finding.end):
            continue
        pieces += text[position:start], finding.dummy
        position = finding.end
        counts[finding.name] += 1
    return Redacted("".join([*pieces, text[position:]]), counts)


_DUMMY = re.compile(r"REDACTED_[A-Z]|redacted@")  # so that nothing is redacted twice
_LITERAL = compile_pattern(LITERALS, re.DOTALL | re.VERBOSE)
_ESCAPE = re.compile(r"x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|[0-7]{1,3}|.", re.DOTALL)


def _inside_literals(text: str, findings: list[_Finding]) -> Iterator[_Finding]:
    """Those of the sorted `findings` that lie inside a single string or comment."""
    literals = _LITERAL.finditer(text)
    literal = next(literals, None)
    for finding in findings:
        while literal is not None and literal.end() < finding.end:
            literal = next(literals, None)
        if literal is None:
            return
        if literal.start() < finding.start:
            yield finding


def _after_escape(text: str, start: int) -> int:
    """`start`, or the end of the escape sequence whose backslash is right before it."""
    first = start
    while text.startswith("\\", first - 1) and first:
        first -= 1
    escape = _ESCAPE.match(text, start) if (start - first) % 2 else None
    return escape.end() if escape else start


# RFC 5322's dot-atom as people use it, without the signs of quoting and templates.
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[._%+-]*+([A-Za-z0-9_][A-Za-z0-9._%+-]{0,63})@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![A-Za-z0-9-]*\.?[\w@(/])"
)
_EMAIL_DUMMY = "redacted@example.com"
_RESERVED_DOMAIN = re.compile(r"(?:^|\.)(?:example(?:\.com|\.net|\.org)?|test|invalid|localhost)$", re.IGNORECASE)


def _emails(line: str) -> Iterator[_Finding]:
    for match in _EMAIL.finditer(line):
        start = match.start(1)
        address = line[start : match.end()]
        name, _, domain = address.rpartition("@")
        # `git@host:path` is a server's address; RFC 2606 domains belong to nobody.
        if name == "git" or _RESERVED_DOMAIN.search(domain) or line.startswith("://", max(0, start - 3)):
            continue
        try:
            email_validator.validate_email(address, check_deliverability=False)
        except email_validator.EmailNotValidError:
            continue
        yield _Finding(start, match.end(), SecretKind.EMAIL.value, _EMAIL_DUMMY)


_IPV6 = re.compile(r"(?<![\w:.])[23][0-9a-fA-F]{3}(?::[0-9a-fA-F]{0,4}){2,7}(?![\w:.])")
_NO_ADDRESS = re.compile(r"version|release|section|\boid\b|\bv[0-9]|[=<>~]=?[ ]*$", re.IGNORECASE)
_PREFIX_LENGTH = re.compile(r"/[0-9]")  # a network, not somebody's machine
_CONTEXT_CHARS = 80  # before an address; assumed: a line of code
_MAX_VERSION_NUMBER = 20  # assumed: four numbers below it are a version or a section
_IPV4_DUMMY, _IPV6_DUMMY = "192.0.2.1", "2001:db8::1"  # RFC 5737, RFC 3849


def _ip_addresses(line: str) -> Iterator[_Finding]:
    for match in IPPublicDetector.denylist[0].finditer(line):
        address = match[1].partition(":")[0]
        numbers = [int(number) for number in address.split(".")]
        if max(numbers) < _MAX_VERSION_NUMBER or _NO_ADDRESS.search(
            line, max(0, match.start() - _CONTEXT_CHARS), match.start()
        ):
            continue
        end = match.start() + len(address)
        if ipaddress.IPv4Address(address).is_global and not _PREFIX_LENGTH.match(line, end):
            yield _Finding(match.start(), end, SecretKind.IP_ADDRESS.value, _IPV4_DUMMY)
    for match in _IPV6.finditer(line):
        try:
            is_global = ipaddress.IPv6Address(match[0]).is_global
        except ValueError:
            continue
        if (
            is_global
            and len(match[0].replace("::", ":").split(":")) > 3
            and not _PREFIX_LENGTH.match(line, match.end())
        ):
            yield _Finding(match.start(), match.end(), SecretKind.IP_ADDRESS.value, _IPV6_DUMMY)


_KEYWORDS = KeywordDetector()
_MIN_PASSWORD_CHARS, _MAX_PASSWORD_CHARS = 6, 128  # assumed
_NO_PASSWORD = re.compile(r"""[\s{}<>()\[\]"'\\%]|^\$|://|^[./~]""")
_ANNOTATION = re.compile(r":[ ]*[A-Za-z_. |\[\]]{1,24}(?==)")  # the plugin does not recognise `password: str = "..."`
_LONG_WORD = re.compile(r"\w{129,}+")  # not a password, and the plugin takes quadratic time on it
_PASSWORD_DUMMY = "REDACTED_PASSWORD"


def _passwords(line: str) -> Iterator[_Finding]:
    assigned = _LONG_WORD.sub("", _ANNOTATION.sub("", line))
    values = {value for value in _KEYWORDS.analyze_string(assigned) if _may_be_password(value)}
    spans = {(found.start(), found.end()) for value in values for found in re.finditer(re.escape(value), line)}
    basic = BasicAuthDetector.denylist[0].finditer(line)
    spans |= {match.span(1) for match in basic if _may_be_password(match[1])}
    for start, end in sorted(spans):
        yield _Finding(start, end, SecretKind.PASSWORD.value, _PASSWORD_DUMMY)


def _may_be_password(value: str) -> bool:
    """Whether a value named as a password looks like one: letters and digits, not a template, path or prose."""
    return (
        _MIN_PASSWORD_CHARS <= len(value) <= _MAX_PASSWORD_CHARS
        and any(map(str.isdigit, value))
        and any(map(str.isalpha, value))
        and not _NO_PASSWORD.search(value)
        and not heuristic.is_templated_secret(value)
        and not heuristic.is_sequential_string(value)
    )


_KEY_BEGINS = re.compile(r"-----BEGIN (?:[A-Z0-9]+ ){0,4}PRIVATE KEY(?: BLOCK)?-----")
_MAX_KEY_CHARS = 20_000  # 16,384 bits of RSA, indented and quoted, take less
_KEY_RUN = re.compile(r"(?:\\[nrt]|(?<![\\A-Za-z0-9+/=]))([A-Za-z0-9+/=]{16,})")
_KEY_DUMMY = "REDACTED_PRIVATE_KEY"


def _private_keys(text: str) -> Iterator[_Finding]:
    """The base64 inside key blocks; BEGIN and END lines stay. Each line or literal of it counts as one."""
    position = 0
    for begin in _KEY_BEGINS.finditer(text):
        end = text.find("-----END ", begin.end(), begin.end() + _MAX_KEY_CHARS)
        if begin.start() >= position and end >= 0:
            for run in _KEY_RUN.finditer(text, begin.end(), end):
                yield _Finding(run.start(1), run.end(1), SecretKind.PRIVATE_KEY.value, _KEY_DUMMY)
            position = end


_ISSUERS: tuple[type[RegexBasedDetector], ...] = (
    AWSKeyDetector,
    AzureStorageKeyDetector,
    DiscordBotTokenDetector,
    GitHubTokenDetector,
    GitLabTokenDetector,
    JwtTokenDetector,
    MailchimpDetector,
    OpenAIDetector,
    PypiTokenDetector,
    SendGridDetector,
    SlackDetector,
    SquareOAuthDetector,
    StripeDetector,
    TelegramBotTokenDetector,
    TwilioKeyDetector,
)


def _name_of(plugin: type[RegexBasedDetector]) -> str:
    return re.sub(r"\W+", "_", str(plugin.secret_type).lower().removesuffix("s"))


_JWT = _name_of(JwtTokenDetector)
_JWT_REST = re.compile(r"[A-Za-z0-9_.=-]*")  # the plugin's pattern stops before the signature
# The secret is the whole match, except for the AWS pattern that also matches the name of the key.
_TOKEN_PATTERNS = tuple(
    (_name_of(plugin), pattern, 1 if plugin is AWSKeyDetector and pattern.groups else 0)
    for plugin in _ISSUERS
    for pattern in plugin().denylist
)


def _tokens(line: str) -> Iterator[_Finding]:
    for name, pattern, group in _TOKEN_PATTERNS:
        for match in pattern.finditer(line):
            start, end = match.span(group)
            if name == _JWT:
                if not JwtTokenDetector.is_formally_valid(match[0]):
                    continue
                end = _JWT_REST.match(line, end).end()  # type: ignore[union-attr] # may be empty, so always matches
            # Inside a longer word, a match is base64 data or a DNA sequence.
            if not (line[start - 1 : start].isalnum() or line[end : end + 1].isalnum()):
                yield _Finding(start, end, name, f"REDACTED_{name.upper()}")


# Without private keys, which span several lines.
_OF_LINE: dict[SecretKind, Callable[[str], Iterator[_Finding]]] = {
    SecretKind.EMAIL: _emails,
    SecretKind.IP_ADDRESS: _ip_addresses,
    SecretKind.PASSWORD: _passwords,
    SecretKind.TOKEN: _tokens,
}
