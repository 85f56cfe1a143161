"""What Streamlit's server answers is narrowed to what our pages need."""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

#: Below the base path: uploads, counters, components and the interface for agents. Whoever opens
#: the login could otherwise put files of 200 MB each into the dashboard's memory.
CLOSED = (
    *("_stcore/upload_file", "_stcore/metrics", "_stcore/agent", "_stcore/bidi-components"),
    "component/",
)
#: Pictures that the login shows too; all else under ``media`` was made for somebody.
PICTURES = (".svg", ".png", ".ico")


class Guard:
    """ASGI middleware: closed endpoints are not there, and what pages offer for download is there
    for those who are logged in, though its address (a hash of the content) can't be guessed."""

    def __init__(self, app: ASGIApp, base: str, knows: Callable[[Request], bool]) -> None:
        self._app = app
        self._closed = tuple(f"{base}/{path}" for path in CLOSED)
        self._media = f"{base}/media/"
        self._knows = knows

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._refusal(scope) if scope["type"] == "http" else None
        await (answer or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        path = scope["path"]
        if path.startswith(self._closed):
            return PlainTextResponse("not found", 404)
        download = path.startswith(self._media) and not path.endswith(PICTURES)
        if download and not self._knows(Request(scope)):
            return PlainTextResponse("log in first", 403)
        return None
