"""The command line on a real SQLite store with real drafter folders."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from aurora_sgl import cli, store
from aurora_sgl.clock import utc_now
from aurora_sgl.config import Settings, get_settings
from aurora_sgl.drafter import checkpoint, scratch
from aurora_sgl.store import queries
from tests.support import store_samples as samples
from tests.unit.training.test_run import House, house  # noqa: F401 (a fixture)
from tests.unit.training.test_trainer import RECIPE

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``aurora-sgl`` with arguments; gives (exit code, stdout, stderr)."""
    monkeypatch.setattr(cli, "keep_to_owner", lambda: None)  # of a process, and this is pytest's

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["aurora-sgl", *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
            raise SystemExit(0)
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call


@pytest.fixture
def second(house: House, tmp_path: Path) -> Path:  # noqa: F811
    """The folder of another drafter for the same target."""
    drafter = scratch.make(house.target, draft_vocab_size=40, seed=2, model=str(house.target))
    return checkpoint.save(drafter, tmp_path / "second")


def test_help_takes_less_than_a_second_of_cpu_and_names_every_command() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "aurora_sgl.cli", "--help"], capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    names = ("serve", "demo", "train", "replay", "versions", "promote", "rollback", "db")
    for name in (*names, "scheduler", "status", "watch", "switch", "trial"):
        assert name in done.stdout


def test_help_imports_neither_torch_nor_the_store() -> None:
    code = (
        "import sys, aurora_sgl.cli; "
        "print([m for m in ('torch', 'sqlalchemy', 'sglang', 'numpy', 'streamlit') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_an_error_is_one_line_on_stderr_without_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "aurora_sgl.cli", "versions", "list"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"AURORA_DATABASE_URL": "mysql://somewhere/else", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("aurora-sgl: ") and "sqlite or postgresql" in done.stderr


def test_a_broken_setting_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AURORA_SPECULATION", "sometimes")
    get_settings.cache_clear()
    code, _, error = run("db", "current")
    get_settings.cache_clear()
    assert code == 1 and "AURORA_SPECULATION" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-command",),
        ("promote", "2"),  # without a reason
        ("train",),  # without --once
        ("train", "--once", "--set", "passes"),
        ("train", "--once", "--set", "passes=0"),
        ("train", "--once", "--set", "colour=1"),
        ("train", "--once", "--objective", "magic"),
        ("train", "--once", "--window", "soon"),
        ("replay",),  # without a version
        ("serve",),  # without a model
        ("switch", "off", "learning"),  # without a reason
        ("trial", "start", "2"),
        ("versions", "pin", "live"),
        ("scheduler", "--set", "passes=0"),
    ],
)
def test_wrong_use_exits_with_2(run: Run, arguments: tuple[str, ...]) -> None:
    assert run(*arguments)[0] == 2


def test_a_store_of_another_schema_says_how_to_upgrade(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AURORA_HOME", str(tmp_path / "empty"))
    get_settings.cache_clear()
    try:
        code, _, error = run("versions", "list")
        assert code == 1 and "aurora-sgl db upgrade" in error
        assert run("db", "current")[0] == 1
        assert run("db", "upgrade")[0] == 0
        code, out, _ = run("db", "current", "--json")
        assert code == 0 and json.loads(out)["up_to_date"] is True
        code, _, error = run("versions", "list")
        assert code == 1 and "no deployment group 'default'" in error
    finally:
        get_settings.cache_clear()


def test_versions_go_in_are_listed_shown_and_come_out(
    run: Run,
    house: House,  # noqa: F811
    second: Path,
    tmp_path: Path,
) -> None:
    code, out, error = run("versions", "import", str(second), "--note", "by hand", "--json")
    assert code == 0, error
    made = json.loads(out)
    rows = json.loads(run("versions", "list", "--json")[1])
    assert [row["id"] for row in rows] == [house.live, made["id"]]
    assert rows[0]["aliases"] == ["live"] and rows[1]["note"] == "by hand"
    assert "by hand" in run("versions", "list")[1]

    shown = json.loads(run("versions", "show", made["weights_sha256"][:8], "--json")[1])
    assert shown["id"] == made["id"] and shown["has_weights"] and shown["deployments"] == []
    assert "weights_sha256" in run("versions", "show", "live")[1]

    into = tmp_path / "out"
    assert run("versions", "export", str(made["id"]), str(into))[0] == 0
    exported = checkpoint.content_sha256(checkpoint.read_tensors(into))
    assert exported == made["weights_sha256"]
    code, _, error = run("versions", "export", str(made["id"]), str(into))
    assert code == 1 and "not empty" in error

    assert "is pinned" in run("versions", "pin", "live", "--reason", "good")[1]
    assert json.loads(run("versions", "list", "--json")[1])[0]["pinned"] is True
    assert "not pinned" in run("versions", "unpin", "live", "--reason", "old")[1]

    number = str(made["id"])
    assert "tags" not in run("versions", "list")[1]
    assert f"noted of version {number} by ada" in run(
        "versions", "note", number, "slow on long prompts", "--actor", "ada")[1]  # fmt: skip
    assert (
        run("versions", "tag", number, "EU", "prod")[1] == f"tags of version {number}: eu, prod\n"
    )
    code, _, error = run("versions", "tag", number, "eu")
    assert code == 1 and "has the tag eu already" in error
    for search in ("tag:prod", "long slow", '"by hand"', number):
        rows = json.loads(run("versions", "list", "--search", search, "--json")[1])
        assert [(row["id"], row["tags"]) for row in rows] == [(made["id"], ["eu", "prod"])], search
    assert "eu, prod" in run("versions", "list")[1]
    assert (
        run("versions", "list", "--search", "tag:none")[1] == "versions of group 'default': none\n"
    )
    assert run("versions", "untag", number, "prod", "--json")[0] == 0
    shown = json.loads(run("versions", "show", number, "--json")[1])
    assert shown["tags"] == ["eu"] and shown["note"] == "by hand"
    assert [(one["actor"], one["text"]) for one in shown["notes"]] == [
        ("ada", "slow on long prompts")]  # fmt: skip
    assert "slow on long prompts" in run("versions", "show", number)[1]


def test_a_drafter_of_another_target_is_refused(run: Run, house: House, tmp_path: Path) -> None:  # noqa: F811
    from tests.support.drafter_cases import target_folder

    other = target_folder(tmp_path / "other", hidden_size=16, vocab_size=30)
    folder = checkpoint.save(scratch.make(other, draft_vocab_size=20), tmp_path / "wrong")
    code, _, error = run("versions", "import", str(folder))
    assert code == 1 and error.count("\n") == 1 and "can't be imported" in error
    assert len(json.loads(run("versions", "list", "--json")[1])) == 1


def test_promote_and_rollback_move_what_is_live_and_say_so(
    run: Run,
    house: House,  # noqa: F811
    second: Path,
) -> None:
    number = str(json.loads(run("versions", "import", str(second), "--json")[1])["id"])
    code, out, _ = run("promote", number, "--reason", "try", "--dry-run", "--json")
    assert code == 0 and json.loads(out)["dry_run"] is True
    code, _, error = run("promote", number, "--reason", "try", "--expect-live", number)
    assert code == 1 and f"version {house.live}" in error

    change = json.loads(run("promote", number, "--reason", "better", "--json")[1])
    assert (change["changed"], change["generation"]) == (True, 2)
    assert "live already" in run("promote", number, "--reason", "again")[1]
    assert "put version" in run("rollback", "--reason", "worse")[1]
    shown = json.loads(run("versions", "show", "live", "--json")[1])
    assert shown["id"] == house.live
    assert [d["action"] for d in shown["deployments"]] == ["rollback", "promote", "promote"]
    assert "@" in shown["deployments"][0]["actor"]
    code, _, error = run("rollback", "--reason", "further")
    assert code == 1 and error.count("\n") == 1


def test_switches_are_turned_with_a_reason_and_listed(run: Run, house: House) -> None:  # noqa: F811
    code, _, error = run("switch", "off", "learning", "--reason", "  ")
    assert code == 1 and "reason" in error and error.count("\n") == 1
    code, _, error = run("switch", "off", "lights", "--reason", "x")
    assert code == 1 and "learning, auto_promote" in error
    assert "would be off" in run("switch", "off", "learning", "--reason", "x", "--dry-run")[1]
    assert "is off" in run("switch", "off", "learning", "--reason", "too warm", "--actor", "ada")[1]
    assert "is off already" in run("switch", "off", "learning", "--reason", "again")[1]
    rows = json.loads(run("switch", "list", "--json")[1])
    assert [(row["name"], row["on"], row["actor"]) for row in rows] == [
        ("learning", False, "ada"),
        ("auto_promote", True, ""),
    ]
    code, _, error = run("train", "--once")
    assert code == 1 and "learning is switched off" in error
    assert "is on" in run("switch", "on", "learning", "--reason", "cooler")[1]


def test_status_watch_and_trial_say_what_goes_on_in_one_group(
    run: Run,
    house: House,  # noqa: F811
    second: Path,
) -> None:
    assert "nothing was promoted over another version" in run("watch")[1]
    assert "there was no trial" in run("trial", "status")[1]
    assert "no trial is running" in run("trial", "stop", "--reason", "x")[1]
    number = str(json.loads(run("versions", "import", str(second), "--json")[1])["id"])
    code, _, error = run("trial", "start", number, "--reason", "is it faster?")
    assert code == 1 and "no server of this group is running" in error
    code, _, error = run("trial", "start", "live", "--reason", "x")
    assert code == 1 and "is live" in error
    assert run("promote", number, "--reason", "x", "--expected-live", "none")[0] == 1
    assert run("promote", number, "--reason", "x", "--expected-live", "live")[0] == 0
    told = json.loads(run("status", "--json")[1])
    assert told["aliases"] == {"live": int(number), "previous": house.live}
    assert told["watch"]["status"] == "running" and told["watch"]["windows"] == []
    assert told["scheduler"]["alive"] is False
    assert "aurora-sgl scheduler" in told["scheduler"]["reason"]
    text = run("status")[1]
    assert f"live: version {number}" in text and "watch over version" in text
    assert f"watch over version {number}" in run("watch")[1]
    assert told["training"] is None and "training: " not in text
    with store.session(house.engine) as s:
        row = queries.runs.start_run(s, 1, trigger="drift")
        word = {"stage": "training", "done": 3, "total": 9, "updated_at": f"{utc_now()}"}
        queries.runs.note_progress(s, row.id, word)
    line = f"training: run {row.id} (drift), training, 3 of 9 updates; time left: not told yet"
    assert line in run("status")[1]
    told = json.loads(run("status", "--json")[1])["training"]
    assert (told["stage"], told["done"], told["lost"]) == ("training", 3, False)


def test_one_training_run_makes_a_version_that_replay_can_judge(run: Run, house: House) -> None:  # noqa: F811
    house.serve(60)
    recipe = {**RECIPE, "gate_share": 0.3}
    pairs = [text for name, value in recipe.items() for text in ("--set", f"{name}={value}")]
    code, out, error = run("train", "--once", "--json", *pairs)
    assert code == 0, error
    outcome = json.loads(out)
    assert outcome["status"] == "succeeded"
    made = outcome["version_id"]
    assert json.loads(run("versions", "show", str(made), "--json")[1])["evaluations"]

    code, out, error = run("replay", "--version", "live", "--version", str(made), "--json", *pairs)
    assert code == 0, error
    assert run("replay", "live", str(made), "--json", *pairs)[1] == out
    lines = json.loads(out)
    whole = [line for line in lines if line["domain"] == "all"]
    assert [line["version_id"] for line in whole] == [house.live, made]
    assert whole[0]["difference"] is None
    assert whole[1]["accept_length"] > whole[0]["accept_length"]
    assert whole[1]["ci_low"] > 0


def test_objective_window_and_domain_of_a_run_are_those_that_were_asked_for(
    run: Run,
    house: House,  # noqa: F811
) -> None:
    house.serve(40)
    asked = ("--objective", "lk", "--window", "2h", "--domain", "d0", "--set", "passes=1")
    code, out, error = run("train", "--once", "--json", "--set", "replay_share=0", *asked)
    assert code == 0, error
    (row,) = house.runs()
    assert json.loads(out)["status"] == "succeeded" and row.objective == "lk"
    assert row.config["window_hours"] == 2 and row.config["domains"] == ["d0"]
    assert row.requests < 20, "half of the requests are of another domain"
    code, out, _ = run("replay", "live", "--domain", "d0", "--json", "--set", "gate_share=0.5")
    assert code == 0 and {line["domain"] for line in json.loads(out)} == {"all", "d0"}


def test_a_second_trainer_waits_its_turn(run: Run, house: House) -> None:  # noqa: F811
    from aurora_sgl.training.lease import training_lease

    with training_lease(house.engine, 1):
        code, _, error = run("train", "--once")
        assert code == 1 and "is going on" in error
    code, _, error = run("train", "--once")
    assert code == 1 and "training skipped" in error  # free again, but nothing to train on


def test_prune_says_what_would_go_and_leaves_it(run: Run, house: House) -> None:  # noqa: F811
    house.serve(4)
    code, out, _ = run("db", "prune", "--trace-bytes", "0", "--dry-run", "--json")
    assert code == 0 and json.loads(out)["traces"] == 4
    assert json.loads(out)["groups"]["default"]["traces"] == 4
    assert json.loads(run("db", "prune", "--trace-bytes", "0", "--json")[1])["traces"] == 4
    assert json.loads(run("db", "prune", "--trace-bytes", "0", "--json")[1])["traces"] == 0
    assert run("db", "prune")[0] == 0
    with store.session(house.engine, write=False) as s:
        assert queries.prune_runs.last(s, 1) is not None
        assert queries.prune_runs.last(s, 1, complete=True) is None, (
            "a whole round is due as before"
        )
    assert run("db", "prune", "--weights")[0] == 0
    with store.session(house.engine, write=False) as s:
        assert queries.prune_runs.last(s, 1, complete=True) is not None


def test_a_bare_prune_on_an_admins_machine_goes_by_the_groups_budget(
    run: Run,
    house: House,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    house.serve(4)
    with store.session(house.engine) as s:
        each = queries.traces.trace_bytes_total(s) // 4
    for name, value in (("CAPTURE_BYTES", "0"), ("RETENTION_DAYS", "1"),
                        ("ARTIFACTS", str(tmp_path / "no such root"))):  # fmt: skip
        monkeypatch.setenv(f"AURORA_{name}", value)
    get_settings.cache_clear()
    code, out, _ = run("db", "prune", "--json")
    assert code == 0 and json.loads(out)["traces"] == 0, "nobody has said what the group keeps"
    budget = f"trace_bytes={2 * each + 1}"
    assert run("db", "limits", "--set", budget, "--reason", "a test", "--dry-run")[0] == 0
    assert json.loads(run("db", "prune", "--dry-run", "--json")[1])["traces"] == 0
    code, out, _ = run("db", "limits", "--set", budget, "--reason", "a test", "--actor", "ada")
    assert code == 0 and "(before: not set)" in out
    assert json.loads(run("db", "prune", "--dry-run", "--json")[1])["traces"] == 2
    assert json.loads(run("db", "prune", "--json")[1])["traces"] == 2
    left = sorted(house.artifacts.local_path("traces").rglob("*.safetensors"))  # type: ignore[union-attr]
    assert len(left) == 4, "whoever has the files sweeps them"
    rows = {row["name"]: row for row in json.loads(run("db", "limits", "--json")[1])}
    assert (rows["trace_bytes"]["value"], rows["trace_bytes"]["set_by"]) == (2 * each + 1, "ada")
    assert rows["event_days"]["value"] == 30
    code, _, error = run("db", "limits", "--set", "event_days=0", "--reason", "x")
    assert (code, error.count("\n")) == (1, 1) and "it can be from 1" in error
    code, _, error = run("db", "limits", "--set", "event_days=3")
    assert code == 1 and "needs an actor and a reason" in error
    assert f"retention: {utc_now():%m-%d}" in run("status")[1]


def test_why_candidates_are_not_live_is_said_by_versions_list_and_status(
    run: Run,
    house: House,  # noqa: F811
    second: Path,
) -> None:
    assert "not live:" not in run("status")[1]
    versions = []
    with store.session(house.engine) as s:
        for letter, verdict in (("a", ""), ("b", "inconclusive"), ("c", "fail"), ("d", "pass")):
            run_id = queries.runs.start_run(s, 1, trigger="time", base_version_id=house.live).id
            queries.runs.finish_run(s, run_id, "succeeded")
            versions.append(
                samples.add_version(s, 1, letter, parent_id=house.live, training_run_id=run_id)
            )
            if verdict:
                queries.evaluations.add_evaluation(
                    s, candidate_id=versions[-1], baseline_id=house.live, kind="replay",
                    requests=2, verdict=verdict, details={"reason": f"the reason of {letter}"},
                )  # fmt: skip
    rows = {row["id"]: row for row in json.loads(run("versions", "list", "--json")[1])}
    assert [rows[one]["not_live"] for one in [house.live, *versions]] == [
        "", "no gate", "not judged", "failed", "passed"
    ]  # fmt: skip
    assert rows[versions[1]]["why_not_live"] == "the reason of b"
    table = run("versions", "list")[1]
    assert "not judged" in table and "no gate" in table
    assert f"not live: version {versions[3]}: passed: it passed the gate" in run("status")[1]
    assert json.loads(run("status", "--json")[1])["not_live"]["word"] == "passed"
    assert run("versions", "import", str(second))[0] == 0
    assert "imported: it comes from outside" in run("status")[1]


@pytest.mark.parametrize("verdict", ["inconclusive", "fail"])
def test_status_says_the_last_verdict_and_its_reason(
    run: Run,
    house: House,  # noqa: F811
    verdict: str,
) -> None:
    with store.session(house.engine) as s:
        run_id = queries.runs.start_run(s, 1, trigger="time", base_version_id=house.live).id
        queries.runs.finish_run(s, run_id, "succeeded")
        made = samples.add_version(s, 1, "a", parent_id=house.live, training_run_id=run_id)
        queries.evaluations.add_evaluation(
            s, candidate_id=made, baseline_id=house.live, kind="replay", requests=2,
            verdict=verdict, details={"reason": "2 requests, and 4 are the least"},
        )  # fmt: skip
    code, out, _ = run("status")
    assert code == 0
    assert f"last verdict: version {made} {verdict}: 2 requests, and 4 are the least\n" in out
    assert "evidence: " in out


def test_unknown_flags_of_serve_go_to_sglang_as_they_are(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aurora_sgl import serving

    seen: list[tuple[str, str | None, list[str]]] = []

    def serve(model: str, drafter: str | None, sglang_args: list[str], _: Settings) -> None:
        seen.append((model, drafter, sglang_args))

    monkeypatch.setattr(serving, "serve", serve)
    flags = ["--tp-size", "2", "--lora-paths", "a", "b", "--disable-radix-cache", "--port=1", "-x"]
    assert run("serve", "--model", "m", *flags)[0] == 0
    assert run("serve", *flags, "--drafter", "d", "--model-path", "m")[0] == 0
    assert seen == [("m", None, flags), ("m", "d", flags)]


def test_serving_a_model_that_is_not_there_is_refused_in_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AURORA_HOME", str(tmp_path / "home"))
    get_settings.cache_clear()
    code, _, error = run("serve", "--model", str(tmp_path / "absent"))
    get_settings.cache_clear()
    assert code == 1 and error.count("\n") == 1 and "absent" in error
