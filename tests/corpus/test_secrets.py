"""Secrets go, what only looks like one stays, and the file still parses."""

from __future__ import annotations

import ast
import base64
import io
import sysconfig
import time
import tokenize
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cert_ray.corpus.secrets import SecretKind, SecretsConfig, redact
from cert_ray.python_source import parse
from cert_ray.schemas import Dropped

ALL = SecretsConfig()
JWT = ".".join(
    base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (b'{"alg":"HS256"}', b'{"sub":"123"}', b"signature")
)
# Put together here, so that no scanner of this repository takes them for real ones.
TOKENS = {
    "aws_access_key": "AKIA" + "Z7VRSQ5TJN2XMPLK",
    "github_token": "gh" + "p_" + "wWPw5k4aXcaT4fNP0UcnZwJUVFk6LO0pINUx",
    "gitlab_token": "glpat" + "-" + "xsZ8sD7dF3gH2jK9lQ4w",
    "slack_token": "xox" + "b-34532454-e039d02840a0b9379c",
    "stripe_access_key": "sk_" + "live_" + "ReTllpYQYfIZu2Jnf2lAPFjD",
    "openai_token": "sk-" + "Xi8tcNiHV9awbCcvilTe" + "T3BlbkFJ" + "vQDsTfpsBfjNIGPvz2mL",
    "sendgrid_api_key": "SG." + "ngeVfQFYQlKU0ufo8x5d1A" + ".TwL2iGABf9DHoTf-09kqeF8tAmbihYzrnopKc-1s5cr",
    "pypi_token": "pypi-"
    + "AgEIcHlwaS5vcmc"
    + "CJDAwMDAwMDAwLTAwMDAtMDAwMC0wMDAwLTAwMDAwMDAwMDAwMAIleyJ1234567890abcdef",
    "telegram_bot_token": "110201543" + ":AAHdqTcvCH1vGWJxfSeofSAs0K5PALDsaw0",
    "twilio_api_key": "SK" + "9fa8b2c4d6e1a3b5c7d9e0f1a2b3c4d5",
    "square_oauth_secret": "sq0csp-" + "ABCDEFGHIJK_LMNOPQRSTUVWXYZ-0123456789abcde",
    "mailchimp_access_key": "343ea45721923ed956e2b38c31db76aa" + "-us30",
    "azure_storage_account_access_key": "AccountKey="
    + "lJzRc1YdHaAA2KCNJJ1tkYwF/+mKK6Ygw0NGe170Xu592euJv2wYUtBlV8z+qnlcNQSnIYVTkLWntUO1F8j8rQ==",
    "json_web_token": JWT,
}


def redacted(source: str, config: SecretsConfig = ALL) -> tuple[str, dict[str, int]]:
    (result,) = redact([source], config)
    return result.text, dict(result.counts)


@pytest.mark.parametrize("name", TOKENS)
def test_token_of_every_issuer_goes(name: str) -> None:
    source = f"client = connect(region, '{TOKENS[name]}')  # mine\n"
    text, counts = redacted(source)
    assert counts == {name: 1}
    assert TOKENS[name] not in text
    assert text == source.replace(TOKENS[name], f"REDACTED_{name.upper()}")
    assert redacted(source, SecretsConfig(kinds=(SecretKind.EMAIL,))) == (source, {})


@pytest.mark.parametrize(
    ("source", "expected", "name"),
    [
        ("# Ann <ann.b@corp.co.uk>, 2020", "# Ann <redacted@example.com>, 2020", "email"),
        ('x = "Hi\\nann@corp.com"', 'x = "Hi\\nredacted@example.com"', "email"),  # the n belongs to the escape
        ('x = "\\x41nn@corp.com"', 'x = "\\x41redacted@example.com"', "email"),
        ('"""Mail ann@corp.com.\n\nBye"""', '"""Mail redacted@example.com.\n\nBye"""', "email"),
        ('host = "93.184.216.34:80"', 'host = "192.0.2.1:80"', "ip_address"),
        ('host = "[2606:4700:4700::1111]"', 'host = "[2001:db8::1]"', "ip_address"),
        ('password = "hunter22!"', 'password = "REDACTED_PASSWORD"', "password"),
        ("conf = {'db_password': 'Tr0ub4dor'}", "conf = {'db_password': 'REDACTED_PASSWORD'}", "password"),
        ("connect(api_key='b3k5l2m9q0')", "connect(api_key='REDACTED_PASSWORD')", "password"),
        ("class A:\n    secret: str = 'b3k5l2m9q0'", "class A:\n    secret: str = 'REDACTED_PASSWORD'", "password"),
        ('u = "ftp://ann:s3cretpw@host/x"', 'u = "ftp://ann:REDACTED_PASSWORD@host/x"', "password"),
        ("if password == 'b3k5l2m9q0': pass", "if password == 'REDACTED_PASSWORD': pass", "password"),
    ],
)
def test_secret_becomes_a_dummy_of_its_kind(source: str, expected: str, name: str) -> None:
    assert redacted(source + "\n") == (expected + "\n", {name: 1})


@pytest.mark.parametrize(
    "source",
    [
        "x = a@b.c",  # a matrix product
        "@app.route\ndef f(): pass",
        'mail = "ann@example.com, bob@host.example, c@test.invalid, root@localhost"',
        'clone = "git@github.com:me/it.git"',
        'x = "127.0.0.1 0.0.0.0 10.1.2.3 192.168.7.8 172.16.0.1 192.0.2.44 198.51.100.7 203.0.113.9 169.254.1.1"',
        'version = "101.22.33.44"',
        '__version__ = "1.2.3.4"',
        'x = "needs libfoo >= 90.22.33.44"',
        "# see section 3.1.2.4 of RFC 1234",
        'oid = "1.3.6.1.4.1.311.20"',
        'network = "93.184.216.0/24"',
        'x = a["2001:4:5"]',
        'x = "::1 fe80::1 2001:db8::5"',
        'password = "password"',
        'password = getpass("Password 2: ")',
        "password = os.environ['DB_PASSWORD2']",
        'password = "{user2}"',
        'password = "${PASS2}"',
        'u = "http://%s:%s@host2/"',
        'u = f"http://{user}:{password1}@host"',
        'password_hasher_type = "sha256"',
        'secret_path = "/etc/secrets/v2"',
        'tokens = "AAAAKIA' + "ACGTACGTACGTACGT" + 'ACGT"',  # the middle of a word
        'digest = "d41d8cd98f00b204e9800998ecf8427e"',
        'uuid = "c9bf9e57-1685-4c89-bafb-ff5af830be8a"',
        "x = 'eyJub3QiOiJ0b2tlbiJ9.x'",
        '-----BEGIN = "PRIVATE KEY"',
    ],
)
def test_what_only_looks_like_a_secret_stays(source: str) -> None:
    assert redacted(source + "\n") == (source + "\n", {})


@pytest.mark.parametrize(
    ("start", "separator", "end"),
    [
        ('key = """', "\n", '"""\n'),
        ('key = "', "\\n", '"\n'),
        ('key = ("', '\\n"\n    "', '")\n'),
        ("# ", "\n# ", "\n"),
    ],
)
def test_private_key_loses_its_base64_however_it_is_written(start: str, separator: str, end: str) -> None:
    body = base64.b64encode(bytes(range(144))).decode()
    lines = [body[at : at + 64] for at in range(0, 192, 64)]
    source = start + separator.join(["-----BEGIN RSA PRIVATE KEY-----", *lines, "-----END RSA PRIVATE KEY-----"]) + end
    text, counts = redacted(source)
    assert counts == {"private_key": 3}
    assert (
        text
        == start
        + separator.join(
            ["-----BEGIN RSA PRIVATE KEY-----", *["REDACTED_PRIVATE_KEY"] * 3, "-----END RSA PRIVATE KEY-----"]
        )
        + end
    )
    assert ast.dump(ast.parse(text)).count("REDACTED") == (0 if start == "# " else 3)


def test_off_is_off_and_nothing_is_nothing() -> None:
    assert redacted("# ann@corp.com\n", SecretsConfig(kinds=())) == ("# ann@corp.com\n", {})
    assert redact([], ALL) == []
    assert redacted("") == ("", {})


def test_texts_of_a_batch_do_not_mix() -> None:
    texts = ["x = 1\n", "# ann@corp.com\n\n# bob@corp.com", "", "# \u00e9\u20ac\n# 93.184.216.34\n", "# ann@corp.com\n"]
    together = redact(texts, ALL)
    assert together == [redact([text], ALL)[0] for text in texts]
    assert sum((result.counts for result in together), Counter()) == {"email": 3, "ip_address": 1}


@pytest.mark.parametrize(
    "piece",
    [
        "ann@corp.com ",
        "a.b-c@",
        "93.184.216.34 ",
        "password='b3k5l2m9q0' ",
        "password='",
        "\\",
        "://a:b@c ",
        "-----BEGIN PRIVATE KEY-----",
        "2606:4700:4700::1111 ",
        "secret_secret_",
        "aws_key ",
        "eyJ.",
        '"""\'',
    ],
)
def test_long_lines_take_no_more_than_their_length(piece: str) -> None:
    source = "x = '" + piece * (300_000 // len(piece)) + " ann@corp.com 93.184.216.34 password='b3k5l2m9q0'\n"
    start = time.process_time()
    redact([source], ALL)
    assert time.process_time() - start < 5  # measured: under 1; what is quadratic takes minutes


SECRETS = st.sampled_from(["ann@corp.com", "93.184.216.34", "2606:4700:4700::1111", *TOKENS.values()])
AROUND = st.sampled_from(
    ["", " ", "\\", "\\\\", "\\n", "x", "(", "#", "'", '"', "{", "}", "{a}", "=", "@", "\n", "\u00e9", "b", "f"]
)


@given(st.sampled_from(['"', "'", '"""', "# ", 'f"', 'rb"', ""]), st.lists(st.one_of(AROUND, SECRETS), max_size=8))
def test_redacted_text_parses_alike_and_is_settled(opening: str, pieces: list[str]) -> None:
    closing = opening.lstrip("rbf") if opening != "# " else ""
    source = f"import os\nx = 1 {'+ ' if opening and opening != '# ' else ''}{opening}{''.join(pieces)}{closing}\n"
    text, _ = redacted(source)
    assert redacted(text) == (text, {})
    if not isinstance(parse(source), Dropped):
        assert outside_of_strings(text) == outside_of_strings(source)


def outside_of_strings(source: str) -> list[str]:
    """The tokens of a file, strings and comments only by their kind."""
    assert not isinstance(parse(source), Dropped)
    kinds = {tokenize.STRING: "string", tokenize.COMMENT: "comment"}
    return [kinds.get(token.type, token.string) for token in tokenize.generate_tokens(io.StringIO(source).readline)]


@pytest.mark.slow
def test_standard_library_parses_alike_and_hardly_changes() -> None:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text("utf-8", "ignore") for path in sorted(stdlib.glob("[a-m]*.py"))]
    results = redact(texts, ALL)
    changed = [(text, result) for text, result in zip(texts, results, strict=True) if result.counts]
    counts = sum((result.counts for result in results), Counter())
    assert set(counts) <= {"email", "ip_address"}
    assert changed
    for text, result in changed:
        assert outside_of_strings(result.text) == outside_of_strings(text)
