"""Runs a Dockerfile's steps in a clean chroot made of Debian's packages, and the image it makes.

    python -m tools.try_dockerfile [--dockerfile deploy/docker/Dockerfile.cpu]

For machines without a container engine. `tools/chroot_build.py` makes the image; then its own
command runs as a hardened container would have it: a process tree, a network and a /tmp of its own,
the root read-only, no capability, no new privilege. The image's own health check is asked until it
says yes, one chat request is sent, and STOPSIGNAL ends it.

Needs root, Linux, and of Debian `debootstrap` and `util-linux`. pip's settings in PIP_* and the
folder that PIP_FIND_LINKS names are passed on. Prints a line a step, with its seconds; all that was
made is removed.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import http.client
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tools.chroot_build import ROOT, Build, Failed, Image, mount, mount_kernel, within
from tools.dockerfile_steps import BadDockerfile, Stage, exec_form, read

DOCKERFILE = Path("deploy/docker/Dockerfile.cpu")
SIDECAR_PORT = 8520
STORE_SECONDS = 120.0  # until the records of one answer are stored, on a busy machine
CLONE_NEWNET = 0x40000000


def serve(build: Build, image: Image, patience: float) -> None:
    """Starts the image's command, waits until it is well, asks once, and stops it."""
    container = Image(
        build.folder / "container", image.env, user=image.user, folder=image.folder,
        settings=image.settings,
    )  # fmt: skip
    volumes = harden(build, image, container.root)
    uid, gid = image.owner()
    own_network()
    user = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs"]
    user += ["--bounding-set=-all", "--inh-caps=-all"]
    root = container.root
    begin = f'mount -t proc proc {root}/proc && exec chroot {root} "$@"'
    words = [*user, "/bin/sh", "-c", 'cd "$0" && exec "$@"', image.folder, *image.command()]
    command = ["unshare", "--pid", "--fork", "--kill-child", "/bin/sh", "-c", begin, "sh", *words]
    print(f"run: {' '.join(image.command())}", flush=True)
    print(f"run: user {uid}:{gid}, root read-only, {' '.join(volumes)} writable", flush=True)
    started = time.monotonic()
    with (
        build.log.open("ab") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=image.env) as process,
    ):
        try:
            wait_until_well(build, container, process, patience)
            print(f"run: healthy after {time.monotonic() - started:.1f} s", flush=True)
            ask(image)
            stop(image, process)
        finally:
            process.kill()


def harden(build: Build, image: Image, container: Path) -> list[str]:
    """The image's root read-only, with its volumes and a /tmp that can be written."""
    container.mkdir()
    mount("--bind", str(image.root), str(container))
    mount("-o", "remount,bind,ro", str(container))
    mount_kernel(container)
    subprocess.run(["umount", str(container / "proc")], check=True)  # one of its own comes
    mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", str(container / "tmp"))
    volumes = image.settings["VOLUME"].words() if "VOLUME" in image.settings else []
    for number, path in enumerate(volumes):
        volume = build.folder / f"volume-{number}"
        build.call(["cp", "-a", str(within(image.root, path)), str(volume)])
        mount("--bind", str(volume), str(within(container, path)))
    return [*volumes, "/tmp"]


def own_network() -> None:
    """From now on this process and its children have a network with nothing but loopback in it: no
    port is taken there, and nothing can be downloaded."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        raise Failed(f"no network of its own: {os.strerror(ctypes.get_errno())}")
    get_flags, set_flags, is_up = 0x8913, 0x8914, 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        answer = fcntl.ioctl(one, get_flags, struct.pack("16s16x", b"lo"))
        flags = struct.unpack("16sH14x", answer)[1]
        fcntl.ioctl(one, set_flags, struct.pack("16sH14x", b"lo", flags | is_up))


def wait_until_well(
    build: Build, container: Image, process: subprocess.Popen[bytes], patience: float
) -> None:
    """By the image's own HEALTHCHECK. Raises ``Failed`` when it ends or is not well in time."""
    step = container.settings.get("HEALTHCHECK")
    check = exec_form(step.text.removeprefix("CMD").strip()) if step else None
    if check is None:
        raise Failed('needs HEALTHCHECK CMD ["..."]')
    ends = time.monotonic() + patience
    while True:
        command = container.inside(check)
        asked = subprocess.run(command, env=container.env, capture_output=True, text=True)
        if asked.returncode == 0:
            return
        if process.poll() is not None or time.monotonic() > ends:
            why = asked.stdout.strip() or asked.stderr.strip()
            raise Failed(f"{build.log_end()}\nthe image's command is not well: {why}")
        time.sleep(2)


def ask(image: Image) -> None:
    """One chat; then until the sidecar says that all is stored."""
    port = int(image.settings["EXPOSE"].words()[0])
    question = {"role": "user", "content": "Say hello in five words."}
    body = {"model": "default", "messages": [question], "max_tokens": 24, "temperature": 0}
    started = time.monotonic()
    code, content = fetch(port, "POST", "/v1/chat/completions", json.dumps(body).encode())
    seconds = time.monotonic() - started
    if code != 200:
        raise Failed(f"the question: {code} {content[:300]!r}")
    answer = json.loads(content)
    text, tokens = answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]
    print(f"run: port {port} answered {tokens} tokens in {seconds:.1f} s: {text!r}", flush=True)
    while True:
        code, content = fetch(SIDECAR_PORT, "GET", "/readyz")
        seconds = time.monotonic() - started
        if code == 200:
            print(f"run: its records are in the store {seconds:.1f} s after the question")
            return
        if seconds > STORE_SECONDS:
            raise Failed(f"the sidecar is not ready: {content[:300]!r}")
        time.sleep(0.5)


def fetch(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request(method, path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def stop(image: Image, process: subprocess.Popen[bytes]) -> None:
    """STOPSIGNAL to the container's first process, as an engine sends it."""
    name = image.settings["STOPSIGNAL"].text if "STOPSIGNAL" in image.settings else "SIGTERM"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    started = time.monotonic()
    os.kill(int(children[0]), signal.Signals[name])
    code = process.wait(timeout=120)
    print(f"run: {name} ended it with {code} in {time.monotonic() - started:.1f} s", flush=True)
    if code != 0:
        raise Failed(f"{name} ended the image's command with {code}")


# -- the two processes -------------------------------------------------------------------------


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dockerfile", type=Path, default=DOCKERFILE)
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--folder", type=Path, help="where it is made (10 GB); default: TMPDIR")
    parser.add_argument("--patience", type=float, default=900, help="seconds until it is healthy")
    parser.add_argument("--dry-run", action="store_true", help="say the steps and end")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def dry_run(stages: Sequence[Stage]) -> None:
    for stage in stages:
        print(f"FROM {stage.image}")
        for step in stage.steps:
            print(f"  {step.line:3} {step.name} {step.text}"[:100])


def outside(arguments: argparse.Namespace) -> int:
    """Starts this file again where mounts and processes are its own, and clears up after it."""
    for name in ("debootstrap", "unshare", "chroot", "setpriv"):
        if shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
            raise Failed(f"{name} is missing; on Debian: apt install debootstrap util-linux")
    if os.geteuid() != 0:
        raise Failed("needs root, for chroot and mounts")
    folder = Path(tempfile.mkdtemp(prefix="try-dockerfile-", dir=arguments.folder))
    folder.chmod(0o711)
    own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command = [*own, sys.executable, "-m", "tools.try_dockerfile", *sys.argv[1:]]
    try:
        return subprocess.run([*command, "--inside", str(folder)], cwd=ROOT).returncode
    finally:
        shutil.rmtree(folder)
        print("all that was made is removed", flush=True)


def inside(folder: Path, stages: Sequence[Stage], arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    build_args = dict(one.partition("=")[::2] for one in arguments.build_arg)
    build = Build(folder, stages, build_args)
    image = build.run()
    seconds = time.monotonic() - started
    print(f"built in {seconds:.0f} s: {megabytes(image.root):,} MB", flush=True)
    serve(build, image, arguments.patience)
    print(f"done in {time.monotonic() - started:.0f} s", flush=True)


def megabytes(root: Path) -> int:
    """Of an image's files, without what is mounted in it."""
    command = ["du", "-sx", "--block-size=1000000", str(root)]
    return int(subprocess.run(command, capture_output=True, text=True).stdout.split()[0])


def main() -> int:
    arguments = parse()
    try:
        build_args = dict(one.partition("=")[::2] for one in arguments.build_arg)
        stages = read((ROOT / arguments.dockerfile).read_text(), build_args)
        if arguments.dry_run:
            dry_run(stages)
        elif arguments.inside is None:
            return outside(arguments)
        else:
            inside(arguments.inside, stages, arguments)
    except (Failed, BadDockerfile, OSError, subprocess.SubprocessError) as error:
        print(f"try_dockerfile: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
