"""The command line as other users and roles meet it: every command with arguments that would do
something, run by a process that imported everything before and forks for each of them."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

#: A user and group of no name, whom nothing belongs to.
STRANGER = 54_321
#: Slow to import, once for all commands; and what the commands import of a Python that may lie in a
#: folder which the other user can't read.
HEAVY = (
    "encodings.idna", "encodings.utf_8_sig", "getpass", "pwd", "stringprep",
    "aurora_sgl.backup", "aurora_sgl.cli", "aurora_sgl.demo.run", "aurora_sgl.doctor",
    "aurora_sgl.erasure", "aurora_sgl.evaluation.compare", "aurora_sgl.rollout",
    "aurora_sgl.scheduler.service", "aurora_sgl.serving", "aurora_sgl.sidecar.__main__",
    "aurora_sgl.sidecar.retry", "aurora_sgl.store.postgres", "aurora_sgl.training.__main__",
    "aurora_sgl.training.run", "dashboard.server", "streamlit",
)  # fmt: skip
#: Processes of ours that are no command, by the name that the table below has for them.
MODULES = {
    "-m aurora_sgl.sidecar": "aurora_sgl.sidecar.__main__",
    "-m aurora_sgl.training": "aurora_sgl.training.__main__",
}


class Ended(NamedTuple):
    """``code`` is None for a process that had to be ended after ``seconds``."""

    code: int | None
    out: str
    err: str
    seconds: float


def commands() -> list[str]:
    """Names of all commands, from the parser itself: ``serve``, ``db prune``, ``dashboard``."""
    import typer
    from typer.core import TyperGroup

    from aurora_sgl.cli import app

    def below(command: Any, name: str) -> Iterator[str]:
        if not isinstance(command, TyperGroup) or command.invoke_without_command:
            yield name
        for each, inner in getattr(command, "commands", {}).items():
            yield from below(inner, f"{name} {each}".strip())

    return list(below(typer.main.get_command(app), ""))


class CommandLine:
    """Runs commands, each in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        uid: int = 0,
        folder: Path,
        seconds: float = 20.0,
        module: str = "",
        enough: str = "",
    ) -> Ended:
        """``uid``: the user, and the only group; 0: as this process. ``folder``: where it starts.
        ``module``: instead of the command line. ``enough``: it is ended once it has said this."""
        asked = {"arguments": list(arguments), "environment": dict(environment), "uid": uid,
                 "folder": str(folder), "seconds": seconds, "module": module,
                 "enough": enough}  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return Ended(*json.loads(self._process.stdout.readline()))


@contextmanager
def command_line() -> Iterator[CommandLine]:
    """A process that waits for commands to run."""
    process = subprocess.Popen(
        [sys.executable, "-m", __name__], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        yield CommandLine(process)
    finally:
        process.communicate()


def _serve() -> dict[str, Any] | None:
    """Runs what is asked for until nobody asks; in a child, what it is to be."""
    import importlib

    for name in HEAVY:
        importlib.import_module(name)
    gc.freeze()
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            begun = time.monotonic()
            child = os.fork()
            if not child:
                _become(asked, out.fileno(), err.fileno())
                return asked
            code = _end_of(child, asked, (out, err))
            took = time.monotonic() - begun
            texts = [_text_of(file) for file in (out, err)]
        print(json.dumps([code, *texts, took]), flush=True)
    return None


def _become(asked: dict[str, Any], out: int, err: int) -> None:
    """A process of that user, of its own session, with that environment and nothing to read."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, place in enumerate((nothing, out, err)):
        os.dup2(place, number)
    for name in [name for name in os.environ if name.startswith("AURORA_")]:
        del os.environ[name]
    os.environ.update(asked["environment"])
    if asked["uid"]:
        for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
            os.environ.pop(name, None)
        os.setgroups([])
        os.setgid(asked["uid"])
        os.setuid(asked["uid"])
    os.chdir(asked["folder"])
    sys.argv = ["aurora-sgl", *asked["arguments"]]


def _end_of(child: int, asked: dict[str, Any], files: Sequence[IO[bytes]]) -> int | None:
    """Its exit code, None when it was ended; what it started ends with it."""
    until = time.monotonic() + asked["seconds"]
    done, status = 0, 0
    while not done and time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if asked["enough"] and any(asked["enough"] in _text_of(file) for file in files):
            break
        time.sleep(0.005)
    with suppress(ProcessLookupError):  # it left nothing
        os.killpg(child, signal.SIGKILL)
    if done:
        return os.waitstatus_to_exitcode(status)
    os.waitpid(child, 0)
    return None


def _text_of(file: IO[bytes]) -> str:
    """Without moving the place at which the child writes."""
    return os.pread(file.fileno(), 1 << 20, 0).decode(errors="backslashreplace")


def _end(job: dict[str, Any]) -> None:
    """As the interpreter ends, without taking all modules down, which takes a second."""
    import atexit
    import importlib
    import threading

    code: Any = 0
    try:
        code = importlib.import_module(job["module"] or "aurora_sgl.cli").main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    if (job := _serve()) is not None:
        _end(job)
