"""deploy/kubernetes: who finds and reaches whom, who sees which secret, what stands in one place
only, and what makes each overlay. See ``support.manifests``.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from aurora_sgl.config import Settings
from tests.support.manifests import (
    BUILDS,
    KUBERNETES,
    ROOT,
    Object,
    Pod,
    built,
    environment,
    kustomize,
    matches,
    mount_of,
    named,
    of,
    ours,
    pods,
    probes,
    variables,
)

DOCKER = ROOT / "deploy" / "docker"


# -- who talks to whom ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDS)
def test_selectors_find_the_pods_that_they_mean(name: str) -> None:
    objects, all_pods = built(name), pods(built(name))
    for one in of(objects, "Deployment", "StatefulSet"):
        labels = one["spec"]["template"]["metadata"]["labels"]
        assert matches(one["spec"]["selector"], labels)
        others = [
            pod for pod in all_pods if pod.owner != f"{one['kind']}/{one['metadata']['name']}"
        ]
        assert not [pod for pod in others if matches(one["spec"]["selector"], pod.labels)]
        for constraint in one["spec"]["template"]["spec"].get("topologySpreadConstraints", ()):
            assert matches(constraint["labelSelector"], labels)
    for one in of(objects, "Service"):
        selector = {"matchLabels": one["spec"]["selector"]}
        behind = [pod for pod in all_pods if matches(selector, pod.labels)]
        assert len(behind) == 1, one["metadata"]["name"]
        ports = {each["name"]: each["containerPort"] for each in behind[0].main["ports"]}
        for port in one["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    for one in of(objects, "PodDisruptionBudget"):
        assert [pod for pod in all_pods if matches(one["spec"]["selector"], pod.labels)]
    for one in of(objects, "ServiceMonitor"):
        services = [
            each
            for each in of(objects, "Service")
            if matches(one["spec"]["selector"], each["metadata"]["labels"])
        ]
        assert len(services) == 1
        ports = {port["name"]: port["port"] for port in services[0]["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in one["spec"]["endpoints"]} <= ports.keys()


def policies(objects: list[Object], pod: Pod, direction: str) -> list[Object]:
    return [
        one["spec"]
        for one in of(objects, "NetworkPolicy")
        if direction in one["spec"]["policyTypes"]
        and matches(one["spec"]["podSelector"], pod.labels)
    ]


def peers(rules: list[Object], port: int) -> list[Object]:
    """Who is let in to a port."""
    return [
        peer
        for rule in rules
        if port in [one["port"] for one in rule.get("ports", [{"port": port}])]
        for peer in rule["from"]
    ]


@pytest.mark.parametrize("name", BUILDS)
def test_every_pod_is_closed_and_every_port_of_a_service_is_opened_for_somebody(name: str) -> None:
    objects = built(name)
    deny = named(objects, "NetworkPolicy", "aurora-deny")["spec"]
    assert not deny.get("ingress") and not deny.get("egress")
    for pod in pods(objects):
        for direction in ("Ingress", "Egress"):
            assert deny in policies(objects, pod, direction), pod.owner
        rules = [
            rule for one in policies(objects, pod, "Ingress") for rule in one.get("ingress", ())
        ]
        assert all(rule["from"] for rule in rules), "everybody is let in"
        for service in of(objects, "Service"):
            if matches({"matchLabels": service["spec"]["selector"]}, pod.labels):
                for port in service["spec"]["ports"]:
                    assert peers(rules, port["port"]), f"{pod.owner}: {port['port']}"
    # Policies that name our own pods name some that there are, and none is about nobody.
    for one in of(objects, "NetworkPolicy"):
        assert any(matches(one["spec"]["podSelector"], pod.labels) for pod in pods(objects))


@pytest.mark.parametrize("name", ["base", "cpu", "gateway", "ray"])
def test_metrics_are_for_prometheus_alone(name: str) -> None:
    objects = built(name)
    for pod in pods(objects):
        rules = [
            rule for one in policies(objects, pod, "Ingress") for rule in one.get("ingress", ())
        ]
        for port in (8510, 8520, 29000):
            for peer in peers(rules, port):
                own = peer.get("podSelector", {}).get("matchExpressions")  # Ray's pods, each other
                assert own or "monitoring" in str(peer["namespaceSelector"]), pod.owner


def test_behind_the_gateway_nobody_else_sends_requests_to_a_server() -> None:
    objects = built("gateway")
    rules = named(objects, "NetworkPolicy", "aurora-server")["spec"]["ingress"]
    gateway = next(pod for pod in pods(objects) if pod.owner == "Deployment/aurora-gateway")
    clients = [peer for peer in peers(rules, 30000) if "namespaceSelector" not in peer]
    assert len(clients) == 1 and matches(clients[0]["podSelector"], gateway.labels)
    server = next(pod for pod in pods(objects) if pod.owner == "StatefulSet/aurora-server")
    arguments = gateway.main["args"]
    labels = arguments[arguments.index("--selector") + 1 :]
    wanted = dict(one.split("=") for one in labels[: [*map(flag, labels), True].index(True)])
    assert wanted and wanted.items() <= server.labels.items()


def flag(word: str) -> bool:
    return word.startswith("--")


def test_behind_a_gateway_that_may_drop_headers_nothing_is_learnt_without_a_yes() -> None:
    """sglang-router from 0.3.1 on drops x-aurora-train, a "no" too."""
    objects = built("gateway")
    server = next(pod for pod in pods(objects) if pod.owner == "StatefulSet/aurora-server")
    assert environment(objects, server.main)["AURORA_TRAIN_BY_DEFAULT"] == "false"
    dockerfile = (KUBERNETES / "overlays" / "gateway" / "Dockerfile").read_text()
    release = re.search(r"sglang-router==(\S+)", dockerfile)
    gateway = next(pod for pod in pods(objects) if pod.owner == "Deployment/aurora-gateway")
    assert release and gateway.main["image"] == f"aurora-gateway:{release[1]}"


# -- secrets -------------------------------------------------------------------------------------


@cache
def declared() -> dict[str, set[str]]:
    """Keys by Secret: those of the example, and what components say that they need beside it."""
    found = {
        one["metadata"]["name"]: set(one["data"])
        for one in kustomize(KUBERNETES / "secrets.example")
    }
    for path in (KUBERNETES / "components").glob("*/kustomization.yaml"):
        for name, key in re.findall(r"generic ([\w-]+) --from-literal=(\w+)", path.read_text()):
            found.setdefault(name, set()).add(key)
    return found | {"aurora-s3": {"credentials"}}


def secrets_of(volume: Object) -> Iterator[tuple[str, set[str], bool]]:
    """(Secret, keys, whether the pod starts without it) of one volume."""
    if "secret" in volume:
        secret = volume["secret"]
        keys = {one["key"] for one in secret.get("items", ())}
        yield secret["secretName"], keys, secret.get("optional", False)
    for source in volume.get("projected", {}).get("sources", ()):
        secret = source["secret"]
        keys = {one["key"] for one in secret["items"]}
        yield secret["name"], keys, secret.get("optional", False)


@pytest.mark.parametrize("name", BUILDS)
def test_secrets_are_files_whose_keys_are_declared_and_a_pod_sees_its_own(name: str) -> None:
    for pod in pods(built(name)):
        for container in pod.containers:
            assert "secretKeyRef" not in str(container) and "secretRef" not in str(container)
        component = pod.labels["app.kubernetes.io/component"]
        for volume in pod.spec.get("volumes", ()):
            for secret, keys, optional in secrets_of(volume):
                assert secret in declared() and keys <= declared()[secret], f"{secret}: {keys}"
                needed = {"aurora-database", "aurora-postgres"}
                if component == "upgrade":
                    needed.add("aurora-database-owner")
                assert optional is (secret not in needed)
                if secret in ("aurora-notify", "aurora-api", "aurora-database-owner"):
                    assert component in ("scheduler", "upgrade")
        mounted = {one["name"] for one in pod.main.get("volumeMounts", ())}
        assert "owner" not in mounted, "the owner's address is for the upgrade of the schema alone"


def test_keys_of_our_secrets_are_named_after_settings_and_hold_placeholders() -> None:
    folder = KUBERNETES / "secrets.example"
    for one in kustomize(folder):
        for key, value in one["data"].items():
            assert b"CHANGE-ME" in base64.b64decode(value)
            assert key == "token" or key.upper() in variables()
    for path in KUBERNETES.rglob("kustomization.yaml"):
        used = yaml.safe_load(path.read_text())
        places = [*used.get("resources", ()), *used.get("components", ())]
        assert not [place for place in places if "secrets.example" in place], path


def as_the_kubelet_does(folder: Path, files: dict[str, str]) -> None:
    """A mounted Secret: links to a folder that an update exchanges at once."""
    real = folder / "..2026_11_30_13_00_00.1"
    real.mkdir(parents=True)
    (folder / "..data").symlink_to(real.name)
    for name, content in files.items():
        (real / name).write_text(content)
        (folder / name).symlink_to(f"..data/{name}")


@pytest.mark.parametrize("with_owner", [True, False])
def test_the_upgrade_of_the_schema_logs_in_as_the_owner_where_there_is_one(
    with_owner: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_the_kubelet_does(tmp_path / "writer", {"aurora_database_url": "postgresql://writer@db/a\n"})
    owner = {"aurora_database_url": "postgresql://owner@db/a\n"} if with_owner else {}
    as_the_kubelet_does(tmp_path / "owner", owner)
    scheduler = named(built("base"), "Deployment", "aurora-scheduler")
    migrate = scheduler["spec"]["template"]["spec"]["initContainers"][0]
    folders = {"/run/secrets/owner": "owner", "/run/secrets/aurora": "writer"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AURORA_DATABASE_URL", raising=False)
    for variable in ("AURORA_SECRETS", "CREDENTIALS_DIRECTORY"):
        folder = environment(built("base"), migrate)[variable]
        assert mount_of(migrate, folder)
        monkeypatch.setenv(variable, str(tmp_path / folders[folder]))
    login = "owner" if with_owner else "writer"
    assert Settings().database_url == f"postgresql://{login}@db/a"


# -- one source ----------------------------------------------------------------------------------


def test_the_rules_of_the_operator_are_those_of_prometheus() -> None:
    path = KUBERNETES / "components" / "monitoring" / "generate.py"
    spec = importlib.util.spec_from_file_location("generate", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.MADE.read_text() == module.made(), f"run: python {path.relative_to(ROOT)}"
    assert len(yaml.safe_load(module.made())["spec"]["groups"]) > 0


def test_what_is_scraped_has_the_labels_that_alerts_and_board_go_by(tmp_path: Path) -> None:
    targets = (ROOT / "deploy" / "monitoring" / "targets.yml").read_text()
    lines = {
        "resources": [os.path.relpath(KUBERNETES / "base", tmp_path)],
        "configMapGenerator": [
            {"name": "aurora-settings", "behavior": "merge", "literals": ["AURORA_GROUP=team"]}
        ],
        "components": [os.path.relpath(KUBERNETES / "components" / "monitoring", tmp_path)],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(lines))
    for objects, group in ((built("gateway"), "default"), (kustomize(tmp_path), "team")):
        monitors = of(objects, "ServiceMonitor")
        each = [endpoint for one in monitors for endpoint in one["spec"]["endpoints"]]
        labels = [{rule["targetLabel"]: rule for rule in one["relabelings"]} for one in each]
        assert {one["group"]["replacement"] for one in labels} == {group}
        jobs = {one["job"]["replacement"] for one in labels}
        assert len(jobs) == len(each) and jobs <= set(re.findall(r"\bjob: ([\w-]+)", targets))
        servers = {one["job"]["replacement"] for one in labels if "server" in one}
        assert servers == {"sglang", "aurora-sidecar"}


def test_users_folders_and_the_model_are_those_of_the_images() -> None:
    for name, tag in (("base", "cuda"), ("cpu", "cpu")):
        image = (DOCKER / ("Dockerfile" if tag == "cuda" else "Dockerfile.cpu")).read_text()
        uid = re.search(r"^ARG UID=(\d+)$", image, re.MULTILINE)
        assert uid is not None and f"aurora-sgl:{tag}" in image
        for pod in filter(ours, pods(built(name))):
            assert pod.main["image"] == f"aurora-sgl:{tag}"
            security = pod.spec["securityContext"]
            assert {security[one] for one in ("runAsUser", "runAsGroup", "fsGroup")} == {
                int(uid[1])
            }
    server = next(pod for pod in pods(built("cpu")) if pod.owner == "Deployment/aurora-server")
    model = environment(built("cpu"), server.main)["MODEL"]
    assert f'"--model", "{model}"' in (DOCKER / "Dockerfile.cpu").read_text()
    assert "nvidia" not in json.dumps(built("cpu"))


# -- overlays ------------------------------------------------------------------------------------


def test_ranks_of_a_group_differ_from_a_server_by_what_makes_them_ranks() -> None:
    server = named(built("base"), "Deployment", "aurora-server")["spec"]["template"]["spec"]
    leader, worker = pods(of(built("lws"), "LeaderWorkerSet"))
    assert leader.spec == worker.spec
    more = leader.main["args"][len(server["containers"][0]["args"]) :]
    assert leader.main["args"][: -len(more)] == server["containers"][0]["args"]
    assert more == [
        "--drafter=$(DRAFTER)",
        "--tp-size=$(TP_SIZE)",
        "--dist-init-addr=$(LWS_LEADER_ADDRESS):20102",
        "--nnodes=$(LWS_GROUP_SIZE)",
        "--node-rank=$(LWS_WORKER_INDEX)",
    ]
    given = environment(built("lws"), leader.main)
    size = of(built("lws"), "LeaderWorkerSet")[0]["spec"]["leaderWorkerTemplate"]["size"]
    gpus = int(leader.main["resources"]["limits"]["nvidia.com/gpu"])
    assert int(given["TP_SIZE"]) == size * gpus
    assert probes(leader.main) == probes(server["containers"][0])


def test_a_run_on_ray_finds_as_many_workers_as_its_recipe_asks_for() -> None:
    from ray.train.v2._internal import constants

    objects = built("ray")
    job = named(objects, "RayJob", "aurora-trainer")["spec"]
    cluster = job["rayClusterSpec"]
    head, trainer = pods([named(objects, "RayJob", "aurora-trainer")])
    recipe = json.loads(environment(objects, head.main)["AURORA_SCHEDULER_RECIPE"])
    assert recipe["workers"] == cluster["workerGroupSpecs"][0]["maxReplicas"] > 1
    assert job["entrypoint"].endswith(" aurora-sgl scheduler")
    shared = re.search(r"TMPDIR=(\S+)", job["entrypoint"])
    assert shared is not None
    for pod in (head, trainer):  # both see the same folder
        mount = mount_of(pod.main, shared[1])
        volume = next(one for one in pod.spec["volumes"] if mount and one["name"] == mount["name"])
        assert volume["persistentVolumeClaim"] == {"claimName": "aurora-artifacts"}
    assert constants.WORKER_GROUP_START_TIMEOUT_S_ENV_VAR in environment(objects, head.main)
    lock = (ROOT / "requirements" / "cpu.lock").read_text()
    release = re.search(r"^ray==(\S+)$", lock, re.MULTILINE)
    dockerfile = (KUBERNETES / "overlays" / "ray" / "Dockerfile").read_text()
    assert release and cluster["rayVersion"] == release[1]
    assert f"]=={release[1]}" in dockerfile
    assert not [one for one in of(objects, "Deployment") if "scheduler" in one["metadata"]["name"]]


def test_with_an_object_store_nobody_mounts_a_shared_volume_for_artifacts() -> None:
    for name in ("base+monitoring+s3+trainer-gpu", "gateway+s3"):
        objects = built(name)
        claims = {one["metadata"]["name"] for one in of(objects, "PersistentVolumeClaim")}
        assert "aurora-artifacts" not in claims and "aurora-models" in claims
        for pod in filter(ours, pods(objects)):
            assert environment(objects, pod.main)["AURORA_ARTIFACTS"].startswith("s3://")
            assert "/var/lib/aurora-artifacts" not in str(pod.main["volumeMounts"])


def test_a_trainer_with_a_gpu_is_one_and_lets_it_go_before_the_next() -> None:
    scheduler = named(built("base+monitoring+s3+trainer-gpu"), "Deployment", "aurora-scheduler")
    spec = scheduler["spec"]
    assert spec["replicas"] == 1 and spec["strategy"] == {"type": "Recreate"}
    limits = spec["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1" and limits["memory"]
