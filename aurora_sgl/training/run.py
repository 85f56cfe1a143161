"""One training run from the store to the store: read, train, compare, and keep a new version."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from aurora_sgl import store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.config import get_settings
from aurora_sgl.drafter import checkpoint, vocabulary
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.refresh import refresh
from aurora_sgl.drafter.target import TargetHead, TargetInfo
from aurora_sgl.errors import AuroraError
from aurora_sgl.evaluation.gate import PASS, difference_of, pairs_of
from aurora_sgl.evaluation.record import record
from aurora_sgl.evaluation.replay import RequestReplay, replay_both
from aurora_sgl.intervals import or_none
from aurora_sgl.private import make_folder
from aurora_sgl.rollout.versions import import_version
from aurora_sgl.sequences import dataset
from aurora_sgl.sequences.held_out import HeldOut, held_out_of
from aurora_sgl.store import queries
from aurora_sgl.store.link import patiently
from aurora_sgl.store.models import Evaluation
from aurora_sgl.training import line_search, reservoir
from aurora_sgl.training.bases import BaseIds, Bases, base_ids, base_ratio, load
from aurora_sgl.training.maturity import by_maturity, trained_tokens
from aurora_sgl.training.recipe_bandit import RecipeChoice, choose, past_rewards, reward_of
from aurora_sgl.training.reporter import RunReporter
from aurora_sgl.training.resume import Checkpoints, RunPlan, settings_of
from aurora_sgl.training.run_data import RunData
from aurora_sgl.training.second_look import RequestsSince, base_after, requests_since
from aurora_sgl.training.selection import Selection, select
from aurora_sgl.training.settings import TrainSettings
from aurora_sgl.training.trainer import Progress, TrainResult, train

#: Seconds that a run waits for a store that is away: less than its lease lasts.
AWAY_SECONDS = 240.0
#: Runs whose rewards the choice of a recipe looks at.
REMEMBERED_RUNS = 200

T = TypeVar("T")


class Skipped(AuroraError):
    """There was nothing to do; not a failure."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to. ``version_id`` and ``evaluation_id`` are set when it succeeded, and when
    it was skipped because the candidate that it would have gone on from passes the gate by now."""

    run_id: int
    status: str  # succeeded | skipped | failed
    version_id: int | None = None
    evaluation_id: int | None = None
    verdict: str = ""
    error: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    reason: str = ""  # of the verdict, one sentence

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
    carry_on: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Train on the requests of a group (by name) and import the result as a version.

    ``target`` is the folder of the target model (default: the group's ``target_model``).
    ``base_version_id`` is what training starts from and its result is compared with (default: the
    live version); ``carry_on``, where none is named: start from the newest candidate against the
    live version that may be gone on with. ``clock``: what ``max_seconds`` is counted by, as in
    :func:`~aurora_sgl.training.trainer.train`. The caller sees to it that one run of a group exists
    at a time; a run that a killed trainer left behind is ended as failed first.

    Every end is written into ``training_run``: ``succeeded`` with a version and an evaluation
    against the baseline, ``skipped`` or ``failed`` with one line in ``error``. Promotes nothing.
    Re-raises what is not an ``AuroraError`` or ``OSError``, after writing it down.
    """
    with store.session(engine) as s:
        owner = queries.groups.group_by_name(s, group)
        queries.runs.fail_running(s, owner.id, "the trainer stopped without a word")
        ids = base_ids(s, owner.id, base_version_id, carry_on=carry_on)
        choice = _choice(s, owner.id, settings)
        settings = choice.settings
        past = _past_stages(s, owner.id)
        run_id = queries.runs.start_run(
            s,
            owner.id,
            trigger=trigger,
            base_version_id=ids.base if ids else None,
            objective=settings.objective,
            config=settings.as_json(),
        ).id
    reporter = RunReporter(engine, run_id, past)
    run = _Run(engine, artifacts, owner.id, group, settings, run_id, reporter, progress, clock)
    run.columns["metrics"] = choice.metrics if settings.explore else {}
    reporter.start()
    try:
        return run.go(ids, Path(target or owner.target_model))
    except Skipped as reason:
        return run.end("skipped", error=str(reason))
    except (AuroraError, OSError) as error:
        return run.end("failed", error=_one_line(error))
    except BaseException as error:
        run.end("failed", error=f"{type(error).__name__}: {_one_line(error)}")
        raise


def _choice(s: Session, group_id: int, settings: TrainSettings) -> RecipeChoice:
    """The recipe by what past runs earned; a run that was killed is chosen for once more alike."""
    if not settings.explore:
        return RecipeChoice(settings)
    past = queries.runs.runs(s, group_id, status="succeeded", limit=REMEMBERED_RUNS)
    rewards = past_rewards([run.metrics for run in reversed(past)])
    last = past[0].id if past else 0
    return choose(settings, rewards, seed=[settings.seed, group_id, last])


def _past_stages(s: Session, group_id: int) -> dict[str, Any]:
    """What the stages of the last run that succeeded took."""
    last = queries.runs.runs(s, group_id, status="succeeded", limit=1)
    return dict(last[0].metrics.get("stage_seconds") or {}) if last else {}


class _Run:
    def __init__(
        self,
        engine: Engine,
        artifacts: ArtifactRoot,
        group_id: int,
        group: str,
        settings: TrainSettings,
        run_id: int,
        reporter: RunReporter,
        progress: Progress | None,
        clock: Callable[[], float],
    ) -> None:
        self.clock = clock
        self.engine, self.artifacts = engine, artifacts
        self.group_id, self.group = group_id, group
        self.settings, self.run_id = settings, run_id
        self.reporter, self.progress = reporter, progress
        self.columns: dict[str, Any] = {}
        self.began = time.monotonic()
        self.info: TargetInfo | None = None
        self.judged = HeldOut(0)

    def go(self, ids: BaseIds | None, target: Path) -> Outcome:
        if ids is None:
            raise Skipped("no version is live yet: import one and promote it first")
        checkpoints = Checkpoints(_training_folder() / f"group-{self.group_id}",
                                  self.settings.checkpoint_seconds)  # fmt: skip
        with _work_folder() as work:
            bases = _waiting(lambda: self._bases(ids, target, work))
            head = TargetHead.load(target)
            since = _waiting(
                lambda: requests_since(self._sources(bases.base), bases.ids, self.settings)
            )
            if since is not None:
                judged = self._judge_again(bases, head, since)
                if judged.verdict == PASS:
                    return self._passed_now(judged)
                bases = base_after(bases, judged)
                self._say({"event": "reading"})
            self._go_on_from(bases)
            base, live = bases.base, bases.baseline
            recipe = _waiting(lambda: self._by_maturity(bases.ids.base))
            selection = _waiting(lambda: self._selection(checkpoints, bases.base_sha256, recipe))
            _waiting(lambda: self._keep_reservoir(selection))
            data = _waiting(lambda: self._data(base, selection))
            examples = _examples(data)
            _waiting(lambda: self._note_examples(examples))
            start = self._with_vocabulary(base, data, target)
            checkpoints.begin(_plan(self.settings, bases.base_sha256, selection))
            try:
                result = self._train(start, data, head, recipe, checkpoints)
                traffic = Counter(row.domain for row in selection.window)
                chosen = self._search(live, start, result, data, head, traffic)
                gate = _waiting(lambda: self._gate(base, examples))
                say = self._counting("gate", len(gate))
                replays = replay_both(live, chosen, gate.readable(), head, self.settings, say)
                self._say({"event": "storing"})
                result = replace(result, drafter=chosen)
                _waiting(lambda: self._require_not_purged(examples))
                outcome = _waiting(lambda: self._keep(bases.ids, result, replays, work))
            except AuroraError:
                checkpoints.clear()  # whoever takes it up would come to the same end
                raise
            checkpoints.clear()
            return outcome

    def end(self, status: str, *, error: str = "", **columns: Any) -> Outcome:
        self.reporter.close()
        fields = {**self.columns, **columns, "error": error, "progress": self.reporter.state()}
        if status == "succeeded":
            fields["metrics"] |= {"stage_seconds": self.reporter.stages()}
        with store.session(self.engine) as s:
            queries.runs.finish_run(s, self.run_id, status, **fields)
        return Outcome(self.run_id, status, error=error, metrics=fields.get("metrics", {}))

    def _bases(self, ids: BaseIds, target: Path, work: Path) -> Bases:
        bases = load(self.engine, self.artifacts, ids, target, work)
        self.info = bases.target
        return bases

    def _judge_again(self, bases: Bases, head: TargetHead, since: RequestsSince) -> Evaluation:
        """The base against the live version, as one more try of its line."""
        say = self._counting("second_look", len(since.judging))
        before, after = replay_both(
            bases.baseline, bases.base, since.judging.readable(), head, self.settings, say
        )
        return _waiting(
            lambda: record(
                self.engine,
                before,
                after,
                candidate_id=bases.ids.base,
                baseline_id=bases.ids.baseline,
                recipe=self.settings,
                details={"run_id": self.run_id, "again": True},
                left_out=since.left_out,
            )
        )

    def _passed_now(self, judged: Evaluation) -> Outcome:
        """The candidate that this run would have gone on from may go live: that comes first."""
        reason = judged.details["reason"]
        sentence = f"version {judged.candidate_id}, judged again by what was served since: {reason}"
        ended = self.end("skipped", error=f"{sentence}; nothing was trained")
        return replace(ended, version_id=judged.candidate_id, evaluation_id=judged.id,
                       verdict=judged.verdict, reason=reason)  # fmt: skip

    def _go_on_from(self, bases: Bases) -> None:
        self.columns["base_version_id"] = bases.ids.base
        if bases.ids.left:
            self.columns["metrics"] = {
                **self.columns.get("metrics", {}), "base_left": bases.ids.left
            }  # fmt: skip
            self._say({"event": "base_left", "reason": bases.ids.left})

    def _selection(
        self, checkpoints: Checkpoints, base_sha256: str, recipe: TrainSettings
    ) -> Selection:
        """The requests of this run: those of a killed run with the same settings and base, or new
        ones."""
        settings = self.settings
        left = checkpoints.left_behind(settings, base_sha256) if settings.resume else None
        with store.session(self.engine, write=False) as s:
            selection = select(s, self.group_id, recipe)
        if left is None:
            return selection
        recent = {row.request_id: row for row in selection.recent}
        window, replay, dev, held_out = (
            [recent[i] for i in ids if i in recent]
            for ids in (left.window, left.replay, left.dev, left.held_out)
        )
        return replace(selection, window=window, replay=replay, dev=dev, held_out=held_out)

    def _keep_reservoir(self, selection: Selection) -> None:
        with store.session(self.engine) as s:
            reservoir.pin(s, self.group_id, selection.reservoir)

    def _data(self, base: Drafter, selection: Selection) -> dataset.Dataset:
        settings = self.settings
        data = self._sources(base).training(selection)
        if selection.span is not None:
            self.columns["window_start"], self.columns["window_end"] = selection.span
        self.columns["requests"] = len(data.train)
        self.columns["metrics"] = {
            **self.columns.get("metrics", {}),
            "left_out": dict(data.left_out),
            "replayed_requests": len(selection.replay),
            "reservoir_requests": len(selection.reservoir),
        }
        self._note_held_out(data, selection)
        counts = {"requests": len(data.train), "dev": len(data.dev), "gate": len(data.gate)}
        self._say({"event": "window", **counts})
        if len(data.train) < settings.min_requests:
            raise Skipped(
                f"{len(data.train)} requests to train on, at least {settings.min_requests} needed"
                + (f" (left out: {dict(data.left_out)})" if data.left_out else "")
            )
        return data

    def _gate(self, base: Drafter, examples: list[int]) -> dataset.SequenceSet:
        data, newest = self._sources(base).newest_unlearnt(examples)
        self._note_held_out(data, newest)
        return data.gate

    def _sources(self, base: Drafter) -> RunData:
        return RunData(self.engine, self.artifacts, self.group_id, self.settings, base.config)

    def _note_held_out(self, data: dataset.Dataset, selection: Selection) -> None:
        gate = [row for row, _ in data.gate.items]
        self.judged = held_out_of(gate, selection.not_judged + data.held_out_left)
        self.columns["metrics"] |= {
            "gate_requests": len(gate),
            "gate_rules": self.judged.by_rule,
            "gate_left_out": self.judged.left_out,
        }

    def _note_examples(self, examples: list[int]) -> None:
        """So that a purge can name the version that learnt from a request."""
        with store.session(self.engine) as s:
            queries.training_requests.add_training_requests(s, self.run_id, examples)

    def _require_not_purged(self, examples: list[int]) -> None:
        with store.session(self.engine, write=False) as s:
            queries.training_requests.require_not_purged(s, examples)

    def _with_vocabulary(self, base: Drafter, data: dataset.Dataset, target: Path) -> Drafter:
        """The base, or a copy whose draft vocabulary holds what traffic asks for now."""
        if not base.has_draft_vocabulary or not data.counts:
            return base
        held = vocabulary.coverage(data.counts, base.target_ids.cpu())
        self.columns["metrics"]["vocabulary_coverage"] = round(held, 4)
        if held >= self.settings.vocabulary_threshold:
            return base
        always = vocabulary.stop_tokens(target)
        fresh = refresh(base, data.counts, always=always, seed=self.settings.seed)
        if not fresh.replaced:
            return base
        self.columns["metrics"] |= {
            "vocabulary_replaced": fresh.replaced,
            "vocabulary_coverage_after": round(fresh.coverage, 4),
        }
        return fresh.drafter

    def _by_maturity(self, base_version_id: int) -> TrainSettings:
        """The recipe with what suits the base."""
        with store.session(self.engine, write=False) as s:
            trained = trained_tokens(s, base_version_id)
        recipe = by_maturity(self.settings, trained)
        self.columns["metrics"] = self.columns.get("metrics", {}) | {
            "peak_rate": recipe.learning_rate,
            "replay_share": round(recipe.replay_share, 4),
            "base_trained_tokens": trained if math.isfinite(trained) else None,
        }
        return recipe

    def _search(
        self,
        live: Drafter,
        start: Drafter,
        result: TrainResult,
        data: dataset.Dataset,
        head: TargetHead,
        traffic: Counter[str],
    ) -> Drafter:
        """How much of what was learnt to take over."""
        if not self.settings.line_search:
            self.columns["metrics"] |= {"alpha": 1.0, "line_search": []}
            return result.drafter

        def say(done: int, most: int) -> None:
            self._say({"event": "line_search", "done": done, "of": most})

        say(0, 1 + len(line_search.ALPHAS))
        search = line_search.search(
            live, start, result.drafter, data.dev, head, self.settings, say, traffic
        )
        self.columns["metrics"] |= search.metrics
        return search.drafter

    def _train(
        self,
        start: Drafter,
        data: dataset.Dataset,
        head: TargetHead,
        settings: TrainSettings,
        checkpoints: Checkpoints,
    ) -> TrainResult:
        dev = data.dev if settings.patience else None
        if settings.workers > 1:
            from aurora_sgl.training.scale import train_on_workers

            return train_on_workers(
                start, data.train, head, settings,
                dev=dev, progress=self._say, checkpoints=checkpoints,
            )  # fmt: skip
        return train(
            start, data.train, head, settings,
            dev=dev, progress=self._say, checkpoints=checkpoints, clock=self.clock,
        )  # fmt: skip

    def _keep(
        self,
        ids: BaseIds,
        result: TrainResult,
        replays: tuple[list[RequestReplay], list[RequestReplay]],
        work: Path,
    ) -> Outcome:
        folder = checkpoint.save(result.drafter, work / "candidate")
        before, after = replays
        paired, settings = difference_of(pairs_of(before, after)), self.settings
        metrics = {
            **self.columns.get("metrics", {}),
            **result.metrics,
            "accept_length_before": or_none(paired.baseline),
            "accept_length_after": or_none(paired.candidate),
            **self._earned(ids, paired.baseline, paired.candidate),
        }
        version = import_version(
            self.engine,
            self.artifacts,
            folder,
            self.group,
            source="train",
            parent_id=ids.base,
            training_run_id=self.run_id,
            note=f"{settings.objective} on {self.columns['requests']} requests",
            metrics=metrics,
            target=self.info,
        )
        row = record(
            self.engine,
            before,
            after,
            candidate_id=version.id,
            baseline_id=ids.baseline,
            recipe=settings,
            details={"run_id": self.run_id},
            left_out=self.judged.left_out,
        )
        outcome = self.end("succeeded", tokens=result.tokens, metrics=metrics)
        return Outcome(
            outcome.run_id, "succeeded", version.id, row.id, row.verdict,
            metrics=metrics, reason=str(row.details.get("reason", "")),
        )  # fmt: skip

    def _earned(self, ids: BaseIds, before: float, after: float) -> dict[str, Any]:
        """Gain over the base and reward, for the choice of the next runs' recipes. ``before`` is
        the baseline's accept length, of which the base may be ahead already."""
        if not self.settings.explore:
            return {}
        with store.session(self.engine, write=False) as s:
            base = before * base_ratio(s, ids)
        earned = reward_of(base, after, time.monotonic() - self.began, self.settings)
        gain, reward = earned or (None, None)
        return {"gain": gain, "reward": reward}

    def _counting(self, event: str, requests: int) -> Callable[[int], None]:
        """Tells that a replay of so many requests begins, and then how many were replayed."""

        def say(done: int) -> None:
            self._say({"event": event, "requests": requests, "done": done})

        say(0)
        return say

    def _say(self, event: dict[str, Any]) -> None:
        self.reporter(event)
        if self.progress is not None:
            self.progress(event)


def _waiting(work: Callable[[], T]) -> T:
    """Work with the store, which may be away for as long as the lease of a run lasts."""
    return patiently(work, AWAY_SECONDS)


def _examples(data: dataset.Dataset) -> list[int]:
    """What is learnt from, and by what its result is chosen."""
    return [row.request_id for part in (data.train, data.dev) for row, _ in part.items]


def _plan(settings: TrainSettings, base_sha256: str, selection: Selection) -> RunPlan:
    parts = (selection.window, selection.replay, selection.dev, selection.held_out)
    return RunPlan(
        settings_of(settings), base_sha256, *([row.request_id for row in part] for part in parts)
    )


def _training_folder() -> Path:
    folder = get_settings().home / "training"
    make_folder(folder)
    return folder


@contextmanager
def _work_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=_training_folder()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
