"""Text of data on a terminal."""

from __future__ import annotations


def excerpt(text: str, chars: int) -> str:
    """The first `chars` characters (0: all), saying how many follow, with control characters spelled out.

    Data must not steer the terminal.
    """
    shown = text[:chars] if chars else text
    safe = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in shown)
    return safe + (f" [... {len(text) - len(shown):,} more]" if len(shown) < len(text) else "")
