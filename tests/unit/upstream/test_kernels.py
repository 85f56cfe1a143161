"""The compiled kernels that SGLang asks for on a CPU, read out of every supported release: each of
them must be ours, since the module that has them is on no package index."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from aurora_sgl.doctor import is_supported
from aurora_sgl.engine.cpu import attention, linear, locations, sampling, tree
from tools.upstream_names import RELEASES, Release, wheel_of

OURS = {name for part in (locations, sampling, tree) for name in part.KERNELS}
OURS_BY_OPERATOR = {name for part in (attention, linear) for name in part.KERNELS}
#: Where what we serve runs through: EAGLE and EAGLE3 over ordinary attention.
FOLDERS = ("kernels/ops/speculative", "kernels/ops/kvcache", "srt/speculative", "srt/mem_cache")
BACKEND = "sglang.srt.layers.attention.intel_amx_backend"
UTILS = "sglang.srt.speculative.eagle_utils"
NOT_SERVED = {"rotate_input_ids_cpu"}  # of drafters of several layers


def trees_of(release: Release) -> Iterator[ast.Module]:
    for folder in FOLDERS:
        for file in sorted((release.root / "sglang" / folder).iterdir(), key=lambda f: f.name):
            module = f"sglang.{folder.replace('/', '.')}.{file.name.removesuffix('.py')}"
            if file.name.endswith(".py") and (found := release.tree(module)) is not None:
                yield found


def imported(tree: ast.AST) -> set[str]:
    """Names from ``sgl_kernel``, wherever in a module they are imported."""
    return {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "sgl_kernel"
        for alias in node.names
    }


def operators(tree: ast.AST) -> set[str]:
    """Names behind ``torch.ops.sgl_kernel``."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr == "sgl_kernel"
    }


def lacking(release: Release) -> set[str]:
    asked = {name for t in trees_of(release) for name in imported(t) if name.endswith("_cpu")}
    assert len(asked) >= 8, "nothing was read"
    backend = release.tree(BACKEND)
    assert backend is not None
    attend = {name for name in operators(backend) if "attention" in name}
    assert attend, "nothing was read"
    return (asked - OURS - NOT_SERVED) | (attend - OURS_BY_OPERATOR)


def not_reached(release: Release) -> set[str]:
    """Kernels of sampled verification that are put where this release does not look."""
    utils = release.tree(UTILS)
    assert utils is not None
    by_import = imported(utils)
    places = [place for place in sampling.PLACES if release.tree(place) is not None]
    return {
        name
        for name in sampling.KERNELS
        if name not in by_import
        and not (release.has(f"{UTILS}.{name}") and any(release.has(f"{p}.{name}") for p in places))
    }


def test_every_kernel_that_the_installed_sglang_asks_for_is_ours() -> None:
    assert lacking(Release.installed()) == set()
    assert not_reached(Release.installed()) == set()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("release", [r for r in RELEASES if is_supported(r)])
def test_every_kernel_that_a_supported_release_asks_for_is_ours(release: str) -> None:
    upstream = Release.of_wheel(wheel_of(release))
    assert lacking(upstream) == set()
    assert not_reached(upstream) == set()
