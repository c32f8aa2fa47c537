"""What a client may send as text, made into one line that every vocabulary can read."""

from __future__ import annotations

import unicodedata


def tidy(text: str) -> str:
    """Half surrogate pairs, which JSON can spell and UTF-8 cannot, become U+FFFD; control characters become spaces."""
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return "".join(" " if unicodedata.category(c) == "Cc" else c for c in whole)
