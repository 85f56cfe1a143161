"""The command line in the hands of others: another user of the machine, and roles of PostgreSQL
that may not do everything. Every command, with arguments that would do something."""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pgserver
import pytest
from sqlalchemy import Engine, create_engine, make_url, select

from aurora_sgl import private, store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.backup import back_up
from aurora_sgl.drafter import checkpoint, scratch
from aurora_sgl.sidecar.refused import RefusedFile
from aurora_sgl.store.accounts import Accounts
from aurora_sgl.store.models import Base
from aurora_sgl.store.partitions import BY_HAND
from aurora_sgl.store.queries.sql_console import make_sql_roles
from tests.conftest import new_database
from tests.support import dashboard_house as samples
from tests.support.command_line import MODULES, STRANGER, CommandLine, Ended, command_line, commands
from tests.support.dashboard_house import House

ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root becomes another user")
#: With the programs of PostgreSQL.
PATH = f"{Path(pgserver.__file__).parent / 'pginstall' / 'bin'}:{os.environ['PATH']}"
OPERATIONS = Path(__file__).parents[3] / "docs" / "operations.md"

WHY = ("--reason", "as before")
#: Words in braces are places of a :class:`Place`.
TABLE: dict[str, tuple[str, ...]] = {
    "serve": ("--model", "{public}/model", "--drafter", "{public}/drafter", "--port", "0"),
    "demo": ("--requests", "3", "--exit"),
    "train": ("--once", "--target", "{public}/model"),
    "replay": ("3", "4", "--target", "{public}/model"),
    "scheduler": (),
    "status": ("--json",),
    "watch": ("--carry-on",),
    "worth": ("--json",),
    "promote": ("4", *WHY, "--force"),
    "rollback": WHY,
    "doctor": ("--json",),
    "versions list": (),
    "versions show": ("live",),
    "versions compare": ("3", "4"),
    "versions import": ("{public}/unknown",),
    "versions convert": ("{home}/made/4", "{new}"),
    "versions export": ("live", "{new}"),
    "versions pin": ("4", *WHY),
    "versions unpin": ("1", *WHY),
    "versions note": ("4", "slow on long prompts"),
    "versions tag": ("4", "prod", "eu-west"),
    "versions untag": ("4", "never-given"),
    "switch list": (),
    "switch on": ("auto_promote", *WHY),
    "switch off": ("learning", *WHY),
    "freeze list": (),
    "freeze add": ("--to", "2d", *WHY),
    "freeze lift": ("1", *WHY),
    "trial start": ("4", *WHY),
    "trial stop": WHY,
    "trial status": (),
    "alerts list": ("--history",),
    "alerts acknowledge": ("1", *WHY),
    "notify list": (),
    "notify test": (),
    "db upgrade": (),
    "db current": (),
    "db prune": ("--days", "1", "--weights", "--keep-versions", "0"),
    "db limits": ("--set", "event_days=1", *WHY),
    "db purge": ("--domain", "chat", *WHY, "--yes", "--wait", "0"),
    "db backup": ("{new}",),
    "db restore": ("{public}/backup", "--force"),
    "db refused": ("--retry",),
    "dashboard": ("--port", "0"),
    "dashboard add-user": ("eve", "--role", "operator", "--openid"),
    "dashboard remove-user": ("eve",),
    "dashboard users": (),
    "dashboard sql-role": (),
    "-m aurora_sgl.sidecar": ("--endpoint", "{new}/endpoint"),
    "-m aurora_sgl.training": ("--target", "{public}/model"),
}
#: What ends a command that waits, once it was said.
ENOUGH = {
    "serve": "store: postgresql",
    "scheduler": "leads group",
    "dashboard": "dashboard: http",
}
#: What needs no store: the page tells those who look at it that the store is away.
NO_STORE = {"dashboard", "dashboard add-user", "dashboard remove-user", "dashboard users"}
#: What looks at no file and no store: it asks receivers that nobody named here.
ELSEWHERE = {"notify test": "no receiver is set"}
#: What a role may do that only reads, but all tables.
READS = {
    "status", "doctor", "versions list", "versions show", "versions compare", "versions export",
    "switch list", "freeze list", "worth", "trial status", "alerts list", "notify list",
    "db current", *NO_STORE,
}  # fmt: skip
#: What only the owner of the tables, or who may make roles, can do.
OWNERS = {"db upgrade", "db restore", "dashboard sql-role"}


class Place(NamedTuple):
    """A data folder, what anybody may read beside it, and a folder of whoever runs a command."""

    home: Path
    public: Path
    mine: Path
    texts: frozenset[str]  # what stands in the store


@pytest.fixture(scope="module")
def line() -> Iterator[CommandLine]:
    with command_line() as running:
        yield running


def furnish(house: House, parent: Path, owner: Engine) -> Place:
    """What else our processes leave in a data folder; a copy of it for others."""
    home, public, mine = house.home, parent / "public", parent / "mine"
    Accounts(home / "dashboard" / "accounts.db").add("vera", "viewer", "correct horse battery")
    private.make_folder(home / "spool" / "0")
    RefusedFile(home / "spool" / "0").keep_bytes(b"odd", "it is odd")
    drafter = scratch.make(home / "target", draft_vocab_size=samples.VOCAB, seed=99,
                           model=str(home / "target"))  # fmt: skip
    checkpoint.save(drafter, public / "unknown")
    shutil.copytree(home / "target", public / "model")
    shutil.copytree(home / "made" / "4", public / "drafter")
    back_up(owner, ArtifactRoot(str(home / "artifacts")), public / "backup")
    # The backup has weights that the store let go of.
    shutil.rmtree(home / "artifacts" / house.version(house.versions[4]).weights_uri)
    opened(public, 0o755, 0o644)
    mine.mkdir()
    if os.getuid() == 0:
        os.chown(mine, STRANGER, STRANGER)
    opened(home, 0o700, 0o600)
    parent.chmod(0o755)
    return Place(home, public, mine, texts_of(house.engine, home))


def opened(top: Path, folder: int, file: int) -> None:
    for path in (top, *top.rglob("*")):
        path.chmod(folder if path.is_dir() else file)


def texts_of(engine: Engine, home: Path) -> frozenset[str]:
    """Texts of the store that no line of ours has by chance."""
    with store.reading(engine) as connection:
        rows = [
            tuple(row)
            for table in Base.metadata.sorted_tables
            for row in connection.execute(select(table))
        ]
    texts = {value for row in rows for value in row if isinstance(value, str) and len(value) > 9}
    assert len(texts) > 20
    return frozenset(text for text in texts if str(home) not in text)


def files(home: Path) -> dict[str, tuple[int, int, str]]:
    """Mode, owner and content of all files, but of what a command may keep for itself."""
    return {
        str(path.relative_to(home)): (
            path.stat().st_mode,
            path.stat().st_uid,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in (home, *home.rglob("*"))
        if path.relative_to(home).parts[:1] not in (("dashboard",), ("cache",))
    }


def run(
    line: CommandLine, place: Place, name: str, *, url: str = "", uid: int = 0, enough: str = ""
) -> Ended:
    new = tempfile.mktemp(dir=place.mine)
    at = {"home": place.home, "public": place.public, "new": new}
    environment = {"AURORA_HOME": str(place.home), "PATH": PATH}
    if url:
        environment["AURORA_DATABASE_URL"] = url
    module = MODULES.get(name, "")
    more = ["--spool", f"{new}/spool"] if "sidecar" in name and not uid else []
    return line.run(
        [*([] if module else name.split()), *(each.format(**at) for each in TABLE[name]), *more],
        environment, uid=uid, folder=place.mine, module=module,
        enough=enough or ENOUGH.get(name, ""),
    )  # fmt: skip


def refusal(ended: Ended, name: str) -> str:
    """The one line that a command ended with, having printed nothing else."""
    if name == "-m aurora_sgl.training":  # for the scheduler
        words = json.loads(ended.out)["error"]
    else:
        assert ended.out == "", ended
        words = ended.err.removesuffix("\n")
    assert ended.code == 1 and words and "\n" not in words, ended
    return str(words)


def test_the_table_has_every_command() -> None:
    assert sorted(TABLE) == sorted([*commands(), *MODULES])


# -- another user of the machine -------------------------------------------------------------


@pytest.fixture(scope="module")
def roots() -> Iterator[Place]:
    """Root's data folder. Not under pytest's own folder, which is closed to others anyway."""
    parent = Path(tempfile.mkdtemp(prefix="aurora-test-others-"))
    house = samples.fill(parent / "home", requests=40)
    place = furnish(house, parent, house.engine)
    house.engine.dispose()
    yield place
    shutil.rmtree(parent)


#: What looks at files of the data folder beside the store; of the rest one.
LOOK = ("demo", "doctor", "status", "versions convert", "db refused", "dashboard users",
        "-m aurora_sgl.sidecar")  # fmt: skip


@ROOT
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, 0o700) for name in TABLE if name not in ELSEWHERE),
        *((name, 0o711) for name in LOOK),
    ],
)
def test_another_user_reads_and_changes_nothing_by_any_command(
    line: CommandLine, roots: Place, name: str, mode: int
) -> None:
    roots.home.chmod(mode)  # the second: as with AURORA_ARTIFACT_ACCESS=group, or by its owner
    before = files(roots.home), (roots.home / "dashboard" / "accounts.db").read_bytes()
    ended = run(line, roots, name, uid=STRANGER)
    after = files(roots.home), (roots.home / "dashboard" / "accounts.db").read_bytes()
    assert after == before
    words = missing(ended) if name == "doctor" else refusal(ended, name)
    assert f"belongs to user {pwd.getpwuid(0).pw_name} and this is user {STRANGER}" in words
    assert "AURORA_HOME" in words
    assert not [text for text in roots.texts if text in ended.out + ended.err]


def missing(ended: Ended) -> str:
    """What ``doctor`` misses."""
    assert ended.code == 1 and not ended.err
    (one,) = [row for row in json.loads(ended.out) if row["state"] == "missing"]
    return f"{one['found']}; {one['advice']}"


@ROOT
@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_what_needs_no_data_folder_is_for_everybody(
    line: CommandLine, roots: Place, flag: str
) -> None:
    home = {"AURORA_HOME": str(roots.home)}
    ended = line.run([flag], home, uid=STRANGER, folder=roots.mine)
    assert (ended.code, ended.err) == (0, "") and ended.out


# -- roles of PostgreSQL ---------------------------------------------------------------------


class Roles(NamedTuple):
    place: Place
    admin: Engine
    urls: dict[str, str]

    def rows(self) -> dict[str, Any]:
        """Number and content of the rows of every table."""
        names = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
        with self.admin.connect() as connection:
            return {
                name: connection.exec_driver_sql(
                    "SELECT count(*), md5(string_agg(t::text, chr(10) ORDER BY t::text)) "
                    f'FROM "{name}" t'
                ).one()
                for name in connection.exec_driver_sql(names).scalars()
            }


@pytest.fixture(scope="module")
def roles(postgres_url: str) -> Iterator[Roles]:
    """A store whose tables are one role's, filled by one that reads and writes (the SQL is that of
    docs/operations.md); two more of the SQL page, and one that may read all tables."""
    parent = Path(tempfile.mkdtemp(prefix="aurora-test-roles-"))
    with new_database(postgres_url) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", PATH)
        admin = create_engine(url)
        urls = make_roles(admin)
        owner = store.connect(urls["owner"])
        store.upgrade(owner)
        with admin.begin() as connection:
            reader = make_url(urls["reader"]).username
            connection.exec_driver_sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {reader}")
        writer = store.connect(urls["writer"])
        place = furnish(samples.fill(parent / "home", writer, requests=40), parent, owner)
        owner.dispose()
        writer.dispose()
        yield Roles(place, admin, urls | make_sql_roles(admin))
        admin.dispose()
    shutil.rmtree(parent)


def make_roles(admin: Engine) -> dict[str, str]:
    """The URLs of roles that belong to this database alone: owner, writer, reader."""
    suffix = f"_of_{admin.url.database}"
    section = OPERATIONS.read_text().split("\n### Two roles\n")[1]
    sql = re.findall(r"```sql\n(.*?)```", section, re.S)[0]
    with admin.begin() as connection:
        connection.exec_driver_sql(re.sub(r"\b(aurora_owner|aurora_writer)\b", rf"\1{suffix}", sql))
        connection.exec_driver_sql(f"CREATE ROLE aurora_reader{suffix} LOGIN")
    names = {role: f"aurora_{role}{suffix}" for role in ("owner", "writer", "reader")}
    return {
        role: admin.url.set(username=name).render_as_string(hide_password=False)
        for role, name in names.items()
    }


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("role", ["viewer", "operator", "reader"])
def test_a_role_that_only_reads_changes_nothing_by_any_command(
    line: CommandLine, roles: Roles, role: str, name: str
) -> None:
    before = roles.rows(), files(roles.place.home)
    waits = "ready: spool" if role == "reader" else "the store is away, records wait in the spool"
    enough = waits if "sidecar" in name else ""
    ended = run(line, roles.place, name, url=roles.urls[role], enough=enough)
    if enough:
        assert ended.code is None and enough in ended.err and "Traceback" not in ended.err
    elif name in NO_STORE or (role == "reader" and name in READS):
        assert ended.code == (None if name in ENOUGH else 0) and not ended.err and ended.out
    else:
        is_refused(ended, role, name)
    assert (roles.rows(), files(roles.place.home)) == before
    if role != "reader":
        assert not [text for text in roles.place.texts if text in ended.out + ended.err]


def is_refused(ended: Ended, role: str, name: str) -> None:
    if name in ELSEWHERE:
        assert ELSEWHERE[name] in refusal(ended, name)
    elif name == "versions convert":
        assert "there is nothing to convert" in refusal(ended, name)
    elif name == "replay" and role == "reader":
        assert "no held-out request" in ended.err
    elif name == "doctor":
        assert "rights are missing" in missing(ended)
    elif name == "dashboard sql-role" and role == "reader":
        assert "let an administrator run" in refusal(ended, name)
    else:
        assert "AURORA_DATABASE_URL must name" in refusal(ended, name)


def test_the_owner_restores(line: CommandLine, roles: Roles) -> None:
    ended = run(line, roles.place, "db restore", url=roles.urls["owner"])
    assert (ended.code, ended.err) == (0, ""), ended


#: What a command says that had nothing to do.
NOTHING = {
    "train": "training skipped: 0 requests",
    "replay": "no held-out request",
    "versions convert": "there is nothing to convert",
    "-m aurora_sgl.training": "learning is switched off",
    "alerts acknowledge": "there is no alert 1",
    "versions untag": "version 4 has no tag never-given",
    **ELSEWHERE,
}


@pytest.mark.parametrize("name", [name for name in TABLE if name != "demo"])  # serves and trains
def test_who_reads_and_writes_does_all_but_what_is_the_owners(
    line: CommandLine, roles: Roles, name: str
) -> None:
    enough = "ready: spool" if "sidecar" in name else ENOUGH.get(name, "")
    ended = run(line, roles.place, name, url=roles.urls["writer"], enough=enough)
    assert "Traceback" not in ended.err
    if name in OWNERS:
        words = refusal(ended, name)
        assert "AURORA_DATABASE_URL must name" in words or "let an administrator run" in words
    elif name in NOTHING:
        assert ended.code == 1 and NOTHING[name] in ended.out + ended.err, ended
    elif enough:
        assert ended.code is None and enough in ended.out + ended.err, ended
    else:
        assert ended.code == 0 and ended.out, ended


def test_the_owner_makes_partitions(line: CommandLine, roles: Roles) -> None:
    before = roles.rows()
    ended = run(line, roles.place, "db upgrade", url=roles.urls["owner"])
    assert (ended.code, ended.err) == (0, ""), ended
    assert len(roles.rows()) == len(before) + BY_HAND + 1
