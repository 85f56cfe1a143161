"""A TCP proxy before a PostgreSQL of the tests that, from some moment on, takes everything that its
clients send and passes nothing on: what is left of a connection when the machine behind it went."""

from __future__ import annotations

import selectors
import socket
import threading
from pathlib import Path

from sqlalchemy.engine import make_url


class SwallowingProxy:
    """``swallow()``: for the connections that there are. New ones are passed on."""

    def __init__(self, database_url: str) -> None:
        url = make_url(database_url)
        self._behind = str(Path(str(url.query["host"])) / ".s.PGSQL.5432")
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.url = f"postgresql://postgres@127.0.0.1:{port}/{url.database}"
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._others: dict[socket.socket, socket.socket] = {}
        self._silent: set[socket.socket] = set()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def swallow(self) -> None:
        self._silent.update(self._others)

    def close(self) -> None:
        self._wake.close()
        self._thread.join(10)
        for one in (*self._others, self._listener, self._woken):
            one.close()
        self._selector.close()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._woken:
                    return
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._pass_on(key.fileobj)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        server = socket.socket(socket.AF_UNIX)
        server.connect(self._behind)
        for one, other in ((client, server), (server, client)):
            self._others[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _pass_on(self, one: socket.socket) -> None:
        if one not in self._others:
            return
        try:
            data = one.recv(65536)
            if data and one not in self._silent:
                self._others[one].sendall(data)
        except OSError:
            data = b""
        if data:
            return
        # Of a silent pair the other side never learns that this one ended.
        for gone in (one,) if one in self._silent else (one, self._others[one]):
            if self._others.pop(gone, None):
                self._selector.unregister(gone)
                gone.close()
