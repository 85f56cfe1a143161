"""Does a training run make a good drafter worse?

From ``benchmarks/static-drafter`` (1.2 million answer tokens of chat, code and one narrow form), as
a run of the scheduler goes: the window's requests and the recipe's share of older ones are trained
on at the peak rate of a mature base, a line search over the dev requests chooses how far to go, and
the gate judges on held-out ones. Two cases:

*own* is 120 more requests of the drafter's own chat traffic; *new* is 100 requests of a form that
it has never seen (the demo's extraction prompts, answered once into ``benchmarks/data``), with
older requests of its three domains to be replayed. *old recipe* is what shipped before: one rate
whatever the base, and the whole way. Dev and held-out requests are never trained on; accept lengths
are exact replays of the demo's tree (depth 4, top-k 4, 16 nodes) in bfloat16.

    python -m benchmarks.mature_drafter [--seeds 0 1 2] [--recipes now old] [--json]

Results are added to ``benchmarks/results/operation.jsonl``.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from aurora_sgl.demo.prompts import sample_prompts
from aurora_sgl.drafter import checkpoint
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import read_target
from aurora_sgl.evaluation.gate import judge
from aurora_sgl.evaluation.replay import replay_both
from aurora_sgl.intervals import Difference
from aurora_sgl.sequences.sequence import readable
from aurora_sgl.training import line_search
from aurora_sgl.training.maturity import peak_rate
from aurora_sgl.training.settings import TrainSettings
from aurora_sgl.training.trainer import train
from benchmarks.corpus.features import DOMAINS, NEW_DOMAIN, CorpusSet, corpus, target_folder
from benchmarks.corpus.generate import SHARD, Target
from benchmarks.corpus.prompts import CorpusPrompt
from benchmarks.corpus.shards import DATA, shards, write_shard
from benchmarks.learning import head
from benchmarks.servers import report
from benchmarks.traffic import held_out, stream

STATIC = Path(__file__).with_name("static-drafter")
OWN, NEW = "own", "new"
WINDOW = {OWN: 120, NEW: 100}
HELD_OUT_NEW, HELD_OUT_OLD = 36, 40  # held-out requests of the new domain, and of each old one
NOW = TrainSettings(depth=4, topk=4, nodes=16)
OLD = NOW.model_copy(update={"mature_learning_rate": NOW.learning_rate})
RECIPES = {"now": NOW, "old": OLD}


@dataclass(frozen=True)
class Traffic:
    """What a run of one case sees, no request twice."""

    train: CorpusSet  # the window, and older requests against forgetting
    dev: CorpusSet
    held_out: CorpusSet


def traffic(case: str, seed: int, settings: TrainSettings) -> Traffic:
    """A share ``dev_share`` of the window's conversations is kept from training, as a run does, and
    as many older ones of each domain as the line search takes in turns."""
    window = new_domain(seed) if case == NEW else stream("chat", seed)
    window = window.part(0, WINDOW[case])
    count = round(settings.dev_share * len(window))
    dev, window = window.part(0, count), window.part(count)
    older = round(len(window) * settings.replay_share / (1 - settings.replay_share))
    first = {OWN: WINDOW[OWN], NEW: 0}[case]
    olds = {d: stream(d, seed).part(first if d == "chat" else 0) for d in DOMAINS}
    each = (settings.dev_requests - count) // len(DOMAINS)
    for rows in olds.values():
        dev = dev + rows.part(0, each)
    replayed = CorpusSet(())
    for rows in olds.values():
        replayed = replayed + rows.part(each, each + older // len(DOMAINS))
    judged = held_out("chat").part(0, 60 if case == OWN else HELD_OUT_OLD)
    if case == NEW:
        for domain in ("code", "narrow"):
            judged = judged + held_out(domain).part(0, HELD_OUT_OLD)
        judged = judged + corpus(NEW_DOMAIN).part(0, HELD_OUT_NEW)
    return Traffic(window + replayed, dev, judged)


def new_domain(seed: int) -> CorpusSet:
    """The requests that are served, each seed beginning somewhere else; made when missing."""
    rows = corpus_of_new_domain().part(HELD_OUT_NEW)
    begin = (seed % 3) * (len(rows) // 3)
    return rows.part(begin) + rows.part(0, begin)


@lru_cache(maxsize=1)
def corpus_of_new_domain() -> CorpusSet:
    if not shards(NEW_DOMAIN):
        texts = [p.prompt for p in sample_prompts() if p.domain == NEW_DOMAIN]
        prompts = [CorpusPrompt(NEW_DOMAIN, number, text) for number, text in enumerate(texts)]
        answered = Target(target_folder()).answer(prompts)
        for shard in range(math.ceil(len(prompts) / SHARD)):
            mine = [one for one in answered if one.number // SHARD == shard]
            write_shard(DATA / NEW_DOMAIN / f"{shard:04d}.npz", mine)
    return corpus(NEW_DOMAIN)


@lru_cache(maxsize=1)
def static() -> Drafter:
    layers = read_target(target_folder()).num_layers
    return checkpoint.load(STATIC, target_layers=layers).float().eval()


def run(case: str, name: str, seed: int) -> dict[str, Any]:
    """One training run and what came of it; differences in percent of the static drafter's."""
    settings = RECIPES[name].model_copy(update={"seed": seed})
    seen = traffic(case, seed, settings)
    rate = peak_rate(settings, math.inf)
    trained = train(
        static(), seen.train, head(), settings.model_copy(update={"learning_rate": rate})
    ).drafter
    alpha, chosen = 1.0, trained
    if name == "now":
        found = line_search.search(static(), static(), trained, seen.dev, head(), settings)
        alpha, chosen = found.alpha, found.drafter
        print(f"{case} {seed}: {found.metrics}", file=sys.stderr, flush=True)
    replays = replay_both(static(), chosen, readable(seen.held_out), head(), settings)
    judged = judge(*replays, fewest=settings.min_gate_requests, seed=settings.seed)
    whole = judged.overall
    domains = {domain: found for domain, (found, _) in judged.by_domain.items()}
    olds = {d: found for d, found in domains.items() if d != NEW_DOMAIN}
    worst = min(olds.values(), key=lambda found: found.difference / found.baseline)
    fresh = domains.get(NEW_DOMAIN, whole)
    return {
        "case": case, "recipe": name, "seed": seed, "rate": f"{rate:.1e}", "alpha": alpha,
        "of": "new" if case == NEW else "chat", "static": fresh.baseline, "then": fresh.candidate,
        "difference": fresh.difference, "95% or 90%": _interval(fresh),
        "worst old %": round(100 * worst.difference / worst.baseline, 2),
        "gate": judged.verdict, "why": judged.reason,
    }  # fmt: skip


def _interval(found: Difference) -> str:
    return f"{found.ci_low:+.3f} to {found.ci_high:+.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--cases", nargs="+", choices=[OWN, NEW], default=[OWN, NEW])
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    head()
    corpus_of_new_domain()
    rows = []
    for seed in given.seeds:
        for case in given.cases:
            for name in given.recipes:
                rows.append(run(case, name, seed))
                print(rows[-1], file=sys.stderr, flush=True)
    report("a run from a well-trained drafter", rows, as_json=given.json, keep="mature_drafter")


if __name__ == "__main__":
    main()
