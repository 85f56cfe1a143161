"""Requests of the store as the sequences of a run: what it trains on, and what judges it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine

from aurora_sgl import store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.config import get_settings
from aurora_sgl.drafter.config import DrafterConfig
from aurora_sgl.sequences import dataset
from aurora_sgl.sequences.sample_weights import by_recency
from aurora_sgl.sequences.trace_cache import TraceFiles
from aurora_sgl.store import queries
from aurora_sgl.store.queries.requests import RecentRequest
from aurora_sgl.training.selection import HELD_OUT, Selection, select
from aurora_sgl.training.settings import TrainSettings


@dataclass(frozen=True)
class RunData:
    """Where a run's data comes from. ``config``: of the drafter that reads the features."""

    engine: Engine
    artifacts: ArtifactRoot
    group_id: int
    settings: TrainSettings
    config: DrafterConfig

    def training(self, selection: Selection) -> dataset.Dataset:
        """All splits as the run begins."""
        settings = self.settings
        return self._build(
            [*selection.window, *selection.replay, *selection.dev, *selection.held_out],
            selection,
            steps_of=_Steps(self.engine) if settings.needs_log else None,
            weights=by_recency(selection.window, settings.recency_half_life),
            after_rejection_weight=settings.after_rejection_weight,
            repeat_prefixes=settings.repeat_prefixes,
        )

    def newest_unlearnt(self, learnt: list[int]) -> tuple[dataset.Dataset, Selection]:
        """The gate's split as it is now, and what it was chosen from: held-out requests, then those
        of the other sides that no run has learnt from, since a run may take as long as it took to
        serve all that it began with. Nothing in it nearly repeats a request that was ``learnt``
        from (by id)."""
        with store.session(self.engine, write=False) as s:
            newest = select(s, self.group_id, self.settings)
            rows = queries.requests.with_traces(s, learnt)
            unlearnt = queries.training_requests.never_learnt(s, self.group_id, newest.open_to_all)
        data = self._build(
            [*rows, *newest.held_out, *unlearnt], newest, trained=learnt,
            unlearnt={row.request_id for row in unlearnt},
        )  # fmt: skip
        return data, newest

    def _build(
        self, rows: list[RecentRequest], selection: Selection, **more: Any
    ) -> dataset.Dataset:
        return dataset.build(
            rows,
            TraceFiles(self.artifacts, get_settings().home / "cache"),
            self.config,
            dev_share=self.settings.dev_share,
            gate_share=self.settings.gate_share,
            donors=selection.recent,
            most_gate=HELD_OUT,
            **more,
        )


class _Steps:
    """Verify steps of a request from the store; picklable, for workers of their own."""

    def __init__(self, engine: Engine) -> None:
        self.url = engine.url.render_as_string(hide_password=False)
        self.engine: Engine | None = engine

    def __call__(self, request_id: int) -> list[dict[str, Any]]:
        if self.engine is None:
            self.engine = store.connect(self.url)
        with store.session(self.engine, write=False) as s:
            return queries.events.events(s, request_id)

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "engine": None}
