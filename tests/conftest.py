"""Shared pieces of the tests: a store on each database that the project supports."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text

# Two test processes on two cores: a second thread of PyTorch's would only spin for its turn (a
# test of five seconds took 150). Before anything imports PyTorch; processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_numbers = itertools.count(1)
_BEGUN = time.monotonic()

#: Of the end-to-end tests the files that share one server; the others start their own.
SHARED_SERVER = tuple(
    f"tests/e2e/test_{name}.py"
    for name in (
        *("dashboard", "identity", "odd_requests", "parameters", "records"),
        *("replay_served", "sampling", "swap", "watch"),
    )
)
_SHAPES = "tests/e2e/test_identity.py::test_other_draft_shapes_give_hugging_faces_tokens"
#: Servers of their own for minutes each, and for one question. They come last, and those that have
#: not begun when AURORA_TEST_MINUTES are over are skipped, with a line that says so: a machine that
#: is half as fast as others still comes to an end in time.
LAST = (
    "tests/e2e/test_ranks.py",
    "tests/e2e/test_outage.py",
    "tests/e2e/test_two_servers.py",
    f"{_SHAPES}[chain]",
    f"{_SHAPES}[wide tree]",
)
#: Of files that share something those that need nothing of it.
ALONE = (
    "tests/e2e/test_demo.py::test_ctrl_c_leaves_no_process_behind",
    "tests/e2e/test_demo.py::test_a_demo_whose_server_ends_says_so_and_ends",
    "tests/e2e/test_identity.py::"
    "test_without_speculation_our_cpu_kernels_give_hugging_faces_tokens",
    *(one for one in LAST if "::" in one),
)


@pytest.fixture(autouse=True)
def _process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test leaves to its process. Streamlit's `AppTest` puts its script as `__main__`: the
    next process that is spawned would run it. A command of ours that runs here sets the umask."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    umask = os.umask(0o077)
    os.umask(umask)
    yield
    os.umask(umask)


@pytest.fixture(autouse=True)
def _no_running_loop(request: pytest.FixtureRequest) -> Iterator[None]:
    """Once a browser was there, its loop stands in this thread as if it ran: a test without one
    could not start its own."""
    loop = asyncio._get_running_loop()
    if loop is None or "chromium" in request.fixturenames:
        yield
        return
    asyncio._set_running_loop(None)
    yield
    asyncio._set_running_loop(loop)


COUNTED = "counted under"  # a property of a test
MARKS = ("engine", "browser", "process", "slow", "gpu")
#: Folders whose tests are marked as a whole.
MARKED = {
    "e2e": "engine",
    "pages": "browser",
    "integration": "process",
    "unit/processes": "process",
}


class _AtOnce:
    """Why a test failed, as soon as it did: whoever waits an hour for the end reads it meanwhile,
    and whoever is ended before the end has it."""

    def __init__(self, config: pytest.Config) -> None:
        self._plugins = config.pluginmanager  # the terminal's reporter comes after this one

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self._plugins.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            took = f"{report.when}, {report.duration:.0f} s"
            terminal.write_line(f"\nFAILED {report.nodeid} ({took})", red=True)
            terminal.write_line("\n".join(report.longreprtext.splitlines()[-60:]))
            terminal.flush()


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_AtOnce(config))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    items.sort(key=_comes_last)
    for item in items:
        place = item.path.relative_to(here).as_posix() if here in item.path.parents else ""
        for folder, mark in MARKED.items():
            if place.startswith(f"{folder}/"):
                item.add_marker(mark)
        first = next((mark for mark in MARKS if item.get_closest_marker(mark)), "unit")
        item.user_properties.append((COUNTED, first))


def _comes_last(item: pytest.Item) -> bool:
    return item.nodeid.startswith(LAST)


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = float(os.environ.get("AURORA_TEST_MINUTES", "inf"))
    if _comes_last(item) and time.monotonic() - _BEGUN > 60 * minutes:
        pytest.skip(f"{minutes:.0f} minutes are over (AURORA_TEST_MINUTES)")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Where the time goes, by mark: a test counts under the first of its marks."""
    seconds, counts = Counter[str](), Counter[str]()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                mark = str(dict(report.user_properties).get(COUNTED, "unit"))
                seconds[mark] += report.duration
                counts[mark] += report.when == "call"
    terminalreporter.section("seconds by mark")
    for mark, total in seconds.most_common():
        terminalreporter.write_line(f"{mark:10} {counts[mark]:6d} tests {total:8.0f} s")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several processes: the tests that share running servers in one of them, from the start,
    those that share a browser in one, the others file by file, or alone where they start servers of
    their own."""
    from xdist.scheduler import LoadScopeScheduling

    class SharedServers(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if nodeid in ALONE:
                return nodeid
            if file in SHARED_SERVER:
                return "server"
            return "pages" if file.startswith("tests/pages/") else file

    config.option.loadscopereorder = False  # longest first by number of tests, not by time
    return SharedServers(config, log)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A real PostgreSQL of our own, started from the package pgserver; gone after the tests.

    Not under pytest's own temporary folder: run as root, the server is another user, and each
    pytest that starts closes that folder to others.
    """
    folder = Path(tempfile.mkdtemp(prefix="aurora-test-pg-"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pgserver's platformdirs warns about XDG_RUNTIME_DIR
            server = _start_postgres(folder / "data")
        url = server.get_uri().replace("postgresql://", "postgresql+psycopg://")
        _make_quick(url)
        yield url
        with suppress(Exception):  # the folder goes all the same
            server.cleanup()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start_postgres(folder: Path) -> Any:
    """pgserver 0.1.4 gives pg_ctl ten seconds, too few for a busy machine; the server comes up
    all the same, and a second look finds it."""
    import pgserver
    from pgserver.postgres_server import PostgresServer

    for _ in range(6):
        try:
            return pgserver.get_server(folder, cleanup_mode="delete")
        except (subprocess.SubprocessError, AssertionError):
            PostgresServer._instances.pop(folder.resolve(), None)
            time.sleep(5)
    raise RuntimeError(f"PostgreSQL did not start in {folder}; see its file named log")


def _make_quick(url: str) -> None:
    """Nothing here outlives the machine, so nothing waits for the disk. Commits are still written
    (synchronous_commit stays on): a test kills the server and wants them back."""
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        for setting in ("fsync", "full_page_writes"):
            connection.execute(text(f"ALTER SYSTEM SET {setting} = off"))
        connection.execute(text("SELECT pg_reload_conf()"))
    admin.dispose()


def _create_database(postgres_url: str, template: str = "template1") -> str:
    """The name of a new database."""
    name = f"test_{next(_numbers)}"
    _administer(postgres_url, f"CREATE DATABASE {name} TEMPLATE {template}")
    return name


def _administer(postgres_url: str, statement: str) -> None:
    admin = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(statement))
    admin.dispose()


@contextmanager
def new_database(postgres_url: str, template: str = "template1") -> Iterator[str]:
    name = _create_database(postgres_url, template)
    yield postgres_url.replace("/postgres?", f"/{name}?")
    _administer(postgres_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def postgres_database(postgres_url: str) -> Iterator[str]:
    """The URL of an empty database of the test's own."""
    with new_database(postgres_url) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, of each kind in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'aurora.db'}"
    return str(request.getfixturevalue("postgres_database"))


@pytest.fixture(scope="session")
def upgraded_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store at the newest schema, for tests to copy: quicker than migrating for each."""
    path = tmp_path_factory.mktemp("store") / "aurora.db"
    _upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def upgraded_postgres(postgres_url: str) -> str:
    """The name of a database at the newest schema, for tests to copy. It goes with its server:
    at the end of a session the server may be on its way out already."""
    name = _create_database(postgres_url)
    _upgrade(postgres_url.replace("/postgres?", f"/{name}?"))
    return name


def _upgrade(url: str) -> None:
    from aurora_sgl import store

    engine = store.connect(url)
    store.upgrade(engine)
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """An engine of a store at the newest schema, on each database in turn."""
    from aurora_sgl import store

    with ExitStack() as stack:
        if request.param == "sqlite":
            shutil.copy(request.getfixturevalue("upgraded_sqlite"), tmp_path / "aurora.db")
            url = f"sqlite:///{tmp_path / 'aurora.db'}"
        else:
            template = request.getfixturevalue("upgraded_postgres")
            url = stack.enter_context(
                new_database(request.getfixturevalue("postgres_url"), template)
            )
        engine = store.connect(url)
        yield engine
        engine.dispose()
