"""What does the loop, as it ships, do to a good drafter: does it follow new traffic, and does it
leave alone what is good already?

All begins with ``benchmarks/static-drafter`` (1.2 million answer tokens of chat, code and one
narrow form). The loop runs without a server (``offline_loop``): its store, recipe, line search,
gate and promotion are those of the product. Cases:

*stationary*: 100 requests of the drafter's own three domains in turns and one training run; each
seed has other requests. A version that the gate lets through is replayed on later traffic of its
domains.
*turn*: 120 (``--old``) requests of the old domains, then 320 of a form never seen, with a run
after 100, 200 and 320 of them; *turn-sampled* has 320 at temperature 0.7, *turn-chats* 70 sampled
chats of four turns (see ``corpus.new_traffic``). After each run the live version is replayed on
40 to 60 held-out requests of the new form and on 120 of the old domains.

Accept lengths are exact replays, served dtype, tree (depth 4, top-k 4, 16 nodes) and chain of 4.

    python -m benchmarks.mature_drafter [--cases turn stationary ...] [--seeds 0 1 2] [--old 120]
        [--show] [--json]

Cells are kept in ``benchmarks/results/mature_drafter.jsonl`` as they finish: stop it at any time
and call it again; one process a case and core.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from aurora_sgl.drafter import checkpoint
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import read_target
from aurora_sgl.training.settings import TrainSettings
from benchmarks.corpus.features import DOMAINS, CorpusSet, corpus, target_folder
from benchmarks.corpus.new_traffic import CHATS, SAMPLED, TICKET
from benchmarks.learning import head
from benchmarks.measure import SHAPES, Measured, accept_length, measure, paired, pooled_by_request
from benchmarks.offline_loop import OfflineLoop
from benchmarks.results import Cells, loop_hash
from benchmarks.servers import report
from benchmarks.traffic import held_out, stream

STATIC = Path(__file__).with_name("static-drafter")
STATIONARY = "stationary"
#: By case: the new form, and after how many of its requests a run begins.
TURNS = {
    "turn": (TICKET, (100, 200, 320)),
    "turn-sampled": (SAMPLED, (100, 200, 320)),
    "turn-chats": (CHATS, (100, 200, 280)),
}
WINDOW, OLD, HELD_OUT_OLD = 100, 120, 40
HELD_OUT_NEW = {TICKET: 60, SAMPLED: 50, CHATS: 40}
SHIPPED = TrainSettings(depth=4, topk=4, nodes=16)


@lru_cache(maxsize=1)
def static() -> Drafter:
    layers = read_target(target_folder()).num_layers
    return checkpoint.load(STATIC, target_layers=layers).float().eval()


@lru_cache(maxsize=1)
def old_held_out() -> dict[str, CorpusSet]:
    return {domain: held_out(domain).part(0, HELD_OUT_OLD) for domain in DOMAINS}


def new_form(name: str, seed: int) -> tuple[CorpusSet, CorpusSet]:
    """(held out, served): whole conversations, the served ones in an order of the seed's own."""
    by_chat: dict[str, list[Any]] = {}
    for place in corpus(name).rows:
        by_chat.setdefault(place.answered.key, []).append(place)
    chats = list(by_chat.values())
    turns = max(map(len, chats))
    held = HELD_OUT_NEW[name] // turns
    first, rest = chats[:held], chats[held:]
    random.Random(seed).shuffle(rest)
    return _set(first), _set(rest)


def _set(chats: Sequence[Sequence[Any]]) -> CorpusSet:
    return CorpusSet(tuple(place for chat in chats for place in chat))


class Bench:
    """Runs cells that are missing, and reads those that are there."""

    def __init__(self, old: int = OLD) -> None:
        self.cells, self.old = Cells("mature_drafter"), old

    def run(self, case: str, seed: int) -> None:
        if self.cells.get(**self.key(case, seed)):
            return
        settings = SHIPPED.model_copy(update={"seed": seed})
        began = time.process_time()
        with tempfile.TemporaryDirectory(prefix="aurora-loop-") as home:
            loop = OfflineLoop(Path(home), STATIC, target_folder(), settings)
            rows = self._stationary(loop, seed) if case == STATIONARY else self._turn(loop, case)
        seconds = round(time.process_time() - began)
        self.cells.put({"rows": rows, "seconds": seconds}, **self.key(case, seed))

    def key(self, case: str, seed: int) -> dict[str, Any]:
        stops = TURNS.get(case, (case, (WINDOW,)))
        settings = loop_hash(SHIPPED, list(stops), self.old)
        return {"case": case, "seed": seed, "settings": settings}

    def start(self, name: str, rows: CorpusSet) -> Measured:
        """The static drafter's replay of some held-out requests."""
        key = {"case": "start", "of": name, "requests": len(rows)}
        cell = self.cells.get(**key)
        if cell is None:
            cell = measure(static(), rows, head())
            self.cells.put(cell, **key)
        return cell

    def _stationary(self, loop: OfflineLoop, seed: int) -> list[dict[str, Any]]:
        own = stream("mixed", 0)
        begin = seed * WINDOW % (len(own) - WINDOW)
        loop.serve(own.part(begin, begin + WINDOW))
        return [self._after(loop, WINDOW, {})]

    def _turn(self, loop: OfflineLoop, case: str) -> list[dict[str, Any]]:
        name, stops = TURNS[case]
        judged, served = new_form(name, loop.settings.seed)
        loop.serve(stream("mixed", loop.settings.seed).part(0, self.old))
        rows, begin = [], 0
        for stop in stops:
            loop.serve(served.part(begin, stop))
            begin = stop
            rows.append(self._after(loop, stop, {name: judged}))
        return rows

    def _after(self, loop: OfflineLoop, count: int, new: dict[str, CorpusSet]) -> dict[str, Any]:
        """One run, and the live version's replays by domain where it changed."""
        loop.second_looks.clear()
        outcome, live = loop.train(), loop.live_id()
        row: dict[str, Any] = {
            "served": count, "status": outcome.status, "verdict": outcome.verdict,
            "reason": outcome.reason or outcome.error, "promoted": live == outcome.version_id,
            "second_look": "".join(look.reason for look in loop.second_looks),
            "alpha": outcome.metrics.get("alpha"),
            "line_search": outcome.metrics.get("line_search"), "replays": {},
        }  # fmt: skip
        _say({name: value for name, value in row.items() if name != "replays"})
        sets = {**old_held_out(), **new}
        changed = live != 1
        drafter = loop.load(live) if changed else None
        for name, rows in sets.items():
            before = self.start(name, rows)
            row["replays"][name] = measure(drafter, rows, head()) if drafter else before
            now = {s: round(accept_length(row["replays"][name], s), 3) for s in SHAPES}
            _say(f"  {name}: {now}")
        return row

    def against_static(self, row: dict[str, Any], names: Sequence[str], shape: str) -> Any:
        """The difference of the live version to the static drafter, some domains together."""
        starts = {name: [self.start(name, self._rows_of(name))] for name in names}
        return paired(
            pooled_by_request(starts),
            pooled_by_request({name: [row["replays"][name]] for name in names}),
            shape,
        )

    def _rows_of(self, name: str) -> CorpusSet:
        return old_held_out()[name] if name in DOMAINS else new_form(name, 0)[0]


def _say(what: Any) -> None:
    print(what, file=sys.stderr, flush=True)


def turns(bench: Bench, seeds: Sequence[int]) -> list[dict[str, Any]]:
    table = []
    for case, (name, _) in TURNS.items():
        for seed in seeds:
            cell = bench.cells.get(**bench.key(case, seed))
            for row in cell["rows"] if cell else ():
                line: dict[str, Any] = {"case": case, "seed": seed, "requests": row["served"]}
                for shape in SHAPES:
                    new = bench.against_static(row, [name], shape)
                    old = bench.against_static(row, DOMAINS, shape)
                    line[f"new, {shape}"] = f"{new.baseline:.3f} to {new.candidate:.3f}"
                    line[f"ratio, {shape}"] = new.candidate / new.baseline
                    line[f"old, {shape}"] = f"{100 * old.difference / old.baseline:+.1f}%"
                why = "; ".join(filter(None, (row["second_look"], row["reason"])))
                table.append(line | {"gate": row["verdict"], "why": why})
    return table


def stationary(bench: Bench) -> list[dict[str, Any]]:
    table = []
    for key, cell in bench.cells:
        if key != bench.key(STATIONARY, key.get("seed", -1)):
            continue
        row = cell["rows"][0]
        later = bench.against_static(row, DOMAINS, "tree")
        table.append(
            {
                "seed": key["seed"], "gate": row["verdict"], "why": row["reason"],
                "promoted": row["promoted"], "alpha": row["alpha"],
                "later": f"{later.difference:+.3f} ({later.ci_low:+.3f} to {later.ci_high:+.3f})"
                if row["promoted"] else "-",
            }
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--old", type=int, default=OLD, help="older requests before a turn")
    parser.add_argument("--cases", nargs="+", choices=[*TURNS, STATIONARY], default=list(TURNS))
    parser.add_argument("--show", action="store_true", help="only print what is there")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    bench = Bench(given.old)
    if not given.show:
        head()
        for seed in given.seeds:
            for case in given.cases:
                _say(f"{case}, seed {seed}")
                bench.run(case, seed)
    tables = {
        "the live version against the static drafter": turns(bench, given.seeds),
        "one run on traffic that the drafter knows": stationary(bench),
    }
    if not any(tables.values()):
        sys.exit("nothing was measured with this recipe yet: leave --show out")
    for title, rows in tables.items():
        if rows:
            report(title, rows, as_json=given.json)


if __name__ == "__main__":
    main()
