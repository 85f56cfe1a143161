"""SGLang's names that the plugin hooks or leans on, read out of SGLang's own files."""

from __future__ import annotations

import ast
import inspect
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from aurora_sgl.doctor import (
    SGLANG_FIRST,
    SGLANG_LAST,
    SGLANG_RUN,
    SGLANG_TESTED,
    is_supported,
)
from aurora_sgl.engine import plugin
from aurora_sgl.engine.plugin import UPSTREAM
from tools.upstream_names import RELEASES, Release, wheel_of

ROOT = Path(__file__).resolve().parents[3]


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
    assert SGLANG_TESTED in SGLANG_RUN and all(map(is_supported, SGLANG_RUN))
    assert f"sglang=={SGLANG_TESTED}" in (ROOT / "requirements" / "cpu.lock").read_text()
    assert f"sglang=={SGLANG_TESTED}" in (ROOT / "tools" / "setup_env.py").read_text()
    assert not is_supported("0.5.9") and not is_supported("unknown")


HOOKS = {name: ("around", hook) for name, hook in plugin.scheduler_hooks().items()}
HOOKS |= plugin.cpu_hooks()
HOOKS |= {
    name: ("around", hook)
    for name, hook in plugin.main_hooks().items()
    if name in plugin.MAIN_HOOKS
}
#: Left to SGLang there, since another hook does the work: see layer.target_layer.
SPARED = {"0.5.22": {"sglang.srt.models.llama.LlamaDecoderLayer.forward"}}
SPARED |= {"0.5.23": SPARED["0.5.22"]}


def refused(when: str, hook: Callable[..., object], arguments: ast.arguments) -> str:
    """Why a hook can't be called as SGLang calls what it stands at, with every argument by its
    place, and with every one but ``self`` by its name; empty: it can."""
    positional = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
    by_name = {each.arg: None for each in arguments.kwonlyargs}
    own = positional[:1] if positional[:1] == ["self"] else []
    named = {name: None for name in positional[len(own) :]} | by_name
    # The function that it goes around, or what SGLang's function returned.
    before = [None] if when in ("around", "after") else []
    try:
        inspect.signature(hook).bind(*before, *[None] * len(positional), **by_name)
        inspect.signature(hook).bind(*before, *[None] * len(own), **named)
        grown = named | {"an_argument_of_the_next_release": None}
        inspect.signature(hook).bind(*before, *[None] * len(own), **grown)
    except TypeError as error:
        return f"({', '.join([*positional, *by_name])}): {error}"
    return ""


def misfits(release: Release) -> dict[str, str]:
    """Hooked functions whose arguments our hooks don't take, and why."""
    found = {}
    for name, (when, hook) in HOOKS.items():
        arguments = release.parameters(name)
        why = refused(when, hook, arguments) if arguments else "its arguments can't be read"
        if why:
            found[name] = why
    return found


def left_to_sglang(release: Release) -> set[str]:
    """Compiled functions that stand aside because SGLang's are others."""
    found = set()
    for name, hook in plugin.compiled_hooks().items():
        arguments = release.parameters(name)
        if not arguments or not hook.fits([each.arg for each in arguments.args[1:]]):
            found.add(name)
    return found


def test_our_hooks_take_the_arguments_of_what_they_stand_at() -> None:
    assert misfits(Release.installed()) == {}
    assert left_to_sglang(Release.installed()) == SPARED.get(version("sglang"), set())


def arguments_of(source: str) -> ast.arguments:
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.FunctionDef)
    return node.args


def test_an_argument_that_a_hook_does_not_take_is_seen() -> None:
    def strict(original: object, layer: object, positions: object) -> None: ...
    def open_(original: object, layer: object, positions: object, **kw: object) -> None: ...

    grown = arguments_of("def forward(self, positions, capture_output=None): ...")
    renamed = arguments_of("def forward(self, places): ...")
    same = arguments_of("def forward(self, positions): ...")
    assert "too many" in refused("around", strict, grown)
    assert "too many" in refused("around", open_, grown)  # may come by its place
    assert "places" in refused("around", strict, renamed)
    assert "next_release" in refused("around", strict, same)
    assert refused("around", open_, same) == ""
    assert "too many" in refused("before", lambda self, **kw: None, same)
    assert refused("replace", lambda self, positions, **kw: None, same) == ""


def test_parameters_are_those_of_the_class_that_stands_last(tmp_path: Path) -> None:
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").write_text("")
    (tmp_path / "sglang" / "a.py").write_text(
        "class Layer:\n    def forward(self, x): ...\n    def both(self, y): ...\n"
    )
    (tmp_path / "sglang" / "b.py").write_text(
        "from sglang.a import Layer\n"
        "class Layer(Layer):\n    def forward(self, x, embeds): ...\n    field = 1\n"
        "def alone(*, name): ...\n"
    )
    release = Release(tmp_path)

    def names(of: str) -> list[str] | None:
        found = release.parameters(f"sglang.{of}")
        return [each.arg for each in (*found.args, *found.kwonlyargs)] if found else None

    assert names("b.Layer.forward") == ["self", "x", "embeds"]
    assert names("a.Layer.forward") == ["self", "x"]
    assert names("b.Layer.both") == ["self", "y"]
    assert names("b.alone") == ["name"]
    assert [names(of) for of in ("b.Layer.field", "b.Layer.other", "b.Other", "c.f")] == [None] * 4


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("release", [r for r in RELEASES if is_supported(r)])
def test_our_hooks_take_the_arguments_of_every_supported_release(release: str) -> None:
    upstream = Release.of_wheel(wheel_of(release))
    assert misfits(upstream) == {}
    assert left_to_sglang(upstream) == SPARED.get(release, set())


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
