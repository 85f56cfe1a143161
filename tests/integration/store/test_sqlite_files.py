"""Where a SQLite store lies, and how large its files become."""

from __future__ import annotations

import logging
import sqlite3
import threading
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from aurora_sgl import store
from aurora_sgl.errors import AuroraError
from aurora_sgl.store import sqlite_file
from aurora_sgl.store.sqlite_file import Mount, bound_log, mount_of, network, shrink

MOUNTS = r"""
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
40 27 0:50 / /home rw,nosuid shared:7 - nfs4 nas:/home rw,vers=4.2,addr=10.0.0.1
41 40 8:1 / /home/ada/local\040disk rw,relatime shared:9 master:2 - xfs /dev/sdb1 rw
42 27 0:51 / /snapshots ro,relatime - ext4 /dev/vdc rw
43 27 0:52 / /image rw,relatime - squashfs /dev/loop0 ro
44 27 0:53 / /mnt/share rw - cifs //nas/share rw,vers=3.0
45 27 0:54 / /mnt/ssh rw - fuse.sshfs ada@nas: rw
46 27 0:55 / /mnt/twice rw - nfs nas:/old ro
47 27 0:56 / /mnt/twice rw - tmpfs tmpfs rw
48 27 0:57 / /workspace rw - 9p host rw
49 27 0:58 / /overlay rw - overlay overlay rw,lowerdir=/a
"""


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the kernel is asked: a file that a test writes."""
    path = tmp_path / "mountinfo"
    monkeypatch.setattr(sqlite_file, "_MOUNTS", path)
    return path


@pytest.mark.parametrize(
    ("path", "mount"),
    [
        ("/var/lib/aurora.db", Mount("ext4", False)),
        ("/home/ada/aurora.db", Mount("nfs4", False)),
        ("/home/ada/local disk/aurora.db", Mount("xfs", False)),
        ("/homestead/aurora.db", Mount("ext4", False)),
        ("/snapshots/a/aurora.db", Mount("ext4", True)),
        ("/image/aurora.db", Mount("squashfs", True)),
        ("/mnt/share/aurora.db", Mount("cifs", False)),
        ("/mnt/ssh/x/../aurora.db", Mount("fuse.sshfs", False)),
        ("/mnt/twice/aurora.db", Mount("tmpfs", False)),
        ("/workspace/aurora.db", Mount("9p", False)),
        ("/overlay/aurora.db", Mount("overlay", False)),
    ],
)
def test_what_a_file_lies_on_is_known(mounts: Path, path: str, mount: Mount) -> None:
    mounts.write_text(MOUNTS)
    assert mount_of(Path(path)) == mount


def test_a_machine_that_does_not_say_is_no_trouble(mounts: Path, tmp_path: Path) -> None:
    for written in (None, b"", b"\xff\xfe - \n1 2 3 - nfs\n\n"):
        if written is not None:
            mounts.write_bytes(written)
        assert mount_of(tmp_path) is None
        assert sqlite_file.read_only(str(tmp_path / "a.db")) == ""


def test_this_machine_says_what_its_files_lie_on(tmp_path: Path) -> None:
    if Path("/proc/self/mountinfo").exists():
        mount = mount_of(tmp_path)
        assert mount is not None and mount.kind and not mount.is_read_only


def test_a_store_on_a_network_file_system_is_said_in_one_line_once(
    mounts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mounts.write_text(f"1 0 0:1 / {tmp_path} rw - nfs4 nas:/x rw\n")
    engine = store.connect(f"sqlite:///{tmp_path / 'aurora.db'}")
    for _ in range(2):
        store.upgrade(engine)
    (record,) = [r for r in caplog.records if r.name == sqlite_file.__name__]
    line = record.getMessage()
    assert record.levelno == logging.WARNING and "\n" not in line
    assert "network file system (nfs4)" in line and "AURORA_DATABASE_URL" in line
    mounts.write_text(MOUNTS)
    assert network(engine) == ""
    engine.dispose()


def test_a_store_on_a_read_only_file_system_is_said_in_one_line(
    mounts: Path, tmp_path: Path
) -> None:
    """The mount is told, not made (that needs rights); that SQLite fails is real."""
    path = tmp_path / "folder"
    path.mkdir()
    mounts.write_text(f"1 0 0:1 / {tmp_path} ro - ext4 /dev/vda ro\n")
    with pytest.raises(AuroraError) as caught:
        store.connect(f"sqlite:///{path}")  # a folder: it can't be opened
    line = str(caught.value)
    assert "lies on a read-only file system (ext4)" in line and "\n" not in line
    assert "AURORA_HOME" in line


def fill(engine: Engine, rows: int) -> None:
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE IF NOT EXISTS much (x BLOB)"))
        connection.execute(
            text(
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :rows) "
                "INSERT INTO much SELECT randomblob(4000) FROM n"
            ),
            {"rows": rows},
        )


def test_the_log_of_changes_is_bounded_while_readers_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "aurora.db"
    engine = store.connect(f"sqlite:///{path}")
    wal = Path(f"{path}-wal")
    fill(engine, 10)
    # Two readers, of whom one always reads: SQLite by itself never begins its log anew.
    readers = [sqlite3.connect(path, isolation_level=None) for _ in range(2)]

    def begin(reader: sqlite3.Connection) -> None:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM much").fetchone()

    begin(readers[0])
    limit, sizes = 2 * 1024**2, []
    for turn in range(8):
        fill(engine, 300)  # 1.2 MB
        begin(readers[(turn + 1) % 2])
        readers[turn % 2].execute("COMMIT")
        sizes.append(wal.stat().st_size)
    assert max(sizes) == sizes[-1] > 8 * 1024**2
    bound_log(engine, limit)  # the last one goes on reading
    still = wal.stat().st_size
    readers[0].execute("COMMIT")
    sqlite_file._emptied.clear()  # ten seconds later
    bound_log(engine, limit)
    assert wal.stat().st_size == 0 < still
    for reader in readers:
        reader.close()
    engine.dispose()


def test_the_log_shrinks_to_its_bound_after_a_long_read(tmp_path: Path) -> None:
    path = tmp_path / "aurora.db"
    engine = store.connect(f"sqlite:///{path}")
    with engine.connect() as connection:
        limit = connection.exec_driver_sql("PRAGMA journal_size_limit").scalar()
    assert limit == sqlite_file.WAL_BYTES
    engine.dispose()


def test_a_file_shrinks_when_rows_go_while_others_write(tmp_path: Path) -> None:
    path = tmp_path / "aurora.db"
    engine = store.connect(f"sqlite:///{path}")
    store.upgrade(engine)
    fill(engine, 1500)
    full = path.stat().st_size
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM much WHERE rowid % 10"))
    written = threading.Event()

    def write() -> None:
        fill(engine, 10)
        written.set()

    thread = threading.Thread(target=write)
    thread.start()
    freed = shrink(engine)
    thread.join()
    assert written.is_set()
    assert freed > 0.6 * full and path.stat().st_size < 0.4 * full
    with store.reading(engine) as connection:
        assert connection.scalar(text("SELECT count(*) FROM much")) == 160
        assert connection.scalar(text("PRAGMA integrity_check")) == "ok"
    engine.dispose()


def test_a_file_of_an_older_release_is_left_as_it_is_unless_it_may_be_rewritten(
    tmp_path: Path,
) -> None:
    path = tmp_path / "aurora.db"
    with sqlite3.connect(path) as older:
        older.execute("CREATE TABLE alembic_something (x)")
    older.close()
    engine = store.connect(f"sqlite:///{path}")
    fill(engine, 200)
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM much"))
    assert shrink(engine) == 0
    assert shrink(engine, rewrite=True) > 500_000
    fill(engine, 200)
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM much"))
    assert shrink(engine) > 500_000  # from now on by itself
    engine.dispose()


def test_a_rewrite_without_room_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "aurora.db"
    sqlite3.connect(path).execute("CREATE TABLE t (x)")
    engine = store.connect(f"sqlite:///{path}")
    usage = sqlite_file.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(sqlite_file.shutil, "disk_usage", lambda _: usage._replace(free=0))
    with pytest.raises(AuroraError, match=r"needs .* MiB beside it, 0 are free"):
        shrink(engine, rewrite=True)
    engine.dispose()
