"""One training run from the store to the store: read, train, compare, and keep a new version."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from aurora_sgl import store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.config import get_settings
from aurora_sgl.drafter import checkpoint
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import TargetHead, TargetInfo, read_target
from aurora_sgl.errors import AuroraError
from aurora_sgl.rollout.gate import record
from aurora_sgl.rollout.versions import fetch_verified, import_version
from aurora_sgl.store import queries
from aurora_sgl.training import dataset, gate
from aurora_sgl.training.files import TraceFiles
from aurora_sgl.training.settings import TrainSettings
from aurora_sgl.training.splits import split_of
from aurora_sgl.training.trainer import Progress, TrainResult, train

_DONORS = 5000  # further traces that may fill a cached prefix
_GATE_REQUESTS = 200  # newest held-out requests that are replayed


class Skipped(AuroraError):
    """There was nothing to do; not a failure."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to. ``version_id`` and ``evaluation_id`` are set when it succeeded."""

    run_id: int
    status: str  # succeeded | skipped | failed
    version_id: int | None = None
    evaluation_id: int | None = None
    verdict: str = ""
    error: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def train_once(
    engine: Engine,
    artifacts: ArtifactRoot,
    group: str,
    settings: TrainSettings,
    *,
    trigger: str,
    progress: Progress | None = None,
    target: Path | None = None,
    base_version_id: int | None = None,
) -> Outcome:
    """Train on the requests of a group (by name) and import the result as a version.

    ``target`` is the folder of the target model (default: the group's ``target_model``), and
    ``base_version_id`` what training starts from (default: the live version). The caller sees to
    it that one run of a group exists at a time; a run that a killed trainer left behind is ended
    as failed first.

    Every end is written into ``training_run``: ``succeeded`` with a version and an evaluation
    against the base, ``skipped`` or ``failed`` with one line in ``error``. Promotes nothing.
    Re-raises what is not an ``AuroraError`` or ``OSError``, after writing it down.
    """
    with store.session(engine) as s:
        owner = queries.group_by_name(s, group)
        queries.fail_running(s, owner.id, "the trainer stopped without a word")
        if base_version_id is None:
            live = queries.desired_version(s, owner.id)
            base_version_id = live[0] if live else None
        run_id = queries.start_run(
            s,
            owner.id,
            trigger=trigger,
            base_version_id=base_version_id,
            objective=settings.objective,
            config=settings.as_json(),
        ).id
    run = _Run(engine, artifacts, owner.id, group, settings, run_id, progress)
    try:
        return run.go(base_version_id, Path(target or owner.target_model))
    except Skipped as reason:
        return run.end("skipped", error=str(reason))
    except (AuroraError, OSError) as error:
        return run.end("failed", error=_one_line(error))
    except BaseException as error:
        run.end("failed", error=f"{type(error).__name__}: {_one_line(error)}")
        raise


class _Run:
    def __init__(
        self,
        engine: Engine,
        artifacts: ArtifactRoot,
        group_id: int,
        group: str,
        settings: TrainSettings,
        run_id: int,
        progress: Progress | None,
    ) -> None:
        self.engine, self.artifacts = engine, artifacts
        self.group_id, self.group = group_id, group
        self.settings, self.run_id, self.progress = settings, run_id, progress
        self.columns: dict[str, Any] = {}
        self.info: TargetInfo | None = None

    def go(self, base_version_id: int | None, target: Path) -> Outcome:
        if base_version_id is None:
            raise Skipped("no version is live yet: import one and promote it first")
        with _work_folder() as work:
            base = self._base(base_version_id, target, work)
            data = self._data(base)
            head = TargetHead.load(target)
            result = train(
                base, data.train, head, self.settings, dev=data.dev, progress=self.progress
            )
            self._say({"event": "gate", "requests": len(data.gate)})
            verdict = gate.evaluate(base, result.drafter, data.gate.readable(), head, self.settings)
            return self._keep(base_version_id, result, verdict, work)

    def end(self, status: str, *, error: str = "", **columns: Any) -> Outcome:
        with store.session(self.engine) as s:
            fields = {**self.columns, **columns, "error": error}
            queries.finish_run(s, self.run_id, status, **fields)
        return Outcome(self.run_id, status, error=error, metrics=fields.get("metrics", {}))

    def _base(self, version_id: int, target: Path, work: Path) -> Drafter:
        with store.session(self.engine, write=False) as s:
            version = queries.version(s, version_id)
        folder = fetch_verified(self.artifacts, version, work / "base")
        info = self.info = read_target(target, model=version.target_model)
        problems = checkpoint.validate(folder, info)
        if problems:
            raise AuroraError(f"version {version_id} does not fit the target: {problems[0]}")
        return checkpoint.load(folder, target_layers=info.num_layers)

    def _data(self, base: Drafter) -> dataset.Dataset:
        settings = self.settings
        with store.session(self.engine, write=False) as s:
            rows = queries.recent_requests(s, self.group_id, limit=_DONORS)
        held_out = [row for row in rows if self._is_gate(row)][:_GATE_REQUESTS]
        window = [row for row in rows[: settings.window] if not self._is_gate(row)]
        data = dataset.build(
            [*window, *held_out],
            TraceFiles(self.artifacts, get_settings().home / "cache"),
            base.config,
            dev_share=settings.dev_share,
            gate_share=settings.gate_share,
            donors=rows,
        )
        if window:
            self.columns["window_start"] = min(row.finished_at for row in window)
            self.columns["window_end"] = max(row.finished_at for row in window)
        self.columns["requests"] = len(data.train)
        self.columns["metrics"] = {"left_out": dict(data.left_out), "gate_requests": len(data.gate)}
        self._say({"event": "window", "requests": len(data.train), "gate": len(data.gate)})
        if len(data.train) < settings.min_requests:
            raise Skipped(
                f"{len(data.train)} requests to train on, at least {settings.min_requests} needed"
                + (f" (left out: {dict(data.left_out)})" if data.left_out else "")
            )
        return data

    def _is_gate(self, row: queries.RecentRequest) -> bool:
        side = split_of(
            dataset.split_key(row),
            dev_share=self.settings.dev_share,
            gate_share=self.settings.gate_share,
        )
        return side == "gate"

    def _keep(
        self, base_version_id: int, result: TrainResult, verdict: gate.GateResult, work: Path
    ) -> Outcome:
        folder = checkpoint.save(result.drafter, work / "candidate")
        paired, settings = verdict.paired, self.settings
        metrics = {
            **self.columns.get("metrics", {}),
            **result.metrics,
            "accept_length_before": _number(paired.baseline),
            "accept_length_after": _number(paired.candidate),
        }
        version = import_version(
            self.engine,
            self.artifacts,
            folder,
            self.group,
            source="train",
            parent_id=base_version_id,
            training_run_id=self.run_id,
            note=f"{settings.objective} on {self.columns['requests']} requests",
            metrics=metrics,
            target=self.info,
        )
        row = record(
            self.engine,
            verdict.before,
            verdict.after,
            candidate_id=version.id,
            baseline_id=base_version_id,
            recipe=settings,
            details={"run_id": self.run_id},
        )
        outcome = self.end("succeeded", tokens=result.tokens, metrics=metrics)
        return Outcome(outcome.run_id, "succeeded", version.id, row.id, row.verdict, "", metrics)

    def _say(self, event: dict[str, Any]) -> None:
        if self.progress is not None:
            self.progress(event)


@contextmanager
def _work_folder() -> Iterator[Path]:
    parent = get_settings().home / "training"
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def _number(value: float) -> float | None:
    """NaN has no place in JSON or SQL."""
    return value if value == value else None
