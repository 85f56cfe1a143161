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
    steps = [vars(step) for way in facts.ancestry.ways for step in way]
    print_table("lineage", {"version": "version_id", "from": "parent_id", "made": "created_at",
                            "how": "origin"}, steps)  # fmt: skip
    common = facts.ancestry.common
    print(f"common ancestor: version {common}" if common else "no common ancestor")
    rows = [{"of": v.kind, "name": v.name, "a": v.values[0], "b": v.values[1]}
            for v in facts.differing]  # fmt: skip
    print_table("what differs", {"of the": "of", "name": "name", **names}, rows,
                empty="their recipes do not differ")  # fmt: skip
    less = {**names, f"{other} less {one}": "difference", "from": "ci_low", "to": "ci_high"}
    replays = [
        {**vars(each), "a": each.accept_length[0], "b": each.accept_length[1]}
        for each in facts.replays
    ]
    print_table("replays", {"when": "created_at", "requests": "requests", **less,
                            "verdict": "verdict"}, replays,
                empty="never replayed against each other; do it with: aurora-sgl replay "
                f"--version {one} --version {other}")  # fmt: skip
    domains = [{"domain": name, **of, "a": of["accept_length"][0], "b": of["accept_length"][1]}
               for name, of in (facts.replays[0].by_domain if facts.replays else {}).items()]  # fmt: skip
    if domains:
        print_table("newest replay by domain", {"domain": "domain", "requests": "requests", **less},
                    domains)  # fmt: skip
    if served.overall is None:
        print("served at equal shape: nothing of one kind, often enough")
    else:
        strata = {"all": served.overall, **served.by_domain}
        print_table("served at equal shape", {"domain": "domain", "strata": "strata", **less},
                    [_row(name, each) for name, each in strata.items()])  # fmt: skip
    if shares is not None:
        depths = [{"depth": i + 1, "a": a, "b": b} for i, (a, b) in
                  enumerate(zip(*shares.reached, strict=True))]  # fmt: skip
        print_table("share of steps that accepted at a depth", {"depth": "depth", **names}, depths)
    trials = [vars(each) for each in facts.trials]
    print_table("trials", {"trial": "trial_id", "status": "status", "verdict": "verdict",
                           f"{other} less {one}": "difference", "from": "ci_low", "to": "ci_high"},
                trials, empty="no trial of these two")  # fmt: skip


def _row(name: str, each: EqualStrata) -> dict[str, Any]:
    return {"domain": name, **vars(each), "a": each.accept_length[0], "b": each.accept_length[1]}
