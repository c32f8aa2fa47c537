"""The one page, and the policy under which a browser shows it: its own script and style, and requests to its origin."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Page:
    html: str
    policy: str
    """Content-Security-Policy, with the digests of what stands inline."""


def load_page() -> Page:
    html = (files(__package__) / "page.html").read_text(encoding="utf-8")
    script, style = (_digests(html, tag) for tag in ("script", "style"))
    return Page(
        html,
        f"default-src 'none'; script-src {script}; style-src {style}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    )


def _digests(html: str, tag: str) -> str:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in found)
