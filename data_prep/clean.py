"""The cleaning steps on one text: rewrite, mask, take out lines, judge. Functions of the text and their section."""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field

from data_prep.clean_config import CleanConfig, NormalizeConfig, PiiConfig
from data_prep.language import language_problem
from data_prep.quality import quality_problem
from data_prep.web import web_text

_LINE_ENDS = re.compile("\r\n|[\r\x85\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff]")
_EMAIL = re.compile(r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+"
                    r"[A-Za-z]{2,24}(?![\w-])")
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![\w:])")
"""Public ones begin with 2 or 3 (2000::/3), which a::b of a program does not."""
_KEYS = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----.*?-----END (?:[A-Z0-9]+ )*PRIVATE KEY-----"
    r"|(?<![A-Za-z0-9])(?:AKIA|ASIA)[0-9A-Z]{16}(?![A-Za-z0-9])"          # AWS
    r"|(?<![A-Za-z0-9_])gh[pousr]_[A-Za-z0-9]{36,}"                        # GitHub
    r"|(?<![A-Za-z0-9_])github_pat_[A-Za-z0-9_]{22,}"
    r"|(?<![A-Za-z0-9-])sk-[A-Za-z0-9_-]{20,}"                             # OpenAI, Anthropic
    r"|(?<![A-Za-z0-9_])(?:sk|rk)_(?:live|test)_[A-Za-z0-9]{16,}"          # Stripe
    r"|(?<![A-Za-z0-9-])xox[abposr]-[A-Za-z0-9-]{10,}"                     # Slack
    r"|(?<![A-Za-z0-9_-])AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])"           # Google
    r"|(?<![A-Za-z0-9_])hf_[A-Za-z0-9]{30,}"                               # Hugging Face
    r"|(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",  # JSON web tokens
    re.DOTALL)
_KEY_SIGNS = ("PRIVATE KEY-", "AKIA", "ASIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "sk-", "sk_live_",
              "sk_test_", "rk_live_", "rk_test_", "xox", "AIza", "hf_", "eyJ")
_IPV4_SIGN, _IPV6_SIGN = re.compile(r"\.\d{1,3}\.\d"), re.compile(r"::|:[0-9A-Fa-f]{1,4}:")
"""What a text without them need not be searched for: found ten times as fast as what they are signs of."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """Why a step drops a document, and the figure that decided it."""

    reason: str
    detail: str


@dataclass(slots=True)
class Cleaner:
    """The steps that a config asks for. `changes` counts documents that a step changed and what it replaced."""

    config: CleanConfig
    changes: Counter[str] = field(default_factory=Counter)

    def rewrite(self, text: bytes) -> bytes:
        """The text normalised and masked: the steps that pairs have too."""
        config = self.config
        if config.normalize is None and config.pii is None:
            return text
        decoded = text.decode()
        if config.normalize is not None:
            normal = normalize(decoded, config.normalize)
            self.changes["normalized"] += normal != decoded
            decoded = normal
        if config.pii is not None:
            decoded, found = mask(decoded, config.pii)
            self.changes.update(found)
        return decoded.encode()

    def document(self, text: bytes) -> bytes | Dropped:
        """The cleaned text of a document, or the first step that drops it. Valid UTF-8 in, valid UTF-8 out."""
        config, text = self.config, self.rewrite(text)
        if config.web is None and config.quality is None and config.language is None:
            return text if text.strip() else Dropped("nothing_left", "cleaning leaves only white space")
        decoded = text.decode()
        if config.web is not None:
            kept, problem = web_text(decoded, config.web)
            if problem is not None:
                return Dropped(*problem)
            self.changes["web_lines_taken_out"] += decoded.count("\n") - kept.count("\n")
            decoded, text = kept, kept.encode()
        problem = None if config.quality is None else quality_problem(decoded, config.quality)
        if problem is None and config.language is not None:
            problem = language_problem(decoded, config.language)
        if problem is not None:
            return Dropped(*problem)
        return text if decoded.strip() else Dropped("nothing_left", "cleaning leaves only white space")


def normalize(text: str, config: NormalizeConfig) -> str:
    """NFC, one kind of line end, no control characters but tab and line end. Applying it twice changes nothing."""
    if config.line_ends:
        text = _LINE_ENDS.sub("\n", text)
    if config.control_characters:
        text = _CONTROL.sub("", text)
    return unicodedata.normalize("NFC", text) if config.nfc and not text.isascii() else text


def mask(text: str, config: PiiConfig) -> tuple[str, dict[str, int]]:
    """The text with marks in place of addresses and keys, and how many of each."""
    counts = {}
    if config.keys and any(sign in text for sign in _KEY_SIGNS):
        text, counts["masked_keys"] = _KEYS.subn("[KEY]", text)
    if config.emails and "@" in text:
        text, counts["masked_emails"] = _EMAIL.subn("[EMAIL]", text)
    if config.ip_addresses:
        found = 0

        def address(match: re.Match[str]) -> str:
            nonlocal found
            if not _is_public(match[0]):
                return match[0]
            found += 1
            return "[IP]"
        text = _IPV4.sub(address, text) if _IPV4_SIGN.search(text) else text
        text = _IPV6.sub(address, text) if _IPV6_SIGN.search(text) else text
        counts["masked_ip_addresses"] = found
    return text, counts


def _is_public(text: str) -> bool:
    """Whether this is an address of the public internet: 10.0.0.1, 127.0.0.1 and version numbers like 1.2.3.400 no."""
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False
