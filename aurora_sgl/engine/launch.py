"""Starts SGLang with us inside: ``python -m aurora_sgl.engine.launch`` is its main module.

A spawned scheduler imports this module again as its main module, so that the CPU kernels are in
place there before sglang is imported.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import traceback

from aurora_sgl import environment

if environment.is_set(environment.CPU):
    # A plain step leaves the drafter's KV cold. On CUDA that was never seen to be right.
    os.environ.setdefault("SGLANG_SPEC_SKIP_ZERO_STEP_DRAFT_EXTEND", "1")
    from aurora_sgl.engine.openmp import wait_politely

    wait_politely()  # before anything loads OpenMP
    from aurora_sgl.config import forgive_mistakes
    from aurora_sgl.engine.cpu import install

    forgive_mistakes()  # ``aurora-sgl serve`` has refused them; this is a process of SGLang's
    install()

from aurora_sgl.engine import sidecars
from aurora_sgl.processes.bound_to_parent import exit_with_parent

# ``kill -USR2`` of a server's process writes where each of its threads stands into its log.
faulthandler.register(signal.SIGUSR2, all_threads=True)


def main(argv: list[str]) -> None:
    """Run SGLang's HTTP server in this process with the given flags."""
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    if environment.is_set(environment.EXIT_WITH_PARENT):
        exit_with_parent()
    if environment.is_set(environment.CPU):
        from aurora_sgl.engine.cpu import native

        native.library()  # compiled here, where its lines are seen; schedulers find it on disk
    load_plugins()
    server_args = prepare_server_args(argv)
    code = 0
    try:
        run_server(server_args)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except Exception:
        traceback.print_exc()
        code = 1
    sidecars.stop()
    kill_process_tree(os.getpid(), include_parent=False)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at a normal exit compiled modules print pages about what they leaked


if __name__ == "__main__":
    main(sys.argv[1:])
