"""A server with several HTTP workers (``--tokenizer-worker-num``): we are in each of them, and it
ends when its scheduler does.

SGLang has uvicorn start the workers, which load no plugins; and uvicorn's supervisor swallows the
signal by which SGLang learns that a scheduler died (SIGQUIT; uvicorn 0.54), so that every request
would wait for ever.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

from aurora_sgl import environment

logger = logging.getLogger("aurora_sgl")

SGLANGS_APP = "sglang.srt.entrypoints.http_server:app"
OUR_APP = "aurora_sgl.engine.http_worker:app"
_LOOK_SECONDS = 1.0
_STOP_SECONDS = 20.0


def run_uvicorn(original: Callable[..., Any], app: Any, *args: Any, **kw: Any) -> Any:
    """Around ``uvicorn.run``."""
    idle, several = environment.is_set(environment.IDLE), (kw.get("workers") or 1) != 1
    if idle or app != SGLANGS_APP or not several:
        return original(app, *args, **kw)
    watch = ProcessWatch(multiprocessing.active_children())
    try:
        watch.start()
    except RuntimeError as error:  # no room for a thread
        logger.warning("aurora: nobody watches SGLang's processes: %s", error)
    app = OUR_APP if environment.value(environment.STAMP) else app
    try:
        result = original(app, *args, **kw)
    finally:
        watch.over.set()
    if watch.dead is not None:
        raise SystemExit(1)
    return result


class ProcessWatch:
    """Ends this server when one of the processes that it can't do without has ended."""

    def __init__(self, needed: Sequence[BaseProcess]) -> None:
        self.dead: BaseProcess | None = None
        self.over = threading.Event()  # no worker is left
        self._needed = list(needed)

    def start(self) -> None:
        threading.Thread(target=self._run, name="aurora-scheduler-watch", daemon=True).start()

    def _run(self) -> None:
        while self.dead is None:
            if self.over.wait(_LOOK_SECONDS):
                return
            self.dead = next((one for one in self._needed if not one.is_alive()), None)
        logger.error(
            "aurora: process %s of SGLang ended (exit code %s), without which no request is "
            "answered: this server ends",
            self.dead.pid,
            self.dead.exitcode,
        )
        os.kill(os.getpid(), signal.SIGTERM)  # uvicorn starts no worker any more
        begun = time.monotonic()
        while not self.over.wait(0.2):
            # Requests that wait for ever would hold the workers up.
            for process in multiprocessing.active_children():
                process.kill()
            if time.monotonic() - begun > _STOP_SECONDS:
                os._exit(1)
