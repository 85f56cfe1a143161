"""Another release of SGLang beside the installed one, in a folder of its own.

    python tools/release_packages.py 0.5.21      # prints the folder

A server that is started with the folder in PYTHONPATH runs that release; everything that
``requirements/sglang-RELEASE.lock`` does not name comes from the environment.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def packages_of(release: str) -> Path:
    """The folder with a release's packages, which are installed when they are not there.

    Raises ``RuntimeError`` with pip's last line when they can't be.
    """
    lock = ROOT / "requirements" / f"sglang-{release}.lock"
    folder = Path(sys.prefix) / "releases" / release
    ready = folder / lock.name
    if ready.exists() and ready.read_bytes() == lock.read_bytes():
        return folder
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade"]
    run = subprocess.run(
        [*command, "--target", str(folder), "-r", str(lock)], capture_output=True, text=True
    )
    if run.returncode != 0:
        last = (run.stderr.strip() or "pip failed").splitlines()[-1]
        raise RuntimeError(f"sglang {release}: {last}")
    ready.write_bytes(lock.read_bytes())
    return folder


if __name__ == "__main__":
    print(packages_of(sys.argv[1]))
