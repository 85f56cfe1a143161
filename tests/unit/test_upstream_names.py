"""SGLang's names that the plugin hooks or leans on, read out of SGLang's own files."""

from __future__ import annotations

import ast
import inspect
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from aurora_sgl.doctor import SGLANG_FIRST, SGLANG_LAST, SGLANG_TESTED, is_supported
from aurora_sgl.engine import plugin
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


def original(*args: object, **kw: object) -> None:
    """Stands where a hook is given the function that it goes around."""


def refused(hook: Callable[..., object], arguments: ast.arguments) -> str:
    """Why a hook can't be called as SGLang calls what it goes around, with every argument by its
    place, and with every one but ``self`` by its name; empty: it can."""
    positional = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
    by_name = {each.arg: None for each in arguments.kwonlyargs}
    own = positional[:1] if positional[:1] == ["self"] else []
    named = {name: None for name in positional[len(own) :]} | by_name
    try:
        inspect.signature(hook).bind(original, *[None] * len(positional), **by_name)
        inspect.signature(hook).bind(original, *[None] * len(own), **named)
    except TypeError as error:
        return f"({', '.join([*positional, *by_name])}): {error}"
    return ""


def misfits(release: Release) -> dict[str, str]:
    """Hooked functions whose arguments our hooks don't take, and why."""
    hooks = {**plugin.scheduler_hooks(), **plugin.compiled_hooks()}
    found = {}
    for name, hook in hooks.items():
        arguments = release.parameters(name)
        if arguments is not None and (why := refused(hook, arguments)):
            found[name] = why
    return found


def test_our_hooks_take_the_arguments_of_what_they_go_around() -> None:
    release = Release.installed()
    hooks = {**plugin.scheduler_hooks(), **plugin.compiled_hooks()}
    assert [name for name in hooks if release.parameters(name) is None] == []
    assert misfits(release) == {}


def test_an_argument_that_a_hook_does_not_take_is_seen() -> None:
    def hook(original: object, layer: object, positions: object) -> None: ...

    grown = ast.parse("def forward(self, positions, capture_output=None): ...").body[0]
    renamed = ast.parse("def forward(self, places): ...").body[0]
    same = ast.parse("def forward(self, positions): ...").body[0]
    assert isinstance(grown, ast.FunctionDef) and isinstance(renamed, ast.FunctionDef)
    assert isinstance(same, ast.FunctionDef)
    assert "too many" in refused(hook, grown.args) and "places" in refused(hook, renamed.args)
    assert refused(hook, same.args) == ""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("release", [r for r in RELEASES if is_supported(r)])
def test_our_hooks_take_the_arguments_of_every_supported_release(release: str) -> None:
    assert misfits(Release.of_wheel(wheel_of(release))) == {}


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
