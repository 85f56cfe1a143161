"""Files of ours are their owner's only, and what was made before is mended."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from aurora_sgl import atomic, private, store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.config import get_settings
from aurora_sgl.drafter import architectures, served
from aurora_sgl.engine.startup import unwritable
from aurora_sgl.processes.server import ServerProcess
from aurora_sgl.store.accounts import Accounts
from tests.support import published


@pytest.fixture(params=[0o000, 0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("AURORA_ARTIFACT_ACCESS", "group")
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


def modes(top: Path) -> dict[str, int]:
    """By path below ``top``, which is "."."""
    return {
        path.relative_to(top).as_posix(): stat.S_IMODE(path.lstat().st_mode)
        for path in (top, *sorted(top.rglob("*")))
        if not path.is_symlink()
    }


def assert_owners(top: Path) -> None:
    for name, mode in modes(top).items():
        assert mode == (0o700 if (top / name).is_dir() else 0o600), f"{name} {mode:o}"


def test_what_we_write_is_the_owners_only_whatever_the_umask(umask: int, tmp_path: Path) -> None:
    """In a process of SGLang's, which keeps its umask."""
    home = tmp_path / "a" / "home"
    assert unwritable(home) == ""
    engine = store.connect(f"sqlite:///{home / 'aurora.db'}")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE x (n INTEGER)")
        connection.exec_driver_sql("INSERT INTO x VALUES (1)")
        names = {path.name for path in home.iterdir()}
        assert names == {"aurora.db", "aurora.db-wal", "aurora.db-shm"}
        Accounts(home / "dashboard" / "accounts.db").offer_setup()
        atomic.replace_file(home / "cursor", b"x")
        root = ArtifactRoot(str(home / "artifacts"))
        root.put_file(home / "cursor", "traces/20261129/1.safetensors")
        root.put_folder(home / "dashboard", "versions/1/")
        drafter = published.eagle1_with_bias(tmp_path / "published")
        config = architectures.read_config(drafter, target_layers=8)
        assert served.folder_for(drafter, config, 128, home / "drafters") != drafter
        log = ServerProcess([], port=1, log=home / "logs" / "server.log", environment={})
        log.start()
        log.stop()
        assert_owners(tmp_path / "a")
    engine.dispose()


def test_an_existing_home_is_mended_once_and_says_so(tmp_path: Path) -> None:
    home, outside = tmp_path / "home", tmp_path / "outside"
    for folder in (home / "spool" / "0", home / "artifacts", outside):
        folder.mkdir(parents=True)
    for place in (home / "aurora.db", home / "spool" / "0" / "1.seg", outside / "mine"):
        place.write_text("x")
        place.chmod(0o644)
    program = home / "spool" / "run"
    program.write_text("x")
    program.chmod(0o755)
    (home / "spool" / "link").symlink_to(outside)
    (home / "spool" / "file").symlink_to(outside / "mine")
    for folder in (home, home / "spool", home / "spool" / "0", home / "artifacts"):
        folder.chmod(0o755)
    line = private.settle(home, str(home / "artifacts"), "owner")
    assert line.startswith(f"7 files and folders of {home} are the owner's only from now on")
    assert "\n" not in line and "AURORA_ARTIFACT_ACCESS" in line
    found = modes(home)
    assert found.pop("spool/run") == 0o700
    assert set(found.values()) == {0o700, 0o600}
    assert modes(outside) == {".": 0o755, "mine": 0o644}  # links are not followed
    assert private.settle(home, str(home / "artifacts"), "owner") == ""


def test_in_a_folder_that_others_use_too_only_what_is_surely_ours_is_mended(tmp_path: Path) -> None:
    """Somebody says AURORA_HOME=/ or ~: his files stay as they are."""
    home = tmp_path / "home"
    for folder in (home, home / "spool", home / "tmp", home / "letters"):
        folder.mkdir()
        (folder / "x").write_text("x")
        (folder / "x").chmod(0o644)
        folder.chmod(0o755)
    assert private.settle(home, str(home / "artifacts"), "owner").startswith("2 files and folders")
    assert modes(home) == {
        ".": 0o755, "x": 0o644, "letters": 0o755, "letters/x": 0o644, "spool": 0o700,
        "spool/x": 0o600, "tmp": 0o755, "tmp/x": 0o644,
    }  # fmt: skip


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_files_of_another_user_stay_as_they_are(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "aurora.db").write_text("x")
    (home / "aurora.db").chmod(0o644)
    os.chown(home / "aurora.db", 54_321, 54_321)
    assert private.settle(home, str(home / "artifacts"), "owner") == ""
    assert modes(home)["aurora.db"] == 0o644


@pytest.mark.parametrize("inside", [True, False])
def test_weights_and_traces_may_be_shared_with_the_group_and_nothing_else_is(
    shared: None, umask: int, tmp_path: Path, inside: bool
) -> None:
    home = tmp_path / "home"
    artifacts = home / "artifacts" if inside else tmp_path / "artifacts"
    private.make_folder(home)
    (home / "aurora.db").write_text("x")
    root = ArtifactRoot(str(artifacts))
    root.put_file(home / "aurora.db", "traces/1.safetensors")
    root.put_folder(home, "versions/1/")
    private.settle(home, str(artifacts), "group")
    expected = {".": 0o2770, "traces": 0o2770, "traces/1.safetensors": 0o660, "versions": 0o2770,
                "versions/1": 0o2770, "versions/1/aurora.db": 0o660}  # fmt: skip
    assert modes(artifacts) == expected
    assert modes(home)["."] == (0o710 if inside else 0o700)
    assert modes(home)["aurora.db"] == 0o600
    # Back again: nothing stays shared.
    private.settle(home, str(artifacts), "owner")
    assert set(modes(artifacts).values()) == {0o700, 0o600}
    assert modes(home)["."] == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes another user")
@pytest.mark.parametrize(("access", "reads"), [("group", True), ("owner", False)])
def test_another_user_of_the_group_reads_shared_weights_and_only_those(
    monkeypatch: pytest.MonkeyPatch, access: str, reads: bool
) -> None:
    monkeypatch.setenv("AURORA_ARTIFACT_ACCESS", access)
    get_settings.cache_clear()
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        Path(folder).chmod(0o755)
        _try_as_another_user(Path(folder) / "home", access, reads)
    get_settings.cache_clear()


def _try_as_another_user(home: Path, access: str, reads: bool) -> None:
    private.make_folder(home)
    (home / "aurora.db").write_text("x")
    ArtifactRoot(str(home / "artifacts")).put_file(home / "aurora.db", "versions/1/w")
    private.settle(home, str(home / "artifacts"), access)
    for path in (home, *home.rglob("*")):
        os.chown(path, 0, 54_322)
    assert _may_read(home / "artifacts" / "versions" / "1" / "w") is reads
    assert not _may_read(home / "aurora.db")


def _may_read(path: Path) -> bool:
    """Whether user 54321 of group 54322 can."""
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(54_322)
            os.setuid(54_321)
            path.read_bytes()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def test_children_that_are_not_ours_get_the_umask_that_we_were_given() -> None:
    code = (
        "import os, subprocess, sys; from aurora_sgl import private\n"
        "os.umask(0o027); private.keep_to_owner(); private.keep_to_owner()\n"
        "show = [sys.executable, '-c', 'import os; print(oct(os.umask(0)))']\n"
        "subprocess.run(show); subprocess.run(show, umask=private.given_umask())\n"
        "with private.users_own(): subprocess.run(show)\n"
        "subprocess.run(show)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0o77", "0o27", "0o27", "0o77"]
