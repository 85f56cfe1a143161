"""A PgBouncer of Debian's before a PostgreSQL of the tests."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.engine import make_url


def program() -> str:
    path = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin")
    assert path, "these tests need a PgBouncer (Debian: apt install pgbouncer)"
    return path


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@contextmanager
def pgbouncer(database_url: str, *, connections: int = 2) -> Iterator[str]:
    """The URL of the same database through a pooler in transaction mode, with so many connections
    to share. Every login name is let in, and is PostgreSQL's own superuser behind it."""
    url = make_url(database_url)
    folder, port = Path(tempfile.mkdtemp(prefix="aurora-test-pgb-")), free_port()
    settings = folder / "pgbouncer.ini"
    settings.write_text(
        f"""[databases]
{url.database} = host={url.query["host"]} dbname={url.database} user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {connections}
logfile = {folder / "log"}
"""
    )
    command = [program(), str(settings)]
    if os.geteuid() == 0:  # it refuses to run as root
        user = pwd.getpwnam(Path(str(url.query["host"])).owner())  # who may open the socket
        for path in (folder, settings):
            os.chown(path, user.pw_uid, user.pw_gid)
        command[1:1] = ["-u", user.pw_name]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, process, folder / "log")
        yield f"postgresql://anybody@127.0.0.1:{port}/{url.database}"
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            written = log.read_text() if log.exists() else ""
            assert process.poll() is None and time.monotonic() < deadline, written
            time.sleep(0.05)
