"""Files of ours are their owner's only: folders 0700, files 0600, whatever the umask.

Processes of our own begin with :func:`keep_to_owner`, which holds for what libraries write as well.
SGLang's processes keep the umask that they were given: what we write there is made with
:func:`make_folder` and :func:`opener`. Weights and traces may be shared with the group of the
artifact root (``AURORA_ARTIFACT_ACCESS``), for trainers and servers of other users.
"""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Access:
    """Modes of folders and of files."""

    folder: int
    file: int


OWNER = Access(0o700, 0o600)
#: The bit of the folders lets what is made in them belong to their group, whoever makes it.
GROUP = Access(0o2770, 0o660)
#: Of a folder of ours on the way to what the group shares: to pass through, not to look around.
ON_THE_WAY = 0o710

_users_umask: int | None = None


def keep_to_owner() -> None:
    """From now on what this process and its children make is its owner's only."""
    global _users_umask
    umask = os.umask(0o077)
    if _users_umask is None:
        _users_umask = umask


def given_umask() -> int:
    """The one with which this process was started, for what is not ours: SGLang's processes, and
    what a user exports. -1, as Popen takes it, where it is in force still."""
    return -1 if _users_umask is None else _users_umask


@contextmanager
def users_own() -> Iterator[None]:
    """What is made meanwhile is the user's, under the umask that he gave."""
    ours = os.umask(0o077)
    os.umask(ours if _users_umask is None else _users_umask)
    try:
        yield
    finally:
        os.umask(ours)


def make_folder(folder: Path, access: Access = OWNER) -> None:
    """Make a folder, and those above it that are missing. Those that are there stay as they are.
    Raises ``OSError``."""
    missing = []
    above = folder
    while not above.exists():
        missing.append(above)
        above = above.parent
    for one in reversed(missing):
        with suppress(FileExistsError):  # another process was quicker
            one.mkdir(access.folder & 0o777)
            one.chmod(access.folder)
    folder.mkdir(exist_ok=True)  # refused where it is a file


def opener(path: str, flags: int) -> int:
    """For ``open``: a file that is made is its owner's only."""
    return os.open(path, flags, OWNER.file)


def denied(error: OSError) -> str:
    """Why the system refused a file, and whose it is when it is somebody else's."""
    words = error.strerror or str(error)
    theirs = isinstance(error, PermissionError) and error.filename and whose(Path(error.filename))
    return f"{words}, {theirs}" if theirs else words


def whose(path: Path) -> str:
    """To whom a file, or the nearest folder above it that this user can see, belongs, in words; ""
    when that is this user."""
    here = os.path.abspath(path)
    while not os.path.lexists(here):
        here = os.path.dirname(here)
    owner, me = os.lstat(here).st_uid, os.geteuid()
    return "" if owner == me else f"{here} belongs to {_user(owner)} and this is {_user(me)}"


def _user(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"


#: What we make in a data folder and in an artifact root. A folder in which something else lies too
#: may be anybody's (somebody says AURORA_HOME=/): there only what can be nobody else's is mended.
OURS = frozenset(("aurora.db", "aurora.db-wal", "aurora.db-shm", "spool", "artifacts", "drafters",
                  "dashboard", "versions", "traces"))  # fmt: skip
COMMON = frozenset(("logs", "tmp", "cache", "models", "training", "stage"))


def settle(home: Path, artifacts: str, access: str) -> str:
    """Take from the data folder, and from an artifact root on this machine, what others were
    allowed to do there. A line that says so; "" when nothing was to be mended.

    ``artifacts`` and ``access`` are the settings' ``artifact_root`` and ``artifact_access``.
    """
    home, local = home.resolve(), artifacts.removeprefix("file://")
    root = home if "://" in local else Path(local).resolve()
    shares = access == "group" and root != home
    changed = 0
    for place in _tops(home):
        if place == home:
            way = shares and home in root.parents
            changed += _set(home, ON_THE_WAY if way else OWNER.folder)
        elif place != root and place not in root.parents:
            changed += _mend(place, OWNER)
    if root != home:
        for folder in _tops(root):
            changed += _mend(folder, access_to_artifacts(access), below=folder != root)
    if not changed:
        return ""
    whose = "weights and traces are their group's too" if shares else (
        "AURORA_ARTIFACT_ACCESS=group shares weights and traces")  # fmt: skip
    return f"{changed:,} files and folders of {home} are the owner's only from now on ({whose})"


def access_to_artifacts(access: str) -> Access:
    """What the setting ``artifact_access`` says."""
    return GROUP if access == "group" else OWNER


def _tops(folder: Path) -> list[Path]:
    """What of a folder, and whether the folder itself, is ours."""
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError:  # it is not there yet
        return []
    if names <= OURS | COMMON:
        return [folder, *(folder / name for name in sorted(names))]
    return [folder / name for name in sorted(names & OURS)]


def _mend(top: Path, access: Access, below: bool = True) -> int:
    """How many files and folders got another mode: ``top``, and what lies ``below``. What is
    another user's stays as it is, and links are not followed."""
    changed, waiting = 0, [top]
    while waiting:
        path = waiting.pop()
        changed += _set(path, access.folder if path.is_dir() else access.file)
        if below and path.is_dir() and not path.is_symlink():
            with suppress(OSError):  # it went meanwhile, or is another user's
                waiting += path.iterdir()
    return changed


def _set(path: Path, mode: int) -> int:
    """1 when a file or folder of this user had another mode."""
    try:
        info = path.lstat()
        if not stat.S_ISREG(info.st_mode) and not stat.S_ISDIR(info.st_mode):
            return 0
        now = stat.S_IMODE(info.st_mode)
        if stat.S_ISREG(info.st_mode):
            mode |= now & 0o100  # a program of ours stays one
        if now == mode or info.st_uid != os.geteuid():
            return 0
        path.chmod(mode)
    except OSError:  # it went meanwhile
        return 0
    return 1
