"""A Dockerfile as steps, the words of its variables, and what of a folder its build may see.

What `tools/try_dockerfile.py` needs of BuildKit's reading, and no more: an instruction, flag or
form that is not read here is refused by its line, never guessed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

INSTRUCTIONS = frozenset(
    (
        *("ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL"),
        *("RUN", "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"),
    )
)
#: Those whose words have variables in them; RUN, CMD and ENTRYPOINT leave them to their shell.
EXPANDED = INSTRUCTIONS - {"RUN", "CMD", "ENTRYPOINT", "HEALTHCHECK", "SHELL"}


class BadDockerfile(Exception):
    """One line: what is not understood, and where."""


@dataclass(frozen=True)
class Step:
    line: int
    name: str  # of the instruction, in capitals
    flags: tuple[tuple[str, str], ...]  # of --name=value, without the dashes
    text: str  # what follows

    def words(self) -> list[str]:
        """A JSON array, or what stands between blanks."""
        listed = exec_form(self.text)
        return self.text.split() if listed is None else listed


@dataclass
class Stage:
    image: str  # what it is made from: an image, or an earlier stage
    name: str
    steps: list[Step] = field(default_factory=list)


def read(text: str, build_args: Mapping[str, str]) -> list[Stage]:
    """The stages, first to last; their FROM has its variables filled in."""
    given: dict[str, str] = {}
    stages: list[Stage] = []
    for step in steps(text):
        if step.name == "FROM":
            words = expand(step.text, given).split()
            named = len(words) == 3 and words[1].upper() == "AS"
            if len(words) != 1 and not named:
                raise BadDockerfile(f"line {step.line}: FROM {step.text}")
            stages.append(Stage(words[0], words[2] if named else ""))
        elif stages:
            stages[-1].steps.append(step)
        elif step.name == "ARG":
            name, value = argument(step, given, build_args)
            given[name] = value
        else:
            raise BadDockerfile(f"line {step.line}: {step.name} before FROM")
    if not stages:
        raise BadDockerfile("it has no FROM")
    return stages


def steps(text: str) -> Iterator[Step]:
    """Instructions with their continued lines joined, without comments."""
    started, parts = 0, []
    for number, raw in enumerate(text.splitlines(), start=1):
        row = raw.strip()
        if not row or row.startswith("#"):
            continue
        started = started or number
        parts.append(row.removesuffix("\\").rstrip() if row.endswith("\\") else row)
        if not row.endswith("\\"):
            yield _step(started, " ".join(parts))
            started, parts = 0, []
    if parts:
        raise BadDockerfile(f"line {started}: goes on beyond the end")


def _step(line: int, text: str) -> Step:
    name, _, rest = text.partition(" ")
    if name.upper() not in INSTRUCTIONS:
        raise BadDockerfile(f"line {line}: {name} is not read here")
    if name.upper() == "RUN" and "<<" in rest:
        raise BadDockerfile(f"line {line}: a here-document is not read here")
    flags = []
    rest = rest.strip()
    while match := re.match(r"--([a-z-]+)=(\S+)\s+", rest):
        flags.append((match[1], match[2]))
        rest = rest[match.end() :]
    return Step(line, name.upper(), tuple(flags), rest)


def exec_form(text: str) -> list[str] | None:
    """The words of ``["a", "b"]``; None for what is left to a shell."""
    if not text.startswith("["):
        return None
    try:
        words = json.loads(text)
    except ValueError:
        return None
    return words if all(isinstance(word, str) for word in words) else None


_VARIABLE = re.compile(r"\\\$|\$(\w+)|\$\{(\w+)(?::([-+])([^}]*))?\}")


def expand(text: str, values: Mapping[str, str]) -> str:
    """``$A``, ``${A}``, ``${A:-else}`` and ``${A:+then}`` filled in; what has no value is empty."""

    def one(match: re.Match[str]) -> str:
        if match[0] == "\\$":
            return "$"
        value = values.get(match[1] or match[2], "")
        if match[3] == "-":
            return value or match[4]
        return (match[4] if value else "") if match[3] == "+" else value

    return _VARIABLE.sub(one, text)


def argument(
    step: Step, values: Mapping[str, str], build_args: Mapping[str, str]
) -> tuple[str, str]:
    """Name and value of an ARG: as the build was told, else its default."""
    name, _, default = step.text.partition("=")
    return name, build_args.get(name, expand(default.strip("\"'"), values))


def pairs(text: str) -> list[tuple[str, str]]:
    """``A=1 B="two words"`` of ENV and LABEL."""
    found = re.findall(r"""([\w.-]+)=("(?:[^"\\]|\\.)*"|\S*)""", text)
    return [(name, re.sub(r"\\(.)", r"\1", value.strip('"'))) for name, value in found]


# -- .dockerignore -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    pattern: re.Pattern[str]
    prefix: str  # what a path begins with before the first sign of the pattern
    takes_back: bool  # an exception: !pattern


def rules(text: str) -> list[Rule]:
    found = []
    for row in text.splitlines():
        row = row.strip()
        if not row or row.startswith("#"):
            continue
        takes_back, row = row.startswith("!"), row.removeprefix("!").strip()
        plain = str(PurePosixPath(row.strip("/")))
        found.append(Rule(re.compile(_as_regex(plain)), re.split(r"[*?\[]", plain)[0], takes_back))
    return found


def _as_regex(pattern: str) -> str:
    """Docker's signs: ``**`` is any number of folders, ``*`` and ``?`` stay within one."""
    signs = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    return "".join(signs.get(part) or re.escape(part) for part in parts)


def is_left_out(path: str, of: Sequence[Rule]) -> bool:
    """Whether a build does not see a path: the last rule that names it, or a folder of it,
    decides."""
    above = [str(one) for one in PurePosixPath(path).parents if str(one) != "."]
    left_out = False
    for rule in of:
        if left_out == rule.takes_back and any(map(rule.pattern.fullmatch, (path, *above))):
            left_out = not rule.takes_back
    return left_out


def context(folder: Path) -> Iterator[str]:
    """Files that a build in this folder may see, by their path in it."""
    ignore = folder / ".dockerignore"
    of = rules(ignore.read_text() if ignore.exists() else "")
    for here, inner, files in os.walk(folder):
        at = Path(here).relative_to(folder)
        inner[:] = sorted(name for name in inner if _may_hold((at / name).as_posix(), of))
        for name in sorted(files):
            path = (at / name).as_posix()
            if not is_left_out(path, of):
                yield path


def _may_hold(folder: str, of: Sequence[Rule]) -> bool:
    """Whether something in a folder may be seen: what is left out is not walked through, unless an
    exception could lie in it."""
    return not is_left_out(folder, of) or any(
        rule.takes_back
        and (rule.prefix.startswith(f"{folder}/") or f"{folder}/".startswith(rule.prefix))
        for rule in of
    )
