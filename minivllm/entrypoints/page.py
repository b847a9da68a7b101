"""GET /: the page where one can talk to the model and watch the engine, ui/index.html.

One file with its script and its style in it. The Content-Security-Policy names both by their hash and lets the page
call nothing but its own server: nothing can be added to it, and nothing leaves.

Called by app.py. Twin in vLLM: none.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files

from flask import Response


@dataclass(frozen=True, slots=True)
class Page:
    """The page and its policy, read once."""

    html: str
    policy: str

    @classmethod
    def load(cls) -> Page:
        html = (files("minivllm.entrypoints") / "ui" / "index.html").read_text(encoding="utf-8")
        return cls(html, content_security_policy(html))

    def show(self) -> Response:
        headers = {
            "Content-Security-Policy": self.policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }
        return Response(self.html, mimetype="text/html", headers=headers)


def content_security_policy(html: str) -> str:
    """Nothing but the page's own script and style, and calls to where it came from."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hashes('script', html)}",
            f"style-src {_hashes('style', html)}",
            "img-src data:",  # the icon
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


def _hashes(tag: str, html: str) -> str:
    bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(body.encode("utf-8")).digest()).decode("ascii") for body in bodies]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
