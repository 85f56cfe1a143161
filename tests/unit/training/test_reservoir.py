"""The reservoir: an even sample of each domain, however old."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from aurora_sgl.store.queries.requests import RecentRequest
from aurora_sgl.training.reservoir import DOMAINS, in_turns, sample

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
ROW = RecentRequest(
    request_id=1, domain="chat", conversation_hash="", admitted_at=NOON, finished_at=NOON,
    sampling={}, prompt_tokens=10, completion_tokens=20, uri="", sha256="", bytes=1, start=0,
    end=29, output_start=10, prompt_sha256="", head_sha256="", greedy=True, accept_rule="greedy",
)  # fmt: skip


def served(count: int, domain: str = "chat", first: int = 0) -> list[RecentRequest]:
    return [
        replace(
            ROW, request_id=number, domain=domain, conversation_hash=f"{domain}-{number}",
            finished_at=NOON + timedelta(seconds=number),
        )
        for number in range(first, first + count)
    ]  # fmt: skip


def over_time(rows: list[RecentRequest], per_domain: int, each: int = 50) -> list[RecentRequest]:
    """The reservoir of traffic of which only the last requests can be looked at."""
    kept: list[RecentRequest] = []
    for begin in range(0, len(rows), each):
        kept = sample([*rows[begin : begin + each], *kept], per_domain)
    return kept


def test_a_sample_over_time_is_the_sample_of_all_that_was_ever_served() -> None:
    rows = served(1000)
    assert {r.request_id for r in over_time(rows, 20)} == {r.request_id for r in sample(rows, 20)}


def test_old_and_new_requests_have_the_same_chance() -> None:
    ids = [row.request_id for row in over_time(served(4000), 200)]
    assert len(ids) == 200
    quarters = [sum(q * 1000 <= i < (q + 1) * 1000 for i in ids) for q in range(4)]
    assert min(quarters) > 30, quarters


def test_a_domain_that_is_no_longer_served_keeps_its_requests() -> None:
    old, new = served(40, "code"), served(3000, "chat", first=100)
    kept = over_time([*old, *new], 16)
    assert sum(row.domain == "code" for row in kept) == 16
    assert sum(row.domain == "chat" for row in kept) == 16


def test_a_conversation_counts_once_with_its_newest_request() -> None:
    turns = [replace(row, conversation_hash="one") for row in served(30)]
    assert [row.request_id for row in sample(turns, 16)] == [29]


@pytest.mark.parametrize(
    "changes", [{"sampling": {"frequency_penalty": 0.5}}, {"completion_tokens": 1, "end": 10}]
)
def test_what_can_not_be_learnt_from_takes_no_place(changes: dict[str, object]) -> None:
    rows = [replace(row, **changes) for row in served(30)]  # type: ignore[arg-type]
    assert sample(rows, 16) == []


def test_the_number_of_domains_is_bounded_and_the_last_served_ones_count() -> None:
    rows = [served(1, f"d{number}", first=number)[0] for number in range(3 * DOMAINS)]
    assert {r.domain for r in sample(rows, 4)} == {f"d{n}" for n in range(2 * DOMAINS, 3 * DOMAINS)}


def test_none_are_kept_where_the_reservoir_is_switched_off() -> None:
    assert sample(served(30), 0) == []


def test_domains_take_turns() -> None:
    rows = [*served(50), *served(2, "code", first=100), *served(5, "law", first=200)]
    taken = in_turns(rows, 9)
    assert {d: sum(r.domain == d for r in taken) for d in ("chat", "code", "law")} == {
        "chat": 4, "code": 2, "law": 3,
    }  # fmt: skip
