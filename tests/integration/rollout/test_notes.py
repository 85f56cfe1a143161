"""What people write about versions stays, and versions are found by it."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine

from aurora_sgl import rollout, store
from aurora_sgl.errors import AuroraError, Refused
from aurora_sgl.rollout import notes, status
from aurora_sgl.store import queries
from aurora_sgl.store.models import DrafterVersion
from tests.support import store_samples as samples


@pytest.fixture
def versions(engine: Engine) -> list[int]:
    with store.session(engine) as s:
        group = queries.groups.ensure_group(s, "default", "target", "r1", "LlamaForCausalLMEagle3")
        ids = [samples.add_version(s, group.id, letter) for letter in "abcd"]
        s.get_one(DrafterVersion, ids[1]).note = "forward_kl on 40 requests"
    return ids


def fitting(engine: Engine, text: str) -> list[int]:
    with store.session(engine, write=False) as s:
        every = queries.versions.versions(s, 1)
        return [row.id for row in notes.search(text, every, notes.of_group(s, 1))]


def test_notes_and_tags_are_written_down_with_who_and_when_and_stand_in_the_audit(
    engine: Engine, versions: list[int]
) -> None:
    first, second = versions[:2]
    rollout.notes.add_note(engine, first, " slow on\n<b>long</b> prompts\x00 ", actor="ada")
    change = notes.tag(engine, first, ["Prod", "eu-west", "prod"], actor="bob")
    assert (change.changed, change.tags) == (("prod", "eu-west"), ("prod", "eu-west"))
    notes.tag(engine, second, ["prod"], actor="bob")
    assert notes.untag(engine, first, ["PROD"], actor="eve").tags == ("eu-west",)
    notes.tag(engine, first, ["prod"], actor="eve")  # again, behind the others
    written = notes.read(engine, "default")
    assert written[first].tags == ("eu-west", "prod") and written[second].tags == ("prod",)
    assert [row.text for row in written[first].notes] == ["slow on\n<b>long</b> prompts\ufffd"]
    assert written.keys() == {first, second}
    with store.session(engine, write=False) as s:
        rows = queries.notes.notes_of(s, first)
    assert [(row.kind, row.text, row.actor) for row in rows[1:]] == [
        ("tag", "prod", "bob"), ("tag", "eu-west", "bob"), ("untag", "prod", "eve"),
        ("tag", "prod", "eve"),
    ]  # fmt: skip
    assert [(row.action, row.actor, row.reason) for row in status.audit(engine, "default")] == [
        ("tag", "eve", "prod"), ("untag", "eve", "PROD".lower()), ("tag", "bob", "prod"),
        ("tag", "bob", "prod, eu-west"), ("note", "ada", "slow on\n<b>long</b> prompts\ufffd"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["", " ", "two words", "x" * 41, "<b>", "größe", "a,b", "tag:x", "\x00", "a/b"]
)
def test_what_is_no_tag_is_refused(engine: Engine, versions: list[int], name: str) -> None:
    with pytest.raises(AuroraError, match=r"is no tag; one is a word of at most 40"):
        notes.tag(engine, versions[0], ["good", name], actor="ada")
    assert notes.read(engine, "default") == {}


def test_a_change_that_is_none_is_one_clear_line_and_does_nothing(
    engine: Engine, versions: list[int]
) -> None:
    one = versions[0]
    notes.tag(engine, one, ["prod"], actor="ada")
    with pytest.raises(Refused, match=f"version {one} has the tag prod already"):
        notes.tag(engine, one, ["new", "prod"], actor="ada")
    with pytest.raises(Refused, match=f"version {one} has no tag new"):
        notes.untag(engine, one, ["prod", "new"], actor="ada")
    with pytest.raises(Refused, match="at most 30 tags"):
        notes.tag(engine, one, [f"t{n}" for n in range(30)], actor="ada")
    with pytest.raises(AuroraError, match="there is no drafter version 99"):
        notes.tag(engine, 99, ["prod"], actor="ada")
    with pytest.raises(AuroraError, match="there is no drafter version 99"):
        notes.add_note(engine, 99, "x", actor="ada")
    for text, why in ((" \n", "needs words"), ("x" * 2001, "at most 2,000 characters")):
        with pytest.raises(AuroraError, match=why):
            notes.add_note(engine, one, text, actor="ada")
    for do in (lambda: notes.add_note(engine, one, "x", actor=" "),
               lambda: notes.tag(engine, one, ["x"], actor=""),
               lambda: notes.tag(engine, one, [], actor="ada")):  # fmt: skip
        with pytest.raises(AuroraError, match=r"who does this|which tags"):
            do()
    assert notes.read(engine, "default")[one].tags == ("prod",)
    assert len(status.audit(engine, "default")) == 1


def test_versions_are_found_by_tags_words_phrases_and_numbers(
    engine: Engine, versions: list[int]
) -> None:
    a, b, c, d = versions
    notes.tag(engine, a, ["prod", "eu"], actor="ada")
    notes.tag(engine, b, ["prod-2025"], actor="ada")
    notes.add_note(engine, c, "Slow on LONG prompts, see ticket 4711", actor="ada")
    for text, ids in {
        "": versions,
        "  ": versions,
        "tag:prod": [a],
        "TAG:Prod tag:eu": [a],
        "tag:prod tag:us": [],
        "prod": [a, b],
        '"long prompts"': [c],
        '"prompts long"': [],
        "long slow": [c],
        "4711": [c],
        "471": [],
        str(d): [d],
        "40": [b],
        "forward_kl": [b],
        f"version {c}": [c],
        'tag:"prod': [a],
        "tag:": [],
        "%": [],
        ".*": [],
    }.items():
        assert fitting(engine, text) == ids, text
