"""Hashes of prompts and conversations are salted with a key of the store."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Engine, text

from aurora_sgl import store, wire
from aurora_sgl.hashing import sha256_ints
from aurora_sgl.sequences.splits import split_key
from aurora_sgl.store import queries
from aurora_sgl.store.ingest import ingest
from tests.support import store_samples as samples

PROMPT, OTHER = sha256_ints([1, 2, 3]), sha256_ints([4, 5])


def serve(engine: Engine, boot_id: int, name: str, hashes: list[str]) -> None:
    """A request with a trace for each hash, on a server of its own."""
    with store.session(engine) as s:
        group = queries.groups.ensure_group(s, "default", "target", "", "LlamaForCausalLMEagle3")
        server_id = queries.servers.register_server(s, group.id, samples.hello(boot_id, name)).id
    records: list[wire.Record] = []
    for number, conversation in enumerate(hashes, 1):
        start = samples.started(number, boot_id=boot_id)
        values = {field: getattr(start, field) for field in start.__struct_fields__}
        records.append(wire.RequestStarted(**values | {"conversation_hash": conversation}))
        records.append(samples.finished(number, [], boot_id=boot_id))
    ingest(engine, server_id, boot_id, [(1, records)])
    with store.session(engine) as s:
        for number, conversation in enumerate(hashes, 1):
            queries.traces.add_trace(
                s, request_id=wire.request_id(boot_id, number), uri=f"traces/{boot_id}-{number}",
                bytes=1, sha256="0" * 64, start=0, end=20, output_start=12,
                prompt_sha256=conversation, head_sha256=conversation, greedy=True, aux_width=9,
                last_width=3, dtype="bfloat16",
            )  # fmt: skip


def served(engine: Engine) -> list[queries.requests.RecentRequest]:
    with store.session(engine, write=False) as s:
        rows = queries.requests.recent_requests(s, 1, newest_first=False)
    return sorted(rows, key=lambda row: row.request_id)


def test_conversation_hash_is_salted_and_equal_on_all_servers_of_a_store(
    engine: Engine, tmp_path: Path
) -> None:
    serve(engine, 5, "one", [PROMPT, OTHER, ""])
    engine.dispose()  # a restart: the key is the store's
    serve(engine, 6, "two", [PROMPT])
    first, other, unnamed, again = served(engine)
    assert first.conversation_hash == again.conversation_hash != other.conversation_hash
    assert unnamed.conversation_hash == ""
    assert PROMPT not in (first.conversation_hash, first.prompt_sha256, first.head_sha256)
    # A request without a conversation is its prompt's, on whichever side that is.
    assert split_key(first) == first.prompt_sha256 == first.head_sha256 == again.head_sha256
    with store.reading(engine) as connection:
        for table in ("request", "trace"):
            rows = connection.execute(text(f"SELECT * FROM {table}")).all()
            assert rows and PROMPT not in str(rows) and OTHER not in str(rows)
    elsewhere = store.connect(f"sqlite:///{tmp_path / 'elsewhere.db'}")
    store.upgrade(elsewhere)
    serve(elsewhere, 5, "one", [PROMPT])
    assert served(elsewhere)[0].conversation_hash != first.conversation_hash


def test_rows_from_before_keep_their_hash_and_with_it_their_side(engine: Engine) -> None:
    serve(engine, 5, "one", [PROMPT])
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE request SET conversation_hash = '{PROMPT}'"))
    serve(engine, 6, "two", [OTHER])
    assert split_key(served(engine)[0]) == PROMPT
