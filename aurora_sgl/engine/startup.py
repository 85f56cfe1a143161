"""What of ours a server starts with: looked at as SGLang launches, and said in one line.

Nothing here may keep SGLang from starting. What is wrong goes to the server's output, and by the
schedulers' heartbeat to the store, where there is one.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aurora_sgl import environment
from aurora_sgl.config import Settings, get_settings, mistakes
from aurora_sgl.errors import AuroraError
from aurora_sgl.private import make_folder

#: SGLang's name for an EAGLE drafter that is part of the target's checkpoint; it calls it EAGLE.
_ALIASES = {"NEXTN": "EAGLE"}

_ARTIFACTS = "artifacts"  # code of a notice


@dataclass
class Outlook:
    """What will be recorded, traced and swapped, and why not all of it."""

    records: bool = True
    traces: bool = True
    swaps: bool = True
    place: str = ""  # where to, in words
    notices: dict[str, str] = field(default_factory=dict)  # code -> sentence, see wire.Hello

    @property
    def line(self) -> str:
        if not self.records:
            what = "nothing is recorded, traced or swapped"
        else:
            traced = "hidden states are traced" if self.traces else "hidden states are not traced"
            swapped = "promoted versions go live" if self.swaps else "no version goes live"
            what = f"verify steps are recorded, {traced}, {swapped}"
        why = "; ".join(sentence.rstrip(".") for sentence in self.notices.values())
        return ": ".join(filter(None, (what, why))) + (f" ({self.place})" if self.place else "")


def say(line: str) -> None:
    """To the server's output: SGLang sets its loggers up later."""
    print(f"aurora-sgl: {line}", file=sys.stderr, flush=True)


def begin(server_args: Any) -> None:
    """Before SGLang starts its processes: decide, start the sidecars, tell the schedulers."""
    for name in ("IDLE", "NOTICES", "ENDPOINT", "STAMP"):
        os.environ.pop(getattr(environment, name), None)
    algorithm = str(getattr(server_args, "speculative_algorithm", None) or "").upper()
    if not algorithm:
        return
    settings = get_settings()
    for line in mistakes():
        say(line)
    if not is_asked(settings):
        say(
            "installed, and not switched on: nothing is recorded. Set AURORA_HOME to a data "
            "folder (or AURORA_ENABLED=1 for ./aurora-data), or start with aurora-sgl serve"
        )
        environment.leave_alone()
        return
    if reason := not_ours(server_args, algorithm):
        say(f"nothing is recorded, traced or swapped: {reason}")
        environment.leave_alone()
        return
    outlook = _start(server_args, settings)
    if mistakes():
        outlook.notices["settings"] = f"{'; '.join(mistakes())}."
    os.environ[environment.NOTICES] = json.dumps(outlook.notices)
    outlook.notices.pop("settings", None)  # these lines were said
    say(outlook.line)


def is_asked(settings: Settings) -> bool:
    """Whether this server is to record: a package that is merely installed does not."""
    named = {"home", "database_url"} & settings.model_fields_set
    return bool(environment.value(environment.ENABLED).strip() or named)


def not_ours(server_args: Any, algorithm: str) -> str:
    """Why nothing of ours fits this kind of speculation or these ranks; "" when it does."""
    from aurora_sgl.drafter import architectures
    from aurora_sgl.engine import layouts

    if getattr(server_args, "enable_multi_layer_eagle", False):
        return "--enable-multi-layer-eagle has a drafter for each depth, which is not supported"
    if not architectures.has_algorithm(_ALIASES.get(algorithm, algorithm)):
        return f"--speculative-algorithm {algorithm} is not supported; EAGLE, EAGLE3 and NEXTN are"
    return layouts.refusal(server_args)


def _start(server_args: Any, settings: Settings) -> Outlook:
    from aurora_sgl.engine import labels, sidecars

    labels.new_stamp()
    if not settings.record:
        off = {"record": "AURORA_RECORD is off."}
        return Outlook(False, False, False, notices=off)
    outlook, usable = look_at_folders(settings)
    if usable is None:
        return outlook
    try:
        sidecars.start(int(getattr(server_args, "dp_size", 1) or 1), usable)
    except (AuroraError, OSError, ValueError) as error:
        why = {"sidecar": f"{error}."}
        return Outlook(False, False, False, notices=why)
    if not outlook.place:
        outlook.place = f"data folder {usable.home.resolve()}"
    return outlook


def look_at_folders(settings: Settings) -> tuple[Outlook, Settings | None]:
    """What can be recorded with these folders, and the settings for it; None when nothing can.

    With a database elsewhere records need a folder for their spool only, and any will do; weights
    and traces need the artifact root.
    """
    from aurora_sgl.engine import sidecars

    outlook = Outlook(traces=settings.capture_share > 0)
    if settings.database_url and (trouble := sidecars.misunderstood(settings.database_url)):
        outlook.notices["store"] = f"{trouble}; records wait in the spool."
    trouble = unwritable(settings.home)
    if trouble:
        line = f"AURORA_HOME {settings.home.resolve()} can't be written ({trouble})"
        if not settings.database_url:
            notices = {"data folder": f"{line}; give a folder that this user may write."}
            return Outlook(False, False, False, notices=notices), None
        root = settings.artifact_root
        settings = settings.model_copy(update={"home": spare_home(), "artifacts": root})
        outlook.place = f"spool in {settings.home}"
        outlook.notices["data folder"] = f"{line}; the spool lies in {settings.home} meanwhile."
    root = settings.artifact_root
    if "://" not in root and (trouble := unwritable(Path(root))):
        settings = settings.model_copy(update={"capture_share": 0.0})
        outlook.traces = outlook.swaps = False
        outlook.notices[_ARTIFACTS] = f"The artifact root {root} can't be written ({trouble})."
    return outlook, settings


def unwritable(folder: Path) -> str:
    """Why nothing can be written into a folder, which is made; "" when it can."""
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)
    return ""


def spare_home() -> Path:
    """A private folder of this user's, the same at each start, so that what waits in its spool is
    taken up."""
    folder = Path(tempfile.gettempdir()) / f"aurora-sgl-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        info = folder.lstat()
        if info.st_uid == os.getuid() and not folder.is_symlink() and not info.st_mode & 0o077:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="aurora-sgl-"))


def no_artifacts() -> str:
    """In a scheduler: why neither weights nor traces can be stored; "" when they can."""
    return notices_of_start().get(_ARTIFACTS, "")


def notices_of_start() -> dict[str, str]:
    """In a scheduler: what was wrong at the start."""
    try:
        notices = json.loads(environment.value(environment.NOTICES) or "{}")
    except ValueError:
        return {}
    return {str(code): str(sentence) for code, sentence in dict(notices).items()}
