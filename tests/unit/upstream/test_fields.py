"""What our code reads of SGLang's objects, held against the classes of every supported release.

A field that a release dropped fails at run time only, in the middle of a step. Here the fields are
read out of our own source: whatever stands behind a name of ``MEANT`` must be there.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import pytest

from aurora_sgl.doctor import is_supported
from tools.upstream_names import RELEASES, Release, wheel_of

ENGINE = Path(__file__).resolve().parents[3] / "aurora_sgl" / "engine"
_SRT = "sglang.srt."
_WORKER = f"{_SRT}speculative.eagle_worker_v2."
_INPUT = f"{_SRT}speculative.eagle_info."
_POOL = f"{_SRT}mem_cache.memory_pool."
_BATCH = f"{_SRT}managers.schedule_batch."
_AMX = f"{_SRT}layers.attention.intel_amx_backend."
#: Our names for SGLang's objects, and what they may be.
MEANT = {
    "req": (f"{_BATCH}Req",),
    "batch": (f"{_BATCH}ScheduleBatch", f"{_SRT}model_executor.forward_batch_info.ForwardBatch"),
    "forward_batch": (f"{_SRT}model_executor.forward_batch_info.ForwardBatch",),
    "forward_mode": (f"{_SRT}model_executor.forward_batch_info.ForwardMode",),
    "spec_info": tuple(
        f"{_INPUT}{name}"
        for name in ("EagleDraftInput", "EagleVerifyInput", "EagleDraftExtendInput")
    ),
    "result": (f"{_SRT}managers.utils.GenerationBatchResult",),
    "scheduler": (f"{_SRT}managers.scheduler.Scheduler",),
    "received": (f"{_SRT}managers.io_struct.TokenizedGenerateReqInput",),
    "sampling_params": (f"{_SRT}sampling.sampling_params.SamplingParams",),
    "worker": (f"{_WORKER}EAGLEWorkerV2",),
    "draft_worker": (f"{_WORKER}EagleDraftWorker",),
    "target_worker": (f"{_SRT}managers.tp_worker.TpModelWorker",),
    "runner": (f"{_SRT}model_executor.model_runner.ModelRunner",),
    "draft_runner": (f"{_SRT}model_executor.model_runner.ModelRunner",),
    "model_runner": (f"{_SRT}model_executor.model_runner.ModelRunner",),
    "model_config": (f"{_SRT}configs.model_config.ModelConfig",),
    "req_to_token_pool": (f"{_POOL}ReqToTokenPool",),
    "pool": (f"{_POOL}MHATokenToKVPool",),
    "tree_cache": (f"{_SRT}mem_cache.radix_cache.RadixCache",),
    "match": (f"{_SRT}mem_cache.base_prefix_cache.MatchResult",),
    "backend": (f"{_AMX}IntelAMXAttnBackend", f"{_AMX}IntelAMXMultiStepDraftBackend"),
}


def fields_read(tree: ast.AST) -> set[tuple[str, str]]:
    """``(name, field)`` of every ``name.field`` and ``other.name.field``; ``getattr`` with a
    default asks for what may be absent, and fields that we set ourselves are ours."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
            continue
        of = node.value
        name = of.id if isinstance(of, ast.Name) else getattr(of, "attr", "")
        if name in MEANT and not node.attr.startswith(("_aurora", "aurora_")):
            found.add((name, node.attr))
    return found


@cache
def read_by_us() -> frozenset[tuple[str, str]]:
    files = sorted(ENGINE.rglob("*.py"))
    return frozenset().union(*(fields_read(ast.parse(file.read_bytes())) for file in files))


#: Asked for in one of two ways: each release has one of them.
EITHER = (
    f"{_SRT}mem_cache.base_prefix_cache.MatchResult.device_indices",
    f"{_SRT}mem_cache.base_prefix_cache.BasePrefixCache.path_device_indices",
)


def absent(
    release: Release, fields: Iterable[tuple[str, str]], meant: Mapping[str, tuple[str, ...]]
) -> list[str]:
    return sorted(
        f"{name}.{field}"
        for name, field in fields
        if not any(release.has(f"{kind}.{field}") for kind in meant[name])
    )


def test_our_source_is_read_with_its_detours() -> None:
    source = (
        "def f(req, batch, other):\n    req.rid, batch.reqs[0].skipped, other.batch.spec_info.x\n"
        "    req._aurora, getattr(req, 'maybe', None), other.rid\n    req.set_by_us = 1\n"
    )
    found = fields_read(ast.parse(source))
    assert found == {("req", "rid"), ("batch", "reqs"), ("batch", "spec_info"), ("spec_info", "x")}
    read = read_by_us()
    assert {("req", "origin_input_ids"), ("batch", "req_pool_indices")} <= read and len(read) > 40


def test_a_field_that_a_release_dropped_is_seen(tmp_path: Path) -> None:
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").write_text("")
    (tmp_path / "sglang" / "a.py").write_text(
        "class Base:\n    kept: int\n"
        "class Req(Base):\n    def __init__(self):\n        self.set = 1\n"
        "    @property\n    def asked(self): ...\n"
    )
    fields = [("req", name) for name in ("kept", "set", "asked", "dropped")]
    assert absent(Release(tmp_path), fields, {"req": ("sglang.a.Req",)}) == ["req.dropped"]


def test_the_installed_sglang_has_every_field_that_is_read() -> None:
    assert absent(Release.installed(), read_by_us(), MEANT) == []
    assert len(Release.installed().missing(EITHER)) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("release", [r for r in RELEASES if is_supported(r)])
def test_every_supported_release_has_every_field_that_is_read(release: str) -> None:
    upstream = Release.of_wheel(wheel_of(release))
    assert absent(upstream, read_by_us(), MEANT) == []
    assert len(upstream.missing(EITHER)) == 1
