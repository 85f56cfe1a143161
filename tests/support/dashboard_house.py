"""A store as servers leave it behind: real drafters of a tiny target, and a day of recorded
requests, taken in by the real ingest; for the tests of the dashboard and its pictures."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any
from urllib.parse import urlencode

from sqlalchemy import Engine

from aurora_sgl import clock, rollout, store, wire
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.drafter import checkpoint, scratch
from aurora_sgl.engine import clean
from aurora_sgl.hashing import sha256_ints
from aurora_sgl.rollout import alerts
from aurora_sgl.rollout.promote import set_candidate
from aurora_sgl.rollout.versions import import_version
from aurora_sgl.store import queries
from aurora_sgl.store.ingest import RULES, IngestRules, ingest
from aurora_sgl.store.liveness import training_lease_name
from tests.support import hostile
from tests.support.drafter_cases import VOCAB, target_folder

WORDS = (
    " the", " drafter", " proposes", " several", " tokens", " and", " target", " checks", " them",
    " in", " one", " step", ",", ".", "\n", " so", " a", " request", " ends", " sooner", " when",
    " most", " of", " what", " was", " proposed", " is", " right", " def", " f", "(", ")", ":",
    " return", " x", " +", " 1", " <b>", " for", "é",
)  # fmt: skip
DEPTH, TOPK, NODES = 3, 2, 6
PARENTS = [0, 0, 1, 1, 3]
#: Accepted nodes by what happened; the last one is the second choice of the first position.
PATHS = ([], [1], [1, 3], [1, 3, 5], [2])
DOMAINS = {"chat": 0.0, "code": 0.12, "sql": 0.05}
SERVERS = {77: "gpu-1:30000", 78: "gpu-2:30000"}
#: Chance that the next proposal is accepted, by version.
QUALITY = (0.05, 0.42, 0.55, 0.62, 0.5)


@dataclass
class House:
    home: Path
    engine: Engine
    group_id: int
    versions: list[int]
    servers: dict[int, int] = field(default_factory=dict)  # boot -> server id
    seqs: dict[int, int] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)
    kept: dict[int, list[wire.Record]] | None = None  # boot -> records that wait, see together
    rules: IngestRules = RULES

    @property
    def url(self) -> str:
        return self.engine.url.render_as_string(hide_password=False)

    def version(self, version_id: int) -> Any:
        with store.session(self.engine, write=False) as s:
            return queries.versions.version(s, version_id)

    def live(self) -> int | None:
        with store.session(self.engine, write=False) as s:
            return queries.aliases.aliases(s, self.group_id).get("live")

    def servers_follow(self) -> None:
        """Every server reports what is live, as after a swap."""
        version = self.version(self.live() or 0)
        with store.session(self.engine) as s:
            for server_id in self.servers.values():
                queries.servers.touch_server(
                    s, server_id, live_version_id=version.id, live_sha256=version.weights_sha256,
                    state="running", phase="speculating", phase_reason="speculation is faster",
                    speculation_share=1.0, last_error="", last_seen_at=clock.utc_now(),
                )  # fmt: skip

    @contextmanager
    def heard_of(self) -> Iterator[None]:
        """Meanwhile every server says again and again that it is there, as its sidecar does."""
        over = Event()

        def say() -> None:
            while not over.wait(5):
                with store.session(self.engine) as s:
                    for server_id in self.servers.values():
                        queries.servers.touch_server(s, server_id, last_seen_at=clock.utc_now())

        thread = Thread(target=say, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def serve(
        self,
        at: datetime,
        version_id: int,
        *,
        boot: int = 77,
        domain: str = "chat",
        steps: int = 12,
        quality: float = 0.6,
        may_train: bool = True,
        sampling: dict[str, Any] | None = None,
        rid: str = "",
        conversation: str = "",
        rng: random.Random,
    ) -> int:
        """One request, recorded as the engine does; its id."""
        number = self.numbers[boot] = self.numbers.get(boot, 0) + 1
        request_id = wire.request_id(boot, number)
        us = int(at.timestamp() * 1e6)
        records: list[wire.Record] = [
            wire.RequestStarted(request_id, us, rid or f"r{number}", 0, domain, conversation, 24, 0,
                                sampling or {"temperature": 0.0}, may_train, False, True)
        ]  # fmt: skip
        made, position = [], 25
        for step in range(steps):
            made.append(verify_step(request_id, step, us + 40_000 * (step + 1), version_id,
                                    position, quality, rng))  # fmt: skip
            position += made[-1].kept
        records += made
        records.append(finished(request_id, us + 40_000 * (steps + 2), made))
        self.take_in(boot, records)
        return request_id

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is served meanwhile is taken in at the end, in one batch a server."""
        self.kept = {}
        try:
            yield
        finally:
            kept, self.kept = self.kept, None
        for boot, records in kept.items():
            self.take_in(boot, records)

    def take_in(self, boot: int, records: list[wire.Record]) -> None:
        if self.kept is not None:
            self.kept.setdefault(boot, []).extend(records)
            return
        self.seqs[boot] = self.seqs.get(boot, 0) + 1
        ingest(self.engine, self.servers[boot], boot, [(self.seqs[boot], records)],
               rules=self.rules)  # fmt: skip


def finished(request_id: int, us: int, made: list[wire.VerifyStep]) -> wire.RequestFinished:
    return wire.RequestFinished(
        request_id, us, "finished", "stop", 1 + sum(step.kept for step in made), 0, len(made),
        sum(step.proposed for step in made), sum(step.accepted for step in made), 0,
    )  # fmt: skip


def verify_step(
    request_id: int, step: int, us: int, version_id: int, position: int, quality: float,
    rng: random.Random,
) -> wire.VerifyStep:  # fmt: skip
    """A greedy tree: nodes 1 and 2 at depth 1, 3 and 4 below 1, 5 below 3."""
    taken = 0
    while taken < DEPTH and rng.random() < quality:
        taken += 1
    which = 4 if not taken and rng.random() < 0.2 else taken
    path = PATHS[which]
    draft = [rng.randrange(VOCAB) for _ in range(NODES - 1)]
    target = [rng.randrange(VOCAB) for _ in range(NODES)]
    for parent, node in zip([0, *path], path, strict=False):
        target[parent] = draft[node - 1]
    rejected = 0 if which in (3, 4) else len(path) + 1
    return wire.VerifyStep(
        request_id, step, us, version_id, 500 + step, False, position, DEPTH, TOPK, NODES,
        "greedy", 1, NODES - 1, len(path), len(path) + 1, rejected, draft, PARENTS, path, target,
    )  # fmt: skip


@contextmanager
def clock_at(moment: datetime) -> Iterator[None]:
    """What is written in here was written then: every module's ``utc_now`` says so."""
    real = clock.utc_now
    patched = [
        module for name, module in list(sys.modules.items())
        if name.startswith("aurora_sgl") and getattr(module, "utc_now", None) is real
    ]  # fmt: skip
    for module in patched:
        module.utc_now = lambda: moment  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in patched:
            module.utc_now = real  # type: ignore[attr-defined]


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {word: number for number, word in enumerate(WORDS)}
    assert len(words) == VOCAB
    Tokenizer(WordLevel(words, unk_token="é")).save(str(folder / "tokenizer.json"))


@cache
def _without_rows() -> bytes:
    """A store at the newest schema, to copy: quicker than to make its tables for each."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "aurora.db"
        engine = store.connect(f"sqlite:///{path}")
        store.upgrade(engine)
        engine.dispose()
        return path.read_bytes()


def empty(home: Path, engine: Engine | None = None, model: str = "", revision: str = "") -> House:
    """A group, its tiny target and two servers; no version, no request. ``model``: what the target
    is called, else its folder."""
    home.mkdir(parents=True, exist_ok=True)
    target = target_folder(home / "target")
    tokenizer(target)
    if engine is None:
        file = home / "aurora.db"
        if not file.exists():
            file.touch(mode=0o600)
            file.write_bytes(_without_rows())
        engine = store.connect(f"sqlite:///{file}")
        store.upgrade(engine)
    with store.session(engine) as s:
        group = queries.groups.ensure_group(
            s, "default", model or str(target), revision, "LlamaForCausalLMEagle3"
        )
    return House(home, engine, group.id, [])


def add_servers(
    house: House, servers: Mapping[int, str] = SERVERS, notices: dict[str, str] | None = None
) -> None:
    with store.session(house.engine) as s:
        for boot, name in servers.items():
            said = {"name": name, "dtype": "float32", "sglang_version": "0.5.21"}
            counters = {"queue": 0.0, "step_ms_plain": 20.0, "step_ms_spec": 26.0,
                        "step_ms_1_0_1": 20.0, f"step_ms_1_{DEPTH}_{NODES}": 26.0}  # fmt: skip
            hello = wire.Hello(boot, 1, said, 0, 0, 0, counters, notices or {})
            house.servers[boot] = queries.servers.register_server(s, house.group_id, hello).id


def add_version(house: House, parent: int | None = None, run: int | None = None) -> int:
    """A drafter with weights of its own, imported as a version."""
    target = house.home / "target"
    drafter = scratch.make(target, draft_vocab_size=VOCAB, seed=len(house.versions),
                           model=str(target))  # fmt: skip
    folder = checkpoint.save(drafter, house.home / "made" / str(len(house.versions)))
    version = import_version(
        house.engine, ArtifactRoot(str(house.home / "artifacts")), folder, house.group_id,
        source="train" if parent else "scratch", parent_id=parent, training_run_id=run,
        note="forward_kl on 40 requests" if parent else "untrained",
    )  # fmt: skip
    house.versions.append(version.id)
    return version.id


def judge(
    house: House, candidate: int, baseline: int, before: float, after: float, verdict: str = "pass",
    domains: Mapping[str, float] = DOMAINS,
) -> int:  # fmt: skip
    """An evaluation over all domains with its domains, as the gate writes it; its id."""
    gain = after - before
    with store.session(house.engine) as s:
        told = {
            domain: {"requests": 20, "baseline": before + more, "candidate": after + more,
                     "difference": gain, "ci_low": gain - 0.08, "ci_high": gain + 0.08,
                     "verdict": "pass" if gain > 0 else "inconclusive"}
            for domain, more in domains.items()
        }  # fmt: skip
        row = queries.evaluations.add_evaluation(
            s, candidate_id=candidate, baseline_id=baseline, kind="replay", requests=60,
            verdict=verdict, candidate_accept_length=after, baseline_accept_length=before,
            difference=gain, ci_low=gain - 0.05, ci_high=gain + 0.05, depth=DEPTH, topk=TOPK,
            nodes=NODES, details={"by_domain": told, "reason": "60 requests", "judged": {
                "requests": 60, "left_out": {"rejection_sampling": 3}}},
        )  # fmt: skip
        for domain, said in told.items():
            queries.evaluations.add_evaluation(
                s, candidate_id=candidate, baseline_id=baseline, kind="replay", domain=domain,
                requests=20, verdict=str(said["verdict"]), difference=gain,
                candidate_accept_length=said["candidate"],
                baseline_accept_length=said["baseline"], ci_low=gain - 0.08, ci_high=gain + 0.08,
                details={"evaluation_id": row.id},
            )  # fmt: skip
    return row.id


def train(house: House, base: int, at: datetime, after: float) -> int:
    """A finished training run; its id."""
    with clock_at(at - timedelta(minutes=4)), store.session(house.engine) as s:
        run = queries.runs.start_run(
            s, house.group_id, trigger="requests", base_version_id=base, objective="forward_kl",
        )  # fmt: skip
    lengths = [1.2 + (after - 1.2) * (1 - 0.6**i) for i in range(1, 7)]
    metrics = {
        "dev_accept_length": lengths, "loss_curve": [5 * 0.93**i + 1 for i in range(40)],
        "reward_curve": [0.9 - 0.8 * 0.95**i for i in range(40)],
        "accept_length_before": 1.3, "accept_length_after": after, "updates": 240,
        "tokens_per_second": 812.4,
    }  # fmt: skip
    with clock_at(at), store.session(house.engine) as s:
        queries.runs.finish_run(
            s, run.id, "succeeded", requests=40, tokens=24_310, metrics=metrics,
            window_start=at - timedelta(hours=3), window_end=at - timedelta(minutes=5),
        )  # fmt: skip
    return run.id


def fill(
    home: Path, engine: Engine | None = None, *, requests: int = 300, now: datetime | None = None
) -> House:
    """Five versions, three of which went live, over 26 hours of traffic on two servers."""
    now = (now or datetime.now(UTC)).replace(microsecond=0)
    rng = random.Random(0)
    house = empty(home, engine)
    add_servers(house)
    begin = now - timedelta(hours=26)
    times = [begin, begin + timedelta(hours=9), begin + timedelta(hours=18)]
    with clock_at(begin):
        first = add_version(house)
        rollout.promote(house.engine, first, actor="system", reason="first version of the group")
    for parent, at in zip(house.versions[:1] * 2, times[1:], strict=True):
        made = _next(house, house.versions[-1] or parent, at)
        with clock_at(at):
            rollout.promote(
                house.engine, made, actor="scheduler", reason="replay on held-out requests",
                evaluation_id=_newest(house, made),
            )  # fmt: skip
    live = house.versions[-1]
    _next(house, live, now - timedelta(minutes=50))
    _next(house, live, now - timedelta(minutes=20), verdict="inconclusive")
    with clock_at(now - timedelta(minutes=19)), store.session(house.engine) as s:
        failed = queries.runs.start_run(s, house.group_id, trigger="drift", base_version_id=live)
        queries.runs.finish_run(s, failed.id, "failed", error="3 of 40 traces could be read")
    set_candidate(house.engine, house.versions[3], house.group_id)
    with clock_at(now - timedelta(hours=2)):
        rollout.pin(house.engine, first, actor="ada", reason="the one to fall back on")
        turn = rollout.switches.turn
        turn(house.engine, "default", "auto_promote", False, actor="ada", reason="release week")
    replayed: list[list[Any]] = []
    with house.together():
        for index in range(requests):
            at = begin + (now - begin - timedelta(minutes=1)) * (index / requests)
            which = sum(at >= moment for moment in times) - 1
            domain = rng.choices(list(DOMAINS), [5, 3, 2])[0]
            served = house.serve(
                at, house.versions[which], boot=rng.choice(list(SERVERS)), domain=domain,
                steps=rng.randrange(8, 26), quality=QUALITY[which] + DOMAINS[domain],
                may_train=index % 7 != 3, rng=rng,
            )  # fmt: skip
            replayed.append([served, domain, rng.randrange(4, 12), 14, rng.randrange(6, 16), 12,
                             "greedy", ""])  # fmt: skip
    keep_requests(house, house.versions[3], replayed[-60:])
    house.servers_follow()
    return house


def keep_requests(house: House, candidate: int, rows: list[list[Any]]) -> None:
    """What the gate keeps of the single requests of a candidate's newest replay."""
    with store.session(house.engine) as s:
        row = queries.evaluations.evaluation(s, _newest(house, candidate))
        row.details = {**row.details, "requests": rows, "served_dtype": "float32"}


#: How old the server of a first hour is, and when after its start versions 2 and 3 went live.
YOUNG = timedelta(minutes=8)
PROMOTED = (timedelta(minutes=3, seconds=17), timedelta(minutes=5, seconds=49))
#: What a request without limits leaves in the store: SGLang 0.5.21 writes "all" as 2**30.
UNLIMITED = {"temperature": 0.7, "top_p": 1.0, "top_k": 1 << 30, "min_p": 0.0,
             "max_new_tokens": 64}  # fmt: skip
#: What is wrong with that server, in words that a page has to take literally.
NOTICE = "The headers of clients are lost: <b>nothing</b> of this server is learnt from."
#: A domain as long as it may be, with what a browser would take for markup.
LONG = "<b>a customer</b> whose name is as long as a domain name may be"
#: Why its newest version was not judged.
UNJUDGED = "9 held-out requests can be judged, at least 12 needed (3 sampled by rejection left out)"


def first_hour(home: Path, now: datetime | None = None) -> House:
    """A demo's store after some minutes: one server, two promotions, and a run that goes on."""
    now = (now or datetime.now(UTC)).replace(microsecond=0)
    begin, rng = now - YOUNG, random.Random(0)
    house = empty(home)
    with clock_at(begin):
        add_servers(house, {77: "127.0.0.1:30000"}, {"consent": NOTICE})
        first = add_version(house)
        rollout.promote(house.engine, first, actor="system", reason="first version of the group")
    times = [begin, *(begin + after for after in PROMOTED)]
    for at in times[1:]:
        made = _next(house, house.versions[-1], at)
        with clock_at(at):
            rollout.promote(house.engine, made, actor="demo", reason="replay on held-out requests",
                            evaluation_id=_newest(house, made))  # fmt: skip
    with house.together():
        at = begin + timedelta(seconds=50)
        while at < now - timedelta(seconds=10):
            which = sum(at >= moment for moment in times) - 1
            house.serve(at, house.versions[which], domain=rng.choice([*DOMAINS, LONG]),
                        quality=QUALITY[which] + 0.1, sampling=UNLIMITED, rng=rng)  # fmt: skip
            at += timedelta(seconds=4.3)
    _next(house, house.versions[-1], now - timedelta(seconds=80), verdict="inconclusive")
    with store.session(house.engine) as s:
        row = next(
            e for e in queries.evaluations.evaluations(s, house.versions[-1]) if not e.domain
        )
        judged = {"requests": 9, "left_out": {"rejection_sampling": 3}}
        row.details = {**row.details, "reason": UNJUDGED, "judged": judged}
    with clock_at(now - timedelta(seconds=71)), store.session(house.engine) as s:
        run = queries.runs.start_run(s, house.group_id, trigger="requests", base_version_id=3)
    goes_on(house, run.id)
    house.servers_follow()
    return house


def goes_on(house: House, run_id: int, done: int = 120, **more: Any) -> None:
    """The run's trainer holds its lease and says how far it is, in the midst of training."""
    curves = {
        "loss": [[float(x), 1 + 3 * 0.97**x] for x in range(1, done + 1)],
        "accept_length": [[done / 3, 1.42], [2 * done / 3, 1.61]],
    }
    word = {"stage": "training", "done": done, "total": 400, "requests": 43, "curves": curves,
            "seconds_left": None, "stage_seconds_left": 130.0,
            "updated_at": clock.utc_now().isoformat(), **more}  # fmt: skip
    with store.session(house.engine) as s:
        queries.leases.acquire_lease(s, training_lease_name(house.group_id), "gpu-1:7:x", 3600)
        queries.runs.note_progress(s, run_id, word)


def fill_hostile(home: Path, engine: Engine | None = None, now: datetime | None = None) -> House:
    """Two versions, and a request for each hostile text, which is its domain, id and conversation;
    the target model, servers, actors, reasons, notices, errors and evidence are hostile too."""
    now = (now or datetime.now(UTC)).replace(microsecond=0)
    rng, names = random.Random(0), hostile.cleaned()
    everything = " ".join(hostile.cleaned(40)[::5])[:480]
    house = empty(home, engine, " ".join(hostile.cleaned(40)[1::5]), everything)
    house.rules = IngestRules(most_domains=len(names))
    add_servers(house, {77: names[0], 78: names[40]}, {"odd": everything})
    with clock_at(now - timedelta(minutes=50)):
        for number in range(2):
            rollout.promote(house.engine, add_version(house), actor=everything[:90],
                            reason=everything, force=bool(number))  # fmt: skip
        judge(house, 2, 1, 1.3, 1.9, domains=dict.fromkeys(names[::9], 0.1))
    turn = rollout.switches.turn
    turn(house.engine, "default", "learning", False, actor=everything[:90], reason=everything)
    with store.session(house.engine) as s:
        run = queries.runs.start_run(s, house.group_id, trigger="requests", base_version_id=1)
        queries.runs.finish_run(s, run.id, "failed", error=everything)
        for name in names[::40]:
            queries.drifts.add_drift(
                s, house.group_id, version_id=2, domain=name, last_request_id=1, details={},
                accept_length_before=2.1, accept_length_after=1.8, requests_before=3,
                requests_after=3,
            )  # fmt: skip
    with house.together():
        for index, name in enumerate(names):
            house.serve(now - timedelta(minutes=40) + timedelta(seconds=index), 2, domain=name,
                        rid=name, conversation=conversation_hash(name), steps=2,
                        boot=77 + index % 2, rng=rng)  # fmt: skip
    _people_write(house, names, everything, now)
    house.servers_follow()
    return house


def _people_write(house: House, names: list[str], everything: str, now: datetime) -> None:
    """Notes, alerts with who took them, notifications that were not delivered, saved views."""
    engine, actor = house.engine, everything[:90]
    for name in names[3::25]:
        if name.strip():
            rollout.notes.add_note(engine, 2, name, actor=actor)
    rollout.notes.tag(engine, 2, ["prod"], actor=actor)
    begun = [alerts.Alert("drift", str(n), "warning", name, now, name)
             for n, name in enumerate(names[7::60])]  # fmt: skip
    with store.session(engine) as s:
        alerts.record(s, house.group_id, begun, now - timedelta(minutes=9))
        alerts.record(s, house.group_id, begun[:3], now)
        queries.notifications.add_notification(
            s, house.group_id, event_key="x", kind="drift", severity="warning", title=everything,
            text=everything, happened_at=now, details={}, targets=[names[9], "webhook"],
        )  # fmt: skip
        queries.notifications.end_attempt(s, 1, "webhook", state="waiting", next_try_at=now,
                                          error=everything)  # fmt: skip
        for name in names[::40]:
            queries.saved_views.add_saved_view(
                s, house.group_id, name=f"{name} ", page="requests", actor=actor,
                query=urlencode({"domain": name, "request": everything}),
            )  # fmt: skip
        for page, query in hostile.ADDRESSES:
            queries.saved_views.add_saved_view(s, house.group_id, name="elsewhere", page=page,
                                               query=query, actor=actor)  # fmt: skip
    alerts.acknowledge(engine, "default", 1, actor=actor, note=everything)


def conversation_hash(name: str) -> str:
    """As the engine sends it, which never sends the name."""
    return sha256_ints(list(clean.text(name).encode()))


def _next(house: House, parent: int, at: datetime, verdict: str = "pass") -> int:
    index = len(house.versions)
    before, after = (1 + 1.6 * QUALITY[i] for i in (index - 1, index))
    if verdict != "pass":
        after = before + 0.02
    run = train(house, parent, at, after)
    with clock_at(at):
        made = add_version(house, parent, run)
        judge(house, made, parent, before, after, verdict)
    return made


def _newest(house: House, candidate: int) -> int:
    with store.session(house.engine, write=False) as s:
        return next(e.id for e in queries.evaluations.evaluations(s, candidate) if not e.domain)


if __name__ == "__main__":
    made = fill(Path(sys.argv[1]))
    print(json.dumps({"live": made.live(), "versions": made.versions}))
