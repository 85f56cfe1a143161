"""People are told each thing once: through restarts, outages of the receiver and of the store."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from sqlalchemy import Engine, text

from aurora_sgl import rollout, store
from aurora_sgl.clock import utc_now
from aurora_sgl.config import NotifySettings, SchedulerSettings
from aurora_sgl.errors import AuroraError
from aurora_sgl.rollout import alerts, status
from aurora_sgl.rollout.switches import turn
from aurora_sgl.scheduler import courier, notifications
from aurora_sgl.scheduler.api import ApiServer
from aurora_sgl.scheduler.courier import Courier
from aurora_sgl.store import queries
from aurora_sgl.store.link import StoreLink
from tests.support.rollout_house import RolloutHouse
from tests.support.sidecar_engine import wait_until
from tests.support.webhook import WebhookReceiver

SECRET = "whsec_" + base64.b64encode(b"k" * 24).decode()
TOKEN = "a token that nobody guesses"

#: Where the database makes no difference to what is tried.
ON_SQLITE = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)


@pytest.fixture
def receiver() -> Iterator[WebhookReceiver]:
    one = WebhookReceiver()
    yield one
    one.close()


class Process:
    """``aurora-sgl scheduler`` with a webhook."""

    def __init__(self, home: Path, receiver: WebhookReceiver, **more: str) -> None:
        self.log = home / "scheduler.log"
        environment = {
            "AURORA_SCHEDULER_LEASE_SECONDS": "3", "AURORA_SCHEDULER_MINUTES": "0",
            "AURORA_SCHEDULER_REQUESTS": "0", "AURORA_SCHEDULER_PORT": "0",
            "AURORA_NOTIFY_WEBHOOK": receiver.url, "AURORA_NOTIFY_SECRET": SECRET,
            "AURORA_NOTIFY_LINK": "https://aurora.example/", **more,
        }  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "aurora_sgl.cli", "scheduler"],
                stdout=log, stderr=log, env={**os.environ, **environment},
            )  # fmt: skip

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(40)


def everything_happens(house: RolloutHouse) -> dict[str, int]:
    """Of each kind that people must know one event, and all verdicts; what is to be told of it."""
    with store.session(house.engine) as s:
        add = queries.evaluations.add_evaluation
        for verdict in ("pass", "fail", "inconclusive"):
            add(s, candidate_id=house.b, baseline_id=house.a, kind="replay", requests=40,
                candidate_accept_length=2.4, baseline_accept_length=2.2, verdict=verdict,
                details={"reason": "because"})  # fmt: skip
            add(s, candidate_id=house.b, baseline_id=house.a, kind="replay", requests=40,
                domain="chat", verdict=verdict)  # fmt: skip
        run = queries.runs.start_run(
            s, house.group_id, trigger="requests", base_version_id=house.a, objective="forward_kl",
            config={},
        )  # fmt: skip
        queries.runs.finish_run(s, run.id, "failed", error="the disk is full")
        queries.drifts.add_drift(
            s, house.group_id, version_id=house.a, domain="chat", last_request_id=1,
            accept_length_before=2.1, accept_length_after=1.4, requests_before=50,
            requests_after=50, details={},
        )  # fmt: skip
    rollout.promote(house.engine, house.b, actor="scheduler", reason="it passed", force=True)
    with store.session(house.engine) as s:
        watch = queries.watches.running_watch(s, house.group_id)
        assert watch is not None
        queries.watches.end_watch(s, watch, "failed", "accept length 1.2 where 2.1 was expected")
    rollout.rollback(house.engine, "default", actor="watch", reason="the watch failed")
    turn(house.engine, "default", "auto_promote", False, actor="eve", reason="holidays")
    with store.session(house.engine) as s:
        for place, count in (("spool", 5), ("engine", 7), ("trace", 3)):
            queries.drops.set_drops(s, house.server_id, place, count)
        queries.servers.touch_server(
            s, house.server_id, last_seen_at=utc_now() - timedelta(minutes=2)
        )
    return {
        "verdict": 3, "training_failed": 1, "drift": 1, "promotion": 1, "watch_failed": 1,
        "rollback": 1, "switch_off/began": 1, "records_lost/began": 1, "traces_lost/began": 1,
        "server_silent/began": 1,
    }  # fmt: skip


def value(engine: Engine, query: str) -> object:
    """What a query of one value says now: a transaction of its own."""
    with engine.connect() as connection:
        return connection.execute(text(query)).scalar_one()


def settled(house: RolloutHouse) -> bool:
    """Everything that was written is delivered."""
    with store.session(house.engine, write=False) as s:
        counts = queries.notifications.count_deliveries(s, house.group_id)
    return bool(counts) and set(counts) == {("webhook", "delivered")}


def test_each_kind_comes_once_through_a_restart_and_an_outage_of_the_receiver(
    home: Path, engine: Engine, receiver: WebhookReceiver
) -> None:
    house = RolloutHouse(engine)
    before = Process(home, receiver)
    try:
        wait_until(lambda: "leads group" in before.log.read_text(), 40, "a leader")
        begins = "SELECT count(*) FROM notification_start"
        wait_until(lambda: value(engine, begins) == 1, 20, "the first look")
        receiver.close()
        expected = everything_happens(house)
        wait_until(lambda: "does not reach webhook" in before.log.read_text(), 20, "a failure")
        assert receiver.url not in before.log.read_text()
    finally:
        assert before.end(signal.SIGKILL) == -signal.SIGKILL
    receiver.answer = 503
    receiver.open()
    after = Process(home, receiver)
    try:
        wait_until(lambda: receiver.tries >= 1, 60, "a try at a receiver with trouble")
        assert not receiver.taken
        receiver.answer = 200
        wait_until(lambda: settled(house), 60, "all delivered")
        mine = {k: n for k, n in receiver.kinds().items() if k in expected}
        assert mine == expected
        turn(engine, "default", "auto_promote", True, actor="eve", reason="back")
        with engine.begin() as c:  # over for a minute
            c.execute(
                text("UPDATE alert SET seen_at = :then WHERE kind = 'switch_off'"),
                {"then": utc_now() - timedelta(seconds=70)},
            )
        wait_until(lambda: receiver.kinds()["switch_off/ended"] == 1, 30, "its end")
    finally:
        assert after.end() == 0
    again = Process(home, receiver)
    try:
        wait_until(lambda: again.log.read_text().count("leads group") == 3, 40, "a third leader")
        newest = "SELECT max(seen_at) FROM alert"
        first = value(engine, newest)
        wait_until(lambda: value(engine, newest) != first, 30, "a look of its own")
        assert {k: n for k, n in receiver.kinds().items() if k in expected} == expected
        assert len(receiver.taken) == len({one["data"]["id"] for one in receiver.letters()})
    finally:
        assert again.end() == 0
    for headers, body in receiver.taken:
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        digest = hmac.new(b"k" * 24, signed, hashlib.sha256).digest()
        assert headers["webhook-signature"] == f"v1,{base64.b64encode(digest).decode()}"
        assert json.loads(body)["data"]["link"] == "https://aurora.example/"


@pytest.fixture
def link(engine: Engine) -> Iterator[StoreLink]:
    one = StoreLink(engine.url.render_as_string(hide_password=False), "it waits")
    yield one
    one.close()


class Time:
    def __init__(self) -> None:
        self.now = utc_now()

    def __call__(self):  # type: ignore[no-untyped-def]
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def settings(**values: object) -> NotifySettings:
    return NotifySettings.model_validate({"webhook": "", "slack": "", **values})


def send_all(one: Courier, house: RolloutHouse, clock: Time, rounds: int = 30) -> None:
    for _ in range(rounds):
        one.round(house.group_id)
        clock.pass_(1)


def test_what_was_before_anybody_looked_is_not_told_and_kinds_narrow_what_is_sent(
    engine: Engine, receiver: WebhookReceiver, link: StoreLink
) -> None:
    house = RolloutHouse(engine)
    everything_happens(house)
    chosen = settings(webhook=receiver.url, kinds="rollback, watch_failed")
    notifications.look(engine, "default", chosen)
    clock = Time()
    one = Courier(link, "default", chosen, now=clock)
    send_all(one, house, clock)
    assert not receiver.taken  # alerts that are on now were written, and are of other kinds
    turn(engine, "default", "auto_promote", True, actor="eve", reason="back")
    everything_happens(house)
    notifications.look(engine, "default", chosen)
    clock.pass_(5)
    send_all(one, house, clock)
    assert receiver.kinds() == {"rollback": 1, "watch_failed": 1}
    with store.session(engine, write=False) as s:
        rows = queries.notifications.notifications(s, house.group_id)
    assert {"verdict", "drift"} <= {row.kind for row, _ in rows}  # written, for those who ask


def test_a_receiver_in_trouble_is_left_alone_longer_each_time_and_nothing_overtakes(
    engine: Engine, receiver: WebhookReceiver, link: StoreLink
) -> None:
    house, clock = RolloutHouse(engine), Time()
    chosen = settings(webhook=receiver.url)
    notifications.look(engine, "default", chosen)
    everything_happens(house)
    notifications.look(engine, "default", chosen)
    clock.pass_(5)
    receiver.answer = 500
    one = Courier(link, "default", chosen, now=clock)
    tries = []
    for second in range(160):
        before = receiver.tries
        one.round(house.group_id)
        tries += [second] * (receiver.tries - before)
        clock.pass_(1)
    assert tries == [0, 5, 15, 35, 75, 155]
    receiver.answer, receiver.headers = 429, {"Retry-After": "1000"}
    clock.pass_(160)
    one.round(house.group_id)
    before = receiver.tries
    clock.pass_(900)
    one.round(house.group_id)
    assert receiver.tries == before  # it asked for a thousand seconds
    clock.pass_(101)
    receiver.answer, receiver.headers = 200, {}
    send_all(one, house, clock)
    ids = [int(one["data"].get("details", {}).get("generation", 0)) for one in receiver.letters()]
    assert sorted(filter(None, ids)) == list(filter(None, ids)) and settled(house)


@pytest.mark.parametrize("answer", [400, 410])
def test_one_that_is_refused_does_not_hold_up_the_others_and_is_given_up_in_the_end(
    engine: Engine, receiver: WebhookReceiver, link: StoreLink, answer: int
) -> None:
    house, clock = RolloutHouse(engine), Time()
    chosen = settings(webhook=receiver.url, give_up_hours=1)
    notifications.look(engine, "default", chosen)
    everything_happens(house)
    notifications.look(engine, "default", chosen)
    clock.pass_(5)
    receiver.answer = answer
    one = Courier(link, "default", chosen, now=clock)
    one.round(house.group_id)
    tried = receiver.tries
    assert tried >= 9  # all that wait, once each
    receiver.answer = 200
    clock.pass_(1)
    one.round(house.group_id)
    assert receiver.tries == tried
    receiver.answer = answer
    clock.pass_(4000)
    one.round(house.group_id)
    with store.session(engine, write=False) as s:
        counts = queries.notifications.count_deliveries(s, house.group_id)
        rows = queries.notifications.notifications(s, house.group_id)
    assert set(counts) == {("webhook", "given_up")}
    assert {each.error for _, sent in rows for each in sent} == {f"it answered {answer}"}


def test_notifications_that_do_not_arrive_are_an_alert_and_slack_still_gets_it(
    engine: Engine, receiver: WebhookReceiver, link: StoreLink
) -> None:
    house, clock, slack = RolloutHouse(engine), Time(), WebhookReceiver()
    receiver.answer = 500
    chosen = settings(webhook=receiver.url, slack=slack.url)
    notifications.look(engine, "default", chosen)
    everything_happens(house)
    notifications.look(engine, "default", chosen)
    clock.pass_(5)
    one = Courier(link, "default", chosen, now=clock)
    send_all(one, house, clock, 10)
    with engine.begin() as c:
        c.execute(text("UPDATE notification SET created_at = :then"),
                  {"then": utc_now() - timedelta(minutes=5)})  # fmt: skip
    problems = alerts.alerts(engine, status.look(engine, "default"))
    late = next(each for each in problems if each.kind == "notifications_late")
    assert "webhook" in late.text and "it answered 500" in late.text
    notifications.look(engine, "default", chosen)
    clock.pass_(20)
    send_all(one, house, clock, 10)
    texts = [each["text"] for each in slack.letters()]
    assert any("notifications do not reach their receiver" in each.lower() for each in texts)
    slack.close()


def test_what_waits_for_a_receiver_that_was_taken_out_of_the_settings_is_given_up(
    engine: Engine, receiver: WebhookReceiver, link: StoreLink
) -> None:
    house = RolloutHouse(engine)
    chosen = settings(webhook=receiver.url, slack=receiver.url)
    notifications.look(engine, "default", chosen)
    everything_happens(house)
    with store.session(engine) as s:
        run = queries.runs.start_run(
            s, house.group_id, trigger="requests", base_version_id=house.a, objective="forward_kl",
            config={},
        )  # fmt: skip
        queries.runs.finish_run(s, run.id, "failed", error="x" * 100_000)
    notifications.look(engine, "default", chosen)
    notifications.look(engine, "default", settings(slack=receiver.url))
    with store.session(engine, write=False) as s:
        counts = queries.notifications.count_deliveries(s, house.group_id)
        rows = queries.notifications.notifications(s, house.group_id)
    assert set(counts) == {("webhook", "given_up"), ("slack", "waiting")}
    assert max(len(row.text) for row, _ in rows) == 2000


def test_text_of_clients_mentions_nobody_in_slack_and_is_json_for_the_webhook(
    engine: Engine, receiver: WebhookReceiver, link: StoreLink
) -> None:
    house, clock, slack = RolloutHouse(engine), Time(), WebhookReceiver()
    chosen = settings(webhook=receiver.url, slack=slack.url, kinds="drift")
    notifications.look(engine, "default", chosen)
    hostile = '<!channel> <https://x|y> *b* `c` & "\u202e\n\x1b[31m'
    with store.session(engine) as s:
        queries.drifts.add_drift(
            s, house.group_id, version_id=house.a, domain=hostile, last_request_id=1,
            accept_length_before=2.1, accept_length_after=1.4, requests_before=50,
            requests_after=50, details={},
        )  # fmt: skip
    notifications.look(engine, "default", chosen)
    clock.pass_(5)
    one = Courier(link, "default", chosen, now=clock)
    send_all(one, house, clock, 3)
    assert receiver.letters()[0]["data"]["details"]["domain"] == hostile
    told = slack.letters()[0]["text"]
    assert "<" not in told and "&lt;!channel&gt;" in told and "\x1b" not in told
    assert told.count("*") == 2 and "`" not in told
    slack.close()


def test_an_alert_has_a_history_is_taken_by_name_and_ends(engine: Engine) -> None:
    RolloutHouse(engine)
    chosen = settings()
    turn(engine, "default", "learning", False, actor="eve", reason="audit")
    moment = utc_now()
    notifications.look(engine, "default", chosen, moment)

    def rows() -> list[tuple[str, bool]]:
        every = alerts.history(engine, "default")
        return [(row.kind, row.ended_at is None) for row in every if row.kind == "switch_off"]

    assert rows() == [("switch_off", True)]
    taken = alerts.history(engine, "default")[0].id
    number = next(r.id for r in alerts.history(engine, "default") if r.kind == "switch_off")
    alerts.acknowledge(engine, "default", number, actor="bob", note="the audit ends on Friday")
    (entry,) = [row for row in status.audit(engine, "default") if row.action == "acknowledge"]
    assert (entry.actor, entry.subject) == ("bob", f"alert {number}")
    assert (entry.reason, entry.after["kind"]) == ("the audit ends on Friday", "switch_off")
    with pytest.raises(AuroraError, match="was acknowledged by bob"):
        alerts.acknowledge(engine, "default", number, actor="eve")
    with pytest.raises(AuroraError, match="there is no alert"):
        alerts.acknowledge(engine, "default", taken + 1000, actor="eve")
    with pytest.raises(AuroraError, match="needs a name"):
        alerts.acknowledge(engine, "default", number, actor="  ")
    turn(engine, "default", "learning", True, actor="eve", reason="done")
    for after in (10, 50):  # one that comes back within a minute is the same
        notifications.look(engine, "default", chosen, moment + timedelta(seconds=after))
        assert rows() == [("switch_off", True)]
    notifications.look(engine, "default", chosen, moment + timedelta(seconds=61))
    assert rows() == [("switch_off", False)]
    turn(engine, "default", "learning", False, actor="eve", reason="again")
    notifications.look(engine, "default", chosen, moment + timedelta(seconds=70))
    assert rows() == [("switch_off", True), ("switch_off", False)]
    row = next(r for r in alerts.history(engine, "default") if r.id == number)
    assert (row.acknowledged_by, row.acknowledgement) == ("bob", "the audit ends on Friday")


def test_old_ones_are_forgotten_and_open_alerts_stay(engine: Engine) -> None:
    house = RolloutHouse(engine)
    chosen = settings(keep_days=1)
    notifications.look(engine, "default", chosen)
    everything_happens(house)
    notifications.look(engine, "default", chosen)
    before = len(alerts.history(engine, "default"))
    assert notifications.forget(engine, "default", chosen) == 0
    with engine.begin() as c:
        then = {"then": utc_now() - timedelta(days=3)}
        c.execute(text("UPDATE notification SET created_at = :then"), then)
        c.execute(text("UPDATE alert SET ended_at = :then WHERE kind = 'switch_off'"), then)
    assert notifications.forget(engine, "default", chosen) > 5
    assert len(alerts.history(engine, "default")) == before - 1


def test_a_wrong_secret_kind_or_address_is_one_line(link: StoreLink) -> None:
    with pytest.raises(AuroraError, match="no base64"):
        Courier(link, "default", settings(secret="whsec_#"))
    with pytest.raises(AuroraError, match="there is no kind 'rolback'"):
        notifications.kinds(settings(kinds="rolback"))
    with pytest.raises(ValueError, match="begins with http"):
        settings(webhook="ftp://x")
    with pytest.raises(AuroraError, match="no receiver is set"):
        courier.try_receivers(settings(), group="default", actor="x")


def test_notify_test_says_for_each_receiver_whether_it_arrived(receiver: WebhookReceiver) -> None:
    slack = WebhookReceiver()
    slack.answer = 404
    chosen = settings(webhook=receiver.url, slack=slack.url)
    outcomes = courier.try_receivers(chosen, group="default", actor="bob@laptop")
    assert outcomes["webhook"].delivered and not outcomes["slack"].delivered
    assert outcomes["slack"].error == "it answered 404"
    assert receiver.kinds() == {"test": 1} and "bob@laptop" in receiver.letters()[0]["data"]["text"]
    slack.close()


@contextmanager
def api_of_a_scheduler(home: Path, receiver: WebhookReceiver) -> Iterator[str]:
    """Its address."""
    process = Process(
        home, receiver, AURORA_SCHEDULER_API_TOKEN=TOKEN, AURORA_SCHEDULER_API_PORT="0"
    )
    try:
        wait_until(lambda: "read-only API at" in process.log.read_text(), 60, "the API")
        line = next(x for x in process.log.read_text().splitlines() if "read-only API" in x)
        yield line.split()[-1]
    finally:
        assert process.end() == 0


@contextmanager
def api_of_its_own(link: StoreLink) -> Iterator[str]:
    """The same server without a scheduler around it, whose start takes seconds of a processor: a
    scheduler's other part in its answers is that it looks for alerts."""
    notifications.look(link.engine(), "default", settings())
    rules = SchedulerSettings.model_validate({"api_token": TOKEN, "api_port": 0})
    server = ApiServer(link, "default", rules)
    server.start()
    try:
        yield server.url
    finally:
        server.stop()


def test_the_api_answers_what_is_live_with_its_token_only(
    home: Path, engine: Engine, link: StoreLink, receiver: WebhookReceiver
) -> None:
    house = RolloutHouse(engine)
    everything_happens(house)
    by_process = engine.dialect.name == "sqlite"
    api = api_of_a_scheduler(home, receiver) if by_process else api_of_its_own(link)
    with api as url:
        with httpx.Client(base_url=url, timeout=20) as anybody:
            for header in ({}, {"Authorization": "Bearer x"}, {"Authorization": f"Basic {TOKEN}"}):
                answer = anybody.get("/api/v1/live", headers=header)
                assert answer.status_code == 401 and TOKEN not in answer.text
            described = anybody.get("/openapi.json").json()["paths"]
        key = {"Authorization": f"Bearer {TOKEN}"}
        with httpx.Client(base_url=url, headers=key, timeout=20) as ours:
            for path in described:
                assert ours.get(path).status_code == 200, path
                assert ours.post(path).status_code == 405
            live = ours.get("/api/v1/live").json()
            assert (live["version_id"], live["previous_version_id"]) == (house.a, None)
            assert live["weights_sha256"] == "a" * 64
            assert [one["live_version_id"] for one in live["servers"]] == [house.a]
            verdicts = ours.get("/api/v1/verdicts?limit=2").json()
            assert [one["verdict"] for one in verdicts] == ["inconclusive", "fail"]
            assert ours.get("/api/v1/verdicts?limit=0").status_code == 422
            first = ours.get("/api/v1/deployments").json()[0]
            assert (first["action"], first["actor"]) == ("rollback", "watch")
            (run,) = ours.get("/api/v1/runs").json()
            assert (run["error"], run["progress"]) == ("the disk is full", None)
            kinds = lambda: {one["kind"] for one in ours.get("/api/v1/alerts").json()}  # noqa: E731
            wait_until(lambda: {"switch_off", "training_failed"} <= kinds(), 30, "alerts")
            with store.session(engine) as s:  # the newest run has not failed then
                word = {"stage": "gate", "done": 3, "total": 9, "curves": {"loss": [[1, 2.0]]}}
                row = queries.runs.start_run(s, house.group_id, trigger="drift")
                queries.runs.note_progress(s, row.id, word)
            assert ours.get("/api/v1/runs?limit=1").json()[0]["progress"] == {
                "stage": "gate", "done": 3, "total": 9, "seconds_left": None,
                "stage_seconds_left": None, "updated_at": None,
            }  # fmt: skip
            assert ours.get("/api/v1/scheduler").json()["auto_promote"] is False


@ON_SQLITE
def test_a_token_that_would_be_guessed_ends_the_scheduler_with_one_line(
    home: Path, engine: Engine, receiver: WebhookReceiver
) -> None:
    process = Process(home, receiver, AURORA_SCHEDULER_API_TOKEN="short")
    assert process.process.wait(60) == 1
    assert "needs at least 16" in process.log.read_text()
    assert "Traceback" not in process.log.read_text()
