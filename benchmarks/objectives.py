"""Which objective raises the accept length most: same start, same requests, same trained tokens?

Every objective trains on the same 64 requests of one domain in the same order, one pass, at the
same settings but for ``objective``; three domains, three seeds. Three starts: *scratch*, an
untrained drafter; *distilled*, one that forward KL has trained beforehand on 48 other requests of
each of the three domains (two passes), since what reinforcement adds to a drafter that knows
something is the question; and *static*, the well-trained ``benchmarks/static-drafter``.
``tree_reward`` reinforces in the last third of a run from scratch and all along from a trained
drafter. *none* is the start itself. Policy gradients also get what the start would have proposed
for these requests, accepted and rejected, as a server's log has it.

Accept lengths are replayed on 60 held-out requests, chain of 4 and tree (4, 4, 16); the last
columns are the paired difference to forward KL by request, all domains and seeds together, with a
bootstrap interval.

    python -m benchmarks.objectives [--seeds 0 1 2] [--domains narrow code chat]
        [--starts scratch distilled static] [--objectives ...] [--held-out 60] [--show] [--json]

Cells are kept in ``benchmarks/results/objectives.jsonl``: stop it at any time and call it again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from functools import cache
from typing import Any

import torch

from aurora_sgl.drafter.model import Drafter
from aurora_sgl.training.objectives import OBJECTIVES
from aurora_sgl.training.settings import TrainSettings
from aurora_sgl.training.trainer import train
from benchmarks.corpus.features import CACHE, DOMAINS
from benchmarks.learning import AsServed, head, untrained
from benchmarks.mature_drafter import static
from benchmarks.measure import (
    SHAPES,
    Measured,
    accept_length,
    mean,
    measure,
    paired,
    pooled_by_request,
    spread,
)
from benchmarks.results import Cells, settings_hash
from benchmarks.servers import report
from benchmarks.traffic import HELD_OUT, held_out, stream

REQUESTS, BEFOREHAND = 64, 48
SEEDS = (0, 1, 2)
#: Peak rate by start: a distilled drafter is disturbed by that of an untrained one.
RATES = {"scratch": 1.5e-3, "distilled": 5e-4, "static": 3e-4}
DISTIL = TrainSettings(objective="forward_kl", passes=2, replay_share=0.0, vocabulary_threshold=0.0)
BASE = TrainSettings(passes=1, replay_share=0.0, topk=4, vocabulary_threshold=0.0)


def recipe(objective: str, start: str, seed: int) -> TrainSettings:
    change = {"objective": objective, "learning_rate": RATES[start], "seed": seed}
    if objective == "tree_reward":
        change["rl_share"] = 0.3 if start == "scratch" else 1.0
    return BASE.model_copy(update=change)


@cache
def begin(start: str, seed: int) -> Drafter:
    """What all objectives begin with; a distilled drafter is made once and kept."""
    drafter = untrained(seed)
    if start == "scratch":
        return drafter
    if start == "static":
        return static()
    path = CACHE.parent / "starts" / f"{_start_hash(start)}-{seed}.pt"
    if path.exists():
        drafter.load_state_dict(torch.load(path, weights_only=True))
        return drafter
    rows = sum(
        (stream(domain, seed).part(REQUESTS, REQUESTS + BEFOREHAND) for domain in DOMAINS[1:]),
        stream(DOMAINS[0], seed).part(REQUESTS, REQUESTS + BEFOREHAND),
    )
    drafter = train(drafter, rows, head(), DISTIL.model_copy(update={"seed": seed})).drafter
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    torch.save(drafter.state_dict(), beside)
    beside.replace(path)
    return drafter


def run(
    cells: Cells, objective: str, start: str, domain: str, seed: int, judged: int = HELD_OUT
) -> None:
    key = _key(objective, start, domain, seed, judged)
    if cells.get(**key):
        return
    drafter, metrics = begin(start, seed), {}
    requests = stream(domain, seed).part(0, REQUESTS).prepare()
    began = time.process_time()
    if objective != "none":
        settings = recipe(objective, start, seed)
        rows = AsServed(requests, drafter, settings)
        reinforced = objective in ("policy_gradient", "distil_then_rl")
        result = train(drafter, rows if reinforced else rows.rows, head(), settings)
        drafter, metrics = result.drafter, result.metrics
        metrics["seconds"] = round(time.process_time() - began - rows.seconds, 1)
    found = measure(drafter, held_out(domain).part(0, judged), head())
    cells.put({**found, "metrics": metrics}, **key)
    now = {shape: round(accept_length(found, shape), 3) for shape in SHAPES}
    print(f"{start} {domain} {seed} {objective}: {now}", file=sys.stderr, flush=True)


def rows(cells: Cells, start: str, domain: str, judged: int = HELD_OUT) -> list[dict[str, Any]]:
    """One line an objective; ``domain`` "" pools them."""
    domains = DOMAINS if not domain else (domain,)
    places = [
        (one, seed) for one in domains for seed in SEEDS
        if cells.get(**_key("none", start, one, seed, judged))
        and cells.get(**_key("forward_kl", start, one, seed, judged))
    ]  # fmt: skip
    found = []
    for objective in ("none", *OBJECTIVES):
        have = [
            (one, seed)
            for one, seed in places
            if cells.get(**_key(objective, start, one, seed, judged))
        ]
        if not have:
            continue
        mine = [cells.cell(**_key(objective, start, *place, judged)) for place in have]
        base = [cells.cell(**_key("forward_kl", start, *place, judged)) for place in have]
        row: dict[str, Any] = {
            "start": start, "domain": domain or "all", "objective": objective, "cells": len(have),
        }  # fmt: skip
        for shape in SHAPES:
            values = [accept_length(one, shape) for one in mine]
            d = paired(_pool(have, base), _pool(have, mine), shape)
            less = f"{d.difference:+.3f} [{d.ci_low:+.3f}, {d.ci_high:+.3f}]"
            row[shape] = f"{mean(values):.3f}"
            if len(values) > 1 and domain:
                row[shape] += f" ± {spread(values):.3f}"
            row[f"{shape} less forward_kl"] = "" if objective == "forward_kl" else less
        row["seconds"] = f"{mean(one['metrics'].get('seconds', 0.0) for one in mine):.0f}"
        found.append(row)
    return found


def show(cells: Cells, *, as_json: bool, judged: int = HELD_OUT) -> None:
    for start in RATES:
        for domain in ("", *DOMAINS):
            if table := rows(cells, start, domain, judged):
                title = f"accept length after {REQUESTS} requests from {start}, {domain or 'all'}"
                report(title, table, as_json=as_json)


def _pool(places: list[tuple[str, int]], cells: list[dict[str, Any]]) -> Measured:
    by_domain: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for (domain, _), cell in zip(places, cells, strict=True):
        by_domain[domain].append(cell)
    return pooled_by_request(by_domain)


@cache
def _start_hash(start: str) -> str:
    return settings_hash(DISTIL, start, BEFOREHAND, REQUESTS)


def _key(
    objective: str, start: str, domain: str, seed: int, judged: int = HELD_OUT
) -> dict[str, Any]:
    if objective == "none":
        digest = _start_hash(start)
    else:
        digest = settings_hash(recipe(objective, start, 0), _start_hash(start))
    names = {"objective": objective, "start": start, "domain": domain, "seed": seed}
    fewer = {"held_out": judged} if judged != HELD_OUT else {}
    return {**names, "settings": digest, **fewer}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--domains", nargs="+", default=list(DOMAINS), choices=DOMAINS)
    parser.add_argument("--starts", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument(
        "--objectives", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES)
    )
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    parser.add_argument("--show", action="store_true", help="only print what is there")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    cells = Cells("objectives")
    if not given.show:
        head()
        for seed in given.seeds:
            for start in given.starts:
                for domain in given.domains:
                    for objective in ("none", *given.objectives):
                        run(cells, objective, start, domain, seed, given.held_out)
    show(cells, as_json=given.json, judged=given.held_out)


if __name__ == "__main__":
    main()
