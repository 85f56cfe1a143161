"""A store, a data folder and a sidecar's parts, with two requests to purge and two to keep, of
which something lies wherever anything of a request ever lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from sqlalchemy import Engine, text

from aurora_sgl import store, wire
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.clock import utc_now
from aurora_sgl.hashing import sha256_ints
from aurora_sgl.rollout import alerts
from aurora_sgl.rollout.alerts import Alert
from aurora_sgl.sidecar.batcher import Batcher, Intake
from aurora_sgl.sidecar.frames import TRACE
from aurora_sgl.sidecar.refused import RefusedFile, RefusedRecord
from aurora_sgl.sidecar.servers import Registry
from aurora_sgl.sidecar.spool.bypass import Bypass
from aurora_sgl.sidecar.spool.cursor import Cursor
from aurora_sgl.sidecar.spool.log import Keep, Spool
from aurora_sgl.sidecar.traces.assembler import AssembledTrace
from aurora_sgl.sidecar.traces.budget import TraceStore
from aurora_sgl.sidecar.traces.writer import TraceWriter
from aurora_sgl.store import queries
from aurora_sgl.store.ingest import IngestRules
from aurora_sgl.store.link import StoreLink
from aurora_sgl.store.models import (
    RolloutStage,
    SavedView,
    SchedulerState,
    Trial,
    TrialWindow,
    Watch,
    WatchWindow,
)
from aurora_sgl.store.salt import forms, known_key
from tests.support import leftovers
from tests.support import store_samples as samples

BOOT = samples.BOOT
#: Tokens of the requests to purge; others have those of ``store_samples``.
TOKENS = [48_611, 17_733, 48_877, 23_003]
KEPT_TOKENS = [31_337, 29_999, 30_011, 31_013]
DOMAIN, RID, TALK = "secret-domain", "rid-of-somebody", "their-conversation"
TALK_HASH = sha256_ints(list(TALK.encode()))
#: Numbers of requests: to purge, and to keep.
OURS, OTHERS = (1, 2), (3, 4)


def hello() -> wire.Hello:
    one = samples.hello()
    server = {**one.server, "draft_architecture": "LlamaForCausalLMEagle3"}
    return msgspec.structs.replace(one, server=server)


def number(counter: int) -> int:
    return wire.request_id(BOOT, counter)


def moment(counter: int) -> int:
    """The requests to keep came an hour later."""
    return samples.START_US + (0 if counter in OURS else 3_600_000_000)


def started(counter: int, at_us: int = 0) -> wire.RequestStarted:
    start = samples.started(counter, at_us=at_us or moment(counter))
    if counter not in OURS:
        return msgspec.structs.replace(start, domain="chat", rid=f"kept-{counter}")
    return msgspec.structs.replace(start, domain=DOMAIN, rid=RID, conversation_hash=TALK_HASH)


def step(counter: int, index: int, at_us: int = 0) -> wire.VerifyStep:
    tokens = TOKENS if counter in OURS else KEPT_TOKENS
    at_us = at_us or moment(counter) + 1000 * index
    one = samples.chain_step(counter, index, 1, at_us=at_us)
    return msgspec.structs.replace(one, target_tokens=tokens, draft_tokens=tokens[:3])


def finished(counter: int) -> wire.RequestFinished:
    steps = [step(counter, index) for index in range(3)]
    return samples.finished(counter, steps, at_us=moment(counter) + 4000)


class PurgeHouse:
    def __init__(
        self,
        home: Path,
        engine: Engine,
        artifacts: ArtifactRoot | None = None,
        *,
        spool_bytes: int = 1 << 26,
        most_domains: int = 200,
    ) -> None:
        self.home, self.engine = home, engine
        self.artifacts = artifacts or ArtifactRoot(str(home / "artifacts"))
        self.spool_bytes, self.rules = spool_bytes, IngestRules(most_domains=most_domains)
        self.trace_hashes: set[str] = set()  # of what is to be purged
        self.seq = self.count = 0
        self.open_sidecar(home / "spool" / "0")

    def open_sidecar(self, folder: Path) -> None:
        url = self.engine.url.render_as_string(hide_password=False)
        self.is_open = True
        self.spool = Spool(folder, self.spool_bytes, 1 << 12, Keep(3600.0, 1 << 26))
        self.cursor = Cursor(self.spool)
        self.link = StoreLink(url)
        self.registry = Registry(self.link, self.cursor, "default")
        self.bypass = Bypass(self.spool)
        self.intake = Intake(self.spool, self.registry, self.bypass)
        self.traces = TraceStore(self.link, self.artifacts)
        self.batcher = Batcher(
            self.spool, self.cursor, self.link, self.registry, self.traces, self.bypass,
            rules=self.rules,
        )  # fmt: skip

    def close_sidecar(self) -> None:
        """As its process ends; twice is once."""
        if self.is_open:
            self.link.close()
            self.spool.close()
        self.is_open = False

    @property
    def wanted(self) -> dict[str, bytes]:
        """What may lie nowhere after a purge: tokens, names, and hashes as the engine sends them
        and as the store keeps them."""
        with store.reading(self.engine) as connection:
            key = known_key(connection)
        hashes = [one for plain in (TALK_HASH, *self.trace_hashes) for one in forms(key, plain)]
        return leftovers.needles(TOKENS, [RID, *hashes])

    def send(self, *records: wire.Record) -> None:
        self.seq += 1
        envelope = wire.Envelope(BOOT, self.seq, list(records), self.count)
        self.count += len(records)
        self.intake.take(wire.encode(envelope))

    def fill(self) -> None:
        """Everything of four requests; the last steps of each stay in the spool."""
        self.send(hello(), *(started(n) for n in (*OURS, *OTHERS)))
        for index in range(3):
            self.send(*(step(n, index) for n in (*OURS, *OTHERS)))
        for n in (*OURS, *OTHERS):
            self.write_trace(n)
        assert self.batcher.drain()
        self.send(*(finished(n) for n in (*OURS, *OTHERS)))
        assert self.batcher.drain()
        self.send(*(step(n, 3) for n in (*OURS, *OTHERS)))
        self.refuse()
        self.add_rows()
        self.leave_files()

    def write_trace(self, n: int) -> str:
        """A trace file, and its row on the way through the spool."""
        tokens = np.asarray((TOKENS if n in OURS else KEPT_TOKENS) * 5, np.int64)
        header = wire.TraceHeader(
            BOOT, number(n), 0, tokens.tolist(), "float32", 3, 1, True, 8, True, []
        )
        rows = np.zeros((len(tokens), 12), np.uint8), np.zeros((len(tokens), 4), np.uint8)
        trace = AssembledTrace(header, tokens, 0, *rows, np.zeros(0, np.int64))
        row = TraceWriter(self.artifacts, self.home / "tmp").write(trace, None)
        assert row is not None
        if n in OURS:
            self.trace_hashes |= {row.prompt_sha256, row.head_sha256} - {""}
        self.spool.append(TRACE, msgspec.msgpack.encode(row))
        return row.uri

    def refuse(self) -> None:
        refused = RefusedFile(self.spool.folder)
        refused.keep(RefusedRecord(BOOT, 9, step(n, 9), "odd") for n in (1, 3))
        refused.keep_bytes(msgspec.msgpack.encode(step(2, 8)) + b"x", "unreadable")
        refused.keep_bytes(msgspec.msgpack.encode(["step", number(2), TOKENS]), "newer")
        refused.keep_bytes(msgspec.msgpack.encode(["step", number(4), "newer"]), "newer")

    def add_rows(self) -> None:
        with store.session(self.engine) as s:
            group = queries.groups.group_by_name(s, "default").id
            one, two, three = (samples.add_version(s, group, letter) for letter in "abc")
            runs = [queries.runs.start_run(s, group, trigger="new", base_version_id=one).id
                    for _ in range(2)]  # fmt: skip
            queries.training_requests.add_training_requests(s, runs[0], [number(1), number(3)])
            queries.training_requests.add_training_requests(s, runs[1], [number(4)])
            for run in runs:
                queries.runs.finish_run(s, run, "succeeded", error=f"{DOMAIN}: 2.10 -> 1.80")
            learnt = samples.add_version(s, group, "d", training_run_id=runs[0], parent_id=one)
            derived = samples.add_version(s, group, "e", parent_id=learnt)
            samples.add_version(s, group, "f", training_run_id=runs[1], parent_id=one)
            self.learnt, self.derived = learnt, derived
            for domain in ("", DOMAIN, "chat"):
                queries.evaluations.add_evaluation(
                    s, candidate_id=two, baseline_id=one, kind="replay", domain=domain, requests=4,
                    verdict="pass", depth=3, topk=1, nodes=4,
                    details={} if domain else self._evidence(),
                )  # fmt: skip
            queries.drifts.add_drift(
                s, group, version_id=one, domain=DOMAIN, last_request_id=number(1),
                accept_length_before=2.1, accept_length_after=1.8, requests_before=3,
                requests_after=3, details={},
            )  # fmt: skip
            watch = (
                Watch(
                    group_id=group, generation=1, version_id=three, baseline_id=one,
                    reason=f"worse in {DOMAIN}", started_at=utc_now(), settings={},
                    baseline={"strata": {f"3/1/4/{DOMAIN}": {}, "3/1/4/chat": {}}},
                )
            )  # fmt: skip

            s.add(watch)
            trial = Trial(
                group_id=group, baseline_id=one, candidate_id=two, started_at=utc_now(),
                status="stopped",
            )  # fmt: skip
            s.add(trial)
            s.flush()
            s.add(
                WatchWindow(
                    watch_id=watch.id, number=1, started_at=utc_now(), finished_at=utc_now(),
                    requests=1, verify_steps=1, accepted=1, verdict="bad",
                    reason=f"worse in {DOMAIN}",
                )
            )  # fmt: skip
            s.add(TrialWindow(trial_id=trial.id, number=1, version_id=one, started_at=utc_now()))
            s.add(
                SchedulerState(
                    group_id=group, holder="", state="waiting", reason=f"drift in {DOMAIN}",
                    next_action="", updated_at=utc_now(),
                )
            )  # fmt: skip
            run = queries.prune_runs.start(s, group, "ada")
            queries.prune_runs.finish(s, run.id, {})
            s.add(
                RolloutStage(
                    group_id=group, version_id=two, baseline_id=one, generation=1, servers=["h"],
                    actor="ada", reason="a server first", started_at=utc_now(), status="failed",
                    outcome=f"worse in {DOMAIN}", windows=[{"reason": f"worse in {DOMAIN}"}],
                )
            )  # fmt: skip
            s.add(
                SavedView(
                    group_id=group, name=f"mine: {DOMAIN}", page="requests",
                    query=f"domain={DOMAIN}", actor="ada", created_at=utc_now(),
                )
            )  # fmt: skip
            fell = Alert("drift", "1", "warning", f"The accept length in {DOMAIN} fell.")
            notice = Alert("server_notice", f"h/odd {DOMAIN}", "warning", f"odd {DOMAIN}")
            alerts.record(s, group, [fell, notice])
            queries.notifications.add_notification(
                s, group, event_key="drift/1", kind="drift", severity="warning",
                title=f"The accept length in {DOMAIN} fell", text=fell.text,
                happened_at=utc_now(), details={"domain": DOMAIN}, targets=["webhook"],
            )  # fmt: skip

    def _evidence(self) -> dict[str, Any]:
        rows = [[number(n), DOMAIN if n in OURS else "chat", 1, 2, 1, 2] for n in (*OURS, *OTHERS)]
        return {"requests": rows, "by_domain": {DOMAIN: {"difference": 0.1}, "chat": {}}}

    def leave_files(self) -> None:
        """What this machine may hold beside rows: copies of remote traces, half-written files, a
        run to be gone on with."""
        for n in (1, 3):
            tokens = np.asarray((TOKENS if n in OURS else KEPT_TOKENS) * 5, np.int64).tobytes()
            copy = self.home / "cache" / "traces" / "20261118" / f"{number(n)}.safetensors"
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(tokens)
            copy.with_name(f".{copy.name}.0a1b2c3d").write_bytes(tokens)
            group = self.home / "training" / f"group-{n}"
            group.mkdir(parents=True)
            parts = {"window": [number(n)], "replay": [], "dev": [], "held_out": []}
            (group / "plan.json").write_text(json.dumps(parts))
            with (group / "state.pt").open("wb") as file:
                np.savez_compressed(file, tokens=np.frombuffer(tokens, np.int64))
            header = json.dumps({"__metadata__": {"request_id": str(number(n))}}).encode()
            scratch = self.home / "tmp" / f"left{n}.trace"
            scratch.parent.mkdir(exist_ok=True)
            scratch.write_bytes(len(header).to_bytes(8, "little") + header + tokens)

    def leftovers(self) -> set[str]:
        """Where anything of the purged requests lies."""
        return leftovers.in_files(self.home, self.wanted) | leftovers.in_tables(
            self.engine, self.wanted
        )

    def numbers(self, table: str, column: str = "request_id") -> list[int]:
        """Counters of the requests that a table has, each once."""
        with store.reading(self.engine) as connection:
            ids = connection.scalars(text(f"SELECT DISTINCT {column} FROM {table} ORDER BY 1"))
            return [one & 0xFFFFFFFF for one in ids]

    def count(self, model: type[Any]) -> int:
        with store.session(self.engine, write=False) as s:
            return s.query(model).count()
