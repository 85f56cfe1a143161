"""Who acted is known also where a user has no name."""

from __future__ import annotations

import os
import pwd
import socket

import pytest

from aurora_sgl.cli.shared import user

NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")


def as_uid(uid: int) -> str:
    """What :func:`user` says in a process of that user, without the variables that name one."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            for name in NAMES:
                os.environ.pop(name, None)
            os.setuid(uid)
            os.write(writer, user().encode())
        except BaseException as error:
            os.write(writer, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as words:
        text = words.read()
    os.waitpid(child, 0)
    return text


@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes another user")
def test_the_actor_under_a_random_uid_is_its_number() -> None:
    with pytest.raises(KeyError):
        pwd.getpwuid(54_321)
    assert as_uid(54_321) == f"uid 54321@{socket.gethostname()}"


def test_the_actor_is_the_user_who_has_a_name() -> None:
    assert as_uid(os.getuid()) == f"{pwd.getpwuid(os.getuid()).pw_name}@{socket.gethostname()}"
