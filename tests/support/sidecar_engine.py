"""The engine's side of the sidecar's sockets, and the sidecar as a real process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from aurora_sgl import wire
from aurora_sgl.sidecar.endpoint import address


def wait_until(
    condition: Callable[[], Any], seconds: float = 60.0, what: str = "it", *, pause: float = 0.05
) -> Any:
    """The first true value of ``condition``; fails after ``seconds`` of a machine that does nothing
    else, which one that many share may take thrice as long for. ``pause``: seconds between two
    looks; more for a costly one, which takes the processor from what is waited for."""
    deadline = time.monotonic() + min(3 * seconds, seconds + 300)
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(pause)
    raise AssertionError(f"{what} did not happen within {seconds} s")


class Sidecar:
    """One sidecar process."""

    def __init__(self, home: Path, endpoint: Path, *options: str, **settings: object) -> None:
        self.home, self.endpoint = home, endpoint
        self.log = home / "sidecar.log"
        home.mkdir(parents=True, exist_ok=True)
        self._options = options
        self._environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("AURORA_")},
            "AURORA_HOME": str(home),
            "OMP_NUM_THREADS": "1",
            **{f"AURORA_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "aurora_sgl.sidecar", "--endpoint", str(self.endpoint),
                 *self._options],
                env=self._environment, stdout=log, stderr=log, cwd=self.home,
            )  # fmt: skip

    def wait_ready(self) -> None:
        wait_until(lambda: self.text().count(": ready: ") == self.starts, 30, "a ready sidecar")

    def text(self) -> str:
        return self.log.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(20)

    def get(self, path: str) -> tuple[int, str]:
        url = json.loads((self.endpoint / "health.json").read_text())["url"]
        try:
            with urllib.request.urlopen(url + path, timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


class Engine:
    """What the plugin does with the sockets: numbers its envelopes, says hello, obeys commands."""

    def __init__(self, endpoint: Path, boot_id: int, **server: object) -> None:
        endpoint.mkdir(parents=True, exist_ok=True)
        self.boot_id = boot_id
        self.server: dict[str, Any] = {
            "name": "test:30000",
            "target_model": "target",
            "target_revision": "",
            "draft_architecture": "LlamaForCausalLMEagle3",
            "dtype": "bfloat16",
            "sglang_version": "0.5.21",
            "aux_layers": [1, 2, 3],
            **server,
        }
        self.context = zmq.Context()
        self.records = self.context.socket(zmq.PUSH)
        self.traces = self.context.socket(zmq.PUSH)
        self.commands = self.context.socket(zmq.PULL)
        for name in ("records", "traces", "commands"):
            socket = getattr(self, name)
            socket.linger = 0
            socket.reconnect_ivl = 50
            socket.connect(address(endpoint, name))
        self.seq = 0
        self.sent = 0  # records in those envelopes
        self.live = 0
        self.swaps = 0
        self.dropped = 0
        self.counters: dict[str, float] = {}
        self.notices: dict[str, str] = {}
        self.heard: list[wire.Command] = []
        self.staged_at: list[float] = []  # seconds of the monotonic clock
        self.refuse = ""
        self.forgets = False  # a part of the weights, when it reads them back
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def send(self, *records: wire.Record) -> int:
        with self._lock:
            self.seq += 1
            envelope = wire.Envelope(self.boot_id, self.seq, list(records), self.sent)
            self.sent += len(records)
            self.records.send(wire.encode(envelope))
            return self.seq

    def hello(self) -> None:
        self.send(
            wire.Hello(
                self.boot_id,
                os.getpid(),
                self.server,
                self.live,
                self.swaps,
                self.dropped,
                self.counters,
                self.notices,
            )
        )

    def trace(
        self, request_id: int, start: int, tokens: list[int], rows: int, **changes: Any
    ) -> None:
        fields: dict[str, Any] = {
            "dtype": "float32", "aux_width": 6, "last_width": 2, "final": False,
            "output_start": 4, "greedy": True, "step_starts": [], **changes,
        }  # fmt: skip
        header = wire.TraceHeader(self.boot_id, request_id, start, tokens, **fields)
        aux = np.random.rand(rows, fields["aux_width"]).astype(np.float32).tobytes()
        last = np.random.rand(rows, fields["last_width"]).astype(np.float32).tobytes()
        self.traces.send_multipart([wire.encode(header), aux, last])

    def run(self) -> None:
        """Say hello every half second and obey commands, as the scheduler's loop does."""
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        last = 0.0
        while not self._stop.wait(0.02):
            if time.monotonic() - last > 0.5:
                last = time.monotonic()
                self.hello()
            while True:
                try:
                    command = wire.decode_command(self.commands.recv(zmq.NOBLOCK))
                except zmq.Again:
                    break
                self.heard.append(command)
                if isinstance(command, wire.Identify):
                    self.live = self.live or command.version_id
                elif isinstance(command, wire.SetPhase):
                    self.counters["speculation_share"] = command.share
                elif isinstance(command, wire.SetCapture):
                    self.counters["capture_share"] = command.share
                elif isinstance(command, wire.Stage):
                    self._swap(command)
                elif isinstance(command, wire.LiveHash):
                    self._done(command.version_id, command.live_sha256)

    def _swap(self, command: wire.Stage) -> None:
        self.staged_at.append(time.monotonic())
        if self.refuse:
            self._done(command.version_id, "")
            return
        path = Path(command.path)
        weights = bytearray(path.read_bytes())
        if self.forgets:
            weights[-100:] = bytes(100)
        path.write_bytes(weights)  # cut, and read back from the model
        self.live = command.version_id
        self.swaps += 1
        self.send(wire.LiveCopied(self.boot_id, wire.now_us(), command.version_id))

    def _done(self, version_id: int, sha256: str) -> None:
        self.send(
            wire.SwapDone(
                self.boot_id,
                wire.now_us(),
                version_id,
                not self.refuse,
                self.refuse,
                sha256,
                5.0,
                1.0,
            )
        )

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.context.destroy(linger=0)


def end_all(running: Iterable[Sidecar | Engine]) -> None:
    """Whatever a test started is gone."""
    for one in running:
        if isinstance(one, Engine):
            one.close()
        else:
            one.process.kill()
            one.process.wait()
