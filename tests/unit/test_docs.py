"""README and docs/ say what the code has: settings, commands, tables, headers, links, paths."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from pydantic import BaseModel
from pydantic_settings import BaseSettings

from aurora_sgl import config, environment
from aurora_sgl.cli import app
from aurora_sgl.engine import labels
from aurora_sgl.store.models import Base
from aurora_sgl.training.settings import TrainSettings

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = (README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")))
#: Folders whose Python files may name settings, headers and the docs.
CODE = ("aurora_sgl", "dashboard", "migrations", "benchmarks", "tools", "tests")
README_BYTES = 7_000
#: Words of one cell.
README_CELL, DOCS_CELL = 25, 40
VARIABLE = re.compile(r"\bAURORA_[A-Z0-9]+(?:_[A-Z0-9]+)*\b(?!_)")
HEADER = re.compile(r"\bx-aurora-[a-z]+\b")


def text(name: str) -> str:
    return (DOCS / name).read_text()


@cache
def sources() -> dict[Path, str]:
    """Every Python file but this one."""
    files = (path for folder in CODE for path in (ROOT / folder).rglob("*.py"))
    return {path: path.read_text() for path in files if path != Path(__file__).resolve()}


@cache
def strings() -> tuple[str, ...]:
    """Of all code: docstrings and messages too, comments not."""
    found = []
    for content in sources().values():
        for node in ast.walk(ast.parse(content)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
                value = node.value
                found.append(value if isinstance(value, str) else value.decode("latin-1"))
    return tuple(found)


@cache
def in_code(pattern: re.Pattern[str]) -> set[str]:
    """What the strings of the code name."""
    return {name for value in strings() for name in pattern.findall(value)}


def in_docs(pattern: re.Pattern[str]) -> set[str]:
    return {name for page in PAGES for name in pattern.findall(page.read_text())}


def first_cells(page: str, section: str = "") -> list[str]:
    """What stands in backticks in the first cell of each row, in one section or in all."""
    content = text(page)
    if section:
        content = content.split(f"\n## {section}\n")[1].split("\n## ")[0]
    rows = (line.split("|")[1] for line in content.splitlines() if line.startswith("| `"))
    return [name for cell in rows for name in re.findall(r"`([^`]+)`", cell)]


# -- settings ----------------------------------------------------------------------------------


def settings_classes() -> list[type[BaseSettings]]:
    return [
        one
        for _, one in inspect.getmembers(config, inspect.isclass)
        if issubclass(one, BaseSettings) and one is not BaseSettings
    ]


def variables(one: type[BaseSettings]) -> list[str]:
    return [f"{one.model_config['env_prefix']}{name}".upper() for name in one.model_fields]


def test_every_setting_is_documented_and_every_documented_one_is_a_setting() -> None:
    fields = {name for one in settings_classes() for name in variables(one)}
    assert len(fields) > 40  # the reader sees them
    documented = [name for name in first_cells("settings.md") if name.startswith("AURORA_")]
    assert len(documented) == len(set(documented)), "documented twice"
    of_others = set(first_cells("settings.md", "Benchmarks and tests"))
    assert fields | set(config.NOT_FIELDS) == set(documented) - of_others


def test_every_variable_that_the_code_names_is_documented_and_the_other_way_round() -> None:
    """Also those of benchmarks, tools and tests: whoever adds one adds it to settings.md."""
    fields = {name for one in settings_classes() for name in variables(one)}
    named = in_code(VARIABLE) | fields
    assert named - set(VARIABLE.findall(text("settings.md"))) == set()
    assert in_docs(VARIABLE) - named == set()


@pytest.mark.parametrize("one", settings_classes(), ids=lambda one: one.__name__)
def test_documented_defaults_are_those_of_the_code(one: type[BaseSettings]) -> None:
    rows = _rows(text("settings.md"))
    for name, field in zip(variables(one), one.model_fields.values(), strict=True):
        said = rows[name][1]
        if said.startswith("`"):  # others say in words what follows from another setting
            assert _means(said.strip("`").removeprefix("./"), field), name


def test_every_knob_of_the_recipe_is_documented_with_its_default() -> None:
    knobs = first_cells("settings.md", "The recipe")
    assert knobs == [*dict.fromkeys(knobs)]
    assert set(knobs) == set(TrainSettings.model_fields)
    rows = _rows(text("settings.md"))
    for name, field in TrainSettings.model_fields.items():
        if rows[name][1].startswith("`"):
            assert _means(rows[name][1].strip("`"), field), name


def _rows(content: str) -> dict[str, list[str]]:
    """Cells of each table row, by the name in the first one."""
    rows = [_cells(line) for line in content.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): row for row in rows}


def _means(said: str, field: Any) -> bool:
    """Whether what a page says is the default of a field."""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, bool):
        return said == str(value).lower()
    if isinstance(value, int | float):
        return float(said) == value
    return said == str(list(value) if isinstance(value, tuple) else value)


def test_variables_of_ours_are_read_by_config_and_environment_alone() -> None:
    """A read past them is a setting that nobody finds."""
    readers = {ROOT / "aurora_sgl" / name for name in ("config.py", "environment.py")}
    offenders = []
    for path, content in sources().items():
        if path in readers or path.parts[len(ROOT.parts)] not in ("aurora_sgl", "dashboard"):
            continue
        offenders += [f"{path.relative_to(ROOT)}: {name}" for name in _reads(content)]
    assert offenders == []


def _reads(content: str) -> Iterator[str]:
    """Variables of ours in ``os.environ.get(...)``, ``os.getenv(...)`` and ``os.environ[...]``."""
    for node in ast.walk(ast.parse(content)):
        asked: list[ast.expr] = []
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "os.environ.get",
            "os.getenv",
            "environ.get",
            "getenv",
        ):
            asked = node.args[:1]
        elif (
            isinstance(node, ast.Subscript)
            and isinstance(node.ctx, ast.Load)
            and ast.unparse(node.value) in ("os.environ", "environ")
        ):
            asked = [node.slice]
        for one in asked:
            name = one.value if isinstance(one, ast.Constant) else ast.unparse(one)
            if "AURORA_" in str(name) or not isinstance(one, ast.Constant):
                yield str(name)


def test_the_reader_of_reads_sees_them() -> None:
    code = 'import os\nos.environ.get("AURORA_X")\nos.environ["AURORA_Y"]\nos.environ["PATH"]\n'
    assert list(_reads(code)) == ["AURORA_X", "AURORA_Y"]


def test_the_plugin_is_read_without_pydantic() -> None:
    """SGLang loads it in every process, also where it has nothing to do."""
    imported = {
        name
        for path in ("engine/plugin.py", "environment.py")
        for node in ast.parse((ROOT / "aurora_sgl" / path).read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or node.names[0].name]
    }
    assert not any("pydantic" in name or name == "aurora_sgl.config" for name in imported)
    assert environment.is_enabled()


# -- commands ----------------------------------------------------------------------------------


@cache
def commands() -> dict[str, click.Command]:
    """Every command by its whole name; of a group only what can be called alone."""
    found: dict[str, click.Command] = {}

    def walk(name: str, command: Any) -> None:
        inner = getattr(command, "commands", {})
        if not inner or getattr(command, "invoke_without_command", False):
            found[name] = command
        for part, one in inner.items():
            walk(f"{name} {part}", one)

    walk("aurora-sgl", typer.main.get_command(app))
    return found


def test_every_command_is_documented() -> None:
    said = text("commands.md")
    missing = [name for name in commands() if not re.search(rf"{re.escape(name)}\b", said)]
    assert missing == []


def flags_of(command: Any) -> set[str]:
    return {flag for one in command.params for flag in (*one.opts, *one.secondary_opts)}


@cache
def blocks(page: Path) -> tuple[str, ...]:
    """Lines of the indented and fenced blocks that are a shell's."""
    lines, fenced = [], False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line.strip())
    return tuple(line for line in lines if line.split()[:1] and _is_shell(line))


def _is_shell(line: str) -> bool:
    first = line.split()[0].rpartition("/")[2]
    return first in ("make", "aurora-sgl", "python", "pip") and "|" not in line.split()[1:2]


SPANS = re.compile(r"`((?:\.venv/bin/)?(?:aurora-sgl|make|python -m) [^`]+)`")


def shell_lines() -> list[tuple[str, str]]:
    """(page, line) of everything that a reader could type."""
    found = []
    for page in PAGES:
        lines = [*blocks(page), *SPANS.findall(page.read_text().replace("\n", " "))]
        found += [(page.name, line) for line in lines]
    return found


@pytest.mark.parametrize(("page", "line"), shell_lines())
def test_what_a_reader_can_type_exists(page: str, line: str) -> None:
    words = shlex.split(line.replace("[", " ").replace("]", " "), comments=True)
    program = words[0].rpartition("/")[2]
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all("=" in word or word in targets for word in words[1:]), line
    elif program == "python" and words[1] == "-m":
        assert importlib.util.find_spec(words[2]) is not None, line
        if words[2].startswith("benchmarks."):
            _check_flags_of_a_script(words[2], words[3:], line)
    elif program == "python":
        assert (ROOT / words[1]).is_file(), line
    elif program == "aurora-sgl":
        _check_command(words, line)


def _check_command(words: list[str], line: str) -> None:
    name, rest = "aurora-sgl", words[1:]
    known = {" ".join(one.split()[:n]) for one in commands() for n in range(1, 4)}
    while rest and f"{name} {rest[0]}" in known:
        name, rest = f"{name} {rest[0]}", rest[1:]
    if rest and name == "aurora-sgl":
        assert rest[0] in ("COMMAND", "--version", "--help", "X"), line
        return
    command = commands().get(name)
    if command is None:
        assert rest == [], f"{line}: {name} has no such command"
        return
    given = {word.partition("=")[0] for word in rest if word.startswith("--")} - {"--help"}
    if getattr(command, "ignore_unknown_options", False) or name == "aurora-sgl serve":
        return  # SGLang's flags
    assert given <= flags_of(command), line


def _check_flags_of_a_script(module: str, words: list[str], line: str) -> None:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text() + (ROOT / "benchmarks" / "servers.py").read_text()
    for word in words:
        if word.startswith("--"):
            assert f'"{word}"' in source, f"{line}: {module} has no {word}"


def test_flags_that_commands_md_names_are_flags_of_a_command() -> None:
    known = {flag for command in commands().values() for flag in flags_of(command)}
    known |= {"--help", "--version", "--tp-size", "--speculative-num-steps"}
    named = set(re.findall(r"`(--[a-z-]+)[^`*]*`", text("commands.md")))
    assert named - known == set()


# -- store and headers -------------------------------------------------------------------------


def views() -> set[str]:
    """What the migrations make, whoever of them."""
    return in_code(re.compile(r"CREATE VIEW (v_[a-z_]+)")) | in_code(re.compile(r"^v_[a-z_]+$"))


def test_every_table_and_view_is_documented_and_the_other_way_round() -> None:
    documented = set(first_cells("store.md"))
    tables = set(Base.metadata.tables)
    assert documented == tables | views()
    assert "v_rejected_tokens" in views()


def test_every_header_of_the_code_is_documented() -> None:
    """labels.py reads headers by what follows their prefix: the plain words of its reader."""
    page = text("commands.md")
    assert in_code(HEADER) == set(HEADER.findall(page))
    reader = ast.parse(inspect.getsource(labels.parse)).body[0]
    assert isinstance(reader, ast.FunctionDef)
    words = {
        node.value
        for node in ast.walk(reader)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if re.fullmatch(r"[a-z]+", node.value)
    }
    assert {"domain", "train"} <= words
    values = set(re.findall(r"`([a-z]+)`", page))
    assert [one for one in words if f"x-aurora-{one}" not in page and one not in values] == []


# -- links, paths, sizes -----------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", _without_blocks(page.read_text()), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        count = sum(1 for one in found if re.fullmatch(rf"{re.escape(name)}(-\d+)?", one))
        found.add(name if not count else f"{name}-{count}")
    return found


def _without_blocks(content: str) -> str:
    content = re.sub(r"^```.*?^```", "", content, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^    .*$", "", content, flags=re.MULTILINE)


def links() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        content = _without_blocks(page.read_text())
        for target in re.findall(r"]\(([^)\s]+)\)", content):
            if not re.match(r"[a-z]+:", target):
                found.append((str(page.relative_to(ROOT)), target))
    return found


@pytest.mark.parametrize(("page", "target"), links())
def test_links_lead_somewhere(page: str, target: str) -> None:
    path, _, anchor = target.partition("#")
    place = ((ROOT / page).parent / path).resolve() if path else ROOT / page
    assert place.exists(), target
    assert not anchor or anchor in anchors(place), target


def test_every_page_is_reached_from_the_readme() -> None:
    linked = set(re.findall(r"]\(docs/([a-z_]+\.md)", README.read_text()))
    assert linked == {page.name for page in DOCS.glob("*.md")}


PATH = re.compile(r"`((?:aurora_sgl|dashboard|migrations|benchmarks|tests|tools|deploy)/[\w./-]+)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = PATH.findall(page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    ("page", "begin"),
    [("security.md", "## Promises"), ("operations.md", "## Promises"), ("cases.md", "# Cases")],
)
def test_every_promise_and_case_names_tests_that_exist(page: str, begin: str) -> None:
    rows = text(page).partition(begin)[2].splitlines()
    named = sum(_tests_of(row) for row in rows)
    assert named > 20
    if page == "cases.md":
        told = [row for row in rows if re.match(r"\| (?!Case |---)", row)]
        assert len(told) > 50 and [row for row in told if not _tests_of(row)] == []


def _tests_of(row: str) -> int:
    """How many tests and files of tests a row names, all of which are there."""
    named, file = 0, ""
    for path, name in re.findall(r"`([\w/]*\.py)?(?:::(test_\w+))?`", row):
        file = path or file
        if not path and not name:
            continue
        files = [one for one in sources() if str(one).endswith(f"/{file}")]
        assert len(files) == 1, f"{file}: no such file, or several\n{row}"
        assert not name or f"def {name}(" in sources()[files[0]], f"{file}::{name}\n{row}"
        named += 1
    return named


def test_names_of_classes_and_functions_in_the_walks_exist() -> None:
    named = re.findall(r"`([A-Z]\w+)\.(\w+)`", text("internals.md"))
    everything = "\n".join(sources().values())
    for owner, member in named:
        assert f"class {owner}" in everything and f"def {member}(" in everything, owner


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def words_of(cell: str) -> int:
    return len(re.sub(r"]\([^)]*\)", "]", cell).split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_cells_are_short(page: Path) -> None:
    most = README_CELL if page == README else DOCS_CELL
    lines = _without_blocks(page.read_text()).splitlines()
    long = [
        cell
        for line in lines
        if line.startswith("|")
        for cell in _cells(line)
        if words_of(cell) > most
    ]
    assert long == []


def test_the_readme_is_read_in_three_minutes() -> None:
    assert len(README.read_bytes()) <= README_BYTES


def test_the_first_two_commands_of_the_readme_set_everything_up() -> None:
    assert [" ".join(line.split()[:2]) for line in blocks(README)[:2]] == ["make demo", "make test"]


def test_the_readme_has_six_headline_results_and_says_what_was_missed() -> None:
    section = README.read_text().split("\n## What was measured\n")[1].split("\n## ")[0]
    rows = [_cells(line) for line in section.splitlines() if line.startswith("| [")]
    assert len(rows) == 6
    assert all("docs/results.md#" in row[0] for row in rows)
    verdicts = [row[3] for row in rows]
    assert all("met" in verdict or "missed" in verdict for verdict in verdicts)
    assert any("missed" in verdict for verdict in verdicts)


def test_results_begin_with_what_falls_short_and_have_a_section_for_each_benchmark() -> None:
    content = text("results.md")
    assert re.findall(r"^## (.+)$", content, re.MULTILINE)[0] == "What falls short"
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        is_command = "argparse" in path.read_text() and "__main__" in path.read_text()
        if is_command and path.stem not in ("dashboard_data", "learning_jobs"):
            assert f"python -m benchmarks.{path.stem}" in content, path.name


def test_a_mention_of_the_readme_in_the_code_is_none_of_what_it_no_longer_says() -> None:
    """Pages are named by their path, which the test of paths follows."""
    named = {
        (path.relative_to(ROOT).as_posix(), page)
        for path, content in sources().items()
        for page in re.findall(r"\bdocs/([a-z_]+\.md)", content)
    }
    assert [one for one in named if not (DOCS / one[1]).exists()] == []


def test_the_source_distribution_takes_the_docs_along() -> None:
    import tomllib

    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert {"docs", "README.md", "CONTRIBUTING.md"} <= set(built["targets"]["sdist"]["include"])


def test_every_setting_says_what_it_means() -> None:
    """A docstring below the field: what ``docs/settings.md`` is written from."""
    tree = ast.parse((ROOT / "aurora_sgl" / "config.py").read_text())
    bare = []
    for owner in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, after in zip(owner.body, [*owner.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and not (
                isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            ):
                bare.append(f"{owner.name}.{ast.unparse(field.target)}")
    assert bare == []
    assert issubclass(TrainSettings, BaseModel)
