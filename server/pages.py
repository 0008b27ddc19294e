"""The pages: one to chat, one about the API. Each is a single file that may run its own script and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

_SCRIPT = re.compile("<script>(.*?)</script>", re.DOTALL)


def make_router() -> APIRouter:
    """``/`` and ``/docs``."""
    router = APIRouter()
    for path, name in (("/", "page.html"), ("/docs", "docs.html")):
        router.add_api_route(
            path, _Page(name), methods=["GET"], response_class=HTMLResponse, include_in_schema=False
        )
    return router


class _Page:
    """Answers with one file; read once."""

    def __init__(self, name: str) -> None:
        self.text = files("qwenvl_mlx.server").joinpath(name).read_text(encoding="utf-8")
        self.headers = {
            "Content-Security-Policy": policy_of(self.text),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }

    async def __call__(self) -> HTMLResponse:
        return HTMLResponse(self.text, headers=self.headers)


def policy_of(page: str) -> str:
    """Nothing from elsewhere; of scripts only those in the file, known by their hashes: text can't become one."""
    digests = (hashlib.sha256(script.encode()).digest() for script in _SCRIPT.findall(page))
    scripts = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    rules = (
        "default-src 'none'",
        f"script-src {scripts}",
        "style-src 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return "; ".join(rules)
