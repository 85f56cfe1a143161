"""From ``aurora-sgl serve`` to a running SGLang: what is checked and made before it starts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from aurora_sgl import memory, store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.config import Settings
from aurora_sgl.draft_shape import DraftShape, ReplayedShape
from aurora_sgl.drafter import architectures, checkpoint, hub, scratch, served
from aurora_sgl.drafter.target import TargetInfo, read_target
from aurora_sgl.engine import pool
from aurora_sgl.engine.flags import server_flags, value_of
from aurora_sgl.environment import CPU, DRAFTER_SOURCE
from aurora_sgl.errors import AuroraError
from aurora_sgl.hashing import sha256_bytes
from aurora_sgl.private import users_own
from aurora_sgl.processes.server import port_is_free
from aurora_sgl.rollout.versions import fetch_verified
from aurora_sgl.store import queries

SCRATCH = "scratch"
_DEFAULT_PORT = 30000
_DRAFTER_REVISION = "--speculative-draft-model-revision"
GIB = 1024**3


@dataclass(frozen=True)
class ServePlan:
    """How SGLang is going to be started."""

    flags: list[str]
    environment: dict[str, str]
    drafter: Path
    note: str  # one line for people: which drafter, and why
    room: str = ""  # the same about the memory of the KV cache; empty: SGLang or the user decides


def runs_on_cpu(args: list[str]) -> bool:
    """Whether the server will use our CPU kernels: asked for, or no CUDA device is there."""
    device = value_of(args, "--device")
    if device is not None:
        return device == "cpu"
    import torch

    return not torch.cuda.is_available()


def plan(
    model: str,
    drafter: str | None,
    sglang_args: list[str],
    settings: Settings,
    *,
    sample_texts: Iterable[str] = (),
) -> ServePlan:
    """Check everything that would stop the server later, and choose the drafter.

    ``model`` and ``drafter`` are folders or names on the hub (``org/name``), which are downloaded
    when this machine's cache does not have them. ``drafter`` may be ``scratch``, or None: then
    the live version of the deployment group, or an untrained drafter when the group has none.
    Raises ``AuroraError`` with one line for a missing model, a drafter of another target, a port in
    use, a store that is out of reach or read-only to this user or role.
    """
    folder_of_target = _fetch(model, "model", sglang_args, "--revision")
    target = read_target(folder_of_target, model=model)
    port = int(value_of(sglang_args, "--port") or _DEFAULT_PORT)
    host = value_of(sglang_args, "--host") or "127.0.0.1"
    if not port_is_free(host, port):
        raise AuroraError(f"port {port} on {host} is in use: choose another with --port")
    store.require_writable(settings.store_url)
    engine = store.connect(settings.store_url)
    if drafter not in (None, SCRATCH):
        drafter = str(_fetch(str(drafter), "drafter", sglang_args, _DRAFTER_REVISION))
    try:
        store.upgrade(engine)
        folder, note = _choose(drafter, folder_of_target, target, settings, engine, sample_texts)
        replayed = _replayed(engine, settings) if drafter is None else None
    finally:
        engine.dispose()
    problems = checkpoint.validate(folder, target)
    if problems:
        raise AuroraError(f"the drafter {folder} cannot serve {model}: {problems[0]}")
    on_cpu = runs_on_cpu(sglang_args)
    config = architectures.read_config(folder, target_layers=target.num_layers)
    algorithm = architectures.named(config.architecture).algorithm
    length = _length(target, sglang_args)
    given, folder = (
        folder,
        served.folder_for(folder, config, length, settings.home.resolve() / "drafters"),
    )
    if folder != given:
        note += f", served from {folder}"
    flags = server_flags(
        model, str(folder), algorithm, sglang_args, on_cpu=on_cpu, replayed=replayed
    )
    room = ""
    if on_cpu and (kv := _pool(target, folder, flags)) is not None:
        flags += ["--max-total-tokens", str(kv.tokens)]
        room = f"KV cache: {kv.tokens:,} tokens, {kv.bytes / GIB:.1f} GiB"
    environment = _environment(settings, on_cpu)
    if given.name.startswith(SCRATCH):
        environment[DRAFTER_SOURCE] = SCRATCH
    return ServePlan(flags, environment, folder, note, room)


def _fetch(place: str, what: str, sglang_args: list[str], revision: str) -> Path:
    """The folder of a model that may be a name on the hub, in the cache that SGLang looks into."""
    return hub.fetch(
        place,
        what,
        revision=value_of(sglang_args, revision),
        cache=value_of(sglang_args, "--download-dir"),
    )


def _length(target: TargetInfo, sglang_args: list[str]) -> int:
    """Tokens of the longest request, which SGLang asks of the drafter too."""
    asked = value_of(sglang_args, "--context-length")
    return int(asked) if asked and asked.isdecimal() else served.context_length(target.raw)


def _pool(target: TargetInfo, drafter: Path, flags: list[str]) -> pool.Pool | None:
    """The KV pool of a server on CPU; None when the user's flags say how large it is."""
    of_drafter = json.loads((drafter / "config.json").read_text())
    dtype = value_of(flags, "--dtype") or "bfloat16"
    return pool.choose([target.raw, of_drafter], flags, memory.available(), dtype=dtype)


def _environment(settings: Settings, on_cpu: bool) -> dict[str, str]:
    environment = {"AURORA_HOME": str(settings.home.resolve())}
    if on_cpu:
        environment[CPU] = "1"
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
    return environment


def _choose(
    drafter: str | None,
    model: Path,
    target: TargetInfo,
    settings: Settings,
    engine: Engine,
    sample_texts: Iterable[str],
) -> tuple[Path, str]:
    if drafter not in (None, SCRATCH):
        return _existing(Path(str(drafter))), f"drafter: {drafter}"
    live = _live(engine, settings) if drafter is None else None
    if live is not None:
        folder, version_id = live
        return folder, f"drafter: version {version_id}, live in group '{settings.group}'"
    return _untrained(model, target, settings, sample_texts), "drafter: untrained"


def _existing(folder: Path) -> Path:
    if not (folder / "config.json").exists():
        raise AuroraError(f"no drafter at {folder}: give a folder with config.json, or 'scratch'")
    return folder


def _live(engine: Engine, settings: Settings) -> tuple[Path, int] | None:
    """The live version's weights in a local folder; None when the group has none yet."""
    with store.session(engine) as s:
        version_id = _live_id(s, settings)
        if version_id is None:
            return None
        version = queries.versions.version(s, version_id)
        into = settings.home.resolve() / "drafters" / version.weights_sha256[:16]
        return fetch_verified(ArtifactRoot(settings.artifact_root), version, into), version.id


def _live_id(s: Session, settings: Settings) -> int | None:
    """The version that the group's servers should run; None when nothing was promoted yet."""
    group_ids = {group.name: group.id for group in queries.groups.groups(s)}
    desired = (
        queries.aliases.desired_version(s, group_ids[settings.group])
        if settings.group in group_ids
        else None
    )
    return None if desired is None else desired[0]


def _replayed(engine: Engine, settings: Settings) -> ReplayedShape | None:
    """What replay said of the group's live version; None when it was never judged."""
    with store.session(engine, write=False) as s:
        version_id = _live_id(s, settings)
        for one in queries.evaluations.evaluations(s, version_id) if version_id is not None else ():
            if one.kind == "replay" and one.domain == "" and one.candidate_accept_length:
                shape = DraftShape(one.depth or 1, one.topk or 1, one.nodes or 0)
                return ReplayedShape(shape, one.candidate_accept_length)
    return None


def _untrained(
    model: Path, target: TargetInfo, settings: Settings, sample_texts: Iterable[str]
) -> Path:
    """An untrained drafter for this target, made once and kept."""
    name = sha256_bytes(f"{model.resolve()}|{sorted(target.raw.items(), key=str)}".encode())[:12]
    folder = settings.home.resolve() / "drafters" / f"scratch-{name}"
    if not (folder / checkpoint.WEIGHTS).exists():
        checkpoint.save(scratch.make(model, texts=sample_texts), folder)
    return folder


def serve(model: str, drafter: str | None, sglang_args: list[str], settings: Settings) -> None:
    """Become the server: replaces this process. Raises ``AuroraError`` before that."""
    serve_plan = plan(model, drafter, sglang_args, settings)
    for line in (f"{serve_plan.note}; store: {_shown(settings)}", serve_plan.room):
        if line:
            print(f"aurora-sgl: {line}", file=sys.stderr, flush=True)
    os.environ.update(serve_plan.environment)
    with users_own():  # SGLang is not ours
        os.execv(
            sys.executable, [sys.executable, "-m", "aurora_sgl.engine.launch", *serve_plan.flags]
        )


def _shown(settings: Settings) -> str:
    from sqlalchemy import make_url

    return make_url(settings.store_url).render_as_string(hide_password=True)
