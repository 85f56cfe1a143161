"""The start-up matrix: whatever is wrong with ours, SGLang starts, and a line says what is off."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aurora_sgl import config, environment
from aurora_sgl.engine import plugin, sidecars, startup


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A process of SGLang's without a variable of ours, in a folder of its own."""
    for name in [name for name in os.environ if name.startswith("AURORA_")]:
        monkeypatch.delenv(name)
    for name in environment.INTERNAL:  # what a start sets goes with the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "_forgives", True)
    config.get_settings.cache_clear()
    yield
    config.get_settings.cache_clear()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[config.Settings]:
    """The settings of each sidecar that would be started."""
    starts: list[config.Settings] = []

    def start(dp_size: int, settings: config.Settings) -> None:
        starts.append(settings)
        os.environ[environment.ENDPOINT] = "/somewhere"

    monkeypatch.setattr(sidecars, "start", start)
    return starts


def launch(**args: Any) -> str:
    """As SGLang does it; what SGLang's own function returns."""
    server_args = SimpleNamespace(**{"speculative_algorithm": "EAGLE3", "device": "cuda", **args})
    return str(plugin._launch_subprocesses(lambda *_, **__: "served", server_args=server_args))


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [one for one in capsys.readouterr().err.splitlines() if one.startswith("aurora-sgl: ")]


def a_file(folder: Path) -> Path:
    """A folder that nobody can make, root neither."""
    (folder / "file").write_text("")
    return folder / "file" / "home"


def test_a_good_start_says_what_it_does_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: list[config.Settings],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AURORA_HOME", str(tmp_path / "home"))
    assert launch() == "served" and len(started) == 1
    assert lines(capsys) == [
        "aurora-sgl: verify steps are recorded, hidden states are traced, promoted versions go "
        f"live (data folder {tmp_path / 'home'})"
    ]
    assert startup.notices_of_start() == {}


@pytest.mark.parametrize(
    ("variable", "value", "field", "default"),
    [
        ("AURORA_CAPTURE_SHARE", "lots", "capture_share", 1.0),
        ("AURORA_CAPTURE_SHARE", "1.5", "capture_share", 1.0),
        ("AURORA_SPECULATION", "sometimes", "speculation", "auto"),
        ("AURORA_RECORD", "maybe", "record", True),
        ("AURORA_HEALTH_PORT", "70000", "health_port", 8520),
        ("AURORA_SPOOL_BYTES", "1G", "spool_bytes", 1024**3),
    ],
)
def test_a_bad_variable_is_named_and_its_default_used(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: list[config.Settings],
    capsys: pytest.CaptureFixture[str],
    variable: str,
    value: str,
    field: str,
    default: object,
) -> None:
    monkeypatch.setenv("AURORA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(variable, value)
    assert launch() == "served"
    assert getattr(started[0], field) == default
    first, second = lines(capsys)
    assert variable in first and repr(value) in first and f"default {default!r} is used" in first
    assert "verify steps are recorded" in second
    assert variable in startup.notices_of_start()["settings"]


def test_an_env_file_that_is_no_text_counts_as_none(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: list[config.Settings],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / ".env").write_bytes(b"AURORA_GROUP=\xff\xfe\n")
    monkeypatch.setenv("AURORA_ENABLED", "1")
    assert launch() == "served" and started[0].group == "default"
    assert "the settings can't be read" in lines(capsys)[0]


def test_our_own_commands_still_refuse_a_bad_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_forgives", False)
    monkeypatch.setenv("AURORA_CAPTURE_SHARE", "lots")
    with pytest.raises(ValueError, match="capture_share"):
        config.get_settings()


def test_a_data_folder_that_cannot_be_written_turns_recording_off(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: list[config.Settings],
    capsys: pytest.CaptureFixture[str],
) -> None:
    home = a_file(tmp_path)
    monkeypatch.setenv("AURORA_HOME", str(home))
    assert launch() == "served" and started == []
    assert lines(capsys) == [
        "aurora-sgl: nothing is recorded, traced or swapped: "
        f"AURORA_HOME {home} can't be written (Not a directory); give a folder that this user may "
        "write"
    ]
    assert not environment.value(environment.ENDPOINT)


@pytest.mark.parametrize("artifacts", ["", "s3://bucket/aurora"])
def test_with_a_database_elsewhere_records_need_no_data_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: list[config.Settings],
    capsys: pytest.CaptureFixture[str],
    artifacts: str,
) -> None:
    home = a_file(tmp_path)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(startup.tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("AURORA_HOME", str(home))
    monkeypatch.setenv("AURORA_DATABASE_URL", "postgresql+psycopg://db/aurora")
    monkeypatch.setenv("AURORA_ARTIFACTS", artifacts)
    assert launch() == "served"
    (settings,) = started
    assert settings.home.is_dir() and stat.S_IMODE(settings.home.stat().st_mode) == 0o700
    assert settings.artifact_root == (artifacts or str(home / "artifacts"))
    assert settings.capture_share == (1.0 if artifacts else 0.0)
    (line,) = lines(capsys)
    assert "verify steps are recorded" in line and f"AURORA_HOME {home} can't be written" in line
    assert ("are not traced, no version goes live" in line) is not bool(artifacts)
    assert "data folder" in startup.notices_of_start()
    assert startup.spare_home() == settings.home, "the next start takes up what waits there"


def test_a_store_that_is_not_understood_is_named_and_records_wait(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: list[config.Settings],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AURORA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AURORA_DATABASE_URL", "mysql://user:hush@db/aurora")
    assert launch() == "served" and len(started) == 1
    (line,) = lines(capsys)
    assert "verify steps are recorded" in line and "hush" not in line
    assert "AURORA_DATABASE_URL names 'mysql'" in line and "records wait in the spool" in line


def test_a_long_tmpdir_gives_sockets_a_private_folder_with_a_short_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(sidecars.tempfile, "tempdir", str(long))
    folder = sidecars.socket_folder(8)
    try:
        assert len(str(folder)) < 40 and stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert list(long.iterdir()) == []
    finally:
        folder.rmdir()


def test_sockets_that_find_no_place_turn_recording_off(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(sidecars.tempfile, "tempdir", str(long))
    monkeypatch.setattr(sidecars, "_SHORT", (str(tmp_path / "none"),))
    monkeypatch.setenv("AURORA_HOME", str(tmp_path / "home"))
    assert launch() == "served"
    (line,) = lines(capsys)
    assert "nothing is recorded, traced or swapped: the socket path" in line
    assert list(long.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ({"speculative_algorithm": "NGRAM"}, "--speculative-algorithm NGRAM is not supported"),
        ({"speculative_algorithm": "STANDALONE"}, "STANDALONE is not supported; EAGLE, EAGLE3"),
        ({"speculative_algorithm": "DFLASH"}, "DFLASH is not supported"),
        ({"speculative_algorithm": "DSPARK"}, "DSPARK is not supported"),
        ({"enable_multi_layer_eagle": True}, "--enable-multi-layer-eagle"),
        ({"pp_size": 2}, "--pp-size is not supported (the first stage has no drafter)"),
        ({"enable_dp_attention": True, "dp_size": 2, "tp_size": 2}, "--enable-dp-attention"),
        ({"attn_dp_size": 4, "tp_size": 8}, "--enable-dp-attention"),
        ({"attn_cp_size": 2}, "context parallelism"),
        ({"dcp_size": 2}, "context parallelism"),
        ({"enable_prefill_cp": True}, "context parallelism"),
        ({"disaggregation_mode": "prefill"}, "--disaggregation-mode"),
        ({"disaggregation_mode": "decode"}, "--disaggregation-mode"),
        ({"nnodes": 2, "tp_size": 16}, "--nnodes"),
        ({"elastic_ep_backend": "mooncake"}, "--elastic-ep-backend"),
        ({"enable_two_batch_overlap": True}, "--enable-two-batch-overlap"),
        ({"enable_pdmux": True}, "--enable-pdmux"),
    ],
)
def test_what_we_have_nothing_for_is_served_untouched_and_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: list[config.Settings],
    capsys: pytest.CaptureFixture[str],
    args: dict[str, Any],
    why: str,
) -> None:
    monkeypatch.setenv("AURORA_HOME", str(tmp_path / "home"))
    assert launch(**args) == "served" and started == []
    (line,) = lines(capsys)
    assert line.startswith("aurora-sgl: nothing is recorded, traced or swapped") and why in line
    assert environment.is_set(environment.IDLE)


def test_nextn_is_eagle_and_a_server_without_drafts_says_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: list[config.Settings],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AURORA_HOME", str(tmp_path / "home"))
    launch(speculative_algorithm="nextn")
    assert len(started) == 1 and len(lines(capsys)) == 1
    launch(speculative_algorithm=None)
    assert len(started) == 1 and lines(capsys) == []


@pytest.mark.parametrize(
    ("variables", "env_file", "is_on"),
    [
        ({}, "", False),
        ({"AURORA_GROUP": "a"}, "", False),
        ({"AURORA_HOME": "data"}, "", True),
        ({"AURORA_DATABASE_URL": "sqlite:///x.db"}, "", True),
        ({"AURORA_ENABLED": "1"}, "", True),
        ({"AURORA_ENABLED": ""}, "", False),
        ({}, "AURORA_HOME=data\n", True),
    ],
)
def test_a_package_that_is_merely_installed_records_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: list[config.Settings],
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    env_file: str,
    is_on: bool,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / ".env").write_text(env_file)
    assert launch() == "served"
    (line,) = lines(capsys)
    assert bool(started) is is_on and environment.is_set(environment.IDLE) is not is_on
    assert ("not switched on" in line and "AURORA_HOME" in line) is not is_on
    if not is_on:
        assert [path.name for path in tmp_path.iterdir()] == [".env"], "nothing was written"


@pytest.mark.parametrize("part", ["is_asked", "look_at_folders", "get_settings"])
def test_no_error_of_ours_keeps_sglang_from_starting(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    part: str,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("what nobody\nthought of")

    monkeypatch.setenv("AURORA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(startup, part, fail)
    assert launch() == "served"
    assert lines(capsys) == [
        "aurora-sgl: nothing is recorded, traced or swapped: RuntimeError: what nobody thought of"
    ]


def test_a_release_that_lacks_one_of_our_names_gets_no_hook(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    hooked: list[str] = []
    gone = "json.decoder.JSONDecoder.gone"
    monkeypatch.setattr(HookRegistry, "register", lambda name, *_: hooked.append(name))
    monkeypatch.setattr(plugin, "main_hooks", lambda: {"json.dumps": print, gone: print})
    plugin.register()
    assert hooked == []
    assert lines(capsys) == [
        f"aurora-sgl: nothing is recorded, traced or swapped: this SGLang has no {gone}; see "
        "aurora-sgl doctor"
    ]


@pytest.mark.parametrize("idle", ["1", "schedulers", ""])
def test_a_scheduler_of_a_server_that_is_left_alone_gets_no_hook(
    monkeypatch: pytest.MonkeyPatch, idle: str
) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    hooked: list[str] = []
    monkeypatch.setattr(HookRegistry, "register", lambda name, *_: hooked.append(name))
    monkeypatch.setattr(plugin, "scheduler_hooks", lambda: {"json.dumps": print})
    monkeypatch.setattr(plugin.multiprocessing, "parent_process", lambda: object())
    monkeypatch.setenv(environment.IDLE, idle)
    plugin.register()
    assert hooked == ([] if idle else ["json.dumps"])


def test_what_was_wrong_reaches_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.NOTICES, json.dumps({"data folder": "it is full."}))
    assert startup.notices_of_start() == {"data folder": "it is full."}
    monkeypatch.setenv(environment.NOTICES, "{")
    assert startup.notices_of_start() == {}
