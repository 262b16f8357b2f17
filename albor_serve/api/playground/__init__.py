"""The page at `/`: an editor with ghost text, to try a model and see where its time goes.

Everything comes from package data and from this server alone, so the page works offline; its
Content-Security-Policy lets no other script, style or address in.
"""

from __future__ import annotations

from importlib import resources

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

__all__ = ["add_playground", "page", "wants_page"]

MEDIA_TYPES = {
    "editor.LICENSE.txt": "text/plain",
    "editor.min.js": "text/javascript",
    "icon.svg": "image/svg+xml",
    "playground.css": "text/css",
    "playground.js": "text/javascript",
}
SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    # After an upgrade the page and its script must not be of two versions.
    "cache-control": "no-cache",
}


def add_playground(app: FastAPI) -> None:
    """Add the routes of the page's files; the page itself is `page()`, at a URL of the caller's."""
    app.add_api_route("/playground/{name}", _asset, methods=["GET"], include_in_schema=False)


def wants_page(request: Request) -> bool:
    """Whether a browser asks, rather than a program that wants plain text."""
    return "text/html" in request.headers.get("accept", "")


def page() -> Response:
    """The page; it refers to files under /playground/."""
    return _file("index.html", "text/html")


async def _asset(name: str) -> Response:
    """A script, a style sheet or an image of the page."""
    media_type = MEDIA_TYPES.get(name)
    if media_type is None:
        raise HTTPException(404)
    return _file(name, media_type)


def _file(name: str, media_type: str) -> Response:
    data = resources.files(__name__).joinpath("assets", name).read_bytes()
    return Response(data, headers=SECURITY_HEADERS, media_type=media_type)
