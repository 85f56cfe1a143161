"""A server of ours as a child process: for the demo, the benchmarks and the tests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import httpx
import psutil

from aurora_sgl.errors import AuroraError
from aurora_sgl.private import given_umask, make_folder, opener

_STOP_SECONDS = 15.0
_DUMP_SECONDS = 1.0


def _catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal (proc(5)): one without would end by it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    mask = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), "0")
    return bool(int(mask, 16) >> (number - 1) & 1)


def free_port() -> int:
    """A TCP port on loopback that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


class ServerProcess:
    """``python -m aurora_sgl.engine.launch`` in its own process group, its output in a file."""

    def __init__(
        self,
        flags: list[str],
        *,
        port: int,
        log: Path,
        environment: Mapping[str, str],
        host: str = "127.0.0.1",
    ) -> None:
        self.url = f"http://{host}:{port}"
        self.log = log
        self._flags = [*flags, "--host", host, "--port", str(port)]
        self._environment = {**os.environ, **environment}
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server was not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        make_folder(self.log.parent)
        self._output = open(self.log, "ab", opener=opener)  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "aurora_sgl.engine.launch", *self._flags],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=self._environment,
            umask=given_umask(),
            start_new_session=True,  # a Ctrl-C of the terminal is ours to pass on, in order
        )

    def wait_ready(
        self, seconds: float = 300.0, waiting: Callable[[float], None] | None = None
    ) -> None:
        """Return when the server answers its health check.

        Raises ``AuroraError`` with the last telling line of its log when it ends or takes longer.
        """
        begun = time.monotonic()
        while time.monotonic() - begun < seconds:
            if not self.running:
                raise AuroraError(f"SGLang did not start: {self.last_words()} (log: {self.log})")
            try:
                if httpx.get(f"{self.url}/health", timeout=5.0).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            if waiting is not None:
                waiting(time.monotonic() - begun)
            time.sleep(0.5)
        self.dump_threads()
        self.stop()
        raise AuroraError(f"SGLang was not ready after {seconds:.0f} s (log: {self.log})")

    def last_words(self) -> str:
        """The last telling line of its log."""
        lines = self.log.read_text(errors="replace").splitlines()
        telling = [line for line in lines if "Error" in line or "error:" in line]
        return (telling or lines or ["no output"])[-1].strip()[:300]

    def dump_threads(self) -> None:
        """Have each of its processes that can write into the log where its threads stand."""
        for process in self.family():
            if _catches(process.pid, signal.SIGUSR2):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGUSR2)
        time.sleep(_DUMP_SECONDS)

    def log_tail(self, lines: int = 60) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def family(self) -> list[psutil.Process]:
        """The server and all its descendants that are alive."""
        try:
            process = psutil.Process(self.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def stop(self) -> None:
        """End the server and everything that it started, politely first."""
        if self._process is None:
            return
        family = self.family()
        if self.running:
            self._process.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs(family, timeout=_STOP_SECONDS)
        for process in alive:
            process.kill()
        # What was spawned while we waited, or lost its parent, is still of our process group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        psutil.wait_procs(alive, timeout=5.0)
        self._process.wait()
        if self._output is not None:
            self._output.close()

    def kill(self) -> None:
        """Kill -9 of the server's processes, as an accident would."""
        for process in self.family():
            process.kill()
        if self._process is not None:
            self._process.wait()
