"""Personal data and secrets give way to fixed placeholders: mail and network addresses, phone numbers, keys.

Code is full of strings that look like these and are not, and of addresses that are nobody's: version numbers, private
and documentation networks (RFC 5737, 3849), example domains (RFC 2606), fictional telephone numbers. They stay.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, ip_address
from typing import Literal, NamedTuple

import polars as pl
import pyarrow as pa

from data_pipeline.steps.step import Step, with_column, with_text

Kind = Literal["email", "ip", "phone", "secret"]

# Domains under these are nobody's, or a service's own.
EXAMPLE_DOMAIN = re.compile(
    r"(?:^|\.)(?:example\.(?:com|org|net|edu)|example|test|invalid|localhost|local|openssh\.com|libssh\.org)$", re.I
)
# Generic top-level domains; with two letters any passes. `x@w.weight` multiplies matrices.
TOP_LEVEL = frozenset([
    "com", "org", "net", "edu", "gov", "mil", "int", "info", "biz", "name", "pro", "aero", "coop", "museum", "jobs",
    "mobi", "travel", "asia", "cat", "tel", "app", "dev", "cloud", "email", "online", "site", "tech", "xyz", "shop",
    "blog", "club", "live", "team", "world", "today", "agency", "company", "systems", "solutions", "network", "digital",
    "academy", "consulting", "foundation", "software", "science", "university", "institute",
])
VERSION_BEFORE = re.compile(r"(?:version|release|ver|v|rev|[=<>~^!]=?)[\s:=\"'(]*$", re.I)
SINGLE_DIGIT = re.compile(r"\d\.\d\.\d\.\d")


def _is_mail(match: re.Match[str]) -> bool:
    local, _, domain = match[0].rpartition("@")
    labels = domain.lower().split(".")
    known = labels[-1] in TOP_LEVEL or len(labels[-1]) == 2
    personal = local != "git" and not EXAMPLE_DOMAIN.search(domain)
    return known and personal and len(labels[-2]) > 1 and labels[-1] == domain.rpartition(".")[2]


def _is_host(match: re.Match[str]) -> bool:
    """Is it the address of one machine on the public network?"""
    try:
        address = ip_address(match[0])
    except ValueError:
        return False
    if not address.is_global or address.is_multicast:
        return False
    if isinstance(address, IPv4Address):
        before = match.string[max(0, match.start() - 20) : match.start()]
        # The first arc of an object identifier is 0, 1 or 2.
        return address.packed[0] > 2 and not SINGLE_DIGIT.fullmatch(match[0]) and not VERSION_BEFORE.search(before)
    return match[0][0] in "23" and sum(bool(group) for group in match[0].split(":")) >= 4       # x[2000::3] is a slice


def _is_telephone(match: re.Match[str]) -> bool:
    digits = re.sub(r"\D", "", match[0])
    fictional = re.search(r"55501\d\d$", digits)
    return (10 if match[0][0] != "+" else 9) <= len(digits) <= 15 and not fictional


def _is_key(match: re.Match[str]) -> bool:
    """Keys of AWS's documentation say EXAMPLE; a value that is one repeated character is a stand-in."""
    return "example" not in match[0].lower() and len(set(match[0][-16:])) > 4


def _is_random(match: re.Match[str]) -> bool:
    """A value named key, token or password: hexadecimal, or of digits and letters of both cases."""
    value = match["value"]
    mixed = all(re.search(letters, value) for letters in ("[a-z]", "[A-Z]", "[0-9]"))
    hexadecimal = re.fullmatch(r"[0-9a-f]{32,}|[0-9A-F]{32,}", value) and re.search("[0-9]", value)
    return bool(mixed or hexadecimal) and _is_key(match)


class Pattern(NamedTuple):
    kind: Kind
    hint: str                       # a text without a match of this has none of `expression`: quick to tell, by polars
    expression: re.Pattern[str]
    accepts: Callable[[re.Match[str]], bool]


PLACEHOLDERS: dict[Kind, str] = {
    "email": "<EMAIL>", "ip": "<IP_ADDRESS>", "phone": "<PHONE_NUMBER>", "secret": "<SECRET>",
}
LOCAL_PART = r"[A-Za-z0-9._%+\-]"
KEY = (
    r"(?:(?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,}|glpat-[A-Za-z0-9_\-]{20}"
    r"|xox[abprs]-[A-Za-z0-9\-]{20,}|hf_[A-Za-z]{34}|AIza[0-9A-Za-z_\-]{35}|[rs]k_live_[0-9A-Za-z]{20,}"
    r"|sk-(?:proj-|ant-)?[A-Za-z0-9_\-]{32,}|npm_[A-Za-z0-9]{36}|pypi-[A-Za-z0-9_\-]{60,}"
    r"|eyJ[A-Za-z0-9_\-]{10,}\.eyJ[A-Za-z0-9_\-]{10,}\.[A-Za-z0-9_\-]{10,})"
)
NAMED = r"(?:api_?key|secret_?key|access_?key|auth_?token|access_?token|client_?secret|passw(?:or)?d|secret|token)"
PATTERNS = [
    Pattern("secret", "PRIVATE KEY", re.compile(
        r"-----BEGIN (?P<of>[A-Z ]*PRIVATE KEY(?: BLOCK)?)-----(?=.{0,4}\s*[\sA-Za-z0-9+/=:,\\\-]{40})"
        r"[^\"'`]*?-----END (?P=of)-----"), lambda match: True),
    Pattern("secret", KEY, re.compile(rf"(?<![A-Za-z0-9_\-+]){KEY}(?![A-Za-z0-9_])"), _is_key),
    Pattern("secret", rf"(?i:{NAMED}[\"']?\s*[:=]\s*[\"'])[A-Za-z0-9+/=\-]{{24}}", re.compile(
        rf"(?i:{NAMED}[\"']?\s*[:=]\s*[\"'])(?P<value>[A-Za-z0-9+/=\-]{{24,}})(?=[\"'])"), _is_random),
    Pattern("email", rf"{LOCAL_PART}@[A-Za-z0-9\-]+\.[A-Za-z]", re.compile(
        rf"(?<!{LOCAL_PART[:-1]}@]){LOCAL_PART}{{1,64}}@(?:[A-Za-z0-9\-]+\.)+[A-Za-z]{{2,}}(?![A-Za-z0-9_(\[]|\.\w)"),
        _is_mail),
    Pattern("ip", r"\d\.\d{1,3}\.\d{1,3}\.\d", re.compile(
        r"(?<![\w.\-])(?:\d{1,3}\.){3}\d{1,3}(?![\w/\-]|\.\d)"), _is_host),
    Pattern("ip", r"[23][0-9A-Fa-f]{3}:[0-9A-Fa-f]*:", re.compile(
        r"(?<![\w:.])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{1,4}(?![\w:./])"), _is_host),
    Pattern("phone", r"\+[1-9]\d{0,2}[ .\-(]", re.compile(
        r"(?<![\w.)\]+\-])\+[1-9]\d{0,2}(?:[ .\-]?\(\d{1,4}\))?(?:[ .\-]\d{2,8}){2,5}(?![\w\-]|\.\d)"), _is_telephone),
    Pattern("phone", r"[2-9]\d\d\)?[ .\-]?[2-9]\d\d[.\-]\d{4}", re.compile(
        r"(?<![\w.\-+/(\[])(?:\([2-9]\d\d\) ?|[2-9]\d\d(?P<by>[.\-]))[2-9]\d\d(?(by)(?P=by)|[.\-])\d{4}"
        r"(?![\w\-]|\.\d)"), _is_telephone),
]


def mask_text(text: str, patterns: Sequence[Pattern]) -> tuple[str, int]:
    """`text` with what `patterns` find replaced by placeholders, and how many replacements that took."""
    replaced = 0
    for pattern in patterns:
        def replacement(match: re.Match[str], pattern: Pattern = pattern) -> str:
            nonlocal replaced
            if not pattern.accepts(match):
                return match[0]
            replaced += 1
            start = match.start("value") if "value" in pattern.expression.groupindex else match.start()
            return match[0][: start - match.start()] + PLACEHOLDERS[pattern.kind]

        text = pattern.expression.sub(replacement, text)
    return text, replaced


class Mask(Step):
    """Fills `masked`, the number of replacements; texts and ids follow."""

    name = "mask"

    def __init__(self, kinds: Sequence[Kind]):
        self.kinds = tuple(kinds)

    def apply(self, table: pa.Table) -> pa.Table:
        patterns = [pattern for pattern in PATTERNS if pattern.kind in self.kinds]
        frame = pl.DataFrame({"text": pl.Series(table["text"])})
        hints = frame.select(
            pl.col("text").str.contains(pattern.hint).alias(str(index)) for index, pattern in enumerate(patterns)
        )
        masked = [0] * len(table)
        texts = table["text"].to_pylist()
        for index, hinted in enumerate(hints.iter_rows()):
            if any(hinted):
                found = [pattern for pattern, hint in zip(patterns, hinted, strict=True) if hint]
                texts[index], masked[index] = mask_text(texts[index], found)
        table = with_column(table, "masked", masked)
        return with_text(table, texts) if any(masked) else table
