"""How a recipe learns from served requests: in one stream as Aurora does, or in rounds as ours.

Both begin with the same drafter and see the same requests in the same order, and hand out the
drafter as it stands when so many requests were served. Time is the processor's, on one thread, so
that a busy machine bends nothing; with a GPU too, since there the processor that starts its kernels
is what a small drafter waits for.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from aurora_sgl.demo.prompts import sample_prompts
from aurora_sgl.drafter import checkpoint, scratch, vocabulary
from aurora_sgl.drafter.model import Drafter, accepted_of
from aurora_sgl.drafter.refresh import refresh
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.evaluation.device import as_served
from aurora_sgl.sequences import sequence as served_request
from aurora_sgl.sequences.sample_weights import by_rejection
from aurora_sgl.sequences.sequence import LoggedProposal
from aurora_sgl.training.learner import Learner
from aurora_sgl.training.settings import TrainSettings
from aurora_sgl.training.team import Team
from aurora_sgl.training.trainer import train
from benchmarks.corpus.features import CACHE, DEVICE, CorpusSet, target_folder
from benchmarks.measure import SHAPES
from benchmarks.offline_loop import OfflineLoop

#: A training run begins whenever so many requests were served.
ROUNDS = (50, 100, 200, 400, 600, 800, 1000)

_BUDGETS = Callable[[int], float]  # served requests -> seconds that training may have taken


@dataclass(frozen=True)
class Learned:
    """A drafter after ``served`` requests, and what its training cost so far."""

    served: int
    drafter: Drafter
    seconds: float  # of the processor
    tokens: int  # trained positions, over all passes


@lru_cache(maxsize=1)
def head() -> TargetHead:
    """The target's head, where everything is computed: on the GPU if there is one."""
    torch.set_num_threads(1)
    return TargetHead.load(target_folder()).to(DEVICE)


def untrained(seed: int) -> Drafter:
    """A drafter as a first start makes it: its vocabulary from the demo's sample prompts."""
    texts = [prompt.prompt for prompt in sample_prompts()]
    return scratch.make(target_folder(), texts=texts, seed=seed)


def one_stream(
    start: Drafter, requests: CorpusSet, settings: TrainSettings, stops: Sequence[int]
) -> Iterator[Learned]:
    """Every request once, in the order in which it was served, at a constant rate: one optimizer
    for the whole stream. At a stop what is waiting for a full batch is trained on as well."""
    head()
    began = time.process_time()
    torch.manual_seed(settings.seed)
    drafter = copy.deepcopy(start).float().to(DEVICE)
    learner = Learner(drafter, requests, head(), settings, Team())
    seconds, tokens, begin = 0.0, 0, 0
    for stop in stops:
        end = min(stop, len(requests))
        for place in range(begin, end, settings.batch_requests):
            batch = list(range(place, min(place + settings.batch_requests, end)))
            tokens += learner.update(batch, rate=1.0, done=0.0).positions
        seconds += time.process_time() - began
        begin = end
        now = learner.average if settings.ema else learner.drafter
        yield Learned(stop, copy.deepcopy(now).cpu(), seconds, tokens)
        began = time.process_time()


#: Of a bounded time: what the replays after it take of so short a run.
TRAINING_SHARE = 0.7


def as_shipped(
    start: Drafter,
    requests: CorpusSet,
    settings: TrainSettings,
    stops: Sequence[int],
    *,
    budget: _BUDGETS | None = None,
) -> Iterator[Learned]:
    """The loop itself (``offline_loop``): a run after each of ``stops`` requests, and what is live
    then. All of a run counts as its time: set-up, training, line search and gate. ``budget`` bounds
    the processor's time of all runs so far, of which training gets ``TRAINING_SHARE`` and the
    replays of line search and gate the rest; a run that would have none of it left is not made.
    """
    seconds, served = 0.0, 0
    with tempfile.TemporaryDirectory(prefix="aurora-loop-") as folder:
        home = Path(folder)
        drafter = checkpoint.save(start, home / "start")
        loop = OfflineLoop(home / "loop", drafter, target_folder(), settings, source="scratch")
        for stop in stops:
            loop.serve(requests.part(served, stop))
            served = stop
            left = budget(stop) - seconds if budget is not None else 0.0
            if budget is None or left >= 1:
                began = time.process_time()
                loop.train(max_seconds=TRAINING_SHARE * left)
                seconds += time.process_time() - began
            yield Learned(stop, loop.load(loop.live_id()), seconds, loop.trained_tokens())


def in_rounds(
    start: Drafter,
    requests: CorpusSet,
    settings: TrainSettings,
    stops: Sequence[int],
    *,
    rounds: Sequence[int] = ROUNDS,
    since: int = 0,
    budget: _BUDGETS | None = None,
    name: str = "",
) -> Iterator[Learned]:
    """A training run, as the scheduler starts them, at each of ``rounds``: it begins with what the
    last one published and trains on the newest ``window`` requests and a share of older ones. The
    drafter that it all begins with has seen ``since`` requests.

    ``budget`` bounds the processor's time of all runs so far. With a ``name`` the state of the last
    round is kept: a benchmark that was killed, or is asked for more requests, goes on there.
    """
    kept = _Kept(name)
    now = kept.load(start, since)
    for served in (n for n in rounds if n <= max(stops)):
        if served > now.served:
            now = _round(now, requests, served, settings, budget)
            kept.save(now)
        if served in stops and served == now.served:
            yield now


def _round(
    now: Learned,
    requests: CorpusSet,
    served: int,
    settings: TrainSettings,
    budget: _BUDGETS | None,
) -> Learned:
    drafter = now.drafter
    window = requests.part(max(0, served - settings.window), served)
    rows = window + _replayed(requests.part(0, max(0, served - settings.window)), window, settings)
    began = time.process_time()
    counts = Counter[int]()
    for place in window.rows:
        counts.update(place.answered.tokens[place.answered.prompt_tokens :].tolist())
    held = vocabulary.coverage(counts, drafter.target_ids)
    if held < settings.vocabulary_threshold:
        always = vocabulary.stop_tokens(target_folder())
        drafter = refresh(drafter, counts, always=always, seed=settings.seed).drafter
    given = settings
    if budget is not None:
        left = budget(served) - now.seconds - (time.process_time() - began)
        if left < 1:
            return replace(now, served=served)
        given = settings.model_copy(update={"max_seconds": left})
    data = AsServed(rows, now.drafter, settings) if settings.needs_log else rows
    result = train(drafter, data, head(), given, clock=time.process_time)
    seconds = now.seconds + time.process_time() - began
    if isinstance(data, AsServed):
        seconds -= data.seconds  # a server has the log already
    return Learned(served, result.drafter, seconds, now.tokens + result.tokens)


def _replayed(older: CorpusSet, window: CorpusSet, settings: TrainSettings) -> CorpusSet:
    count = round(len(window) * settings.replay_share / (1 - settings.replay_share))
    generator = torch.Generator().manual_seed(settings.seed * 1009 + len(older))
    picked = torch.randperm(len(older), generator=generator)[:count].tolist()
    return CorpusSet(tuple(older.rows[index] for index in picked))


class AsServed:
    """Requests with what the live drafter proposed for them and how it fared: the store's log."""

    def __init__(self, rows: CorpusSet, live: Drafter, settings: TrainSettings) -> None:
        self.rows, self.settings = rows, settings
        self.live = as_served(live, settings)
        self.seconds = 0.0  # spent on finding out what a server would have known
        self.known: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def length(self, index: int) -> int:
        return self.rows.length(index)

    def __getitem__(self, index: int) -> served_request.Sequence:
        one = self.rows[index]
        if index not in self.known:
            began = time.process_time()
            proposals = served(self.live, one, head())
            weights = None
            if self.settings.after_rejection_weight != 1:
                steps = [
                    {
                        "position": p.root + 1,
                        "depth": SHAPES["tree"].depth,
                        "accepted": p.accepted,
                        "first_rejected_at": int(p.accepted < SHAPES["tree"].depth),
                    }
                    for p in proposals
                ]
                weights = by_rejection(
                    steps, one.rows, one.output_start, self.settings.after_rejection_weight
                )
            self.known[index] = {"proposals": proposals, "weights": weights}
            self.seconds += time.process_time() - began
        return replace(one, **self.known[index])


def served(
    drafter: Drafter, one: served_request.Sequence, head: TargetHead
) -> tuple[LoggedProposal, ...]:
    """The verify steps of a request, had this drafter served it with the tree."""
    shape = SHAPES["tree"]
    roots = torch.arange(one.output_start, min(len(one.tokens) - 2, one.rows) + 1)
    drafts = drafter.propose(one.tokens, one.features, roots, shape, head)
    found, root = [], one.output_start
    while root - one.output_start < len(drafts):
        draft = drafts[root - one.output_start]
        accepted = accepted_of(draft, one.tokens[root + 1 :].tolist())
        found.append(LoggedProposal(root, draft.tokens, draft.parents, accepted))
        root += accepted + 1
    return tuple(found)


class _Kept:
    """The state after the last round of one cell's run; no name: nothing is kept."""

    def __init__(self, name: str) -> None:
        self.path: Path | None = None
        if name:
            digest = hashlib.sha256(name.encode()).hexdigest()[:16]
            self.path = CACHE.parent / "rounds" / f"{digest}.pt"

    def load(self, start: Drafter, since: int) -> Learned:
        if self.path is None or not self.path.exists():
            return Learned(since, start, 0.0, 0)
        state = torch.load(self.path, weights_only=True)
        drafter = copy.deepcopy(start)
        drafter.load_state_dict(state["drafter"])
        return Learned(state["served"], drafter, state["seconds"], state["tokens"])

    def save(self, now: Learned) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        state = {"served": now.served, "seconds": now.seconds, "tokens": now.tokens}
        torch.save({**state, "drafter": now.drafter.state_dict()}, beside)
        beside.replace(self.path)
