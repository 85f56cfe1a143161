"""A throw-away system that systemd has booted, in namespaces of its own, with our environment.

Its root is an overlay over this machine's: what is installed there is gone with it. Network,
processes and mounts are its own. This machine's own systemd, if it runs one, is not touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SYSTEMD = Path("/lib/systemd/systemd")
ROOT = Path(__file__).resolve().parents[2]
#: Where things lie inside: none of them hidden from a unit with ProtectHome and PrivateTmp.
VENV, PYTHON, PACKAGES, SOURCE = (
    "/opt/aurora-sgl",
    "/opt/python",
    "/opt/site-packages",
    "/opt/source",
)
BOOT_SECONDS = 30.0

#: Runs as the first process of the new namespaces, and becomes systemd. Of what a Debian boots only
#: the journal and D-Bus are started: the rest would look at this machine's hardware and settings.
BOOT = r"""
set -eu
top=$1
mount --make-rprivate /
mount -t tmpfs -o size=2g,mode=755 tmpfs "$top"
mkdir "$top/upper" "$top/work" "$top/root"
root=$top/root
mount -t overlay -o "lowerdir=/,upperdir=$top/upper,workdir=$top/work" overlay "$root"
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs tmpfs "$root/sys/fs/cgroup"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero full random urandom tty; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
for place in dev/shm run tmp; do
    mount -t tmpfs -o mode=1777 tmpfs "$root/$place"
done
chmod 755 "$root/run"

units=$root/etc/systemd/system
rm -rf "$units"
mkdir -p "$units"
for unit in "$root"/lib/systemd/system/*.target.wants/*; do
    case ${unit##*/} in
    systemd-journald* | dbus*) ;;
    *) ln -sf /dev/null "$units/${unit##*/}" ;;
    esac
done
printf '[Unit]\nWants=systemd-journald.service dbus.service\n' >"$units/tried.target"

for pair in "$2:python" "$3:site-packages" "$4:source"; do
    mkdir -p "$root/opt/${pair##*:}"
    mount --bind "${pair%:*}" "$root/opt/${pair##*:}"
done
venv=$root/opt/aurora-sgl
site=$venv/lib/python$5/site-packages
mkdir -p "$site" "$venv/bin"
printf 'home = /opt/python/bin\ninclude-system-site-packages = false\n' >"$venv/pyvenv.cfg"
printf '/opt/site-packages\n/opt/source\n' >"$site/aurora.pth"
ln -s "/opt/python/bin/python$5" "$venv/bin/python"
printf '#!/opt/aurora-sgl/bin/python\nfrom aurora_sgl.cli import main\nmain()\n' \
    >"$venv/bin/aurora-sgl"
chmod 755 "$venv/bin/aurora-sgl"
echo /opt/python/lib >"$root/etc/ld.so.conf.d/aurora-python.conf"
cd "$root"
pivot_root . mnt
cd /
umount -l /mnt
# Credentials are mounted by a child of systemd's, for systemd.
mount --make-rshared /
ldconfig
exec env -i container=aurora-test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --unit=tried.target --log-target=console --log-level=notice
"""


def why_not() -> str:
    """Why no system can be booted here; "" where it can."""
    if not SYSTEMD.exists() or shutil.which("dbus-daemon") is None:
        return "systemd or dbus is missing; on Debian: apt-get install systemd dbus"
    if os.getuid() != 0:
        return "only root boots a system"
    new = ["unshare", "--mount", "--pid", "--fork", "--cgroup", "--net", "--ipc", "--uts"]
    with suppress(OSError):
        tried = subprocess.run(
            [*new, "sh", "-c", "mount --make-rprivate / && mount -t tmpfs tmpfs /mnt"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""
    return "unshare is missing"


class Machine:
    """A booted system; what is run in it is run by root."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log

    def init(self) -> int:
        """The process id, here, of its systemd; 0 before it is there."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int((children.read_text().split() or ["0"])[0])

    def run(
        self, *command: str, check: bool = True, typed: str = ""
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["nsenter", "-t", str(self.init()), "-m", "-p", "-C", "-n", "-i", "-u", "-r", "-w",
             "env", "-i", "PATH=/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin", *command],
            input=typed, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        if check:
            assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def show(self, unit: str, *names: str) -> dict[str, str]:
        lines = self.run("systemctl", "show", unit, *(f"-p{name}" for name in names)).stdout
        return dict(line.split("=", 1) for line in lines.splitlines())

    def journal(self, unit: str) -> str:
        return self.run("journalctl", "-o", "cat", "-u", unit).stdout

    def get(self, url: str) -> tuple[int, str]:
        """Status and body; 0 where nobody answers."""
        code = (
            "import sys, urllib.request as u, urllib.error as e\n"
            "try: a = u.urlopen(sys.argv[1], timeout=5); print(a.status, a.read().decode())\n"
            "except e.HTTPError as a: print(a.code, a.read().decode())\n"
            "except OSError as a: print(0, a)\n"
        )
        said = self.run("/usr/bin/env", "-S", f"{VENV}/bin/python", "-c", code, url).stdout
        status, _, body = said.partition(" ")
        return int(status), body


@contextmanager
def booted(folder: Path) -> Iterator[Machine]:
    """A system that is up; gone, with all that runs in it, at the end. ``folder``: for its log."""
    top = folder / "machine"
    top.mkdir()
    log = folder / "machine.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--cgroup", "--net", "--ipc",
             "--uts", "sh", "-c", BOOT, "boot", str(top), sys.base_prefix,
             sysconfig.get_paths()["purelib"], str(ROOT),
             f"{sys.version_info.major}.{sys.version_info.minor}"],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    machine = Machine(process, log)
    try:
        _wait_up(machine)
        yield machine
    finally:
        process.kill()
        process.wait()


def _wait_up(machine: Machine) -> None:
    deadline = time.monotonic() + BOOT_SECONDS
    while time.monotonic() < deadline and machine.process.poll() is None:
        if machine.init():
            asked = machine.run("systemctl", "is-active", "tried.target", check=False)
            if asked.stdout.strip() == "active":
                return
        time.sleep(0.1)
    raise AssertionError(f"systemd did not boot: {machine.log.read_text()[-2000:]}")
