"""The closed loop on one machine: serve, record, train, go live, and show it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from aurora_sgl import store
from aurora_sgl.config import Settings, get_settings
from aurora_sgl.demo.chats import limited, with_turns
from aurora_sgl.demo.dashboard import DashboardProcess
from aurora_sgl.demo.held_out import HeldOutPrompts, spread
from aurora_sgl.demo.model import demo_model
from aurora_sgl.demo.prompts import Prompt, load_prompts, sample_prompts, to_measure, to_serve
from aurora_sgl.demo.screen import Screen, VersionRow
from aurora_sgl.demo.summary import number, rounded, sentence
from aurora_sgl.demo.traffic import Sent, send_all
from aurora_sgl.demo.trainer import BackgroundTrainer
from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.engine.flags import value_of
from aurora_sgl.environment import EXIT_WITH_PARENT
from aurora_sgl.errors import AuroraError, Refused
from aurora_sgl.processes.server import ServerProcess, free_port
from aurora_sgl.rollout.promote import promote
from aurora_sgl.serving import ServePlan, plan
from aurora_sgl.step_cost import StepCost
from aurora_sgl.store import queries

TRAIN_EVERY = 40  # served requests between training runs
MAX_TOKENS = 64  # of one answer: keeps the first improvement within minutes on two cores
MEASURED = 24  # held-out prompts, of all domains, unless a user says otherwise
AGAIN_TEMPERATURE = 0.7  # of prompts that come again
_SWAP_SECONDS = 60.0

#: What SGLang is started with; small enough for two cores and a few GiB.
SERVER_FLAGS = [
    *("--max-total-tokens", "16384"),
    *("--max-running-requests", "16"),
]


def run(
    *,
    requests: int | None = None,
    stop: bool = False,
    held_out: int = MEASURED,
    prompts: Path | None = None,
    drafter: str | None = None,
    temperature: float | None = None,
    turns: int = 1,
    recipe: Mapping[str, Any] | None = None,
    port: int = 0,
    dashboard: bool = True,
    as_json: bool = False,
) -> int:
    """Run the demo; returns the exit code. Raises ``AuroraError`` for what a user can mend.

    ``requests``: how many to send (None: go on until Ctrl-C). ``stop``: measure the first and the
    last version on the same held-out prompts, sum up, and end; nobody looks at a dashboard then,
    so none is started. ``held_out``: how many prompts are measured and never trained on.
    ``drafter``: a folder to begin with, or ``scratch`` (None: what was live in
    this data folder, else scratch). ``temperature``: of traffic that has none of its own (None:
    greedy, and 0.7 when the prompts come again). ``turns``: of the user in a chat; each is a
    request, and no header says that they belong together. ``recipe``: knobs of training.
    """
    settings = get_settings()
    chosen = load_prompts(prompts) if prompts is not None else sample_prompts()
    measured = spread(to_measure(chosen), held_out)
    if stop and requests is None:
        requests = 120
    store.require_writable(settings.store_url)
    model = demo_model(settings.home, quiet=as_json)
    os.environ["AURORA_HOME"] = str(settings.home.resolve())
    port = port or free_port()
    ready = plan(
        str(model),
        drafter,
        [*SERVER_FLAGS, "--port", str(port)],
        settings,
        sample_texts=[prompt.prompt for prompt in chosen],
    )
    server = _server(ready, port, settings)
    engine = store.connect(settings.store_url)
    signal.signal(signal.SIGTERM, _interrupt)
    with Screen(quiet=as_json) as screen:
        screen.say(ready.note)
        if not measured:
            screen.say("no prompt is held out, the file has one prompt alone: nothing is measured")
        pages = DashboardProcess(settings.home / "logs" / "dashboard.log", screen.say)
        shape = _shape(ready.flags)
        held = HeldOutPrompts(
            server.url, engine, screen, measured, DraftShape(**shape), temperature or 0.0
        )
        chats = with_turns(to_serve(chosen), turns)
        trainer = BackgroundTrainer(
            {**shape, **(recipe or {})}, {"AURORA_HOME": str(settings.home)}
        )
        demo = _Demo(settings, engine, server, screen, chats, held, requests, stop, trainer,
                     temperature)  # fmt: skip
        if dashboard and not stop:
            demo.dashboard = pages
        try:
            asyncio.run(demo.go())
            failed = False
        except KeyboardInterrupt:
            screen.say("stopping ...")
            failed = stop
        finally:
            demo.end()
    screen.print_table()
    if stop and not failed:
        summary = demo.summary()
        if as_json:
            print(json.dumps(summary, indent=2))
        else:
            screen.say(sentence(summary))
    return 130 if failed else 0


def _server(ready: ServePlan, port: int, settings: Settings) -> ServerProcess:
    place = ready.flags.index("--port")
    return ServerProcess(
        ready.flags[:place] + ready.flags[place + 2 :],
        port=port,
        log=settings.home / "logs" / "server.log",
        environment={"OMP_NUM_THREADS": "1", **ready.environment, EXIT_WITH_PARENT: "1"},
    )


def _shape(flags: list[str]) -> dict[str, int]:
    """The draft shape that the server was given, under the names that training calls it by."""
    names = {"depth": "num-steps", "topk": "eagle-topk", "nodes": "num-draft-tokens"}
    return {
        name: int(value_of(flags, f"--speculative-{flag}") or 0) for name, flag in names.items()
    }


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class _Demo:
    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        server: ServerProcess,
        screen: Screen,
        prompts: list[Prompt],
        held_out: HeldOutPrompts,
        requests: int | None,
        stop: bool,
        trainer: BackgroundTrainer,
        temperature: float | None,
    ) -> None:
        self.settings, self.engine, self.server, self.screen = settings, engine, server, screen
        self.requests, self.stop, self.temperature = requests, stop, temperature
        self.to_serve, self.held_out = prompts, held_out
        self.trainer = trainer
        self.dashboard: DashboardProcess | None = None
        self.sent: list[Sent] = []
        self.failed = 0
        self.trained_at = 0  # requests served when the last training run began
        self.group_id = 0
        self.server_id = 0

    # -- the loop ----------------------------------------------------------------------------

    async def go(self) -> None:
        self.server.start()
        await asyncio.to_thread(
            self.server.wait_ready,
            300.0,
            lambda seconds: self.screen.bar("starting SGLang", int(seconds), 60, "about 30 s"),
        )
        self.screen.end_bar("starting SGLang")
        self.screen.url = self.server.url
        self.screen.say(f"SGLang is ready: {self.server.url}/v1")
        await self._until(self._server_known, 180.0, "the sidecar did not register the server")
        if self.dashboard is not None:
            self.dashboard.start()
        watching = asyncio.create_task(self._watch())
        try:
            await self._while_it_serves(self._all())
        finally:
            watching.cancel()
            await asyncio.to_thread(self._refresh)

    async def _all(self) -> None:
        await self.held_out.measure_speed("no_speculation", drafts="no")
        await self.held_out.measure_speed("first")
        await self._measure_length("first")
        await self._traffic()
        if self.stop:
            await self._last_training()
            # Machines drift: what the last version gains is set against plain steps of now.
            await self.held_out.measure_speed("no_speculation_last", drafts="no")
            await self.held_out.measure_speed("last")
            await self._measure_length("last")

    async def _measure_length(self, name: str) -> None:
        sample = await self.held_out.serve_whole_drafts(name)
        await self._until(
            lambda: self.held_out.is_stored(name, sample), 30.0,
            "the store did not receive the measured requests",
        )  # fmt: skip

    async def _while_it_serves(self, work: Coroutine[Any, Any, None]) -> None:
        """Raises ``AuroraError`` with the last telling line of its log when SGLang ends."""
        doing = asyncio.create_task(work)
        while not (await asyncio.wait([doing], timeout=0.5))[0]:
            if not self.server.running:
                doing.cancel()
                with contextlib.suppress(asyncio.CancelledError, ExceptionGroup, AuroraError):
                    await doing
                raise self._ended()
        if doing.exception() is not None and not self.server.running:
            raise self._ended() from doing.exception()
        await doing

    def _ended(self) -> AuroraError:
        return AuroraError(
            f"SGLang ended by itself: {self.server.last_words()} (log: {self.server.log})"
        )

    async def _traffic(self) -> None:
        training: list[asyncio.Task[None]] = []

        def done(one: Sent) -> None:
            self.sent.append(one)
            self.failed += bool(one.error)
            if one.error and self.server.running:
                self.screen.say(f"a request failed: {one.error}")
            self.screen.bar("requests", len(self.sent), self.requests)
            due = len(self.sent) - self.trained_at >= TRAIN_EVERY
            if due and (not training or training[-1].done()):
                self.trained_at = len(self.sent)
                training.append(asyncio.create_task(self._train("requests")))

        # The first round is greedy. When the prompts come again, sampling keeps answers apart.
        left, given = self.requests, self.temperature
        first = list(limited(self.to_serve, left))
        rest = None if left is None else left - sum(1 + len(p.follow_ups) for p in first)
        again = limited(itertools.cycle(self.to_serve), rest)
        for prompts, usual in ((first, 0.0), (again, AGAIN_TEMPERATURE)):
            temperature = usual if given is None else given
            await send_all(self.server.url, prompts, done, max_tokens=MAX_TOKENS,
                           temperature=temperature)  # fmt: skip
        if training:
            await training[-1]

    async def _train(self, trigger: str) -> None:
        def progress(event: dict[str, Any]) -> None:
            if event.get("event") == "update":
                done, total = int(event["update"]), int(event["updates"])
                self.screen.bar("training", done, total, f"loss {event.get('loss', 0):.2f}")

        outcome = await self.trainer.run(trigger, progress)
        self.screen.end_bar("training")
        if outcome["status"] != "succeeded":
            self.screen.say(f"training {outcome['status']}: {outcome.get('error', '')}")
            return
        await asyncio.to_thread(self._judge, outcome)

    def _judge(self, outcome: dict[str, Any]) -> None:
        """Promote what replay on held-out requests calls better."""
        version, metrics = outcome["version_id"], outcome["metrics"]
        before, after = metrics.get("accept_length_before"), metrics.get("accept_length_after")
        summary = f"version {version}: replay {number(before)} -> {number(after)}"
        if outcome["verdict"] != "pass":
            why = outcome.get("reason", "")
            self.screen.say(f"{summary}, not promoted: {outcome['verdict']} ({why})")
            return
        try:
            promote(
                self.engine,
                version,
                actor="demo",
                reason=f"replay on held-out requests: {number(before)} -> {number(after)}",
                evaluation_id=outcome["evaluation_id"],
            )
        except Refused as refusal:
            self.screen.say(f"{summary}, not promoted: {refusal}")
            return
        self.screen.say(f"{summary}, promoted")

    async def _last_training(self) -> None:
        if len(self.sent) - self.trained_at > TRAIN_EVERY // 4:
            self.trained_at = len(self.sent)
            await self._train("last requests")
        await self._until(self._converged, _SWAP_SECONDS, "the promoted version did not go live")

    # -- the store ---------------------------------------------------------------------------

    async def _until(self, condition: Callable[[], bool], seconds: float, otherwise: str) -> None:
        for _ in range(int(seconds * 4)):
            if not self.server.running:
                raise self._ended()
            if await asyncio.to_thread(condition):
                return
            await asyncio.sleep(0.25)
        raise AuroraError(f"{otherwise} (log: {self.settings.home / 'logs' / 'sidecar.log'})")

    def _server_known(self) -> bool:
        with store.session(self.engine, write=False) as s:
            for group in queries.groups.groups(s):
                if group.name != self.settings.group:
                    continue
                for row in queries.servers.servers(s, group.id):
                    if row.name.endswith(self.server.url.rpartition(":")[2]) and row.live_sha256:
                        self.group_id, self.server_id = group.id, row.id
                        return row.live_version_id is not None
        return False

    def _converged(self) -> bool:
        with store.session(self.engine, write=False) as s:
            desired = queries.aliases.desired_version(s, self.group_id)
            row = queries.servers.server(s, self.server_id)
            return desired is not None and row.live_version_id == desired[0]

    async def _watch(self) -> None:
        while True:
            await asyncio.to_thread(self._refresh)
            await asyncio.sleep(1.0)

    def _refresh(self) -> None:
        if not self.group_id:
            return
        with store.session(self.engine, write=False) as s:
            row = queries.servers.server(s, self.server_id)
            reason = row.phase_reason
            self.screen.phase = f"{row.phase or 'starting'} - {reason}" if reason else row.phase
            self.screen.versions = [
                self._row(s, version, served, version.id == row.live_version_id)
                for version, served in self._versions(s)
            ]

    def _versions(self, s: Any) -> list[tuple[Any, queries.accept_lengths.AcceptLength | None]]:
        """Every version of the group, and what it reached on the served requests."""
        served = {
            one.version_id: one
            for one in queries.accept_lengths.accept_length_by_version(s, self.group_id)
        }
        return [(one, served.get(one.id)) for one in queries.versions.versions(s, self.group_id)]

    def _row(self, s: Any, version: Any, served: Any, live: bool) -> VersionRow:
        origin = version.source if version.parent_id is None else f"version {version.parent_id}"
        evaluations = queries.evaluations.evaluations(s, version.id)
        row = VersionRow(version.id, origin, live=live)
        if evaluations:
            row.replayed = number(evaluations[-1].candidate_accept_length)
            row.verdict = evaluations[-1].verdict
        if served is not None:
            row.served = served.requests
            row.accept_length = number(served.accept_length)
        return row

    # -- the end -----------------------------------------------------------------------------

    def end(self) -> None:
        """Stop everything that was started."""
        if self.dashboard is not None:
            self.dashboard.stop()
        self.trainer.stop()
        self.server.stop()

    def summary(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        with store.session(self.engine, write=False) as s:
            row = queries.servers.server(s, self.server_id)
            versions = [self._version(s, version, served) for version, served in self._versions(s)]
            live_version, live_sha256 = row.live_version_id, row.live_sha256
            phase, counters = row.phase, dict(row.counters or {})
            events = queries.events.count_events(s, self.server_id)
            dropped = sum(queries.drops.drops(s, self.group_id).values())
        return {
            "requests": len(self.sent),
            "failed_requests": self.failed + self.held_out.failed,
            "events": events,
            "versions": versions,
            "live_version": live_version,
            "live_sha256": live_sha256,
            "accept_length": self.held_out.accept_length("first", "last"),
            "tokens_per_second": self.held_out.tokens_per_second(),
            "phase": phase,
            "break_even": rounded(StepCost.of(counters).break_even),
            "dropped_records": dropped,
        }

    def _version(self, s: Any, version: Any, served: Any) -> dict[str, Any]:
        evaluations = queries.evaluations.evaluations(s, version.id)
        replayed = evaluations[-1].candidate_accept_length if evaluations else None
        measured = served.accept_length if served is not None else None
        return {
            "id": version.id,
            "parent": version.parent_id,
            "source": version.source,
            "weights_sha256": version.weights_sha256,
            "accept_length": rounded(measured if measured is not None else replayed),
            "accept_length_replayed": rounded(replayed),
            "accept_length_served": rounded(measured),
            "verdict": evaluations[-1].verdict if evaluations else None,
        }
