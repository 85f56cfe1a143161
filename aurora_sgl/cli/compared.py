"""Two versions beside each other, as ``versions compare`` prints them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from aurora_sgl.console import print_table

if TYPE_CHECKING:
    from aurora_sgl.rollout.comparison import PairFacts
    from aurora_sgl.rollout.equal_shape import EqualStrata, PositionShares, ServedAtEqualShape


def facts_as_json(
    facts: PairFacts, served: ServedAtEqualShape, shares: PositionShares | None
) -> dict[str, Any]:
    """Pairs are of the first and the second version, differences the second's less the first's."""
    worse, better = facts.contrasts
    return {
        **asdict(facts),
        "contrasts": {
            name: [{**asdict(one), "difference": one.difference} for one in some]
            for name, some in (("worse", worse), ("better", better))
        },
        "served": asdict(served),
        "positions": asdict(shares) if shares else None,
    }


def print_facts(
    facts: PairFacts, served: ServedAtEqualShape, shares: PositionShares | None
) -> None:
    one, other = facts.version_ids
    names = {f"version {one}": "a", f"version {other}": "b"}
    less = {f"{other} less {one}": "difference", "from": "ci_low", "to": "ci_high"}
    _print_origin(facts, names)
    _print_replays(facts, names, less)
    if served.overall is None:
        print("served at equal shape: nothing of one kind, often enough")
    else:
        strata = {"all": served.overall, **served.by_domain}
        rows = [_row(name, each) for name, each in strata.items()]
        columns = {"domain": "domain", "strata": "strata", **names, **less}
        print_table("served at equal shape", columns, rows)
    if shares is not None:
        reached = zip(*shares.reached, strict=True)
        rows = [{"depth": i, "a": a, "b": b} for i, (a, b) in enumerate(reached, 1)]
        print_table("share of steps that accepted at a depth", {"depth": "depth", **names}, rows)
    trials = [vars(each) for each in facts.trials]
    columns = {"trial": "trial_id", "status": "status", "verdict": "verdict", **less}
    print_table("trials", columns, trials, empty="no trial of these two")


def _print_origin(facts: PairFacts, names: dict[str, str]) -> None:
    steps = [vars(step) for way in facts.ancestry.ways for step in way]
    columns = {"version": "version_id", "from": "parent_id", "made": "created_at", "how": "origin"}
    print_table("lineage", columns, steps)
    common = facts.ancestry.common
    print(f"common ancestor: version {common}" if common else "no common ancestor")
    first, second = (asdict(run) if run else {} for run in facts.runs)
    runs = [{"name": name, "a": first.get(name), "b": second.get(name)}
            for name in (first or second) if name != "domains"]  # fmt: skip
    neither = "neither was made by a training run of this store"
    print_table("what they learnt from", {"name": "name", **names}, runs, empty=neither)
    rows = [
        {"of": value.kind, "name": value.name, "a": value.values[0], "b": value.values[1]}
        for value in facts.differing
    ]
    columns = {"of the": "of", "name": "name", **names}
    print_table("what differs", columns, rows, empty="their recipes do not differ")


def _print_replays(facts: PairFacts, names: dict[str, str], less: dict[str, str]) -> None:
    one, other = facts.version_ids
    if not facts.replays:
        print(
            "never replayed against each other; do it with: aurora-sgl replay "
            f"--version {one} --version {other}"
        )
        if facts.against is not None:
            rows = [
                {"version": version, **vars(each)}
                for version, each in zip(facts.version_ids, facts.against.replays, strict=True)
            ]
            columns = {"version": "version", "requests": "requests", "difference": "difference",
                       "from": "ci_low", "to": "ci_high", "verdict": "verdict"}  # fmt: skip
            third = facts.against.baseline_id
            print_table(f"each against version {third}, on other requests", columns, rows)
        return
    replays = [
        {**vars(each), "a": each.accept_length[0], "b": each.accept_length[1]}
        for each in facts.replays
    ]
    columns = {"when": "created_at", **names, **less, "verdict": "verdict"}
    print_table("replays", columns, replays)
    domains = [
        {"domain": name, **of, "a": of["accept_length"][0], "b": of["accept_length"][1]}
        for name, of in facts.replays[0].by_domain.items()
    ]
    if domains:
        columns = {"domain": "domain", "requests": "requests", **names, **less}
        print_table("newest replay by domain", columns, domains)


def _row(name: str, each: EqualStrata) -> dict[str, Any]:
    return {"domain": name, **vars(each), "a": each.accept_length[0], "b": each.accept_length[1]}
