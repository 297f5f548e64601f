"""Which language a document seems to be in: by its script, and by function words within the Latin one.

A filter against the wrong language, not a classifier: it tells apart what it lists, looks at the first 20,000
characters, and needs a few sentences. Cyrillic counts as ru whatever its language, Devanagari as hi, Arabic script as
ar.
"""

from __future__ import annotations

import re
from collections import Counter

from data_prep.clean_config import LanguageConfig

_LOOKED_AT = 20_000
_SCRIPTS = {"ru": "\u0400-\u04ff", "el": "\u0370-\u03ff", "ar": "\u0600-\u06ff", "he": "\u0590-\u05ff",
            "hi": "\u0900-\u097f", "th": "\u0e00-\u0e7f", "ko": "\u1100-\u11ff\uac00-\ud7af",
            "ja": "\u3040-\u30ff", "zh": "\u3400-\u9fff"}
_SCRIPT_PATTERNS = {code: re.compile(f"[{characters}]") for code, characters in _SCRIPTS.items()}
_LATIN = re.compile("[A-Za-z\u00c0-\u024f]")
_WORD = re.compile(r"[^\W\d_]+")
_FUNCTION_WORDS = {code: frozenset(words.split()) for code, words in {
    "en": "the of and to in is that for was with on are as be this by have not but from they his her which you it at",
    "de": "der die und das den von zu mit ist im des nicht ein eine auf für sich dem auch es an werden aus er hat dass",
    "fr": "le la les de des et en un une est que dans qui pour par sur au avec plus ne pas du ce il sont aux cette",
    "es": "el la los las de que y en un una es por con para se del no al lo como más su fue o pero sus está",
    "it": "il la di che e un una è per in del della non con si le dei da sono i al nel più gli come anche alla",
    "pt": "o a os as de que e do da em um uma é com não para se por no na dos mais como ao das foi seu são",
    "nl": "de het een van en in is dat op te zijn met voor niet aan er om ook als bij door maar naar dan wordt werd",
}.items()}
CODES = (*_FUNCTION_WORDS, *_SCRIPTS)
Problem = tuple[str, str]


def language_of(text: str) -> tuple[str, float]:
    """(code, share that speaks for it): characters of its script, or of words those that are its function words.

    ("unknown", 0) where there are no letters.
    """
    text = text[:_LOOKED_AT]
    scripts = {code: len(pattern.findall(text)) for code, pattern in _SCRIPT_PATTERNS.items()}
    latin = len(_LATIN.findall(text))
    letters = latin + sum(scripts.values())
    if letters == 0:
        return "unknown", 0.0
    if scripts["ja"] > 0.05 * letters:  # Japanese is written with Han characters too
        scripts["ja"] += scripts["zh"]
    code, count = max(scripts.items(), key=lambda entry: entry[1])
    if count > latin:
        return code, count / letters
    words = Counter(word.lower() for word in _WORD.findall(text))
    shares = {code: sum(words[word] for word in known) / max(1, words.total())
              for code, known in _FUNCTION_WORDS.items()}
    return max(shares.items(), key=lambda entry: entry[1])


def language_problem(text: str, config: LanguageConfig) -> Problem | None:
    """("language", what it seems to be) for a document of none of the allowed languages."""
    code, share = language_of(text)
    if code in config.allow and share >= config.min_share:
        return None
    return "language", f"{code}, {share:.3f} of it speaks for that; {', '.join(config.allow)} at {config.min_share:g}"
