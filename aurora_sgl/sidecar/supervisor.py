"""Keeps a sidecar process running beside the engine. Knows nothing of sglang."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from aurora_sgl.config import Settings
from aurora_sgl.errors import AuroraError
from aurora_sgl.private import make_folder, opener
from aurora_sgl.sidecar.endpoint import HEALTH_FILE, NAMES, address

BACKOFF_SECONDS = (0.5, 30.0)
#: A sidecar that ran this long was healthy: the next failure starts the pauses anew.
HEALTHY_SECONDS = 60.0
STOP_SECONDS = 10.0
#: Seconds in which a sidecar that starts says where it answers.
ADDRESS_SECONDS = 30.0
LOG_BYTES = 10 << 20
#: Of the line with which a sidecar that can't start ends.
LAST_WORDS = "aurora-sgl sidecar: "

log = logging.getLogger(__name__)


class SidecarSupervisor:
    """Starts the sidecar, starts it again when it dies, stops it.

    The sidecar ends by itself when this process does, however that happens.
    """

    def __init__(self, settings: Settings, endpoint_dir: Path, replica: int = 0) -> None:
        """``replica``: which of a server's sidecars it is. Raises ``AuroraError`` for a folder
        whose socket paths are too long."""
        for name in NAMES:
            address(endpoint_dir, name)
        self._settings = settings
        self._endpoint = endpoint_dir.absolute()
        self._replica = replica
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.restarts = 0
        self.log_path = settings.home.resolve() / "logs" / "sidecar.log"

    @property
    def pid(self) -> int:
        """Of the running sidecar; 0 when there is none."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else 0

    def start(self) -> None:
        """Raises ``AuroraError`` when the log or the endpoint can't be written."""
        self._process = self._spawn()
        self._thread = threading.Thread(target=self._watch, name="sidecar-watch", daemon=True)
        self._thread.start()

    def _spawn(self) -> subprocess.Popen[bytes]:
        try:
            make_folder(self.log_path.parent)
            make_folder(self._endpoint)
            if self.log_path.exists() and self.log_path.stat().st_size > LOG_BYTES:
                os.replace(self.log_path, self.log_path.with_suffix(".log.1"))
            (self._endpoint / HEALTH_FILE).unlink(missing_ok=True)
            with open(self.log_path, "ab", opener=opener) as log_file:
                return subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "aurora_sgl.sidecar",
                        "--endpoint",
                        str(self._endpoint),
                        "--parent-pid",
                        str(os.getpid()),
                        "--replica",
                        str(self._replica),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=log_file,
                    stderr=log_file,
                    env=self._environment(),
                    start_new_session=True,  # Ctrl-C is for the server, which then stops us
                )
        except OSError as error:
            raise AuroraError(f"can't start the sidecar: {error}") from error

    def _environment(self) -> dict[str, str]:
        """Of the process that is started."""
        environment = {**os.environ, **as_variables(self._settings)}
        environment["AURORA_HOME"] = str(self._settings.home.resolve())
        environment.setdefault("OMP_NUM_THREADS", "1")
        return environment

    def _watch(self) -> None:
        pause = BACKOFF_SECONDS[0]
        while True:
            process = self._process
            assert process is not None
            started = time.monotonic()
            self._tell_address(process)
            code = process.wait()
            if self._stopping.is_set():
                return
            if time.monotonic() - started > HEALTHY_SECONDS:
                pause = BACKOFF_SECONDS[0]
            log.warning(
                "the sidecar ended with %d%s; nothing is stored until it runs: starting it again "
                "in %.1f s, see %s",
                code,
                self._reason(code),
                pause,
                self.log_path,
            )
            if self._stopping.wait(pause):
                return
            pause = min(2 * pause, BACKOFF_SECONDS[1])
            try:
                self._process = self._spawn()
                self.restarts += 1
                if self._stopping.is_set():
                    self._process.terminate()
            except AuroraError as error:
                log.error("%s", error)

    def _tell_address(self, process: subprocess.Popen[bytes]) -> None:
        """Say in the server's log where the sidecar answers, once it does."""
        file, deadline = self._endpoint / HEALTH_FILE, time.monotonic() + ADDRESS_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):
                url = json.loads(file.read_text())["url"]
                log.info("health and metrics of the sidecar at %s", url)
                return
            if self._stopping.wait(0.2):
                return

    def _reason(self, code: int) -> str:
        """What a sidecar that could not start said last."""
        try:
            with self.log_path.open("rb") as log_file:
                log_file.seek(max(0, self.log_path.stat().st_size - 4096))
                last = log_file.read().decode(errors="replace").rstrip().splitlines()[-1]
        except (OSError, IndexError):
            return ""
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line for people
            last = str(json.loads(last)["message"])
        return (
            f" ({last.removeprefix(LAST_WORDS)})"
            if code == 1 and last.startswith(LAST_WORDS)
            else ""
        )

    def stop(self) -> None:
        """Ask the sidecar to drain and end; kill it when it takes too long."""
        self._stopping.set()
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)


def as_variables(settings: Settings) -> dict[str, str]:
    """The settings of this process, whatever they came from, so that another one reads the same.
    What is nothing has no variable; the port of health is the sidecar's own to choose."""
    return {
        f"AURORA_{name.upper()}": value if isinstance(value, str) else json.dumps(value)
        for name, value in settings.model_dump(mode="json").items()
        if value is not None and (name != "health_port" or name in settings.model_fields_set)
    }
