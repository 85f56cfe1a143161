"""Notes and tags: what people write about versions, and how versions are found by it.

Nothing that was written is changed: who takes a tag off writes that down, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from aurora_sgl import store
from aurora_sgl.errors import AuroraError, Refused, printable
from aurora_sgl.store import queries
from aurora_sgl.store.models import DrafterVersion, VersionNote

NOTE, TAG, UNTAG = "note", "tag", "untag"
#: Characters of a note.
LONGEST = 2000
#: Tags that one version can have: they are read at a glance or not at all.
MOST_TAGS = 30
_TAG = re.compile(r"[a-z0-9._-]{1,40}")
#: A word of a search, or several in quotation marks: ``tag:prod "two words" 4``.
_WORD = re.compile(r'(tag:)?(?:"([^"]*)"?|(\S+))', re.IGNORECASE)


@dataclass(frozen=True)
class NotesAndTags:
    """Of one version; notes oldest first, tags in the order in which they were given."""

    notes: tuple[VersionNote, ...] = ()
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class TagChange:
    """What was done."""

    action: str  # tag | untag
    version_id: int
    changed: tuple[str, ...]
    tags: tuple[str, ...]  # of the version, after


def add_note(engine: Engine, version_id: int, text: str, *, actor: str) -> VersionNote:
    """Raises ``AuroraError`` for an unknown version, without an actor, and for a note that is
    empty or too long."""
    lines = (printable(line.expandtabs()) for line in text.splitlines())
    note = "\n".join(lines).strip()
    if not note:
        raise AuroraError("a note needs words")
    if len(note) > LONGEST:
        raise AuroraError(f"a note has at most {LONGEST:,} characters; this one has {len(note):,}")
    who = _actor(NOTE, actor)
    with store.session(engine) as s:
        version = queries.versions.version(s, version_id)
        row = queries.notes.add_note(s, version_id, actor=who, kind=NOTE, text=note)
        _audit(s, version, NOTE, who, note, {}, {})
    return row


def tag(engine: Engine, version_id: int, names: Iterable[str], *, actor: str) -> TagChange:
    """Give a version tags. Raises ``Refused`` where it has one of them; none is given then."""
    return _change(engine, version_id, TAG, names, actor)


def untag(engine: Engine, version_id: int, names: Iterable[str], *, actor: str) -> TagChange:
    """Take tags off. Raises ``Refused`` where it does not have one of them; all stay then."""
    return _change(engine, version_id, UNTAG, names, actor)


def read(engine: Engine, group: str) -> dict[int, NotesAndTags]:
    """By version; versions about which nobody wrote anything are left out."""
    with store.session(engine, write=False) as s:
        return of_group(s, queries.groups.group_by_name(s, group).id)


def of_group(s: Session, group_id: int) -> dict[int, NotesAndTags]:
    rows: dict[int, list[VersionNote]] = {}
    for row in queries.notes.notes(s, group_id):
        rows.setdefault(row.version_id, []).append(row)
    return {version_id: summed_up(of) for version_id, of in rows.items()}


def summed_up(rows: Sequence[VersionNote]) -> NotesAndTags:
    """``rows``: of one version, oldest first."""
    tags: dict[str, None] = {}
    for row in rows:
        if row.kind == TAG:
            tags[row.text] = None
        elif row.kind == UNTAG:
            tags.pop(row.text, None)
    return NotesAndTags(tuple(row for row in rows if row.kind == NOTE), tuple(tags))


def search(
    text: str, versions: Sequence[DrafterVersion], written: Mapping[int, NotesAndTags]
) -> list[DrafterVersion]:
    """The versions that everything in ``text`` fits: ``tag:NAME``, a version's number, and words
    (or "several words") of its tags, its notes and its source, in any case of letters."""
    tests = list(_tests(text))
    return [
        version
        for version in versions
        if all(_fits(test, version, written.get(version.id, NotesAndTags())) for test in tests)
    ]


def _tests(text: str) -> Iterator[tuple[bool, str]]:
    """(whether it is a tag, what is looked for)."""
    for prefix, quoted, word in _WORD.findall(text):
        wanted = (quoted or word).casefold().strip()
        if wanted:
            yield bool(prefix), wanted


def _fits(test: tuple[bool, str], version: DrafterVersion, written: NotesAndTags) -> bool:
    is_tag, wanted = test
    if is_tag:
        return wanted in written.tags
    texts = [f"version {version.id}", version.source, version.note, *written.tags]
    lines = "\n".join((*texts, *(row.text for row in written.notes))).casefold()
    if wanted.isdecimal():  # 4 is neither 40 nor a part of a hash
        return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", lines) is not None
    return wanted in lines


def _change(
    engine: Engine, version_id: int, action: str, names: Iterable[str], actor: str
) -> TagChange:
    wanted = tuple(dict.fromkeys(_tag(name) for name in names))
    if not wanted:
        raise AuroraError(f"which tags? to {action} a version needs at least one")
    who = _actor(action, actor)
    with store.session(engine) as s:
        # The group's lock: two people who give the same tag at once do so one after the other.
        queries.groups.lock_group(s, queries.versions.version(s, version_id).group_id)
        version = queries.versions.version(s, version_id)
        before = summed_up(queries.notes.notes_of(s, version_id)).tags
        for name in wanted:
            if (name in before) == (action == TAG):
                has = "has the tag {} already" if action == TAG else "has no tag {}"
                raise Refused(f"version {version_id} {has.format(name)}; nothing was changed")
        if action == TAG and len(before) + len(wanted) > MOST_TAGS:
            raise Refused(f"a version has at most {MOST_TAGS} tags; take some off first")
        for name in wanted:
            queries.notes.add_note(s, version_id, actor=who, kind=action, text=name)
        after = summed_up(queries.notes.notes_of(s, version_id)).tags
        _audit(s, version, action, who, ", ".join(wanted), {"tags": before}, {"tags": after})
    return TagChange(action, version_id, wanted, after)


def _tag(name: str) -> str:
    folded = name.strip().casefold()
    if not _TAG.fullmatch(folded):
        raise AuroraError(
            f"{name[:60]!r} is no tag; one is a word of at most 40 letters a-z, digits, dots, "
            "hyphens and underscores"
        )
    return folded


def _actor(action: str, actor: str) -> str:
    if not actor.strip():
        raise AuroraError(f"to {action} a version needs an actor: who does this?")
    return printable(actor.strip())


def _audit(
    s: Session,
    version: DrafterVersion,
    action: str,
    actor: str,
    reason: str,
    before: Mapping[str, Sequence[str]],
    after: Mapping[str, Sequence[str]],
) -> None:
    """What was written is why it was done: no other reason is asked for."""
    queries.audit.add_audit(
        s, version.group_id, actor=actor, action=action, subject=f"version {version.id}",
        reason=reason, before={name: list(tags) for name, tags in before.items()},
        after={name: list(tags) for name, tags in after.items()},
    )  # fmt: skip
