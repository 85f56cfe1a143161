"""The sockets between engine and sidecar take a connection of their owner alone."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from errno import EACCES
from pathlib import Path

import pytest

from aurora_sgl.sidecar.endpoint import NAMES, Endpoint


@pytest.fixture(params=[0o000, 0o022])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def connect(path: Path) -> int:
    """0, or the error's number."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
        return one.connect_ex(os.fspath(path))


def connect_as_another_user(path: Path) -> int:
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(54_322)
            os.setuid(54_321)
            os._exit(connect(path))
        finally:
            os._exit(255)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes another user")
@pytest.mark.parametrize("exists", [False, True])
def test_another_user_of_the_machine_reaches_no_socket_of_ours(umask: int, exists: bool) -> None:
    """Whatever the umask, and in a folder that was open before; not under pytest's own folder,
    which is closed to others already."""
    with tempfile.TemporaryDirectory() as top:
        Path(top).chmod(0o755)
        folder = Path(top) / "sockets"
        if exists:
            folder.mkdir()
            folder.chmod(0o777)
        endpoint = Endpoint(folder)
        try:
            for name in NAMES:
                assert connect(folder / name) == 0, name
                assert connect_as_another_user(folder / name) == EACCES, name
                if not exists:  # he can't even look
                    assert connect_as_another_user(folder / f"{name}2") == EACCES, name
            # It is the permissions that keep him out: with others he is in.
            folder.chmod(0o755)
            (folder / "records").chmod(0o777)
            assert connect_as_another_user(folder / "records") == 0
        finally:
            endpoint.close()
