"""The loop without a server: answered requests go into a store of their own, as servers and their
sidecars leave them, and training runs follow as the scheduler starts them.

Everything behind the server is what ships: traces on the disk, which request is on which side, the
reservoir, the recipe by the base's maturity, the line search, the candidate line, the gate, the
promotion. Only the bandit's exploration is off, so that a run repeats.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
import numpy as np
import torch
from sqlalchemy.orm import Session

from aurora_sgl import store, wire
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.clock import utc_now
from aurora_sgl.config import get_settings
from aurora_sgl.drafter import checkpoint
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import read_target
from aurora_sgl.evaluation.gate import PASS
from aurora_sgl.hashing import sha256_bytes
from aurora_sgl.rollout.promote import promote
from aurora_sgl.rollout.versions import fetch_verified, import_version
from aurora_sgl.sequences.sequence import Sequence, Sequences
from aurora_sgl.sidecar.traces.assembler import AssembledTrace
from aurora_sgl.sidecar.traces.writer import TraceRow, TraceWriter
from aurora_sgl.store import queries
from aurora_sgl.store.models import Request
from aurora_sgl.training.run import Outcome, train_once
from aurora_sgl.training.settings import TrainSettings

GROUP = "default"
_BOOT = 7
_SECONDS_APART = 10


@dataclass
class OfflineLoop:
    """A store in an empty folder ``home`` whose live version is the drafter in a folder."""

    home: Path
    drafter: Path
    target: Path
    settings: TrainSettings
    source: str = "import"  # where the drafter comes from: an import counts as well trained
    served: int = 0
    second_looks: list[Outcome] = field(default_factory=list)
    began: datetime = field(default_factory=lambda: utc_now() - timedelta(days=1))

    def __post_init__(self) -> None:
        self.engine = store.connect(f"sqlite:///{self.home / 'aurora.db'}")
        store.upgrade(self.engine)
        self.artifacts = ArtifactRoot(str(self.home / "artifacts"))
        self.writer = TraceWriter(self.artifacts, self.home / "tmp")
        with store.session(self.engine) as s:
            kind = checkpoint.load(self.drafter).config.architecture
            group = queries.groups.ensure_group(s, GROUP, str(self.target), "", kind)
            hello = wire.Hello(_BOOT, 1, {"name": "offline"}, 0, 0, 0, {})
            self.server_id = queries.servers.register_server(s, group.id, hello).id
        version = import_version(
            self.engine, self.artifacts, self.drafter, GROUP, source=self.source
        )
        promote(self.engine, version.id, actor="benchmark", reason="the start", force=True)

    def serve(self, rows: Sequences) -> None:
        """Requests as if they had been served one after the other; which side of the splits a
        conversation is on depends on its key and the recipe's seed."""
        with store.session(self.engine) as s:
            for index in range(len(rows)):
                self._store(s, rows[index])

    def train(self, *, max_seconds: float = 0.0) -> Outcome:
        """One run of the scheduler, whose training may take ``max_seconds`` of the processor's time
        (0: any); a candidate that passes the gate goes live. Where the last run's passes by what
        was served since, it goes live, which ``second_looks`` keeps, and a run from it follows."""
        outcome = self._run(max_seconds)
        if outcome.status == "skipped" and outcome.verdict == PASS:
            self.second_looks.append(outcome)
            outcome = self._run(max_seconds)
        return outcome

    def _run(self, max_seconds: float) -> Outcome:
        settings = self.settings.model_copy(update={"max_seconds": max_seconds})
        with _at_home(self.home):
            outcome = train_once(
                self.engine, self.artifacts, GROUP, settings, trigger="benchmark",
                carry_on=True, clock=time.process_time,
            )  # fmt: skip
        if outcome.verdict == PASS and outcome.version_id is not None:
            promote(
                self.engine, outcome.version_id, actor="benchmark", reason=outcome.reason,
                evaluation_id=outcome.evaluation_id, force=True,
            )  # fmt: skip
        return outcome

    def live_id(self) -> int:
        with store.session(self.engine, write=False) as s:
            live = queries.aliases.desired_version(s, queries.groups.group_by_name(s, GROUP).id)
        assert live is not None
        return live[0]

    def trained_tokens(self) -> int:
        """Trained positions of all runs."""
        with store.session(self.engine, write=False) as s:
            group_id = queries.groups.group_by_name(s, GROUP).id
            return sum(run.tokens or 0 for run in queries.runs.runs(s, group_id))

    def load(self, version_id: int) -> Drafter:
        with store.session(self.engine, write=False) as s:
            version = queries.versions.version(s, version_id)
        folder = fetch_verified(self.artifacts, version, self.home / "read")
        layers = read_target(self.target).num_layers
        return checkpoint.load(folder, target_layers=layers).float().eval()

    def _store(self, s: Session, one: Sequence) -> None:
        self.served += 1
        finished = self.began + timedelta(seconds=_SECONDS_APART * self.served)
        request_id = wire.request_id(_BOOT, self.served)
        row = self.writer.write(_trace(one, request_id), None)
        assert row is not None
        temperature = one.sampling.temperature if one.sampling else 0.0
        s.add(
            Request(
                id=request_id, server_id=self.server_id, status="finished", may_train=True,
                admitted_at=finished - timedelta(seconds=_SECONDS_APART), finished_at=finished,
                domain=one.domain, prompt_tokens=one.output_start,
                completion_tokens=len(one.tokens) - one.output_start,
                conversation_hash=sha256_bytes(f"{self.settings.seed}:{one.conversation}".encode()),
                sampling={"temperature": temperature}, accept_rule=one.accept_rule,
            )
        )  # fmt: skip
        s.flush()
        queries.traces.add_trace(s, **_columns(row))


@contextmanager
def _at_home(folder: Path) -> Iterator[None]:
    """Where a run keeps its files meanwhile."""
    before = os.environ.get("AURORA_HOME")
    os.environ["AURORA_HOME"] = str(folder)
    get_settings.cache_clear()
    try:
        yield
    finally:
        os.environ.pop("AURORA_HOME")
        if before is not None:
            os.environ["AURORA_HOME"] = before
        get_settings.cache_clear()


def _trace(one: Sequence, request_id: int) -> AssembledTrace:
    """What a sidecar puts together of a request none of whose prefix was cached."""
    end, width, last_width = one.rows, one.features.shape[1], one.last.shape[1]
    tokens = one.tokens.numpy().astype(np.int64)
    header = wire.TraceHeader(
        _BOOT, request_id, 0, tokens.tolist(), str(one.features.dtype).removeprefix("torch."),
        width, last_width, True, one.output_start, one.greedy, [],
    )  # fmt: skip
    aux, last = (
        part[:end].contiguous().view(torch.uint8).numpy() for part in (one.features, one.last)
    )
    return AssembledTrace(header, tokens, 0, aux, last, np.zeros(0, np.int64))


def _columns(row: TraceRow) -> dict[str, object]:
    columns = msgspec.structs.asdict(row)
    return {name: columns[name] for name in columns if name not in ("created_us", "tokens")}
