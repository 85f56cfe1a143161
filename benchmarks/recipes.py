"""Our whole recipe against Aurora's: what does each gain from the same served requests?

Both start from the same untrained drafter and see the same requests in the same order: one narrow
form, broad chat, and both mixed with code; three seeds, each with an untrained drafter and requests
of its own. Accept length is replayed on 60 requests of the same domain that nobody trains on, in
bfloat16, as a chain of 4 and as the demo's tree (depth 4, top-k 4, 16 nodes).

*aurora* is the published recipe: forward KL on the answers, 5 unrolled steps weighted 0.8 ** i,
AdamW at a constant rate, batches of 8 requests, one pass, gradient clip 2.5, the last weights. Its
rate is the best of ``RATES`` on seed 0 of each domain, so that it is no straw man.
*aurora batch 1* is the same with one request an update, at its own best rate.
*shipped* is the loop as it ships, without a server (``learning.as_shipped``): a run after each of
``ROUNDS`` requests; what is measured is the version that is live then. A quarter of its requests
are never trained on, they choose and judge.
*shipped equal time* may take no more of the processor's time than *aurora* took for as many
requests, *shipped equal time 1* no more than *aurora batch 1*; line search and gate count too.
*ours* and *ours equal time* are what was measured on an H200 before: ``OURS`` (more updates, a
larger share of the vocabulary) in rounds, without line search and gate.

Nothing of our recipe was tuned on these cells: the trainer's defaults were measured on the demo's
own prompts (``TrainSettings`` says what), and the rest of ``OURS`` and ``EQUAL_TIME`` was written
down before their first cell was run. The ratio is pooled gain over pooled gain, over the cells in
which Aurora's gain exceeds 0.05, with a bootstrap interval over held-out requests and seeds, with
one seed over requests alone. All clocks count from before the optimizer is made.
``--search 0`` tries no rates where none were tried yet, and takes the middle one.

    python -m benchmarks.recipes [--until 400] [--seeds 0 1 2] [--domains narrow chat mixed]
        [--recipes aurora ours ...] [--search 200] [--parts] [--show] [--json]

Cells are kept in ``benchmarks/results/recipes.jsonl`` as they finish: stop it at any time, call it
again to go on, or with ``--show`` for the tables of what is there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

from aurora_sgl.training.settings import TrainSettings
from benchmarks.learning import (
    ROUNDS,
    Learned,
    as_shipped,
    head,
    in_rounds,
    one_stream,
    untrained,
)
from benchmarks.measure import SHAPES, Measured, accept_length, mean, measure, paired, spread
from benchmarks.ratio import Cell, pooled
from benchmarks.results import Cells, loop_hash, settings_hash
from benchmarks.servers import report
from benchmarks.traffic import HELD_OUT, NAMES, held_out, stream

CHECKPOINTS = (50, 100, 200, 400, 1000)
SEEDS = (0, 1, 2)
RATES = (1e-3, 2e-3, 4e-3)
LEAST_GAIN = 0.05
#: What runs when none is named: the opponents first, whose time the others may take.
RECIPES = (
    "aurora", "aurora batch 1", "shipped", "shipped equal time", "shipped equal time 1",
)  # fmt: skip

AURORA = TrainSettings(
    objective="forward_kl", steps=5, step_decay=0.8, passes=1, schedule="constant", warmup=0,
    clip=2.5, ema=0.0, train_on_prompt=False, replay_share=0.0, batch_requests=8,
    vocabulary_threshold=0.0,
)  # fmt: skip
OURS = TrainSettings(objective="forward_kl", least_updates=400, vocabulary_threshold=0.99)
SHIPPED = TrainSettings(depth=4, topk=4, nodes=16)
EQUAL_TIME = OURS.model_copy(update={"steps": 2, "train_on_prompt": False})

#: What is taken out of our recipe, or put in, one at a time.
PARTS: dict[str, dict[str, Any]] = {
    "one pass": {"passes": 1, "least_updates": 0},
    "two passes": {"passes": 2, "least_updates": 0},
    "first vocabulary": {"vocabulary_threshold": 0.0},
    "constant rate": {"schedule": "constant"},
    "last weights": {"ema": 0.0},
    "no replay": {"replay_share": 0.0},
    "answers only": {"train_on_prompt": False},
    "batches of 8": {"batch_requests": 8},
    "five steps": {"steps": 5},
    "after rejections x3": {"after_rejection_weight": 3.0},
    "lk": {"objective": "lk"},
    "expected accept length": {"objective": "expected_accept_length"},
    "RL stage": {"objective": "distil_then_rl"},
}


class Bench:
    """Runs cells that are missing, and reads those that are there."""

    def __init__(self, name: str = "recipes") -> None:
        self.cells = Cells(name)

    def before(self, domain: str, seed: int) -> Measured:
        key = {"recipe": "start", "domain": domain, "seed": seed, "held_out": HELD_OUT}
        found = self.cells.get(**key)
        if found is None:
            found = measure(untrained(seed), held_out(domain), head())
            self.cells.put(found, **key)
        return found

    def get(
        self,
        settings: TrainSettings,
        domain: str,
        seed: int,
        served: int,
        *,
        timed: bool | str = False,
    ) -> dict[str, Any] | None:
        return self.cells.get(**_key(settings, domain, seed, served, timed))

    def run(
        self,
        settings: TrainSettings,
        domain: str,
        seed: int,
        until: int,
        *,
        rival: TrainSettings | None = None,  # whose time ours may take
        timed: bool | str = False,  # see ``timed_of``
    ) -> None:
        """All checkpoints of one recipe on one domain and seed, those that are missing."""
        settings = settings.model_copy(update={"seed": seed})
        stops = [n for n in CHECKPOINTS if n <= until]
        if all(self.get(settings, domain, seed, n, timed=timed) for n in stops):
            return
        self.before(domain, seed)
        requests = stream(domain, seed).part(0, until).prepare()
        learned: Iterator[Learned]
        budget = self._budget(rival, domain, seed) if rival is not None else None
        if settings == SHIPPED.model_copy(update={"seed": seed}):
            learned = as_shipped(untrained(seed), requests, settings, stops, budget=budget)
        elif settings.schedule == "constant" and settings.warmup == 0:
            learned = one_stream(untrained(seed), requests, settings, stops)
        else:
            name = str(_key(settings, domain, seed, 0, timed))
            learned = in_rounds(
                untrained(seed), requests, settings, stops, budget=budget, name=name
            )
        for now in learned:
            if self.get(settings, domain, seed, now.served, timed=timed):
                continue
            found = measure(now.drafter, held_out(domain), head())
            extra = {
                "seconds": round(now.seconds, 2),
                "tokens": now.tokens,
                "served": min(now.served, len(requests)),
            }
            self.cells.put({**found, **extra}, **_key(settings, domain, seed, now.served, timed))
            lengths_now = {shape: round(accept_length(found, shape), 3) for shape in SHAPES}
            _say(f"{domain} seed {seed} {now.served}: {lengths_now}, {now.seconds:.0f} s")

    def _budget(self, rival: TrainSettings, domain: str, seed: int) -> Any:
        """The rival's seconds; between its checkpoints in proportion to what was served."""
        rival = rival.model_copy(update={"seed": seed})
        known = [(0, 0.0)]
        for n in CHECKPOINTS:
            cell = self.get(rival, domain, seed, n)
            known += [(n, cell["seconds"])] if cell else []
        at, seconds = zip(*known, strict=True)
        return lambda served: float(np.interp(served, at, seconds))

    def best_rate(self, settings: TrainSettings, domain: str) -> TrainSettings:
        """At the rate that was best on seed 0 after the most requests that all rates were run to,
        by the mean accept length of chain and tree."""
        found: list[tuple[float, float]] = []
        for served in CHECKPOINTS:
            at_rates = [settings.model_copy(update={"learning_rate": rate}) for rate in RATES]
            tried = [(one.learning_rate, self.get(one, domain, 0, served)) for one in at_rates]
            if all(cell for _, cell in tried):
                found = [
                    (mean(accept_length(cell, shape) for shape in SHAPES), rate)
                    for rate, cell in tried
                    if cell
                ]
        rate = max(found)[1] if found else RATES[1]
        return settings.model_copy(update={"learning_rate": rate})

    def search(self, settings: TrainSettings, domain: str, until: int) -> TrainSettings:
        for rate in RATES:
            self.run(settings.model_copy(update={"learning_rate": rate}), domain, 0, until)
        return self.best_rate(settings, domain)


def _key(
    settings: TrainSettings, domain: str, seed: int, served: int, timed: bool | str
) -> dict[str, Any]:
    """``timed`` cells also depend on the machine: their limit is another recipe's time; a text
    says whose, where it is not that of batches of 8."""
    plain = settings.model_copy(update={"seed": 0})
    named = loop_hash if plain == SHIPPED else settings_hash
    return {
        "recipe": named(plain, ROUNDS, HELD_OUT),
        "timed": timed,
        "domain": domain,
        "seed": seed,
        "served": served,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# Tables.


def rivals(bench: Bench) -> dict[str, Any]:
    """Settings of each recipe for a domain."""
    one = AURORA.model_copy(update={"batch_requests": 1})
    best = cache(bench.best_rate)
    return {
        "aurora": lambda domain: best(AURORA, domain),
        "aurora batch 1": lambda domain: best(one, domain),
        "ours": lambda domain: OURS,
        "ours equal time": lambda domain: EQUAL_TIME,
        "shipped": lambda domain: SHIPPED,
        "shipped equal time": lambda domain: SHIPPED,
        "shipped equal time 1": lambda domain: SHIPPED,
    }


#: By recipe of :func:`rivals` the one whose processor's time it may take.
IN_THE_TIME_OF = {
    "ours equal time": "aurora",
    "shipped equal time": "aurora",
    "shipped equal time 1": "aurora batch 1",
}


def timed_of(name: str) -> bool | str:
    """As a part of the key of the cells of a recipe."""
    rival = IN_THE_TIME_OF.get(name)
    return rival if rival == "aurora batch 1" else rival is not None


def compared(bench: Bench, mine: str, rival: str = "aurora") -> list[Cell]:
    """Every cell that both recipes have finished."""
    settings, found = rivals(bench), []
    for domain in NAMES:
        for seed in SEEDS:
            for served in CHECKPOINTS:
                one = bench.get(settings[rival](domain), domain, seed, served)
                timed = timed_of(mine)
                other = bench.get(settings[mine](domain), domain, seed, served, timed=timed)
                if one and other:
                    start = bench.before(domain, seed)
                    found.append(Cell(domain, seed, served, start, one, other))
    return found


def by_checkpoint(bench: Bench, shape: str) -> list[dict[str, Any]]:
    settings, rows = rivals(bench), []
    for domain in NAMES:
        for served in CHECKPOINTS:
            row: dict[str, Any] = {"domain": domain, "requests": served, "seeds": 0}
            for name, of in settings.items():
                cells = [
                    (seed, bench.get(of(domain), domain, seed, served, timed=timed_of(name)))
                    for seed in SEEDS
                ]
                values = [
                    accept_length(cell, shape) - accept_length(bench.before(domain, seed), shape)
                    for seed, cell in cells
                    if cell
                ]
                seconds = mean(cell["seconds"] for _, cell in cells if cell)
                row[name] = _number(values)
                row["seeds"] = max(row["seeds"], len(values))
                row[f"{name} s"] = f"{seconds:.0f}" if values else "-"
            if row["seeds"]:
                rows.append(row)
    return rows


BOTH = ("aurora", "aurora batch 1")
OPPONENTS = {
    "shipped": BOTH, "shipped equal time": BOTH[:1], "shipped equal time 1": BOTH[1:],
    "ours": BOTH, "ours equal time": BOTH,
}  # fmt: skip


def ratios(bench: Bench) -> list[dict[str, Any]]:
    rows = []
    for mine, rivals_of in OPPONENTS.items():
        for rival in rivals_of:
            cells = compared(bench, mine, rival)
            for shape in SHAPES:
                r = pooled(cells, shape, least=LEAST_GAIN)
                if r.counted:
                    rows.append(
                        {
                            "recipe": mine,
                            "against": rival,
                            "cells": f"{r.counted} of {r.cells}",
                            "seeds": len({cell.seed for cell in cells}),
                            "shape": shape,
                            "their gain": r.rival,
                            "our gain": r.mine,
                            "ratio": r.ratio,
                            "from": r.ci_low,
                            "to": r.ci_high,
                        }
                    )
    return rows


def parts(bench: Bench, domain: str, served: int) -> list[dict[str, Any]]:
    """The default, and with one part changed: seed 0."""
    start = bench.before(domain, 0)
    rows = []
    whole = bench.get(OURS, domain, 0, served)
    for name, change in {"default": {}, **PARTS}.items():
        cell = bench.get(OURS.model_copy(update=change), domain, 0, served)
        if not (cell and whole):
            continue
        row: dict[str, Any] = {"part": name, "domain": domain, "requests": served}
        for shape in SHAPES:
            d = paired(whole, cell, shape)
            row[f"{shape} gain"] = accept_length(cell, shape) - accept_length(start, shape)
            less = f"{d.difference:+.3f} [{d.ci_low:+.3f}, {d.ci_high:+.3f}]"
            row[f"{shape} less default"] = less
        rows.append(row | {"seconds": f"{cell['seconds']:.0f}"})
    return rows


def show(bench: Bench, *, as_json: bool) -> None:
    for shape in SHAPES:
        if rows := by_checkpoint(bench, shape):
            title = f"gain in accept length, {shape} (± over seeds), and seconds of training"
            report(title, rows, as_json=as_json)
    if rows := ratios(bench):
        report(f"pooled gain over pooled gain (Aurora above {LEAST_GAIN})", rows, as_json=as_json)
    for domain in NAMES:
        for served in reversed(CHECKPOINTS):
            rows = parts(bench, domain, served)
            if len(rows) > 1:
                report(f"one part changed, seed 0, {domain}", rows, as_json=as_json)
                break


def _number(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{mean(values):.3f}" + (f" ± {spread(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--until", type=int, default=400, help="served requests")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--domains", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument(
        "--recipes", nargs="+", default=list(RECIPES), choices=(*RECIPES, "ours", "ours equal time")
    )
    parser.add_argument("--search", type=int, default=200, help="requests to try each rate on")
    parser.add_argument(
        "--parts", nargs="*", choices=list(PARTS), metavar="PART",
        help=f"also with one part changed, on seed 0; all of them, or: {', '.join(PARTS)}",
    )  # fmt: skip
    parser.add_argument("--show", action="store_true", help="only print what is there")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    bench = Bench()
    if not given.show:
        run(bench, given)
    show(bench, as_json=given.json)


def run(bench: Bench, given: argparse.Namespace) -> None:
    settings = rivals(bench)
    for seed in given.seeds:
        for domain in given.domains:
            for name in given.recipes:
                if name.startswith("aurora"):
                    size = 1 if name.endswith("batch 1") else AURORA.batch_requests
                    aurora = AURORA.model_copy(update={"batch_requests": size})
                    recipe = bench.search(aurora, domain, given.search)
                else:
                    recipe = settings[name](domain)
                whose = IN_THE_TIME_OF.get(name)
                rival = settings[whose](domain) if whose else None
                _say(f"{name}, {domain}, seed {seed}")
                bench.run(recipe, domain, seed, given.until, rival=rival, timed=timed_of(name))
    if given.parts is not None:
        for domain in given.domains:
            for part in given.parts or PARTS:
                bench.run(OURS.model_copy(update=PARTS[part]), domain, 0, given.until)


if __name__ == "__main__":
    main()
