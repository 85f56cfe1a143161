"""Whatever a client called a request: who says the same to ``db purge`` finds it, and only it."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from unicodedata import category

import pytest
from sqlalchemy import Engine, inspect, select

from aurora_sgl import store
from aurora_sgl.clock import utc_now
from aurora_sgl.config import get_settings
from aurora_sgl.engine import clean, labels
from aurora_sgl.errors import AuroraError
from aurora_sgl.hashing import sha256_ints
from aurora_sgl.store.ingest import IngestRules
from aurora_sgl.store.models import AcceptanceMinute, Audit, Request
from aurora_sgl.store.purge import Selector
from aurora_sgl.store.purge_rows import count_rows
from tests.integration.erasure.conftest import Run
from tests.support import dashboard_house as samples
from tests.support import hostile
from tests.support.dashboard_house import House

TEXTS = hostile.texts()


def header(text: str, name: str) -> str:
    """What the engine records of a header."""
    lossless = "surrogateescape" if "\udce9" in text else "surrogatepass"
    value = text.encode("utf-8", lossless)
    said = labels.parse([(f"x-aurora-{name}".encode(), value)]).get(name, "")
    return clean.text(said, labels.MAX_LABEL)


def hashed(name: str) -> str:
    return sha256_ints(list(name.encode())) if name else ""


#: What the engine records, by what is purged by.
RECORDED: dict[str, Callable[[str], str]] = {
    "domain": lambda text: header(text, "domain") or labels.DEFAULT_DOMAIN,
    "rid": clean.text,
    "conversation": lambda text: header(text, "conversation"),
}


def ways(kind: str, text: str) -> set[str]:
    """As what a text was recorded; a conversation is named in a header or in a field."""
    recorded = RECORDED[kind](text)
    return {recorded} if kind != "conversation" else {recorded, clean.text(text)} - {""}


@pytest.fixture
def house(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    """A request for each text."""
    house = samples.empty(tmp_path / "home", engine)
    house.rules = IngestRules(most_domains=len(TEXTS))
    samples.add_servers(house)
    rng, begin = random.Random(0), utc_now() - timedelta(hours=1)
    with house.together():
        for number, text in enumerate(TEXTS):
            domain, rid, talk = (of(text) for of in RECORDED.values())
            house.serve(begin + timedelta(seconds=number), 0, domain=domain, rid=rid or "none",
                        conversation=hashed(talk), steps=1, rng=rng)  # fmt: skip
    monkeypatch.setenv("AURORA_HOME", str(house.home))
    monkeypatch.setenv("AURORA_DATABASE_URL", house.url)
    get_settings.cache_clear()
    yield house
    get_settings.cache_clear()


def test_what_a_client_named_is_selected_as_the_client_wrote_it(house: House) -> None:
    """Each text by two of the three names, counted as a purge counts it."""
    counts = {kind: Counter(map(of, TEXTS)) for kind, of in RECORDED.items()}
    refused = 0
    for number, text in enumerate(TEXTS):
        for kind in [kind for index, kind in enumerate(RECORDED) if (number + index) % 3]:
            try:
                selector = Selector(kind, text, utc_now())
            except AuroraError as error:
                assert not text.strip() and "is empty" in str(error)
                refused += 1
                continue
            expected = sum(counts[kind][one] for one in ways(kind, text))
            assert count_rows(house.engine, selector)[0].requests == expected, (kind, text)
    assert 0 < refused < 9


#: As a shell gives them to a command: bytes that are no UTF-8 are halves of surrogate pairs.
BY_HAND = [
    ("domain", "'; DROP TABLE request; --"), ("domain", " =1"), ("domain", "\udce9"),
    ("domain", "a\r\nINFO forged: line"), ("domain", "x" * 500), ("rid", "-1+1"), ("rid", "a\nb"),
    ("rid", "%s%n%d"), ("rid", "\x1b[31mred\x1b]0;title\x07"), ("rid", "\u202egpj.exe"),
    ("conversation", "=cmd|' /C calc'!A0"), ("conversation", "\ud83d"), ("conversation", "\n=1"),
    ("conversation", "@SUM(A1)"),
]  # fmt: skip


def test_a_purge_by_a_hostile_name_takes_what_has_it_and_nothing_else(
    house: House, run: Run
) -> None:
    rest = dict(zip(numbers(house), TEXTS, strict=True))
    for kind, text in BY_HAND:
        mine = [number for number, one in rest.items() if RECORDED[kind](one) in ways(kind, text)]
        code, out, err = run("db", "purge", f"--{kind}", text, "--reason", f"asked by {text}",
                             "--actor", f"x{text}", "--yes", "--wait", "0", "--json")  # fmt: skip
        assert (code, err) == (0, ""), (kind, text)
        assert json.loads(out)["requests"] == len(mine), (kind, text)
        rest = {number: one for number, one in rest.items() if number not in mine}
        assert numbers(house) == list(rest)
    number = next(iter(rest))
    code, out, _ = run("db", "purge", "--request", str(number), "--reason", "x", "--yes", "--json")
    assert (code, json.loads(out)["requests"]) == (0, 1)
    assert numbers(house) == list(rest)[1:]
    with store.session(house.engine, write=False) as s:
        domains = {*s.scalars(select(AcceptanceMinute.domain))}
        notes = list(s.scalars(select(Audit.reason)))
    assert domains == {RECORDED["domain"](text) for number, text in list(rest.items())[1:]}
    assert len(notes) == len(BY_HAND) + 1
    assert not any(category(letter) in ("Cc", "Cs") for note in notes for letter in note)
    assert inspect(house.engine).has_table("request")


def numbers(house: House) -> list[int]:
    with store.session(house.engine, write=False) as s:
        return list(s.scalars(select(Request.id).order_by(Request.id)))
