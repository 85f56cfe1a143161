"""deploy/systemd: what systemd's own tools say of the units, the installer, and all of it in a
system that systemd has booted."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aurora_sgl import config, environment
from tests.support import booted_systemd
from tests.support.booted_systemd import Machine
from tests.support.sidecar_engine import wait_until
from tests.unit.test_docs import settings_classes, variables

FOLDER = Path(__file__).parents[3] / "deploy" / "systemd"
INSTALL = FOLDER / "install.sh"
SERVICES = sorted(path.name for path in FOLDER.glob("*.service"))
UNITS = [*SERVICES, "aurora-backup.timer", "aurora.target"]
SCRIPTS = sorted(FOLDER.glob("*.sh"))
#: Of systemd-analyze: from 0 (all is closed) to 10.
EXPOSURE = 4.0
#: What each unit leaves open on purpose, by the names of systemd-analyze's table. DeviceAllow: of
#: the clock, which ProtectClock lets be read.
OPEN = {"PrivateNetwork", "IPAddressDeny", "RestrictAddressFamilies_AF_INET_INET6",
        "RestrictAddressFamilies_AF_UNIX", "RootDirectoryOrRootImage", "ProcSubset",
        "PrivateMounts", "DeviceAllow"}  # fmt: skip
OPEN_FOR_THE_GPU = {"PrivateDevices", "MemoryDenyWriteExecute", "PrivateUsers",
                    "RestrictAddressFamilies_AF_NETLINK", "SystemCallFilter_resources",
                    "SystemCallFilter_debug"}  # fmt: skip


def run(*command: object, **kw: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **kw
    )  # type: ignore[call-overload,no-any-return]


def install(*arguments: object, **kw: object) -> subprocess.CompletedProcess[str]:
    return run(INSTALL, *arguments, **kw)


def words_of(unit: str, name: str) -> list[str]:
    """What a unit's file says under a name, line by line."""
    lines = (FOLDER / unit).read_text().splitlines()
    return [line.partition("=")[2] for line in lines if line.startswith(f"{name}=")]


# -- what tools say ----------------------------------------------------------------------------


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    """A root in which all of it lies, with systemd's own units."""
    root = tmp_path / "root"
    done = install("--destdir", root)
    assert done.returncode == 0, done.stderr
    shutil.copytree("/lib/systemd/system", root / "lib/systemd/system", symlinks=True)
    command = root / "opt/aurora-sgl/bin/aurora-sgl"
    command.parent.mkdir(parents=True)
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    return root


def test_systemd_finds_nothing_wrong_with_any_unit(staged: Path) -> None:
    done = run("systemd-analyze", "verify", f"--root={staged}", *UNITS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    server = staged / "usr/local/lib/systemd/system/aurora-server.service"
    server.write_text(server.read_text().replace("\nKillMode", "\nKilMode"))
    done = run("systemd-analyze", "verify", f"--root={staged}", server.name)
    assert "KilMode" in done.stderr  # it would say so


@pytest.mark.parametrize("unit", SERVICES)
def test_a_unit_is_closed_but_for_what_its_file_says(unit: str) -> None:
    asked = ("systemd-analyze", "security", "--offline=true")
    whole = run(*asked, f"--threshold={EXPOSURE * 10:.0f}", "--no-pager", FOLDER / unit)
    assert whole.returncode == 0, whole.stdout[-200:]
    rows = json.loads(run(*asked, "--json=short", FOLDER / unit).stdout)
    left_open = {row["json_field"] for row in rows if row["set"] is False and row["exposure"]}
    allowed = OPEN if unit == "aurora-backup.service" else OPEN | OPEN_FOR_THE_GPU
    assert left_open <= allowed
    assert len(rows) > 60  # the reader of the table sees it


def test_shellcheck_finds_nothing_in_the_scripts() -> None:
    done = run("shellcheck", "--severity=style", *SCRIPTS)
    assert (done.returncode, done.stdout) == (0, "")
    assert len(SCRIPTS) == 3 and all(os.access(path, os.X_OK) for path in SCRIPTS)


# -- what the files say of each other ----------------------------------------------------------


def test_every_variable_is_a_setting_and_every_flag_of_a_command_is_in_the_environment_file() -> (
    None
):
    example = (FOLDER / "aurora.env.example").read_text()
    named = set(re.findall(r"^#?([A-Z_]+)=", example, re.MULTILINE))
    settings = {name for one in settings_classes() for name in variables(one)}
    assert {name for name in named if name.startswith("AURORA_")} <= settings | {
        environment.LOG_FORMAT
    }
    used = {
        name
        for unit in SERVICES
        for line in words_of(unit, "ExecStart")
        for name in re.findall(r"\$\{?([A-Z_]+)", line)
    }
    assert used == {"MODEL", "SERVE_FLAGS", "SCHEDULER_FLAGS", "DASHBOARD_FLAGS"} <= named
    assert set(re.findall(r"credentials/(\w+)", example)) == credentials()


def test_defaults_that_the_environment_file_shows_are_those_of_the_code() -> None:
    example = (FOLDER / "aurora.env.example").read_text()
    defaults = {
        name: str(field.get_default(call_default_factory=True)).lower()
        for one in settings_classes()
        for name, field in zip(variables(one), one.model_fields.values(), strict=True)
    }
    shown = dict(re.findall(r"^#(AURORA_[A-Z_]+)=(.*)$", example, re.MULTILINE))
    compared = {name for name in shown if defaults.get(name)} - {"AURORA_HOME"}
    assert {name: float_or_text(shown[name]) for name in compared} == {
        name: float_or_text(defaults[name]) for name in compared
    }
    assert len(compared) > 8
    folder = words_of("aurora-server.service", "Environment")[0].split()[0]
    assert folder == "AURORA_HOME=%S/aurora" and shown["AURORA_HOME"] == "/var/lib/aurora"


def float_or_text(value: str) -> float | str:
    return float(value) if re.fullmatch(r"[0-9.]+", value) and value.count(".") < 2 else value


def credentials() -> set[str]:
    lines = [line for unit in SERVICES for line in words_of(unit, "LoadCredential")]
    names = {line.partition(":")[0] for line in lines}
    assert all(line == f"{(n := line.partition(':')[0])}:/etc/aurora/credentials/{n}"
               for line in lines)  # fmt: skip
    return names


def test_every_secret_is_a_credential_of_who_needs_it_and_of_nobody_else() -> None:
    settings = {name.lower() for one in settings_classes() for name in variables(one)}
    assert credentials() - {"hf_token"} <= settings
    secret = {
        f"{one.model_config['env_prefix']}{name}".lower()
        for one in settings_classes()
        for name, field in one.model_fields.items()
        if "SecretStr" in str(field.annotation)
    }
    scheduler = {line.partition(":")[0] for line in
                 words_of("aurora-scheduler.service", "LoadCredential")}  # fmt: skip
    assert secret | {"aurora_database_url"} <= scheduler
    for unit in ("aurora-dashboard.service", "aurora-backup.service"):
        assert [line.partition(":")[0] for line in words_of(unit, "LoadCredential")] == [
            "aurora_database_url"
        ]


def test_a_credential_of_systemd_is_a_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty one, as the installer makes it, is a setting that is not set."""
    for name in ("aurora_scheduler_api_token", "aurora_notify_webhook"):
        (tmp_path / name).write_text("")
    (tmp_path / "aurora_database_url").write_text("postgresql+psycopg://a:b@c/d\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    monkeypatch.delenv("AURORA_DATABASE_URL", raising=False)
    assert config.Settings().database_url == "postgresql+psycopg://a:b@c/d"
    assert config.SchedulerSettings().api_token.get_secret_value() == ""
    assert config.NotifySettings().webhook.get_secret_value() == ""


def test_what_a_process_gets_to_end_is_longer_than_it_takes() -> None:
    """Seconds by the code of each, and of SGLang: see the comments in the units."""
    from aurora_sgl.sidecar.supervisor import STOP_SECONDS
    from dashboard.server import GRACE_SECONDS

    least = {"aurora-server": 15 + 60 + STOP_SECONDS, "aurora-scheduler": 20 + 3,
             "aurora-dashboard": GRACE_SECONDS + 5}  # fmt: skip
    for name, seconds in least.items():
        (stop,) = words_of(f"{name}.service", "TimeoutStopSec")
        said = {"5min": 300, "1min": 60, "30": 30}[stop]
        assert said > seconds
        assert words_of(f"{name}.service", "KillMode") == ["mixed"]
        assert words_of(f"{name}.service", "Restart") == ["on-failure"]


# -- the installer -----------------------------------------------------------------------------


def tree(root: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path.relative_to(root)): (path.stat().st_mode & 0o7777, path.read_text())
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_it_installs_twice_and_takes_away_what_it_brought(tmp_path: Path) -> None:
    root = tmp_path / "a b"
    assert install("--destdir", root, "--venv", "/srv/venv", "--prefix", "/usr").returncode == 0
    first = tree(root)
    units = {name for name in first if name.startswith("usr/lib/systemd/system/")}
    assert {Path(name).name for name in units} == set(UNITS)
    server = first["usr/lib/systemd/system/aurora-server.service"][1]
    assert "ExecStart=/srv/venv/bin/aurora-sgl serve" in server
    backup = first["usr/lib/systemd/system/aurora-backup.service"][1]
    assert "ExecStart=/usr/lib/aurora-sgl/aurora-backup /srv/venv/bin/aurora-sgl" in backup
    assert "/opt/aurora-sgl/" not in "".join(content for _, content in first.values())
    assert first["etc/aurora/aurora.env"][0] == 0o640
    assert {mode for name, (mode, _) in first.items() if "/credentials/" in name} == {0o600}
    assert (root / "etc/aurora/credentials").stat().st_mode & 0o777 == 0o700

    settings, secret = root / "etc/aurora/aurora.env", "etc/aurora/credentials/aurora_database_url"
    settings.write_text("MODEL=/srv/model\n")
    (root / secret).write_text("postgresql://x")
    (root / "usr/lib/systemd/system/aurora.target").write_text("of an older release")
    again = install("--destdir", root, "--venv", "/srv/venv", "--prefix", "/usr")
    assert again.returncode == 0 and f"{settings} stays as it is" in again.stdout
    assert settings.read_text() == "MODEL=/srv/model\n"
    assert (root / secret).read_text() == "postgresql://x"
    kept = {"etc/aurora/aurora.env", secret}
    assert {n: v for n, v in tree(root).items() if n not in kept} == {
        n: v for n, v in first.items() if n not in kept
    }

    for _ in range(2):
        gone = install("--destdir", root, "--prefix", "/usr", "--uninstall")
        assert gone.returncode == 0 and "What stays" in gone.stdout
        assert set(tree(root)) == {n for n in first if n.startswith("etc/aurora/")} - {
            "etc/aurora/aurora.env.example"
        }
    assert settings.read_text() == "MODEL=/srv/model\n"


def test_a_link_in_the_place_of_settings_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "etc/aurora").mkdir(parents=True)
    (tmp_path / "etc/aurora/aurora.env").symlink_to("/nowhere/aurora.env")
    assert install("--destdir", tmp_path).returncode == 0
    assert os.readlink(tmp_path / "etc/aurora/aurora.env") == "/nowhere/aurora.env"


def test_a_dry_run_says_all_and_changes_nothing(tmp_path: Path) -> None:
    said = install("--destdir", tmp_path, "--dry-run").stdout
    assert f"would write {tmp_path}/usr/local/lib/systemd/system/aurora-server.service" in said
    assert tree(tmp_path) == {} and list(tmp_path.iterdir()) == []
    assert install("--destdir", tmp_path).returncode == 0
    before = tree(tmp_path)
    assert "would run: rm -f" in install("--destdir", tmp_path, "--dry-run", "--uninstall").stdout
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nonsense"],
        ["install"],
        ["--venv"],
        ["--venv", ""],
        ["--venv", "opt/aurora"],
        ["--venv", "/opt/a b"],
        ["--venv", "/opt/%n"],
        ["--venv", "/opt/$HOME"],
        ["--venv", "/opt/a|b;touch x"],
        ["--venv", "/opt/a\nExecStart=/bin/sh"],
        ["--venv", "/opt/../root"],
        ["--venv", "/"],
        ["--prefix", "usr"],
        ["--prefix", "/usr/'"],
        ["--prefix", "/usr/./x/.."],
        ["--destdir", ""],
        ["--destdir", "relative"],
        ["--destdir", "/"],
        ["--destdir"],
    ],
    ids=repr,
)
def test_what_it_cannot_do_it_refuses_in_one_line(arguments: list[str], tmp_path: Path) -> None:
    if "--destdir" not in arguments:
        arguments = ["--destdir", str(tmp_path / "root"), *arguments]
    done = install(*arguments, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("install.sh: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes another user")
def test_only_root_installs_on_a_machine_and_only_root_acts_as_the_services() -> None:
    with tempfile.TemporaryDirectory() as place:
        copied = shutil.copytree(FOLDER, Path(place) / "systemd")
        Path(place).chmod(0o755)
        for script in ("install.sh", "aurora-sgl.sh"):
            done = run("setpriv", "--reuid", 65534, "--clear-groups", copied / script)
            assert done.returncode == 1 and done.stderr.count("\n") == 1
            assert "only root" in done.stderr


def test_an_environment_that_services_cannot_see_is_refused(tmp_path: Path) -> None:
    """Before anything is done to this machine."""
    missing = install("--venv", tmp_path, "--dry-run")
    assert missing.returncode == 1 and missing.stderr.count("\n") == 1
    assert "bin/aurora-sgl is missing" in missing.stderr
    command = tmp_path / "bin/aurora-sgl"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    hidden = install("--venv", tmp_path, "--dry-run")
    assert hidden.returncode == 1 and hidden.stdout == "" and hidden.stderr.count("\n") == 1
    assert "the services can't see it" in hidden.stderr


def test_the_backup_refuses_settings_that_are_none(tmp_path: Path) -> None:
    script = FOLDER / "aurora-backup.sh"
    for settings, arguments, words in (
        ({"BACKUP_FOLDER": str(tmp_path)}, [], "say which command"),
        ({"BACKUP_FOLDER": "here"}, ["/bin/false"], "no absolute path"),
        ({"BACKUP_FOLDER": str(tmp_path / "none")}, ["/bin/false"], "is no folder"),
        ({"BACKUP_FOLDER": str(tmp_path), "BACKUP_KEEP": "0"}, ["/bin/false"], "no number"),
        ({"BACKUP_FOLDER": str(tmp_path), "BACKUP_KEEP": "1x"}, ["/bin/false"], "no number"),
        ({"BACKUP_FOLDER": str(tmp_path)}, ["/bin/false"], "no backup was made (exit code 1)"),
    ):
        done = run(script, *arguments, env={"PATH": os.environ["PATH"], **settings})
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and words in done.stderr


# -- all of it, in a system --------------------------------------------------------------------


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    if why := booted_systemd.why_not():
        pytest.skip(why)
    with booted_systemd.booted(tmp_path_factory.mktemp("system")) as one:
        yield one


def test_services_run_closed_in_and_end_in_order(machine: Machine) -> None:
    """From nothing to running services, a backup, a command of root's, and to nothing again."""
    machine.run(f"{booted_systemd.SOURCE}/deploy/systemd/install.sh")
    assert "aurora:x:" in machine.run("getent", "passwd", "aurora").stdout
    _start(machine)
    _look_at_processes(machine)
    _back_up(machine)
    _be_root(machine)
    _stop(machine)
    machine.run(f"{booted_systemd.SOURCE}/deploy/systemd/install.sh", "--uninstall")
    assert "not-found" in machine.show("aurora-scheduler", "LoadState").values()
    assert machine.run("ls", "/var/lib/aurora/aurora.db", "/etc/aurora/aurora.env").stdout


def _start(machine: Machine) -> None:
    token = "a token of the read-only API"
    machine.run("sh", "-c", 'echo "$0" >/etc/aurora/credentials/aurora_scheduler_api_token', token)
    machine.run("sh", "-c", "echo AURORA_LOG_FORMAT=json >>/etc/aurora/aurora.env")
    units = ("aurora.target", "aurora-scheduler", "aurora-dashboard", "aurora-backup.timer")
    machine.run("systemctl", "enable", "--now", *units)
    for url in ("8510/readyz", "8501/_stcore/health", "8511/openapi.json"):
        wait_until(lambda: machine.get(f"http://127.0.0.1:{url}")[0] == 200, 60, url)  # noqa: B023
    for unit in ("aurora-scheduler", "aurora-dashboard"):
        lines = machine.journal(unit).splitlines()
        assert lines and all("message" in json.loads(line) for line in lines)
    assert machine.show("aurora-backup.timer", "ActiveState") == {"ActiveState": "active"}


def _look_at_processes(machine: Machine) -> None:
    for unit in ("aurora-scheduler", "aurora-dashboard"):
        pid = machine.show(unit, "MainPID")["MainPID"]
        status = machine.run("cat", f"/proc/{pid}/status").stdout
        uid = machine.run("id", "-u", "aurora").stdout.strip()
        assert re.search(rf"^Uid:\t{uid}\t{uid}\t{uid}\t{uid}$", status, re.MULTILINE)
        assert "CapEff:\t0000000000000000" in status and "NoNewPrivs:\t1" in status
        assert "Seccomp:\t2" in status
        # As the process sees it: no home of anybody, and nothing to write to but its own.
        look = "ls -A /root /home; touch /usr/x"
        seen = machine.run("nsenter", "-t", pid, "-m", "sh", "-c", look, check=False)
        assert seen.stdout.split() == ["/home:", "/root:"] and "Read-only" in seen.stderr
    modes = machine.run("stat", "-c", "%a %U", "/var/lib/aurora", "/var/cache/aurora").stdout
    assert modes.splitlines() == ["700 aurora", "700 aurora"]


def _back_up(machine: Machine) -> None:
    """Of older backups those go that are too many; what has no name of a whole one stays."""
    folder = "/var/lib/aurora-backups"
    whole, left = "20200{}01T000000Z", ".20200101T000000Z.abc"
    machine.run("install", "-d", "-o", "aurora", folder, f"{folder}/{left}", f"{folder}/mine")
    for month in range(1, 10):
        older = f"{folder}/{whole.format(month)}"
        machine.run("install", "-d", "-o", "aurora", older)
        machine.run("install", "-o", "aurora", "/dev/null", f"{older}/manifest.json")
    machine.run("systemctl", "start", "aurora-backup")
    names = machine.run("ls", "-A", folder).stdout.split()
    assert [one for one in names if one.startswith("20200")] == [
        whole.format(month) for month in range(4, 10)
    ]
    (new,) = set(names) - {"mine"} - {whole.format(month) for month in range(1, 10)}
    files = machine.run("stat", "-c", "%a %U %n", f"{folder}/{new}/manifest.json").stdout
    assert files == f"600 aurora {folder}/{new}/manifest.json\n"
    assert f"{folder}/{new} is whole: " in machine.journal("aurora-backup")


def _be_root(machine: Machine) -> None:
    """``aurora-sgl`` of root acts as the services do, with every argument as it was given."""
    command = ("aurora-sgl", "promote", "1", "--reason", "$5 a ${DAY}", "--group", "no $x")
    refused = machine.run(*command, check=False)
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert "aurora-sgl: there is no deployment group 'no $x'" in refused.stderr


def _stop(machine: Machine) -> None:
    began = time.monotonic()
    machine.run("systemctl", "stop", "aurora-scheduler", "aurora-dashboard")
    assert time.monotonic() - began < 40
    for unit in ("aurora-scheduler", "aurora-dashboard"):
        ended = machine.show(unit, "Result", "ExecMainCode", "ExecMainStatus")
        assert ended == {"Result": "success", "ExecMainCode": "1", "ExecMainStatus": "0"}, unit
