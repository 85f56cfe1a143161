"""worth."""

from __future__ import annotations

from datetime import UTC
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aurora_sgl.cli.shared import AsJson, Group, open_group
from aurora_sgl.console import print_json, print_table

if TYPE_CHECKING:
    from aurora_sgl.rollout.worth import Prices, Saved, Trained, Worth

Days = Annotated[int, typer.Option("--days", min=1, max=366, help="Days in UTC, up to today.")]


def worth(group: Group = "", days: Days = 30, as_json: AsJson = False) -> None:
    """Show what drafts saved and what training cost, by day and by domain."""
    from aurora_sgl import store
    from aurora_sgl.clock import utc_now
    from aurora_sgl.config import get_settings
    from aurora_sgl.rollout import worth as sums

    engine, owner = open_group(group)
    now, prices = utc_now(), sums.Prices.of(get_settings())
    wanted = sums.days(now.date(), days, UTC)
    with store.session(engine, write=False) as s:
        answer = sums.read(s, owner.id, wanted, now)
    if as_json:
        print_json(_as_json(owner.name, answer, prices))
        return
    _print(owner.name, answer, prices)


def _as_json(group: str, answer: Worth, prices: Prices) -> dict[str, Any]:
    from aurora_sgl.rollout.worth import FORMULA

    return {
        "group": group,
        "currency": prices.currency,
        "prices": {"server_hour": prices.server_hour, "training_hour": prices.training_hour},
        "formula": FORMULA,
        "total": _sums(answer.saved, answer.trained, prices),
        "by_day": [
            {"day": str(day.day), "begin": day.begin, **_sums(saved, trained, prices)}
            for day, saved, trained in answer.by_day
        ],
        "by_domain": [
            {"domain": domain, **_sums(saved, None, prices)}
            for domain, saved in answer.by_domain.items()
        ],
    }


def _sums(saved: Saved, trained: Trained | None, prices: Prices) -> dict[str, Any]:
    sums: dict[str, Any] = {
        "steps": saved.steps,
        "tokens": saved.tokens,
        "steps_saved": saved.steps_saved,
        "steps_not_measured": saved.steps - saved.timed_steps,
        "seconds_saved": saved.seconds,
        "money_saved": prices.saved(saved),
    }
    if trained is not None:
        sums |= {
            "runs": trained.runs,
            "training_seconds": trained.seconds,
            "training_money": prices.spent(trained),
            "money": prices.net(saved, trained),
        }
    return sums


def _print(group: str, answer: Worth, prices: Prices) -> None:
    from aurora_sgl.rollout.worth import FORMULA, ranged

    def row(saved: Saved, trained: Trained | None = None) -> dict[str, Any]:
        net = prices.saved(saved) if trained is None else prices.net(saved, trained)
        return {
            "steps": saved.steps_saved,
            "seconds": ranged(saved.seconds) or "not measured",
            "training": f"{trained.seconds:,.0f}" if trained else "",
            "money": ranged(net, 2) or "-",
        }

    columns = {"steps saved": "steps", "seconds saved": "seconds"}
    money = {} if prices.missing else {f"money {prices.currency}".strip(): "money"}
    by_day = [
        {"day": str(day.day), **row(saved, trained)}
        for day, saved, trained in answer.by_day
        if saved.steps or trained.seconds
    ]
    print_table(f"worth of group {group!r} by day (UTC)",
                {"day": "day", **columns, "training s": "training", **money}, by_day)  # fmt: skip
    by_domain = [{"domain": domain, **row(saved)} for domain, saved in answer.by_domain.items()]
    print_table("by domain, without training", {"domain": "domain", **columns, **money}, by_domain)
    whole = row(answer.saved, answer.trained)
    print(f"together: {whole['steps']:,} steps saved; seconds saved: {whole['seconds']}; "
          f"{whole['training']} s of training in {answer.trained.runs} runs")  # fmt: skip
    if not prices.missing:
        print(f"money: {whole['money']} {prices.currency}".rstrip())
    left_out = answer.saved.steps - answer.saved.timed_steps
    if left_out:
        print(f"{left_out:,} of {answer.saved.steps:,} steps with drafts are not in the seconds: "
              "their server did not measure both kinds of step at their load")  # fmt: skip
    for name in prices.missing:
        print(f"no money is shown: give {name}")
    for line in FORMULA:
        print(f"  {line}")
