"""C4's rules for pages (Raffel et al. 2020, section 2.2): lines that are no sentences are taken out."""

from __future__ import annotations

import re

from data_prep.clean_config import WebConfig

_END = re.compile(r"[.!?][\"'”’)\]]?$")
_SENTENCE = re.compile(r"[.!?][\"'”’)\]]*(?:\s|$)")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
Problem = tuple[str, str]


def web_text(text: str, config: WebConfig) -> tuple[str, Problem | None]:
    """What is left of a page, or (reason, detail) for dropping it."""
    lower = text.lower()
    if config.curly_brackets and "{" in text:
        return text, ("web_curly_bracket", f"at character {text.index('{')}")
    if config.lorem_ipsum and "lorem ipsum" in lower:
        return text, ("web_lorem_ipsum", f"at character {lower.index('lorem ipsum')}")
    kept = [line for line in text.split("\n") if _keeps(line.strip(), config)]
    left = "\n".join(kept)
    sentences = len(_SENTENCE.findall(left))
    if sentences < config.min_sentences:
        return left, ("web_few_sentences", f"{sentences} left, {config.min_sentences} at least")
    return left, None


def _keeps(line: str, config: WebConfig) -> bool:
    if config.terminal_punctuation and (not _END.search(line) or line.endswith("...")):
        return False
    if len(line.split()) < config.min_line_words:
        return False
    lower = line.lower()
    return not ((config.javascript and "javascript" in lower)
                or (config.policy and any(phrase in lower for phrase in _POLICY)))
