"""SGLang's names that the plugin hooks or leans on, read out of SGLang's own files."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from aurora_sgl.doctor import SGLANG_FIRST, SGLANG_LAST, SGLANG_TESTED, is_supported
from aurora_sgl.engine.plugin import UPSTREAM
from tools.upstream_names import RELEASES, Release, wheel_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", UPSTREAM)
def test_the_installed_sglang_has_every_name_that_the_plugin_leans_on(name: str) -> None:
    assert Release.installed().has(name), f"SGLang has no {name} any more"


def test_the_reader_follows_imports_bases_and_fields(tmp_path: Path) -> None:
    package = tmp_path / "sglang"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from sglang.b import Child\n"
        "class Base:\n    field: int = 0\n    def go(self):\n        self.later = 1\n"
    )
    (package / "b.py").write_text(
        "from sglang.a import Base as Parent\n"
        "class Child(Parent):\n    async def own(self): ...\n"
        "try:\n    import fast\nexcept ImportError:\n    fast = None\n"
    )
    release = Release(tmp_path)
    there = ["b.Child.own", "b.Child.go", "b.Child.field", "b.Child.later", "b.Parent.go", "b.fast"]
    assert release.missing(f"sglang.{name}" for name in [*there, "a", "b"]) == []
    absent = ["c", "a.Child", "b.Child.other", "b.Other", "a.Base.go.x.y"]
    names = [f"sglang.{name}" for name in absent]
    assert release.missing(names) == names


def test_one_range_of_releases_stands_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    sglang = next(r for r in map(Requirement, project["dependencies"]) if r.name == "sglang")
    for release in RELEASES:
        assert sglang.specifier.contains(release) == is_supported(release), release
    assert is_supported(SGLANG_FIRST) and is_supported(SGLANG_LAST)
    assert f"sglang=={SGLANG_TESTED}" in (ROOT / "requirements" / "cpu.lock").read_text()
    assert f"sglang=={SGLANG_TESTED}" in (ROOT / "tools" / "setup_env.py").read_text()
    assert not is_supported("0.5.9") and not is_supported("unknown")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_supported_releases_are_those_that_have_every_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    missing = {
        release: Release.of_wheel(wheel_of(release)).missing(UPSTREAM) for release in RELEASES
    }
    with capsys.disabled():
        print()
        for release, names in missing.items():
            print(f"  sglang {release}: {'lacks ' + ', '.join(names) if names else 'supported'}")
    assert {r for r, names in missing.items() if not names} == set(filter(is_supported, RELEASES))
