"""A receiver of webhooks that can be away, refuse or hang, and remembers what it took."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Handler(BaseHTTPRequestHandler):
    server: _Listener

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        owner = self.server.owner
        owner.tries += 1
        time.sleep(owner.delay)
        self.send_response(owner.answer)
        for name, value in owner.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()
        if owner.answer == 200:
            owner.taken.append((dict(self.headers.items()), body))

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Listener(ThreadingHTTPServer):
    owner: WebhookReceiver
    daemon_threads = True


class WebhookReceiver:
    """``answer``: the status that it gives; only what it answered with 200 counts as taken."""

    def __init__(self) -> None:
        self.answer, self.delay, self.tries = 200, 0.0, 0
        self.headers: dict[str, str] = {}
        self.taken: list[tuple[dict[str, str], bytes]] = []
        self._port = 0
        self._listener: _Listener | None = None
        self.open()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/hook"

    def open(self) -> None:
        """Listen, on the port of before."""
        self._listener = _Listener(("127.0.0.1", self._port), _Handler)
        self._listener.owner = self
        self._port = self._listener.server_address[1]
        threading.Thread(target=self._listener.serve_forever, daemon=True).start()

    def close(self) -> None:
        if self._listener is not None:
            self._listener.shutdown()
            self._listener.server_close()
            self._listener = None

    def letters(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.taken]

    def kinds(self) -> Counter[str]:
        """How many different notifications came, by kind; states of alerts apart."""
        by_id = {one["data"]["id"]: one for one in self.letters()}
        return Counter(map(_kind, by_id.values()))


def _kind(letter: dict[str, Any]) -> str:
    state = letter["data"].get("details", {}).get("state")
    return f"{letter['type']}/{state}" if state else str(letter["type"])
