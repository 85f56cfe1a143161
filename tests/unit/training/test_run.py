"""A training run from the store to the store, on a real database and real files."""

from __future__ import annotations

import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sqlalchemy import Engine, select

from aurora_sgl import rollout, store, wire
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.clock import utc_now
from aurora_sgl.config import get_settings
from aurora_sgl.drafter import checkpoint, scratch
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.evaluation.compare import replay_versions
from aurora_sgl.hashing import sha256_ints
from aurora_sgl.rollout.promote import promote
from aurora_sgl.rollout.versions import import_version
from aurora_sgl.scheduler import metrics
from aurora_sgl.sequences.held_out import held_out_counts
from aurora_sgl.store import connection, queries
from aurora_sgl.store.models import Evaluation, Request, TrainingRequest, TrainingRun
from aurora_sgl.store.pruning.kept import RESERVOIR
from aurora_sgl.store.purge import Selector, begin_purge
from aurora_sgl.training import run_data, selection
from aurora_sgl.training.bases import BaseIds, base_ids, base_ratio
from aurora_sgl.training.recipe_bandit import ARMS
from aurora_sgl.training.run import train_once
from aurora_sgl.training.settings import TrainSettings
from tests.support.drafter_cases import target_folder
from tests.unit.training.test_trainer import RECIPE, requests

SETTINGS = TrainSettings(**{**RECIPE, "gate_share": 0.3})
BRIEF = SETTINGS.model_copy(update={"passes": 1})  # where what is learnt is not the matter


@dataclass
class House:
    home: Path
    engine: Engine
    artifacts: ArtifactRoot
    target: Path
    live: int
    rule_of: Callable[[int], str] = lambda number: "greedy"

    def serve(self, count: int, first: int = 0) -> None:
        """Requests as the sidecar would have stored them, with their trace files."""
        head = TargetHead.load(self.target)
        with store.session(self.engine) as s:
            group = queries.groups.group_by_name(s, "default")
            hello = wire.Hello(7, 1, {"name": "tiny"}, 0, 0, 0, {})
            server = queries.servers.register_server(s, group.id, hello)
            for sequence in requests(head, count)[first:]:
                self._store(s, server.id, sequence)

    def _store(self, s: Any, server_id: int, sequence: Any) -> None:
        number = wire.request_id(7, sequence.request_id + 1)
        rule = self.rule_of(sequence.request_id)
        uri = f"traces/20260101/{number}.safetensors"
        path = self.artifacts.local_path(uri)
        assert path is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {
                "tokens": sequence.tokens,
                "aux": sequence.features.contiguous(),
                "last": sequence.last.contiguous(),
                "step_starts": torch.zeros(0, dtype=torch.int64),
            },
            str(path),
            metadata={"request_id": str(number), "output_start": "6", "greedy": "1"},
        )
        tokens = sequence.tokens.tolist()
        s.add(
            Request(
                id=number,
                server_id=server_id,
                admitted_at=utc_now(),
                finished_at=utc_now(),
                status="finished",
                domain=sequence.domain,
                prompt_tokens=6,
                may_train=True,
                completion_tokens=18,
                conversation_hash=f"c{sequence.request_id}",
                sampling={},
                accept_rule=rule,
            )
        )
        s.flush()
        queries.traces.add_trace(
            s,
            request_id=number,
            uri=uri,
            bytes=path.stat().st_size,
            sha256="",
            start=0,
            end=23,
            output_start=6,
            prompt_sha256=sha256_ints(tokens[:6]),
            head_sha256=sha256_ints(tokens[:16]),
            greedy=rule == "greedy",
            aux_width=48,
            last_width=16,
            dtype="float32",
        )

    def runs(self) -> list[TrainingRun]:
        with store.session(self.engine, write=False) as s:
            return list(s.scalars(select(TrainingRun).order_by(TrainingRun.id)))


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upgraded_sqlite: Path) -> House:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    shutil.copy(upgraded_sqlite, home / "aurora.db")
    monkeypatch.setenv("AURORA_HOME", str(home))
    get_settings.cache_clear()
    engine = store.connect(f"sqlite:///{home / 'aurora.db'}")
    target = target_folder(tmp_path / "target")
    artifacts = ArtifactRoot(str(home / "artifacts"))
    drafter = scratch.make(target, draft_vocab_size=40, seed=1, model=str(target))
    folder = checkpoint.save(drafter, tmp_path / "scratch")
    with store.session(engine) as s:
        queries.groups.ensure_group(s, "default", str(target), "", drafter.config.architecture)
    version = import_version(engine, artifacts, folder, "default", source="scratch")
    promote(engine, version.id, actor="test", reason="first")
    yield House(home, engine, artifacts, target, version.id)
    get_settings.cache_clear()


def test_a_run_makes_a_version_and_an_evaluation_against_the_live_one(house: House) -> None:
    house.serve(60)
    seen: list[dict[str, Any]] = []
    outcome = train_once(
        house.engine, house.artifacts, "default", SETTINGS, trigger="test", progress=seen.append
    )
    assert (outcome.status, outcome.verdict, outcome.error) == ("succeeded", "pass", "")
    assert {event["event"] for event in seen} == {
        "window", "update", "line_search", "gate", "storing",
    }  # fmt: skip
    (run,) = house.runs()
    assert run.progress == {}, "what it came to says more"
    took = run.metrics["stage_seconds"]
    assert set(took) == {"reading", "training", "choosing", "gate", "storing"}
    gate = [event["done"] for event in seen if event["event"] == "gate"]
    assert gate == [*range(len(gate))] and gate[-1] == run.metrics["gate_requests"]
    assert run.status == "succeeded" and run.base_version_id == house.live
    assert run.requests > 20 and run.tokens > 0 and run.window_start is not None
    assert outcome.version_id is not None
    with store.session(house.engine, write=False) as s:
        version = queries.versions.version(s, outcome.version_id)
        evaluation = s.get(Evaluation, outcome.evaluation_id)
        live = queries.aliases.desired_version(s, version.group_id)
    assert live is not None and live[0] == house.live, "a run promotes nothing"
    assert (version.parent_id, version.training_run_id) == (house.live, run.id)
    assert version.source == "train"
    assert evaluation is not None and evaluation.baseline_id == house.live
    # Sixty requests of so small a vocabulary ask for the same more than once.
    parts = (evaluation.requests, run.requests, outcome.metrics["dev_requests"],
             outcome.metrics["left_out"]["duplicate"])  # fmt: skip
    assert sum(parts) == 60 and all(parts)
    assert evaluation.ci_low > 0 and evaluation.candidate_accept_length > 1.5
    folder = house.artifacts.local_path(version.weights_uri)
    assert folder is not None and checkpoint.validate(folder) == []
    assert list((house.home / "training").iterdir()) == [], "the work folder is gone"


def test_an_evaluation_names_no_conversation_as_the_store_does(house: House) -> None:
    """Viewers read evaluations, and no hash of a conversation."""
    house.serve(30)
    outcome = train_once(house.engine, house.artifacts, "default", BRIEF, trigger="manual")
    with store.session(house.engine, write=False) as s:
        row = queries.evaluations.evaluation(s, int(outcome.evaluation_id or 0))
        hashes = set(s.scalars(select(Request.conversation_hash)))
    names = {request[7] for request in row.details["requests"]}
    assert len(names) == len(row.details["requests"]) and "" not in names
    assert not names & hashes


def test_sampled_requests_are_judged_as_greedy_ones_are(house: House) -> None:
    house.rule_of = lambda number: "target_sampling"
    house.serve(60)
    outcome = train_once(house.engine, house.artifacts, "default", SETTINGS, trigger="test")
    assert (outcome.status, outcome.verdict) == ("succeeded", "pass"), outcome.reason
    with store.session(house.engine, write=False) as s:
        evaluation = s.get_one(Evaluation, outcome.evaluation_id)
        counts = held_out_counts(s, 1, gate_share=SETTINGS.gate_share)
        series = metrics.of_group(s, 1, SETTINGS.gate_share)
    assert evaluation.requests >= 8
    left = outcome.metrics["gate_left_out"]  # of so small a vocabulary: near-duplicates
    assert set(left) <= {"duplicate"}
    assert evaluation.details["judged"] == {"requests": evaluation.requests, "left_out": left}
    assert counts.judged >= evaluation.requests and counts.left_out == {}
    assert f"{counts.judged} sampled" in counts.sentence
    by_rule = [one for one in series if one.name == "aurora_held_out_judged"]
    assert {dict(one.labels)["rule"]: one.value for one in by_rule} == {
        "greedy": 0, "target_sampling": counts.judged, "rejection_sampling": 0,
    }  # fmt: skip
    assert rollout.status.last_verdict(house.engine, "default").reason == outcome.reason
    lines = replay_versions(
        house.engine, house.artifacts, rollout_group(house), [house.live, outcome.version_id],
        SETTINGS, limit=50,
    )  # fmt: skip
    assert lines[-1].requests and lines[-1].ci_low > 0


@pytest.mark.parametrize("rule", ["block_verification", "", "mixed"])
def test_what_replay_does_not_cover_is_left_out_counted_and_said(house: House, rule: str) -> None:
    house.rule_of = lambda number: rule
    house.serve(60)
    outcome = train_once(house.engine, house.artifacts, "default", BRIEF, trigger="test")
    assert (outcome.status, outcome.verdict) == ("succeeded", "inconclusive")
    reason = {"": "unknown_rule", "mixed": "mixed_rules"}.get(rule, rule)
    left = outcome.metrics["gate_left_out"]
    assert left[reason] > 8 and outcome.metrics["gate_requests"] == 0
    assert outcome.reason.startswith("0 held-out requests can be judged, at least 4 needed (")
    assert f"{left[reason]} " in outcome.reason and "left out" in outcome.reason
    with store.session(house.engine, write=False) as s:
        counts = held_out_counts(s, 1, gate_share=SETTINGS.gate_share)
        assert s.get_one(Evaluation, outcome.evaluation_id).details["judged"]["left_out"] == left
    assert counts.judged == 0 and counts.left_out[reason] == left[reason]
    assert counts.sentence.startswith("0 held-out requests can be judged (")


def test_what_can_be_judged_is_chosen_before_the_newest_are_cut(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_data, "HELD_OUT", 5)
    house.rule_of = lambda number: "block_verification" if number >= 40 else "target_sampling"
    house.serve(60)  # the newest twenty can't be judged
    outcome = train_once(house.engine, house.artifacts, "default", BRIEF, trigger="test")
    assert outcome.metrics["gate_requests"] == 5, outcome.reason
    assert outcome.metrics["gate_left_out"]["block_verification"] >= 2


def test_the_gate_judges_on_what_was_served_while_the_run_trained(house: House) -> None:
    """But on no prompt that the run has learnt from meanwhile, whichever side that should be on."""
    house.serve(30)
    told: list[dict[str, Any]] = []
    counts: dict[str, int] = {}

    def once(event: dict[str, Any]) -> None:
        if event["event"] == "update" and not told:
            told.append(event)
            house.serve(90, first=30)
        elif event["event"] in ("window", "gate"):
            counts[event["event"]] = (
                event["gate"] if event["event"] == "window" else event["requests"]
            )

    outcome = train_once(
        house.engine, house.artifacts, "default", BRIEF, trigger="test", progress=once
    )
    assert counts["gate"] > counts["window"]
    with store.session(house.engine, write=False) as s:
        judged = s.get_one(Evaluation, outcome.evaluation_id).details["requests"]
        learnt = set(s.scalars(select(TrainingRequest.request_id)))
    assert len(judged) == outcome.metrics["gate_requests"] == counts["gate"]
    late = {wire.request_id(7, n + 1) for n in range(30, 90)}
    assert {row[0] for row in judged} & late and not learnt & late
    served = requests(TargetHead.load(house.target), 90)
    prompt = {wire.request_id(7, n + 1): one.tokens[:6].tolist() for n, one in enumerate(served)}
    trained = [prompt[number] for number in learnt]
    assert [row[0] for row in judged if prompt[row[0]] in trained] == []
    assert sum(prompt[n] in trained for n in late) > 10, "many of them repeat one"


def test_rows_that_several_prompts_begin_with_are_trained_on_once(house: House) -> None:
    house.serve(60)  # of so small a vocabulary: many have one prompt
    tokens = {}
    for repeat in (True, False):
        settings = BRIEF.model_copy(update={"repeat_prefixes": repeat})
        outcome = train_once(house.engine, house.artifacts, "default", settings, trigger="test")
        assert outcome.status == "succeeded"
        run = house.runs()[-1]
        tokens[repeat] = run.tokens
        rows = 22 * run.requests  # each has 24 tokens, 6 of them a prompt
        assert tokens[repeat] == rows if repeat else rows * 17 / 22 < tokens[repeat] < rows
    assert tokens[False] < tokens[True]


def rollout_group(house: House) -> Any:
    with store.session(house.engine, write=False) as s:
        return queries.groups.group_by_name(s, "default")


def test_the_peak_rate_falls_with_what_the_lineage_was_trained_on(house: House) -> None:
    house.serve(40)
    first = train_once(house.engine, house.artifacts, "default", BRIEF, trigger="test")
    promote(house.engine, first.version_id, actor="test", reason="better")
    second = train_once(house.engine, house.artifacts, "default", BRIEF, trigger="test")
    assert first.metrics["base_trained_tokens"] == 0
    assert first.metrics["peak_rate"] == SETTINGS.learning_rate
    (run_1, _) = house.runs()
    assert second.metrics["base_trained_tokens"] == run_1.tokens > 0
    elsewhere = scratch.make(house.target, draft_vocab_size=40, seed=9, model=str(house.target))
    folder = checkpoint.save(elsewhere, house.home / "elsewhere")
    brought = import_version(house.engine, house.artifacts, folder, "default", source="import")
    third = train_once(
        house.engine, house.artifacts, "default", BRIEF, trigger="test",
        base_version_id=brought.id,
    )  # fmt: skip
    assert third.metrics["base_trained_tokens"] is None
    assert third.metrics["peak_rate"] == SETTINGS.mature_learning_rate


def test_what_a_run_earned_is_logged_and_decides_on_the_next_ones_recipe(house: House) -> None:
    house.serve(40)
    free = TrainSettings(
        **{k: v for k, v in RECIPE.items() if k != "passes"}, gate_share=0.3, explore=1.0
    )
    first = train_once(house.engine, house.artifacts, "default", free, trigger="requests")
    assert first.metrics["reward"] == pytest.approx(first.metrics["gain"], abs=0.1)
    knob, level = first.metrics["explored"].split(": ")
    assert first.metrics["arms"] == {knob: level}
    changed = ARMS[knob, level](free)
    with store.session(house.engine) as s:
        row = s.get(TrainingRun, first.run_id)
        assert row is not None and row.metrics["arms"] == first.metrics["arms"]
        assert {name: row.config[name] for name in changed} == changed
        for _ in range(8):  # runs with more passes earned much more
            for arms, reward in (({"passes": "double"}, 8.0), ({}, 0.0)):
                one = queries.runs.start_run(s, row.group_id, trigger="requests")
                queries.runs.finish_run(
                    s, one.id, "succeeded", metrics={"arms": arms, "reward": reward}
                )
    careful = free.model_copy(update={"explore": 1e-9})
    second = train_once(house.engine, house.artifacts, "default", careful, trigger="requests")
    assert second.metrics["arms"]["passes"] == "double" and second.metrics["explored"] == ""
    with store.session(house.engine, write=False) as s:
        row = s.get(TrainingRun, second.run_id)
        assert row is not None and row.config["passes"] == 2 * free.passes


def test_each_domains_reservoir_is_pinned_and_replayed_and_may_be_gone(house: House) -> None:
    house.serve(40)
    recipe = BRIEF.model_copy(update={"reservoir": 5, "window": 40})
    outcome = train_once(house.engine, house.artifacts, "default", recipe, trigger="manual")
    with store.session(house.engine) as s:
        pinned = queries.traces.pinned_traces(s, 1, RESERVOIR)
        domains = Counter(row.domain for row in queries.requests.with_traces(s, pinned))
    assert domains and set(domains.values()) == {5}
    assert outcome.metrics["reservoir_requests"] == len(pinned) == 5 * len(domains)
    for uri in (row.uri for row in rows_of(house, pinned)):
        path = house.artifacts.local_path(uri)
        assert path is not None
        path.unlink()
    again = train_once(house.engine, house.artifacts, "default", recipe, trigger="manual")
    assert again.status == "succeeded" and again.metrics["left_out"]["broken"] > 0
    none = recipe.model_copy(update={"reservoir": 0})
    train_once(house.engine, house.artifacts, "default", none, trigger="manual")
    with store.session(house.engine) as s:
        assert queries.traces.pinned_traces(s, 1, RESERVOIR) == []


def test_what_only_the_reservoir_still_has_is_trained_on(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.serve(40)
    recipe = BRIEF.model_copy(
        update={"reservoir": 5, "window": 12, "min_requests": 1, "replay_share": 0.5}
    )
    train_once(house.engine, house.artifacts, "default", recipe, trigger="manual")
    monkeypatch.setattr(selection, "REACH", 12)
    outcome = train_once(house.engine, house.artifacts, "default", recipe, trigger="manual")
    with store.session(house.engine, write=False) as s:
        trained = set(s.scalars(select(TrainingRequest.request_id)
                                .where(TrainingRequest.run_id == outcome.run_id)))  # fmt: skip
        newest = queries.requests.recent_requests(s, 1, limit=12)
    assert trained - {row.request_id for row in newest}


def rows_of(house: House, request_ids: list[int]) -> list[queries.requests.RecentRequest]:
    with store.session(house.engine, write=False) as s:
        return queries.requests.with_traces(s, request_ids)


def test_without_the_line_search_the_whole_way_is_taken(house: House) -> None:
    house.serve(40)
    recipe = BRIEF.model_copy(update={"line_search": False})
    outcome = train_once(house.engine, house.artifacts, "default", recipe, trigger="manual")
    assert (outcome.metrics["alpha"], outcome.metrics["line_search"]) == (1.0, [])
    assert "reward" not in outcome.metrics  # nothing was chosen


def test_too_few_requests_skip_the_run_and_say_so(house: House) -> None:
    house.serve(3)
    outcome = train_once(house.engine, house.artifacts, "default", SETTINGS, trigger="test")
    assert outcome.status == "skipped" and "at least 8 needed" in outcome.error
    (run,) = house.runs()
    assert (run.status, run.error) == ("skipped", outcome.error)


def test_broken_weights_of_the_base_fail_the_run_and_make_no_version(house: House) -> None:
    house.serve(30)
    with store.session(house.engine, write=False) as s:
        uri = queries.versions.version(s, house.live).weights_uri
    path = house.artifacts.local_path(uri)
    assert path is not None
    weights = path / checkpoint.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-50])
    outcome = train_once(house.engine, house.artifacts, "default", SETTINGS, trigger="test")
    assert outcome.status == "failed" and "\n" not in outcome.error and outcome.error
    assert [run.status for run in house.runs()] == ["failed"]
    with store.session(house.engine, write=False) as s:
        group = queries.groups.group_by_name(s, "default")
        assert len(queries.versions.versions(s, group.id)) == 1


def test_a_run_that_a_killed_trainer_left_is_ended_by_the_next_one(house: House) -> None:
    with store.session(house.engine) as s:
        group = queries.groups.group_by_name(s, "default")
        queries.runs.start_run(s, group.id, trigger="killed")
    train_once(house.engine, house.artifacts, "default", SETTINGS, trigger="next")
    assert [run.status for run in house.runs()] == ["failed", "skipped"]
    assert "without a word" in house.runs()[0].error


def test_what_is_raised_in_between_is_written_down_and_raised_again(house: House) -> None:
    house.serve(30)

    def stop(_: dict[str, Any]) -> None:
        raise KeyboardInterrupt("stopped by hand")

    with pytest.raises(KeyboardInterrupt):
        train_once(house.engine, house.artifacts, "default", BRIEF, trigger="test", progress=stop)
    (run,) = house.runs()
    assert run.status == "failed" and run.error == "KeyboardInterrupt: stopped by hand"


@pytest.mark.process
def test_the_process_prints_one_json_result_and_progress_lines(house: House) -> None:
    house.serve(40)
    command = [sys.executable, "-m", "aurora_sgl.training", "--trigger", "test"]
    command += ["--settings", SETTINGS.model_copy(update={"nice": 0}).model_dump_json()]
    environment = {**os.environ, "AURORA_HOME": str(house.home), "AURORA_DATABASE_URL": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["status"] == "succeeded" and outcome["version_id"] > house.live
    events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert events[0]["event"] == "window" and events[-1]["event"] == "storing"


@pytest.mark.process
def test_the_process_refuses_settings_that_do_not_exist(house: House) -> None:
    command = [sys.executable, "-m", "aurora_sgl.training", "--settings", '{"pases": 1}']
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "pases" in done.stderr


@pytest.mark.process
def test_a_run_that_was_killed_goes_on_with_its_requests_and_from_its_checkpoint(
    house: House,
) -> None:
    house.serve(40)
    settings = SETTINGS.model_copy(
        update={"nice": 0, "passes": 30, "checkpoint_seconds": 0.2, "replay_share": 0.0}
    )
    command = [sys.executable, "-m", "aurora_sgl.training", "--trigger", "test"]
    command += ["--settings", settings.model_dump_json()]
    environment = {**os.environ, "AURORA_HOME": str(house.home), "AURORA_DATABASE_URL": ""}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    for line in process.stderr:
        event = json.loads(line) if line.startswith("{") else {}
        if event.get("update", 0) > 60:
            break
    process.kill()
    process.communicate()
    outcome = train_once(house.engine, house.artifacts, "default", settings, trigger="next")
    assert outcome.status == "succeeded", outcome.error
    assert 0 < outcome.metrics["resumed_at"] < outcome.metrics["updates"]
    assert [run.status for run in house.runs()] == ["failed", "succeeded"]
    assert list((house.home / "training").glob("group-*")) == []


def test_a_vocabulary_that_lost_touch_with_traffic_is_refreshed(
    house: House, tmp_path: Path
) -> None:
    house.serve(40)
    small = scratch.make(house.target, draft_vocab_size=24, seed=1, model=str(house.target))
    folder = checkpoint.save(small, tmp_path / "small")
    version = import_version(house.engine, house.artifacts, folder, "default", source="scratch")
    promote(house.engine, version.id, actor="test", reason="fewer draft tokens")
    settings = SETTINGS.model_copy(update={"vocabulary_threshold": 0.1, "passes": 1})
    kept = train_once(house.engine, house.artifacts, "default", settings, trigger="test")
    held = kept.metrics["vocabulary_coverage"]
    assert 0.1 < held < 1 and "vocabulary_replaced" not in kept.metrics
    settings = settings.model_copy(update={"vocabulary_threshold": held + 0.001})
    fresh = train_once(house.engine, house.artifacts, "default", settings, trigger="test")
    assert fresh.metrics["vocabulary_replaced"] > 0
    assert fresh.metrics["vocabulary_coverage_after"] > held
    with store.session(house.engine, write=False) as s:
        old, new = (queries.versions.version(s, outcome.version_id) for outcome in (kept, fresh))
        assert old.vocab_sha256 != new.vocab_sha256


def test_a_window_by_domain_and_time_takes_only_what_lies_in_it(house: House) -> None:
    house.serve(40)
    settings = SETTINGS.model_copy(update={"domains": ("d0",), "replay_share": 0.0, "passes": 1})
    one = train_once(house.engine, house.artifacts, "default", settings, trigger="test")
    both = settings.model_copy(update={"domains": ()})
    two = train_once(house.engine, house.artifacts, "default", both, trigger="test")
    assert house.runs()[0].requests < house.runs()[1].requests
    assert one.status == two.status == "succeeded"
    none = settings.model_copy(update={"domains": ("nobody",)})
    outcome = train_once(house.engine, house.artifacts, "default", none, trigger="test")
    assert outcome.status == "skipped" and "0 requests to train on" in outcome.error


def test_a_store_that_is_away_at_the_end_of_a_run_is_waited_for(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    house.serve(60)
    monkeypatch.setattr(connection, "BUSY_SECONDS", 0)  # a lock is an error at once
    engine = store.connect(str(house.engine.url))
    other = sqlite3.connect(house.home / "aurora.db", check_same_thread=False)
    back = threading.Timer(3.0, other.rollback)

    def away_at_the_gate(event: dict[str, Any]) -> None:
        if event["event"] == "gate" and not event["done"]:
            other.execute("BEGIN EXCLUSIVE")
            back.start()

    outcome = train_once(
        engine, house.artifacts, "default", SETTINGS, trigger="test", progress=away_at_the_gate
    )
    back.join()
    other.close()
    engine.dispose()
    assert (outcome.status, outcome.verdict) == ("succeeded", "pass")
    assert "the store is away, waiting: the database is busy (database is locked)" in caplog.text
    away = "the progress of run 1 can't be stored, the run goes on: the database is busy"
    assert caplog.text.count(away) == 1
    (run,) = house.runs()
    assert run.status == "succeeded"
    with store.session(house.engine, write=False) as s:
        assert len(queries.evaluations.evaluations(s, outcome.version_id or 0)) > 1, (
            "overall and by domain"
        )


def test_a_run_ends_without_a_version_when_what_it_learns_from_is_purged(house: House) -> None:
    house.serve(60)

    def purge_one(event: dict[str, Any]) -> None:
        if event["event"] == "line_search" and not event["done"]:
            with store.session(house.engine, write=False) as s:
                first = s.scalars(select(TrainingRequest.request_id)).first()
            selector = Selector("request", str(first), utc_now())
            begin_purge(house.engine, selector, actor="ada", reason="asked to")

    outcome = train_once(
        house.engine, house.artifacts, "default", BRIEF, trigger="test", progress=purge_one
    )
    assert (outcome.status, outcome.version_id) == ("failed", None)
    assert "1 of the requests that it learnt from were purged meanwhile" in outcome.error
    assert list((house.home / "training").iterdir()) == []


def test_a_run_goes_on_from_a_candidate_and_is_compared_with_live(house: House) -> None:
    house.serve(30)
    first = train_once(house.engine, house.artifacts, "default", BRIEF, trigger="test")
    assert first.version_id is not None
    with store.session(house.engine) as s:
        queries.evaluations.add_evaluation(
            s, candidate_id=first.version_id, baseline_id=house.live, kind="replay", requests=9,
            verdict="inconclusive", attempt=1, baseline_accept_length=2.0,
            candidate_accept_length=2.2,
            details={"line": {"generation": 1, "log_e": 0.0, "continues": True}},
        )  # fmt: skip
        ids = base_ids(s, queries.groups.group_by_name(s, "default").id, None, carry_on=True)
        assert ids is not None and base_ratio(s, ids) == pytest.approx(1.1)
        assert base_ratio(s, BaseIds(house.live, house.live)) == 1.0
        assert math.isnan(base_ratio(s, BaseIds(house.live, first.version_id)))
    assert ids == BaseIds(first.version_id, house.live)
    by_hand = train_once(house.engine, house.artifacts, "default", BRIEF, trigger="test")
    second = train_once(
        house.engine, house.artifacts, "default", BRIEF, trigger="test", carry_on=True
    )
    with store.session(house.engine, write=False) as s:
        parents = [
            queries.versions.version(s, int(run.version_id or 0)).parent_id
            for run in (by_hand, second)
        ]
        row = queries.evaluations.evaluation(s, int(second.evaluation_id or 0))
        weights = [
            queries.versions.version(s, int(run.version_id or 0)).weights_uri
            for run in (first, by_hand, second)
        ]
    assert parents == [house.live, first.version_id] and row.baseline_id == house.live
    for uri in set(weights):  # the first and the one by hand are alike
        folder = house.artifacts.local_path(uri)
        assert folder is not None
        shutil.rmtree(folder)
    third = train_once(
        house.engine, house.artifacts, "default", BRIEF, trigger="test", carry_on=True
    )
    assert f"training starts from the live version {house.live}" in third.metrics["base_left"]
    assert house.runs()[-1].base_version_id == house.live and third.status == "succeeded"
