"""Everything that breaks, at random, under load: what is lost, what is twice, what fails?

A real server with its sidecar, a scheduler that trains and promotes, a dashboard, on PostgreSQL or
on SQLite, and streams that ask all the time. Meanwhile, in a random order: processes are killed
(-9), the database is stopped, hung, made read-only or replaced by a replica that is some seconds
behind, the disk of the data folder fills up, the clock is set back by an hour. Afterwards each
answer is held against its rows. Aims: every verify step that SGLang counted is stored or counted as
lost, none twice; no request fails but those of a server that was killed itself; a training run
succeeds after the last fault.

    python -m benchmarks.chaos [--database postgresql|sqlite] [--kills 5] [--each 1] [--seed 0]
    python -m benchmarks.chaos --long            # 200 kills and each fault ten times

Where the data folder can't have a file system of its own (that takes root), or no C compiler is
there, the fault that needs it is left out, which the table says.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import Engine, text

from aurora_sgl import store
from aurora_sgl.clock import utc_now
from aurora_sgl.config import Settings
from aurora_sgl.demo.prompts import sample_prompts
from aurora_sgl.errors import AuroraError
from aurora_sgl.processes.server import ServerProcess, free_port
from aurora_sgl.serving import plan
from aurora_sgl.store import queries
from benchmarks.outage import RULES, Postgres, Traffic, postgres, wait
from benchmarks.servers import arguments, report, target

FAULT_SECONDS = (5.0, 15.0)  # how long one lasts
PAUSE_SECONDS = (3.0, 10.0)  # between two
#: A replica is so far behind what it replaces.
BEHIND_SECONDS = 10.0
#: Records of so many seconds before a kill may still have been in the engine, which is gone.
UNSENT_SECONDS = 3.0
#: Steps of requests whose start was lost: the store does not know what the client called them.
NAMELESS = (
    "SELECT count(*) FROM acceptance_event JOIN request ON request.id = request_id WHERE rid = ''"
)
READY_SECONDS, DRAIN_SECONDS, LEARN_SECONDS = 600.0, 300.0, 1200.0
DISK_BYTES = 1 << 30  # of the data folder's file system
READY = "ready: spool"  # of the sidecar's log
CLOCK_FILE = "CLOCK_OFFSET_FILE"  # see clock_offset.c
#: In turn; a server takes a minute to come back, and a trainer has to be there first.
PROCESSES = (
    "server", "sidecar", "scheduler", "dashboard", "sidecar",
    "trainer", "sidecar", "scheduler", "dashboard", "sidecar",
)  # fmt: skip


@dataclass
class World:
    """What runs, and when which server was not there."""

    home: Path
    url: str  # of the store
    flags: list[str]
    environment: dict[str, str]
    database: Postgres | None  # None: SQLite
    port: int = field(default_factory=free_port)
    away: list[tuple[float, float]] = field(default_factory=list)  # time.monotonic()
    begun: float = field(default_factory=time.monotonic)
    counts: Counter[str] = field(default_factory=Counter)
    _server: ServerProcess | None = None
    _others: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    #: When the sidecar was killed, and how long its log was then.
    _sidecar_killed: tuple[float, int] = (0.0, 0)

    def start_server(self) -> None:
        log = self.home / "logs" / "server.log"
        environment = {**self.environment, "AURORA_EXIT_WITH_PARENT": "1"}
        self._server = ServerProcess(self.flags, port=self.port, log=log, environment=environment)
        self._server.start()
        self._server.wait_ready(READY_SECONDS)

    def start(self, name: str) -> None:
        """The scheduler, or the dashboard."""
        arguments = {"scheduler": [], "dashboard": ["--port", str(free_port())]}[name]
        with (self.home / "logs" / f"{name}.log").open("ab") as log:
            self._others[name] = subprocess.Popen(
                [sys.executable, "-m", "aurora_sgl.cli", name, *arguments],
                env={**os.environ, **RULES, **self.environment},
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def kill(self, name: str) -> bool:
        """With -9; what nobody else starts again is started here. False: it does not run."""
        if name == "server":
            self._kill_server()
        elif name in self._others:
            self._others[name].kill()
            self._others[name].wait()
            self.start(name)
        else:
            process = self._child(name)
            if process is None:
                return False
            if name == "sidecar":
                self._sidecar_killed = time.monotonic(), len(self._sidecar_log())
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.counts[f"kill {name}"] += 1
        return True

    def _kill_server(self) -> None:
        assert self._server is not None
        begun = self._handed_over_until()
        pids = [self._server.pid, *(p.pid for p in psutil.Process(self._server.pid).children(True))]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._server.stop()
        self.start_server()
        self.away.append((begun, time.monotonic()))

    def _handed_over_until(self) -> float:
        """What the engine said later may still be in it: its sidecar was not back."""
        killed, length = self._sidecar_killed
        is_back = READY in self._sidecar_log()[length:]
        return time.monotonic() if is_back or not killed else killed

    def _sidecar_log(self) -> str:
        return (self.home / "logs" / "sidecar.log").read_text(errors="replace")

    def _child(self, name: str) -> psutil.Process | None:
        if name == "sidecar":
            parent, word = self._server.pid if self._server else 0, "aurora_sgl.sidecar"
        else:
            parent, word = self._others["scheduler"].pid, "aurora_sgl.training"
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(parent).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if word in " ".join(process.cmdline()):
                        return process
        return None

    def stop(self) -> None:
        for process in self._others.values():
            process.terminate()
        for process in self._others.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
        if self._server is not None:
            self._server.stop()

    def excuses(self, begun: float, ended: float) -> bool:
        """Whether the server was killed, or not there yet, at any moment in between."""
        return any(begun <= back and ended >= killed for killed, back in self.away)


# -- faults: each begins, lasts and ends ----------------------------------------------------------


def _stopped(world: World, seconds: float) -> None:
    assert world.database is not None
    world.database.stop()
    time.sleep(seconds)
    world.database.start()


def _hung(world: World, seconds: float) -> None:
    """Its processes stand still: connections stay open and nobody answers."""
    assert world.database is not None
    head = psutil.Process(int((world.database.folder / "postmaster.pid").read_text().split()[0]))
    processes = [head, *head.children(recursive=True)]
    for process in processes:
        process.suspend()
    time.sleep(seconds)
    for process in processes:
        process.resume()


def _read_only(world: World, seconds: float) -> None:
    _administer(world, "ALTER SYSTEM SET default_transaction_read_only = on")
    time.sleep(seconds)
    _administer(world, "ALTER SYSTEM RESET default_transaction_read_only")


def _administer(world: World, statement: str) -> None:
    engine = store.connect(world.url)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(statement))
        connection.execute(text("SELECT pg_reload_conf()"))
    engine.dispose()


def _failed_over(world: World, seconds: float) -> None:
    """To a replica that lacks the last seconds before the failure."""
    assert world.database is not None
    folder = world.database.folder
    replica = folder.with_name("replica")
    world.database.stop()
    subprocess.run(["cp", "-a", str(folder), str(replica)], check=True)
    world.database.start()
    time.sleep(BEHIND_SECONDS)
    world.database.stop()
    shutil.rmtree(folder)
    replica.rename(folder)
    time.sleep(seconds / 2)
    world.database.start()


def _locked(world: World, seconds: float) -> None:
    """Another program has the file for itself."""
    engine = store.connect(world.url)
    with engine.connect() as connection:  # BEGIN IMMEDIATE: see store.connection
        connection.execute(text("SELECT 1"))
        time.sleep(seconds)
    engine.dispose()


def _disk_full(world: World, seconds: float) -> None:
    filler = world.home / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 20)):
            pass
    time.sleep(seconds)
    filler.unlink()


def _clock_back(world: World, seconds: float) -> None:
    file = Path(world.environment[CLOCK_FILE])
    set_clock(file, -3600)
    time.sleep(seconds)
    set_clock(file, 0)


Fault = Callable[[World, float], None]
ON_POSTGRESQL: dict[str, Fault] = {
    "database stopped": _stopped,
    "database hung": _hung,
    "database read-only": _read_only,
    "failed over to a replica that is behind": _failed_over,
}
ON_SQLITE: dict[str, Fault] = {"database locked": _locked}


def faults(world: World) -> dict[str, Fault]:
    """What can be done to this world."""
    possible = dict(ON_SQLITE if world.database is None else ON_POSTGRESQL)
    if os.path.ismount(world.home):
        possible["disk of the data folder full"] = _disk_full
    if CLOCK_FILE in world.environment:
        possible["clock an hour back"] = _clock_back
    return possible


@contextmanager
def data_folder(into: Path) -> Iterator[Path]:
    """A file system of its own for the data folder, in memory, where that is allowed."""
    home = into / "home"
    home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0700", "tmpfs", str(home)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        (home / "logs").mkdir()
        yield home
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(home)], check=False)


def clock(into: Path) -> dict[str, str]:
    """Variables under which a process takes its time of day off by what a file says; none where
    there is no C compiler."""
    library, file = into / "clock_offset.so", into / "clock"
    source = Path(__file__).with_name("clock_offset.c")
    compiler = shutil.which("cc")
    if compiler is None:
        return {}
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, source], check=True)
    set_clock(file, 0)
    return {"LD_PRELOAD": str(library), CLOCK_FILE: str(file)}


def set_clock(file: Path, seconds: int) -> None:
    with file.open("r+b" if file.exists() else "xb") as open_file:
        open_file.write(seconds.to_bytes(8, sys.byteorder, signed=True))


@contextmanager
def running(model: Path, drafter: str | None, on_sqlite: bool) -> Iterator[World]:
    """Server, sidecar, scheduler and dashboard."""
    with ExitStack() as stack:
        into = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aurora-chaos-")))
        home = stack.enter_context(data_folder(into))
        database = None if on_sqlite else stack.enter_context(postgres())
        settings = Settings(home=home, database_url=database.url if database else "")
        given = ["--max-total-tokens", "8192", "--max-running-requests", "8"]
        texts = [prompt.prompt for prompt in sample_prompts()]
        made = plan(str(model), drafter, given, settings, sample_texts=texts)
        environment = {
            **made.environment, **clock(into), "OMP_NUM_THREADS": "1",
            "AURORA_DATABASE_URL": settings.store_url, "AURORA_SPECULATION": "on",
            "AURORA_CAPTURE_BYTES": str(256 << 20),
        }  # fmt: skip
        world = World(home, settings.store_url, made.flags, environment, database)
        stack.callback(world.stop)
        world.start_server()
        world.start("scheduler")
        world.start("dashboard")
        yield world


# -- the run and the count -------------------------------------------------------------------------


def break_things(world: World, kills: int, each: int, draw: random.Random) -> None:
    possible = faults(world)
    todo = [name for name in possible for _ in range(each)] + ["kill"] * kills
    draw.shuffle(todo)
    names = [PROCESSES[number % len(PROCESSES)] for number in range(kills)]
    for number, what in enumerate(todo, 1):
        time.sleep(draw.uniform(*PAUSE_SECONDS))
        if what == "kill":
            what = f"kill {names[-1]}"
            wait(lambda: world.kill(names[-1]), LEARN_SECONDS, what)
            names.pop()
        else:
            possible[what](world, draw.uniform(*FAULT_SECONDS))
            world.counts[what] += 1
        passed = time.monotonic() - world.begun
        print(f"{passed:5.0f} s {number}/{len(todo)} {what}", file=sys.stderr, flush=True)


def rows_of(engine: Engine, rid: str) -> tuple[int, int, bool]:
    """(rows of the request, of its verify steps, whether its end is there)."""
    with store.session(engine, write=False) as s:
        requests = queries.requests.requests_by_rid(s, rid)
        steps = sum(len(queries.events.events(s, request.id)) for request in requests)
        return len(requests), steps, any(one.status != "running" for one in requests)


def count(world: World, traffic: Traffic) -> dict[str, Any]:
    """Of the answers whose server lived long enough to hand everything over."""
    engine = store.connect(world.url)
    compared = [a for a in traffic.answers if not world.excuses(a.asked, a.at + UNSENT_SECONDS)]
    deadline = time.monotonic() + DRAIN_SECONDS
    left = compared
    while left and time.monotonic() < deadline:
        left = [answer for answer in left if not rows_of(engine, answer.rid)[2]]
        time.sleep(0.5)
    rows = [rows_of(engine, answer.rid) for answer in compared]
    steps = [(answer.verify_steps, row[1]) for answer, row in zip(compared, rows, strict=True)]
    missing = sum(max(0, made - there) for made, there in steps)
    for answer, (made, there) in zip(compared, steps, strict=True):
        if made > there:
            when = f"answered {answer.at - world.begun:.0f} s"
            print(f"{when}: {there} of {made} steps are there", file=sys.stderr, flush=True)
    with store.session(engine, write=False) as s:
        group_id = queries.groups.groups(s)[0].id
        drops = queries.drops.drops(s, group_id)
        nameless = s.scalar(text(NAMELESS)) or 0
    engine.dispose()
    lost = sum(number for place, number in drops.items() if place != "trace")
    ours = [one for one in traffic.failures if not world.excuses(*one)]
    return {
        "answers": len(traffic.answers),
        "compared": len(compared),
        "verify steps": sum(made for made, _ in steps),
        "missing": missing,
        "of them stored without a rid": nameless,
        "counted as lost": lost,
        "unexplained": max(0, missing - nameless - lost),
        "twice": sum(row[0] > 1 for row in rows) + sum(there > made for made, there in steps),
        "failed with a dead server": len(traffic.failures) - len(ours),
        "failed": len(ours),
    }


def learnt(world: World, since: Any) -> bool:
    """Whether a training run that began after all faults has succeeded."""
    engine = store.connect(world.url)
    try:
        with store.session(engine, write=False) as s:
            runs = queries.runs.runs(s, queries.groups.groups(s)[0].id, limit=5)
        return any(run.status == "succeeded" and run.started_at > since for run in runs)
    finally:
        engine.dispose()


def in_time(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(1.0)
    return true


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--database", choices=("postgresql", "sqlite"), default="postgresql")
    parser.add_argument("--kills", type=int, default=5, help="kill -9, each process in turn")
    parser.add_argument("--each", type=int, default=1, help="times that each other fault comes")
    parser.add_argument("--long", action="store_true", help="200 kills, each fault ten times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="add them to results/operation.jsonl")
    given = parser.parse_args()
    kills, each = (200, 10) if given.long else (given.kills, given.each)
    try:
        with running(target(given), given.drafter, given.database == "sqlite") as world:
            traffic = Traffic(f"http://127.0.0.1:{world.port}")
            traffic.start()
            wait(lambda: len(traffic.answers) >= 4, READY_SECONDS, "answers")
            break_things(world, kills, each, random.Random(given.seed))
            since = utc_now()
            print("waiting for a training run", file=sys.stderr, flush=True)
            goes_on = in_time(lambda: learnt(world, since), LEARN_SECONDS)
            traffic.stop()
            loop = "goes on" if goes_on else f"no run in {LEARN_SECONDS:.0f} s"
            row = {"database": given.database, **count(world, traffic), "loop": loop}
            done = [{"what": name, "times": times} for name, times in world.counts.items()]
    except AuroraError as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 1
    report("what was broken", done, as_json=given.json)
    title = "after it (aims: 0 unexplained, 0 twice, 0 failed)"
    keep = f"chaos {given.database}" if given.keep else ""
    report(title, [row], as_json=given.json, keep=keep)
    return 1 if row["unexplained"] or row["twice"] or row["failed"] or not goes_on else 0


if __name__ == "__main__":
    sys.exit(main())
