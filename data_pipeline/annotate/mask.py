"""Personal data and secrets give way to fixed placeholders: mail and network addresses, phone numbers, keys.

What looks like one is a candidate, and who hands them out decides: a mail address ends in a suffix of the Public Suffix
List (ICANN's part, which has every top-level domain of IANA's), a network address is global by Python's `ipaddress`, a
telephone number is one that Google's libphonenumber knows to be assigned. Keys have the prefixes their issuers publish
(GitHub's secret scanning, gitleaks), or a name such as `api_key` before a value that looks drawn by chance.

Code is full of strings that look like these and are not, and of addresses that are nobody's: version numbers, private
and documentation networks (RFC 5737, 3849), example domains (RFC 2606), fictional telephone numbers. They stay.
Recall and precision on a labelled set: docs/results/masking.md.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from ipaddress import IPv4Address, ip_address, ip_network
from typing import Literal, NamedTuple

import phonenumbers
import polars as pl
import pyarrow as pa
from publicsuffixlist import PublicSuffixList

from data_pipeline.annotate.step import Step, with_column, with_text

Kind = Literal["email", "ip", "phone", "secret"]
Span = tuple[int, int] | None       # what is replaced for a match, as positions in its string

# Domains under these are nobody's, or a service's own.
EXAMPLE_DOMAIN = re.compile(
    r"(?:^|\.)(?:example\.(?:com|org|net|edu)|example|test|invalid|localhost|local|openssh\.com|libssh\.org)$", re.I
)
# `out@w.map` multiplies matrices: domains of one letter are believed under these only.
ONE_LETTER_UNDER = frozenset({"com", "net", "org", "edu", "co", "io"})
VERSION_BEFORE = re.compile(
    r"(?:(?:\b|[a-z])versions?|\b(?:release|rev(?:ision)?|ver|v|build|firmware|section|chapter|clause|figure|fig|oid)\.?)"
    r"[\s:=\"'(]*$|(?:[=<>~^!]=|[~^])\s*$|\w/$", re.I)
REGIONS = ("US", "GB", "DE", "FR", "ES", "IT", "NL", "BE", "CH", "AT", "PL", "SE", "PT", "RU", "TR", "IN", "CN", "JP",
           "KR", "AU", "BR", "MX", "ZA")


@cache
def _suffixes() -> PublicSuffixList:
    return PublicSuffixList(accept_unknown=False, only_icann=True)


def _mail(match: re.Match[str]) -> Span:
    """The address, less a sentence that follows the domain's point without a blank."""
    before = match.string[max(0, match.start() - 140) : match.start()]
    local, domain = LOCAL_BEFORE.search(before), match["domain"]
    if local is None:
        return None
    while not _suffixes().publicsuffix(domain.lower()):
        domain, _, last = domain.rpartition(".")
        if "." not in domain or not last.istitle():
            return None
    labels = domain.lower().split(".")
    if local[0] == "git" or EXAMPLE_DOMAIN.search(domain):
        return None
    if len(labels[-2]) == 1 and (len(local[0]) == 1 or labels[-1] not in ONE_LETTER_UNDER):
        return None
    return match.start() - len(local[0]), match.start("domain") + len(domain)


def _international_mail(match: re.Match[str]) -> Span:
    """An address with other letters than ASCII's."""
    span = _mail(match)
    return None if span is None or match.string[slice(*span)].isascii() else span


def _host(match: re.Match[str]) -> Span:
    """The address, if it is that of one machine on the public network."""
    try:
        address = ip_address(match[0])
    except ValueError:
        return None
    if not address.is_global or address.is_multicast or _is_network(match):
        return None
    if isinstance(address, IPv4Address):
        first, second, *_ = address.packed
        # Versions, sections and object identifiers, whose first arc is 0, 1 or 2 and second below 40 or a country.
        numbered = max(address.packed) < 32 or (first < 3 and second < 48)
        if numbered or VERSION_BEFORE.search(match.string, max(0, match.start() - 20), match.start()):
            return None
    elif sum(bool(group) for group in match[0].split(":")) < 3:                     # x[2000::3] is a slice
        return None
    return match.span()


def _is_network(match: re.Match[str]) -> bool:
    """Is it an address with a length of prefix behind it, and no bit set beyond: 34.0.0.0/8?"""
    length = re.compile(r"/\d{1,3}(?!\d)").match(match.string, match.end())
    try:
        return length is not None and ip_network(match[0] + length[0]).num_addresses > 1
    except ValueError:
        return False


def _labelled(match: re.Match[str]) -> Span:
    """A number in any country's own form, after a word such as `Tel.:`."""
    before = match.string[max(0, match.start() - 30) : match.start()]
    return _telephone(match, 7, REGIONS) if LABEL_BEFORE.search(before) else None


def _telephone(match: re.Match[str], fewest: int = 8, regions: Sequence[str] = ("US",)) -> Span:
    """The longest run of the match's groups of digits, of `fewest` or more, that is an assigned number.

    `regions`: whose numbers it may be where it has no code of a country.
    """
    start, text = match.start("value"), match["value"]
    prefix = "+" if text.startswith("00") else ""
    ends = [group.end() for group in re.finditer(r"\d+", text)]
    for end in reversed(ends):
        digits = re.sub(r"\D", "", text[:end])
        if len(digits) < fewest:
            return None
        if re.search(r"55501\d\d$", digits):           # fictional
            return None
        number = prefix + (text[2:end] if prefix else text[:end])
        if len(digits) <= 17 and any(_is_assigned(number, region) for region in regions):
            return start, start + end
    return None


def _national(match: re.Match[str]) -> Span:
    """A whole number with its trunk prefix 0, of ten digits or more if the prefix is not in brackets."""
    span, digits = _telephone(match, 7, REGIONS), re.sub(r"\D", "", match["value"])
    return span if span == match.span("value") and len(digits) >= (7 if match["value"][0] == "(" else 10) else None


def _is_assigned(number: str, region: str) -> bool:
    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(number, region))
    except phonenumbers.NumberParseException:
        return False


def _block(match: re.Match[str]) -> Span:
    return match.span()


def _key(match: re.Match[str]) -> Span:
    """Keys of AWS's documentation say EXAMPLE; a value that is one repeated character is a stand-in."""
    value = match["value"]
    return match.span("value") if "example" not in value.lower() and len(set(value[-16:])) > 4 else None


def _named(match: re.Match[str]) -> Span:
    """A value named key, token or password: hexadecimal, or of digits and letters without order."""
    if not NAMED_BEFORE.search(match.string[max(0, match.start("value") - 40) : match.start("value")]):
        return None
    value = match["value"]
    mixed = all(re.search(letters, value) for letters in ("[a-z]", "[A-Z]", "[0-9]"))
    hexadecimal = re.fullmatch(r"[0-9a-f]{32,}|[0-9A-F]{32,}", value) and re.search("[0-9]", value)
    lower = value.isalnum() and len(set(value)) > 9 and 0.15 < sum(map(str.isdigit, value)) / len(value) < 1
    return _key(match) if mixed or hexadecimal or lower else None


def _password(match: re.Match[str]) -> Span:
    return _key(match) if re.search("[0-9]", match["value"]) and re.search("[A-Za-z]", match["value"]) else None


class Pattern(NamedTuple):
    """Where personal data of one kind may stand, and what of a match is it."""

    kind: Kind
    hint: str                       # a text without a match of this has none of `expression`: quick to tell, by polars
    expression: re.Pattern[str]
    accepts: Callable[[re.Match[str]], Span]


PLACEHOLDERS: dict[Kind, str] = {
    "email": "<EMAIL>", "ip": "<IP_ADDRESS>", "phone": "<PHONE_NUMBER>", "secret": "<SECRET>",
}
LETTER = r"A-Za-z\u00c0-\u024f\u0370-\u052f"          # of alphabets whose words stand apart
LOCAL = rf"[{LETTER}0-9._%+\-]"
LOCAL_BEFORE = re.compile(       # o'brien, but not a string's prefix; or of letters of one script without blanks
    rf"(?<!{LOCAL[:-1]}@])(?:(?![fbruFBRU]{{1,2}}'){LOCAL}{{1,30}}'){{0,2}}{LOCAL}{{1,64}}\Z"
    r"|(?<!\w)[^\W\x00-\x7f]{1,64}\Z")
AT = r"(?:@|＠|%40|&#64;|&#x40;|&commat;)"
# Issuers' own grammars; gitleaks (github.com/gitleaks/gitleaks, config) collects them.
KEYS = (
    r"(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}",                                                 # AWS
    r"gh[pousr]_[A-Za-z0-9]{36,}", r"github_pat_[A-Za-z0-9_]{40,}",
    r"gl(?:pat|dt|rt|ptt|ft|soat|cbt|oas)-[A-Za-z0-9_\-]{20,}",                               # GitLab
    r"glsa_[A-Za-z0-9]{32}_[A-Fa-f0-9]{8}",                                                 # Grafana
    r"xox[abeoprs]-[A-Za-z0-9\-]{20,}", r"xapp-\d-[A-Za-z0-9\-]{20,}",                     # Slack
    r"https://hooks\.slack\.com/(?:services|workflows)/[A-Za-z0-9/+]{40,}",
    r"(?:hf|api_org)_[A-Za-z0-9]{34}", r"AIza[0-9A-Za-z_\-]{35}", r"GOCSPX-[0-9A-Za-z_\-]{28}",
    r"ya29\.[0-9A-Za-z_\-]{20,}",
    r"[rs]k_(?:live|test|prod)_[0-9A-Za-z]{20,}", r"whsec_[0-9A-Za-z+/=]{32,}",             # Stripe
    r"sk-[A-Za-z0-9]{32,}", r"sk-(?:proj|svcacct|admin|ant|or)-[A-Za-z0-9_\-]{32,}", r"gsk_[A-Za-z0-9]{52}",
    r"xai-[A-Za-z0-9]{80}",
    r"r8_[A-Za-z0-9]{37}", r"pplx-[A-Za-z0-9]{48}",
    r"npm_[A-Za-z0-9]{36}", r"pypi-[A-Za-z0-9_\-]{60,}", r"rubygems_[a-f0-9]{48}", r"dckr_pat_[A-Za-z0-9_\-]{27,}",
    r"SG\.[A-Za-z0-9_\-]{22}\.[A-Za-z0-9_\-]{43}", r"SK[0-9a-f]{32}", r"key-[0-9a-z]{32}",   # SendGrid, Twilio, Mailgun
    r"do[opr]_v1_[a-f0-9]{64}", r"dapi[a-f0-9]{32}", r"hv[sb]\.[A-Za-z0-9_\-]{24,}",        # DigitalOcean ...
    r"shp(?:at|ca|pa|ss)_[A-Fa-f0-9]{32}", r"sq0(?:atp|csp|idp)-[0-9A-Za-z_\-]{22,43}", r"lin_api_[A-Za-z0-9]{40}",
    r"(?:secret|ntn)_[A-Za-z0-9]{43,46}", r"NRAK-[A-Z0-9]{27}", r"AGE-SECRET-KEY-1[0-9A-Z]{58}",
    r"PMAK-[a-f0-9]{24}-[a-f0-9]{34}",
    r"sbp_[a-f0-9]{40}", r"ATATT3[A-Za-z0-9_\-=]{100,}", r"figd_[A-Za-z0-9_\-]{40,}", r"dp\.pt\.[A-Za-z0-9]{40,44}",
    r"eyJ[A-Za-z0-9_\-]{10,}\.eyJ[A-Za-z0-9_\-]{10,}\.[A-Za-z0-9_\-]{10,}",                 # JSON Web Token
)
# Without a prefix.
BARE_KEYS = (
    r"[0-9a-f]{32}-us\d{1,2}", r"\d{8,10}:AA[A-Za-z0-9_\-]{33}",                            # Mailchimp, Telegram
    r"[MNO][A-Za-z0-9_\-]{23,25}\.[A-Za-z0-9_\-]{6}\.[A-Za-z0-9_\-]{27,38}",               # Discord
)
NAME = (
    r"(?i:(?:api|secret|access|private|account|auth|encryption|signing)_?-?key|(?:auth|access|refresh|bearer|api|bot|session)"
    r"_?-?token|client_?-?secret|passw(?:or)?d|passwd|secret|token)"
)
NAMED = (rf"(?:{NAME}[\"']?\s{{0,3}}(?::=|=>|[:=])\s{{0,3}}[\"'`]?"
         rf"|(?i:authorization)[\"']?\s{{0,3}}[:=]\s{{0,3}}[\"']?(?i:bearer|basic|token)\s{{1,3}})")
INTERNATIONAL = r"\d[\d ().\-/\u00a0\u2009\u202f\u2010-\u2013]{6,24}\d"
LABEL = (
    r"(?i:(?:tel[ée](?:ph|f)(?:one?|ono?|ax)|tel|phone|fax|mobile?|handy|whatsapp|hotline|t[ée]l[ée]phone|tél|m[óo]vil|"
    r"celular|тел(?:ефон)?)|电话|電話|手机|手機|传真|전화|☎|📞)\.?(?: ?(?i:no|nr|number|nummer)\.?)?"
    r"[\"']?\s{0,2}[:：=]?\s{0,2}[\"']?"
)
NAMED_BEFORE = re.compile(rf"{NAMED}\Z")
LABEL_BEFORE = re.compile(rf"(?<![{LETTER}]){LABEL}\Z")
KEY, BARE_KEY = "|".join(KEYS), "|".join(BARE_KEYS)
NO_WORD = "(?:^|[^A-Za-z0-9_])"     # in hints; without it the many beginnings are looked for one by one
PATTERNS = [
    Pattern("secret", "PRIVATE KEY", re.compile(
        r"-----BEGIN (?P<of>[A-Z0-9 ]{0,20}PRIVATE KEY(?: BLOCK)?)-----(?=.{0,4}\s*[\sA-Za-z0-9+/=:,\\\-]{40})"
        r"(?:(?:(?!-----)[^\"'`])*-----END (?P=of)-----"
        r"|(?:(?:\s|\\[nr])*[A-Za-z0-9+/=]{40,})+)"), _block),                           # END may be cut off
    Pattern("secret", rf"{NO_WORD}(?:{KEY})", re.compile(
        rf"(?<![A-Za-z0-9_\-+.])(?P<value>{KEY})(?![A-Za-z0-9_])"), _key),
    Pattern("secret", rf"{NO_WORD}(?:{BARE_KEY})", re.compile(
        rf"(?<![A-Za-z0-9_\-+.])(?P<value>{BARE_KEY})(?![A-Za-z0-9_])"), _key),
    Pattern("secret", rf"{NAMED}[A-Za-z0-9+/_=\-]{{20}}", re.compile(
        r"(?:[:=>]\s{0,3}[\"'`]?|[rcnRCN]\s{1,3})(?P<value>[A-Za-z0-9+/_\-]{20,}={0,2})(?=[\"'`\s,;&)}<]|$)"), _named),
    Pattern("secret", r"://[^\s:/@]{1,64}:[^\s:/@<{$]{6}", re.compile(
        r"(?<=://)[^\s:/@]{1,64}:(?P<value>[^\s:/@<{$]{6,64})(?=@)"), _password),
    Pattern("email", rf"{LOCAL}{AT}[A-Za-z0-9\-]{{1,63}}\.[A-Za-z]", re.compile(
        rf"{AT}(?P<domain>(?:[A-Za-z0-9\-]{{1,63}}\.){{1,8}}[A-Za-z][A-Za-z0-9\-]{{1,62}})"
        r"(?![A-Za-z0-9_(\[]|\.\w)"), _mail),
    Pattern("email", rf"\w{AT}[^\s@]*[^\x00-\x7f]|[^\x00-\x7f][^\s@]*{AT}|＠", re.compile(
        rf"{AT}(?P<domain>(?:[\w\-]{{1,63}}\.){{1,8}}[^\W\d_]{{2,63}})(?![\w(\[]|\.\w)"), _international_mail),
    Pattern("ip", r"\d\.\d{1,3}\.\d{1,3}\.\d", re.compile(
        r"(?<![\w.])(?<![A-Za-z_]-)(?:\d{1,3}\.){3}\d{1,3}(?!\w|-[A-Za-z_]|\.\d)"), _host),
    Pattern("ip", r"[23][0-9A-Fa-f]{3}:[0-9A-Fa-f]*:", re.compile(
        r"(?<![\w:.])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{1,4}(?!\w|:[\w:]|\.\d)"), _host),
    Pattern("phone", rf"\+[1-9]{INTERNATIONAL[2:]}", re.compile(
        rf"(?<![\w.)\]+\-/])(?P<value>\+[1-9]{INTERNATIONAL[2:]})(?!\w|[.\-]\d)"), _telephone),
    Pattern("phone", rf"(?:^|[^\w.)\]+\-/,])00[1-9]\d{{0,2}}[ .\-/(]{INTERNATIONAL}", re.compile(
        rf"(?<![\w.)\]+\-/,])(?P<value>00[1-9]\d{{0,2}}[ .\-/(]{INTERNATIONAL})(?!\w|[.\-]\d)"), _telephone),
    Pattern("phone", r"[2-9]\d\d\)?[ .\-]?[2-9]\d\d[.\-]\d{4}", re.compile(
        r"(?<![\w.\-+/\[])(?P<value>(?:1[.\- ])?(?:\([2-9]\d\d\) ?|[2-9]\d\d(?P<by>[.\-]))[2-9]\d\d"
        r"(?(by)(?P=by)|[.\-])\d{4})(?![\w\-]|\.\d)"), _telephone),
    Pattern("phone", r"(?:^|[^\w.,:+\-/\[])(?:0[1-9]\d{0,3}[ \-]\d\d|\(0[1-9]\d{0,4}\)[ \-/]?\d)[\d \-]{3}", re.compile(
        r"(?<![\w.,:+\-/\[])(?<!\d )(?P<value>0[1-9]\d{0,3}(?:[ \-]\d{2,8}){1,4}"
        r"|\(0[1-9]\d{0,4}\)[ \-/]?\d[\d \-]{4,10}\d)(?!\w|[ .,:\-/]\d)"), _national),
    Pattern("phone", rf"{LABEL}[(\d]", re.compile(
        rf"(?<![\d(])(?P<value>\(?{INTERNATIONAL})(?!\w|[.\-]\d)"), _labelled),
]


def mask_text(text: str, patterns: Sequence[Pattern]) -> tuple[str, int]:
    """`text` with what `patterns` find replaced by placeholders, and how many replacements that took."""
    replaced = 0
    for pattern in patterns:
        parts, done = [], 0
        for match in pattern.expression.finditer(text):
            span = pattern.accepts(match)
            if span is not None and span[0] >= done:
                parts += [text[done : span[0]], PLACEHOLDERS[pattern.kind]]
                done = span[1]
                replaced += 1
        if parts:
            text = "".join(parts) + text[done:]
    return text, replaced


class Mask(Step):
    """Fills `masked`, the number of replacements; texts and ids follow."""

    name = "mask"

    def __init__(self, kinds: Sequence[Kind]):
        self.kinds = tuple(kinds)

    def apply(self, table: pa.Table) -> pa.Table:
        frame = pl.DataFrame({"text": pl.Series(table["text"])}).with_row_index()
        found: defaultdict[int, list[Pattern]] = defaultdict(list)
        chosen = [pattern for pattern in PATTERNS if pattern.kind in self.kinds]
        # Hardly a text has what any hint asks for. Two looks: the automaton of all hints would outgrow Rust's cache.
        for secret in (True, False):
            patterns = [pattern for pattern in chosen if (pattern.kind == "secret") == secret]
            likely = frame.filter(pl.col("text").str.contains("|".join(f"(?:{pattern.hint})" for pattern in patterns)))
            for pattern in patterns:
                for index in likely.filter(pl.col("text").str.contains(pattern.hint))["index"]:
                    found[index].append(pattern)
        masked = [0] * len(table)
        texts = table["text"].to_pylist()
        for index, hinted in found.items():
            texts[index], masked[index] = mask_text(texts[index], hinted)
        table = with_column(table, "masked", masked)
        return with_text(table, texts) if any(masked) else table
