"""The layouts that are refused, in the words of users, through SGLang's own parser."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import aurora_sgl.compat  # noqa: F401  (torchvision must import before transformers asks for it)
from aurora_sgl.doctor import SGLANG_RUN
from aurora_sgl.engine import layouts
from tools.upstream_names import Release, wheel_of

RANKS = ("--tp-size", "2")
REFUSED = [
    ("--pp-size", "2"),
    (*RANKS, "--dp-size", "2", "--enable-dp-attention"),
    (*RANKS, "--attn-cp-size", "2"),
    (*RANKS, "--dcp-size", "2"),
    (*RANKS, "--enable-prefill-cp"),
    ("--disaggregation-mode", "prefill"),
    ("--disaggregation-mode", "decode"),
    (*RANKS, "--nnodes", "2", "--dist-init-addr", "127.0.0.1:9"),
    ("--elastic-ep-backend", "mooncake"),
    ("--enable-two-batch-overlap",),
    ("--enable-pdmux",),
]
TAKEN = [
    (),
    RANKS,
    ("--dp-size", "2"),
    (*RANKS, "--dp-size", "2"),
    ("--disaggregation-mode", "null"),
]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 96}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refusal(target: Path, flags: tuple[str, ...]) -> str:
    from sglang.srt.server_args import prepare_server_args

    given = ["--model-path", str(target), "--device", "cpu", "--skip-server-warmup"]
    return layouts.refusal(prepare_server_args([*given, *flags]))


@pytest.mark.parametrize("flags", REFUSED, ids=" ".join)
def test_a_layout_that_was_never_run_is_refused_by_a_flag_that_its_user_wrote(
    target: Path, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    line = refusal(target, flags)
    assert line.endswith("serving is untouched")
    assert any(flag in line for flag in flags) or "context parallelism" in line


@pytest.mark.parametrize("flags", TAKEN, ids=" ".join)
def test_ranks_and_replicas_of_one_machine_are_taken(
    target: Path, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert refusal(target, flags) == ""


def sizes(release: Release) -> set[str]:
    """The sizes of groups of processes that a release can be given."""
    module = "sglang.srt.arg_groups.fields.parallel"
    tree = release.tree(module)
    assert tree is not None, f"{module} is gone: where are the sizes now?"
    names = {node.target.id for node in ast.walk(tree) if is_field(node)}
    return {name for name in names if name.endswith("_size") or name == "nnodes"}


def is_field(node: ast.AST) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)


@pytest.mark.parametrize("release", SGLANG_RUN)
def test_every_size_of_a_release_is_taken_or_refused_on_purpose(release: str) -> None:
    refused = {field for one in layouts.REFUSED for field in one.fields}
    taken = {"tp_size", "dp_size"}  # run by tests/e2e/test_ranks.py
    #: They divide the experts among the tensor-parallel ranks, which make their steps together.
    taken |= {"ep_size", "moe_dp_size", "moe_dense_tp_size", "dwdp_size", "shared_experts_tp_size"}
    taken |= {"pp_max_micro_batch_size", "elastic_ep_initial_size", "max_ep_size"}
    assert sizes(Release.of_wheel(wheel_of(release))) - refused <= taken
