"""``python -m aurora_sgl.training``: one run in a process of its own, at low priority.

Prints one JSON object (the outcome) on stdout and progress, one JSON object a line, on stderr.
Exit code 0 when the run succeeded or was skipped, 1 when it failed, 2 for wrong use.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from aurora_sgl.errors import AuroraError
from aurora_sgl.private import keep_to_owner
from aurora_sgl.processes.priority import step_back
from aurora_sgl.store.faults import with_advice
from aurora_sgl.training.settings import TrainSettings


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m aurora_sgl.training", description=__doc__)
    parser.add_argument("--group", default="", help="deployment group (default: the settings')")
    parser.add_argument("--trigger", default="manual", help="why this run: a word for the store")
    parser.add_argument("--target", type=Path, help="folder of the target model")
    parser.add_argument("--base", type=int, help="version to start from (default: the live one)")
    parser.add_argument(
        "--continue", action="store_true", dest="carry_on",
        help="start from the newest candidate against the live version that did not fail",
    )  # fmt: skip
    parser.add_argument("--settings", default="{}", help="JSON object of training settings")
    given = parser.parse_args(arguments)
    keep_to_owner()
    try:
        settings = TrainSettings.model_validate_json(given.settings)
    except ValidationError as error:
        first = error.errors()[0]
        parser.error(f"--settings: {'.'.join(map(str, first['loc']))}: {first['msg']}")
    step_back(settings.nice)
    os.environ.setdefault("OMP_NUM_THREADS", str(settings.threads))
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    try:
        outcome = _run(given, settings)
    except (AuroraError, SQLAlchemyError, OSError) as error:
        outcome = {"status": "failed", "error": with_advice(error)}
    print(json.dumps(outcome), flush=True)
    return 1 if outcome["status"] == "failed" else 0


def _run(given: argparse.Namespace, settings: TrainSettings) -> dict[str, Any]:
    import torch

    torch.set_num_threads(settings.threads)
    from aurora_sgl import store
    from aurora_sgl.artifacts import ArtifactRoot
    from aurora_sgl.config import get_settings
    from aurora_sgl.store import queries
    from aurora_sgl.training.lease import training_lease
    from aurora_sgl.training.run import train_once

    engine, printer = store.connect(), _Printer()
    group = given.group or get_settings().group
    with store.session(engine, write=False) as s:
        group_id = queries.groups.group_by_name(s, group).id
    with training_lease(engine, group_id) as renew:

        def progress(event: dict[str, Any]) -> None:
            renew(event)
            printer(event)

        return train_once(
            engine,
            ArtifactRoot(get_settings().artifact_root),
            group,
            settings,
            trigger=given.trigger,
            progress=progress,
            target=given.target,
            base_version_id=given.base,
            carry_on=given.carry_on,
        ).as_json()


class _Printer:
    """Progress on stderr, at most two lines a second of the same event."""

    def __init__(self) -> None:
        self.last, self.event = 0.0, ""

    def __call__(self, event: dict[str, Any]) -> None:
        now = time.monotonic()
        name = str(event.get("event"))
        if name == self.event and now - self.last < 0.5:
            return
        self.last, self.event = now, name
        print(json.dumps(event), file=sys.stderr, flush=True)


def _stop(number: int, _: object) -> NoReturn:
    for each in (signal.SIGTERM, signal.SIGINT):  # a second one would cut the clearing up short
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
