"""The page at `/`: ask the model, and see its documents, versions, recent answers and load.

One page without anything from elsewhere, put together from the files beside this module. Its form is made from the JSON
schema of the domain's request. Whatever comes from a model, a document or a customer enters the page as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

from twinloop.domains.domain import Domain
from twinloop.serving.decisions import OWNERS

Access = Literal["token", "here", "nobody"]
"""Who is an administrator: who has the token, whoever is at the server's own machine, or nobody."""

FOLDER = Path(__file__).parent
SCRIPTS = ("base", "form", "answer", "ask", "chat", "documents", "versions", "traces", "load", "start")
"""In the order in which they run; each uses what those before it define."""


@dataclass(frozen=True)
class Page:
    """The HTML, and the Content-Security-Policy that goes with it: only the page's own script and style run, and they
    may talk only to this server."""

    html: str
    policy: str


def console_page(domain: Domain, *, access: Access, releases: bool) -> Page:
    """The page for a model of this domain. releases: whether the server shows versions, and moves the champion."""
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    script = "\n".join((FOLDER / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    data = json.dumps(_described(domain, access, releases)).replace("<", "\\u003c")  # nothing in it ends the element
    parts = {"style": style, "name": escape(domain.name), "data": data, "script": script}
    html = re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], (FOLDER / "page.html").read_text(encoding="utf-8"))
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Page(html, policy)


def _described(domain: Domain, access: Access, releases: bool) -> dict[str, Any]:
    """What the script knows of the domain and the server; a part that is false has no tab."""
    decides = domain.request is not None
    return {
        "request": domain.request.model_json_schema() if domain.request is not None else None,
        "example": dict(domain.example),
        "chat": domain.serves_chat,
        "documents": bool(domain.passages),
        "checks": {name: predicate.title for name, predicate in domain.predicates.items()},
        "own_checks": [*OWNERS],
        "answers": decides,
        "versions": releases,
        "access": access,
    }


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
