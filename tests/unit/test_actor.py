"""Who acted is known also where a user has no name."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aurora_sgl import cli, rollout, store
from aurora_sgl.cli.shared import user
from aurora_sgl.config import get_settings
from aurora_sgl.store import queries
from tests.support import dashboard_house as samples
from tests.support.dashboard_house import House

NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")
ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root becomes another user")


def as_uid(uid: int, words: Callable[[], str] = user) -> str:
    """What is said in a process of that user, without the variables that name one."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            for name in NAMES:
                os.environ.pop(name, None)
            os.setuid(uid)
            os.write(writer, words().encode())
        except BaseException as error:
            os.write(writer, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return text


@ROOT
def test_the_actor_under_a_random_uid_is_its_number() -> None:
    with pytest.raises(KeyError):
        pwd.getpwuid(54_321)
    assert as_uid(54_321) == f"uid 54321@{socket.gethostname()}"


def test_the_actor_is_the_user_who_has_a_name() -> None:
    assert as_uid(os.getuid()) == f"{pwd.getpwuid(os.getuid()).pw_name}@{socket.gethostname()}"


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    """A store with two versions, the second one live; a folder that any user may reach."""
    home = Path(tempfile.mkdtemp(prefix="aurora-test-uid-"))
    house = samples.empty(home)
    for number in range(2):
        made = samples.add_version(house)
        rollout.promote(house.engine, made, actor="ada", reason="first", force=bool(number))
    house.engine.dispose()
    monkeypatch.setenv("AURORA_HOME", str(home))
    monkeypatch.delenv("AURORA_DATABASE_URL", raising=False)
    get_settings.cache_clear()
    yield house
    get_settings.cache_clear()
    house.engine.dispose()
    shutil.rmtree(home)


def command(*arguments: str) -> str:
    """Exit code of ``aurora-sgl`` with these arguments, or what went wrong."""
    sys.argv = ["aurora-sgl", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        return f"ended with {end.code or 0}"
    return "ended with 0"


@ROOT
def test_commands_under_a_random_uid_are_done_and_name_its_number(house: House) -> None:
    """cases.md: a container with a random uid."""
    for place in (house.home, *house.home.rglob("*")):
        os.chown(place, 54_321, 54_321)
    for arguments in (
        ("promote", "1", "--reason", "as before", "--force"),
        ("rollback", "--reason", "it was worse"),
        ("switch", "off", "learning", "--reason", "release week"),
    ):
        assert as_uid(54_321, lambda: command(*arguments)) == "ended with 0", arguments  # noqa: B023
    with store.session(house.engine, write=False) as s:
        deployed = queries.deployments.deployments(s, house.group_id)[:2]
        turned = queries.audit.audits(s, house.group_id, limit=1)[0]
    assert [row.action for row in deployed] == ["rollback", "promote"]
    assert {row.actor for row in (*deployed, turned)} == {f"uid 54321@{socket.gethostname()}"}
