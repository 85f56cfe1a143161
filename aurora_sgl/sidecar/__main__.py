"""``python -m aurora_sgl.sidecar --endpoint DIR``: the sidecar process."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from pydantic import ValidationError

from aurora_sgl import environment, logs
from aurora_sgl.config import get_settings, variable_of
from aurora_sgl.errors import AuroraError
from aurora_sgl.private import keep_to_owner, settle
from aurora_sgl.processes.priority import step_back
from aurora_sgl.sidecar.service import SidecarService
from aurora_sgl.sidecar.supervisor import LAST_WORDS

#: Serving comes first on a machine that has few cores.
NICENESS = 10


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 stopped as asked, 1 could not start."""
    parser = argparse.ArgumentParser(prog="python -m aurora_sgl.sidecar", description=__doc__)
    parser.add_argument("--endpoint", type=Path, required=True, help="folder of the sockets")
    parser.add_argument("--parent-pid", type=int, default=0, help="stop when this process ends")
    parser.add_argument(
        "--spool", type=Path, help="folder of the spool (default: in the data folder)"
    )
    parser.add_argument("--replica", type=int, default=0, help="which of a server's sidecars it is")
    chosen = parser.parse_args(arguments)
    keep_to_owner()
    logs.begin(environment.logs_as_json())
    logging.getLogger("alembic").setLevel(logging.WARNING)  # two lines a look at the revision
    step_back(NICENESS)
    try:
        settings = get_settings()
        service = SidecarService(
            settings,
            chosen.endpoint,
            spool=chosen.spool,
            parent_pid=chosen.parent_pid,
            replica=chosen.replica,
        )
    except Exception as error:
        line = f"{LAST_WORDS}{_why(error)}"  # which the supervisor reads
        print(logs.as_record(line) if environment.logs_as_json() else line, file=sys.stderr)
        return 1
    if line := settle(settings.home, settings.artifact_root, settings.artifact_access):
        logging.getLogger(__name__).warning("%s", line)
    service.ending.on_signals(signal.SIGTERM, signal.SIGINT)
    service.run()
    return 0


def _why(error: Exception) -> str:
    if isinstance(error, AuroraError):
        return str(error)
    if isinstance(error, ValidationError):
        return f"setting {variable_of(error)}: {error.errors()[0]['msg']}"
    logging.getLogger(__name__).exception("the sidecar can't start")
    return " ".join(f"{type(error).__name__}: {error}".split())


def _end(code: int) -> NoReturn:
    """Leave without the interpreter's own clearing up.

    All that counts is on the disk by now. Clearing up takes a second of the processor's time, which
    on a busy machine, at our priority, is more than the server waits for us before it kills.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _end(main())
