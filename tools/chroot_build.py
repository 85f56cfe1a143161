"""The stages of a Dockerfile, built in chroots of Debian's packages.

In place of an image ``python:3.11-slim-bookworm`` stands a system that debootstrap makes, with
Python 3.11 of Debian. Each step runs in it as BuildKit would run it: by the file's user, with what
`.dockerignore` lets through, with its cache and bind mounts. Works as root in a mount namespace of
its own (`tools/try_dockerfile.py` sees to that): what is mounted here goes with it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tools.dockerfile_steps import (
    EXPANDED,
    Stage,
    Step,
    argument,
    context,
    exec_form,
    expand,
    pairs,
)

ROOT = Path(__file__).resolve().parent.parent
STANDS_IN = re.compile(r"python:(3\.\d+)-slim-(\w+)")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
#: Steps that change no file: what the image is told for its run.
CONFIGURATION = frozenset(
    ("CMD", "ENTRYPOINT", "EXPOSE", "HEALTHCHECK", "LABEL", "STOPSIGNAL", "VOLUME")
)


class Failed(Exception):
    """What went wrong, with the end of the log where a command did."""


@dataclass
class Image:
    """A stage while it is built, and its settings."""

    root: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": PATH, "LANG": "C.UTF-8"})
    args: dict[str, str] = field(default_factory=dict)
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    user: str = "0:0"
    folder: str = "/"
    settings: dict[str, Step] = field(default_factory=dict)

    def owner(self) -> tuple[int, int]:
        """User and group in numbers, by the image's own names."""
        user, _, group = self.user.partition(":")
        uid, own = _numbers(self.root / "etc/passwd", user)
        return uid, _numbers(self.root / "etc/group", group)[0] if group else own

    def command(self) -> list[str]:
        """ENTRYPOINT with CMD behind it."""
        words: list[str] = []
        for name in ("ENTRYPOINT", "CMD"):
            if step := self.settings.get(name):
                words += exec_form(step.text) or [*self.shell, step.text]
        return words

    def inside(self, command: Sequence[str]) -> list[str]:
        """A command in this root, by the image's user, in its folder."""
        uid, gid = self.owner()
        enter = ["chroot", f"--userspec={uid}:{gid}", f"--groups={gid}", str(self.root)]
        return [*enter, "/bin/sh", "-c", 'cd "$0" && exec "$@"', self.folder, *command]


def _numbers(file: Path, name: str) -> tuple[int, int]:
    """Ids of a row of passwd or group; a number needs no row, and its group is 0 then."""
    for row in file.read_text().splitlines():
        cells = row.split(":")
        if name in (cells[0], cells[2]):
            return int(cells[2]), int(cells[3]) if cells[3].isdigit() else 0
    if not name.isdigit():
        raise Failed(f"{file.name} has no {name}")
    return int(name), 0


class Build:
    """All stages: a folder, a log, and a line for each step."""

    def __init__(self, folder: Path, stages: Sequence[Stage], build_args: dict[str, str]) -> None:
        self.folder, self.stages, self.build_args = folder, stages, build_args
        self.log = folder / "build.log"
        self.images: dict[str, Image] = {}
        bases = {match[2] for one in stages if (match := STANDS_IN.fullmatch(one.image))}
        self.steps = sum(1 for suite in bases if not self._base_folder(suite).exists())
        self.steps += 1 + sum(len(stage.steps) + 1 for stage in stages)  # and the context
        self.done = 0

    def run(self) -> Image:
        """The image that the last stage makes."""
        seen = self.folder / "context"
        self._line("the context, as .dockerignore leaves it", lambda: copy_context(ROOT, seen))
        image = None
        for number, stage in enumerate(self.stages):
            image = self._stage(number, stage)
            self.images[stage.name or str(number)] = image
        assert image is not None
        return image

    def call(self, command: Sequence[str], env: dict[str, str] | None = None) -> None:
        """A command whose output goes to the log. Raises ``Failed`` with the log's end."""
        with self.log.open("ab") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            code = subprocess.run(command, stdout=log, stderr=log, env=env, check=False).returncode
        if code != 0:
            raise Failed(f"{self.log_end()}\nexit status {code}")

    def log_end(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])

    def _line(self, text: str, work: Callable[[], object]) -> None:
        """Does one step and prints its line."""
        self.done += 1
        started = time.monotonic()
        work()
        shown = re.sub(r"\s+", " ", text)
        shown = shown if len(shown) <= 72 else f"{shown[:69]}..."
        seconds = time.monotonic() - started
        print(f"[{self.done:2}/{self.steps}] {shown:<72} {seconds:7.1f} s", flush=True)

    def _stage(self, number: int, stage: Stage) -> Image:
        root = self.folder / f"stage-{number}"
        source = self.images[stage.image].root if stage.image in self.images else self._base(stage)
        begin = f"FROM {stage.image}" + (f" AS {stage.name}" if stage.name else "")
        copy = ["cp", "-ax", "--reflink=auto", str(source), str(root)]
        self._line(begin, lambda: self.call(copy))
        image = Image(root)
        mount_kernel(root)
        for step in stage.steps:
            flags = "" if step.name == "RUN" else "".join(f"--{n}={v} " for n, v in step.flags)
            self._line(f"{step.name} {flags}{step.text}", lambda one=step: self._do(image, one))  # type: ignore[misc]
        return image

    def _base_folder(self, suite: str) -> Path:
        return self.folder / f"base-{suite}"

    def _base(self, stage: Stage) -> Path:
        """Debian in place of an image of Python; made once."""
        match = STANDS_IN.fullmatch(stage.image)
        if match is None:
            raise Failed(f"nothing of Debian stands in for the image {stage.image}")
        base = self._base_folder(match[2])
        if not base.exists():
            shown = f"Debian {match[2]} with Python {match[1]}, in place of {stage.image}"
            self._line(shown, lambda: make_base(self, base, python=match[1], suite=match[2]))
        return base

    def _do(self, image: Image, step: Step) -> None:
        if step.name in CONFIGURATION:
            image.settings[step.name] = step
            return
        known = {**image.args, **image.env}
        text = expand(step.text, known) if step.name in EXPANDED else step.text
        if step.name == "ARG":
            name, value = argument(step, known, self.build_args)
            image.args[name] = value
        elif step.name == "ENV":
            image.env.update(pairs(text))
        elif step.name == "USER":
            image.user = text
        elif step.name == "SHELL":
            image.shell = step.words()
        elif step.name == "WORKDIR":
            image.folder = os.path.join(image.folder, text)
            within(image.root, image.folder).mkdir(parents=True, exist_ok=True)
        elif step.name == "COPY":
            self._copy(image, step, text)
        else:
            self._run(image, step)

    def source(self, stage: str | None, path: str) -> Path:
        """What COPY or a mount takes: of an earlier stage, or of the context."""
        place = within(self.images[stage].root if stage else self.folder / "context", path)
        if not place.exists():
            raise Failed(f"{path} is not in {stage or 'the context'}")
        return place

    def _copy(self, image: Image, step: Step, text: str) -> None:
        flags = dict(step.flags)
        if unread := flags.keys() - {"from", "chmod", "chown"}:
            raise Failed(f"line {step.line}: COPY --{min(unread)} is not read here")
        *sources, into = exec_form(text) or text.split()
        target = within(image.root, os.path.join(image.folder, into))
        many = into.endswith("/") or into == "." or len(sources) > 1
        for name in sources:
            source = self.source(flags.get("from"), name)
            place = target / source.name if many and not source.is_dir() else target
            place.parent.mkdir(parents=True, exist_ok=True)
            copy_owned(source, place, flags.get("chown", "0:0"), flags.get("chmod"))

    def _run(self, image: Image, step: Step) -> None:
        if unread := {name for name, _ in step.flags} - {"mount"}:
            raise Failed(f"line {step.line}: RUN --{min(unread)} is not read here")
        command = exec_form(step.text) or [*image.shell, step.text]
        pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        with mounted(self, image, [value for _, value in step.flags]):
            self.call(image.inside(command), {**image.args, **pip, **image.env})


def within(root: Path, path: str) -> Path:
    """A path of an image, on this machine."""
    return root / os.path.normpath(path).lstrip("/")


def copy_context(source: Path, into: Path) -> None:
    for path in context(source):
        place = into / path
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / path, place, follow_symlinks=False)


def copy_owned(source: Path, into: Path, owner: str, mode: str | None) -> None:
    """A file, or what is in a folder, with the owner and the mode that COPY gives it."""
    if source.is_dir():
        shutil.copytree(source, into, symlinks=True, dirs_exist_ok=True)
    else:
        shutil.copy2(source, into)
    subprocess.run(["chown", "-R", owner, str(into)], check=True)
    if mode:
        subprocess.run(["chmod", "-R", mode, str(into)], check=True)


def make_base(build: Build, base: Path, *, python: str, suite: str) -> None:
    """Debian's smallest system, and its Python in /usr/local as the image has its own there."""
    build.call(["debootstrap", "--variant=minbase", "--include=ca-certificates", suite, str(base)])
    for name in ("resolv.conf", "hosts"):
        shutil.copy2(f"/etc/{name}", base / "etc" / name)
    if CERTIFICATES.exists():  # a machine behind a proxy that speaks TLS itself
        shutil.copy2(CERTIFICATES, within(base, str(CERTIFICATES)))
    image = Image(base, env={"PATH": PATH, "LANG": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"})
    packages = " ".join(f"python{python}{part}" for part in ("", "-venv", "-dev"))
    for command in (
        "apt-get update",
        f"apt-get install -y --no-install-recommends {packages}",
        f"python{python} -m venv /usr/local",
        "apt-get clean && rm -rf /var/lib/apt/lists/*",
    ):
        build.call(image.inside(["/bin/sh", "-c", command]), image.env)


# -- mounts ------------------------------------------------------------------------------------


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def mount_kernel(root: Path) -> None:
    """/proc, /sys, the few devices and the shared memory that a container has."""
    mount("-t", "proc", "proc", str(root / "proc"))
    mount("--bind", "-o", "ro", "/sys", str(root / "sys"))
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(root / "dev"))
    for name in DEVICES:
        (root / "dev" / name).touch()
        mount("--bind", f"/dev/{name}", str(root / "dev" / name))
    for link, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        (root / "dev" / link).symlink_to(f"/proc/self/fd{target}")
    (root / "dev" / "shm").mkdir()
    mount("-t", "tmpfs", "-o", "mode=1777,size=1g", "tmpfs", str(root / "dev" / "shm"))


@contextmanager
def mounted(build: Build, image: Image, asked: Sequence[str]) -> Iterator[None]:
    """The --mount flags of a RUN, and the folder of wheels that pip of this machine looks into."""
    places = [_mount_of(build, image, text) for text in asked]
    links = os.environ.get("PIP_FIND_LINKS", "")
    if os.path.isdir(links):
        places.append((Path(links), within(image.root, links), False))
    made: list[Path] = []
    try:
        for source, target, writable in places:
            made += make_place(source, target)
            mount("--bind", str(source), str(target))
            if not writable:
                mount("-o", "remount,bind,ro", str(target))
        yield
    finally:
        for _, target, _ in reversed(places):
            subprocess.run(["umount", str(target)], check=False, stderr=subprocess.DEVNULL)
        for place in reversed(made):  # empty again
            place.rmdir() if place.is_dir() else place.unlink()


def _mount_of(build: Build, image: Image, text: str) -> tuple[Path, Path, bool]:
    """Source and target of one --mount, and whether it is written to."""
    options = dict(part.partition("=")[::2] for part in text.split(","))
    kind, target = options.get("type", "bind"), options.get("target", "")
    if not target or kind not in ("bind", "cache"):
        raise Failed(f"--mount={text} is not read here")
    if kind == "bind":
        source = build.source(options.get("from"), options.get("source", "/"))
        return source, within(image.root, target), False
    cache = build.folder / "cache" / target.strip("/").replace("/", "-")
    cache.mkdir(parents=True, exist_ok=True)
    return cache, within(image.root, target), True


def make_place(source: Path, target: Path) -> list[Path]:
    """What a mount lies on, made where it is missing: the outermost first."""
    made = []
    for one in (*reversed(target.parents), target):
        if one.exists():
            continue
        if one == target and not source.is_dir():
            one.touch()
        else:
            one.mkdir()
        made.append(one)
    return made
