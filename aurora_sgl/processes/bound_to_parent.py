"""``python -m aurora_sgl.processes.bound_to_parent PARENT MODULE ARGUMENT ...``: a module that dies
with the process that started it, even when both are stopped or killed without a word."""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import threading
import time

#: prctl(2); SIGKILL, because a process that is stopped (SIGSTOP) takes no other signal.
PR_SET_PDEATHSIG = 1


def exit_with_parent() -> None:
    """End this process, as by SIGTERM, when the process that started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20.0)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, name="aurora-parent-watch", daemon=True).start()


def main() -> None:
    parent, module = int(sys.argv[1]), sys.argv[2]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(f"the process {parent} that wanted {module} is gone")
    sys.argv[1:] = sys.argv[3:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
