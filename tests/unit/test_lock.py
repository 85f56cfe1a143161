"""The locked list for machines without a GPU, held to pyproject and to the packages' own words."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

#: What SGLang names for CUDA machines only; none of it is imported on a CPU.
CUDA_PACKAGES = {
    "cuda-python",
    "flash-attn-4",
    "flashinfer-python",
    "humming-kernels",
    "kernels",
    "nvidia-cutlass-dsl",
    "nvidia-mathdx",
    "nvshmem4py-cu13",
    "quack-kernels",
    "sgl-deep-ep",
    "sgl-deep-gemm",
    "sgl-flash-mla",
    "sglang-kernel",
    "tilelang",
}

#: What packages name for things that are not used here: other models, other endpoints, other
#: file systems, running the GGUF file with llama.cpp.
UNUSED_PACKAGES = {
    "anthropic",
    "blobfile",
    "build",
    "datasets",
    "deepseek-recipe",
    "llama-cpp-python",
    "llm",
    "mistral-common",
    "modelscope",
    "numba",
    "smg-grpc-servicer",
    "timm",
    "tml-renderers",
    "torchaudio",
    "torchcodec",
}

#: Pins of SGLang 0.5.23 that can't be had without CUDA: newer torch comes only with it.
OTHERWISE = {("sglang", "torch"): "==2.14.1"}


def locked() -> dict[str, str]:
    rows = (ROOT / "requirements" / "cpu.lock").read_text().splitlines()
    pins = [row.split("==") for row in rows if row and not row.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def requirements(*extras: str) -> list[Requirement]:
    optional = PROJECT["optional-dependencies"]
    rows = [*PROJECT["dependencies"], *(row for extra in extras for row in optional[extra])]
    return [Requirement(row) for row in rows]


def applies(requirement: Requirement, extras: set[str]) -> bool:
    if requirement.marker is None:
        return True
    return any(requirement.marker.evaluate({"extra": extra}) for extra in extras | {""})


def test_every_line_of_the_lock_pins_one_version() -> None:
    rows = (ROOT / "requirements" / "cpu.lock").read_text().splitlines()
    pins = [row for row in rows if row and not row.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9\-]+==[0-9][0-9a-z.]*", row) for row in pins)
    assert pins == sorted(pins, key=lambda row: row.split("==")[0])
    assert len(pins) == len(locked())


@pytest.mark.parametrize(
    "requirement", requirements("demo", "dev", "scale", "openid"), ids=lambda r: str(r.name)
)
def test_the_lock_satisfies_what_pyproject_asks_for(requirement: Requirement) -> None:
    version = locked().get(canonicalize_name(requirement.name))
    assert version is not None, f"{requirement.name} is not in requirements/cpu.lock"
    assert requirement.specifier.contains(version, prereleases=True), f"{requirement} != {version}"


def test_the_lock_holds_none_of_the_cuda_packages() -> None:
    cuda = {canonicalize_name(requirement.name) for requirement in requirements("cuda")} - {
        canonicalize_name(requirement.name) for requirement in requirements()
    }
    assert cuda <= CUDA_PACKAGES
    assert not (cuda | CUDA_PACKAGES) & locked().keys()
    # nvidia-ml-py asks a driver what GPUs there are; SGLang imports it on every machine.
    nvidia = {name for name in locked() if name.startswith(("nvidia-", "cuda-"))}
    assert nvidia == {"nvidia-ml-py"}


def test_the_lock_lacks_only_the_named_packages_of_what_its_own_packages_ask_for() -> None:
    pins = locked()
    seen: set[tuple[str, frozenset[str]]] = set()
    absent: set[str] = set()
    unsatisfied: list[str] = []
    queue = [
        (requirement, "aurora-sgl")
        for requirement in requirements("demo", "dev", "scale", "openid")
    ]
    while queue:
        requirement, asker = queue.pop()
        name = canonicalize_name(requirement.name)
        if name not in pins:
            absent.add(name)
            continue
        known = OTHERWISE.get((asker, name)) == str(requirement.specifier)
        if not known and not requirement.specifier.contains(pins[name], prereleases=True):
            unsatisfied.append(f"{asker} wants {requirement}, the lock has {pins[name]}")
        key = (name, frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            found = distribution(name)
        except PackageNotFoundError:  # an environment made with CUDA=1 may lack some of the list
            continue
        for row in found.requires or []:
            wanted = Requirement(row)
            if applies(wanted, set(requirement.extras)):
                queue.append((wanted, name))
    assert unsatisfied == []
    assert absent - UNUSED_PACKAGES - CUDA_PACKAGES == set()
    # In the environment of the lock itself, no name in the two lists above is out of date.
    if all(_installed(name) == version for name, version in pins.items()):
        assert absent == UNUSED_PACKAGES | CUDA_PACKAGES
    assert {name for name, _ in seen} - {"aurora-sgl"} <= pins.keys()


def _installed(name: str) -> str | None:
    try:
        return distribution(name).version.split("+")[0]
    except PackageNotFoundError:
        return None
