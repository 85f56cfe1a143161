"""Starts SGLang with us inside: ``python -m aurora_sgl.engine.launch`` is its main module.

A spawned scheduler imports this module again as its main module, so that the CPU kernels are in
place there before sglang is imported.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import NamedTuple

os.environ.setdefault("SGLANG_SPEC_SKIP_ZERO_STEP_DRAFT_EXTEND", "1")

if os.environ.get("AURORA_CPU") == "1":
    from aurora_sgl.engine.openmp import wait_politely

    wait_politely()  # before anything loads OpenMP
    from aurora_sgl.engine.cpu import install

    install()

from aurora_sgl.config import get_settings
from aurora_sgl.engine import companion
from aurora_sgl.errors import AuroraError

_CPU_FLAGS = {
    "--device": "cpu",
    "--prefill-attention-backend": "intel_amx",
    "--decode-attention-backend": "intel_amx",
}
_TREE_FLAGS = {
    "--speculative-num-steps": "3",
    "--speculative-eagle-topk": "4",
    "--speculative-num-draft-tokens": "8",
}


def _given(args: list[str], flag: str) -> bool:
    return any(arg == flag or arg.startswith(f"{flag}=") for arg in args)


def value_of(args: list[str], flag: str) -> str | None:
    """What a command line gives for ``flag``, as ``--flag value`` or ``--flag=value``."""
    for at, arg in enumerate(args):
        if arg == flag and at + 1 < len(args):
            return args[at + 1]
        if arg.startswith(f"{flag}="):
            return arg.partition("=")[2]
    return None


class Replayed(NamedTuple):
    """What exact replay found of a drafter, with trees of that depth, top-k and size."""

    depth: int
    topk: int
    nodes: int
    accept_length: float


def _cpu_shape(replayed: Replayed | None, args: list[str]) -> dict[str, str]:
    processes = value_of(args, "--tp-size") or value_of(args, "--tensor-parallel-size") or "1"
    if get_settings().speculation == "auto" and processes == "1":
        return _TREE_FLAGS  # the server makes a busy step's tree smaller by itself
    from aurora_sgl.engine.cpu import shape

    return shape.choose(replayed).flags


def server_flags(
    model: str,
    drafter: str | None,
    algorithm: str,
    args: list[str],
    *,
    on_cpu: bool,
    replayed: Replayed | None = None,
) -> list[str]:
    """SGLang's flags for a target and a drafter; what the user gave stays as it is.

    ``replayed``: of this drafter, as far as known; on CPU trees are as large as pays for it.
    Raises ``AuroraError`` for acceptance thresholds other than 1, which are not lossless.
    """
    for flag in ("single", "acc"):
        value = value_of(args, f"--speculative-accept-threshold-{flag}")
        if value is not None and float(value) != 1.0:
            raise AuroraError(
                f"--speculative-accept-threshold-{flag} {value} changes the target's answers; "
                "leave it at 1"
            )
    flags = ["--model-path", model, *args]
    defaults: dict[str, str] = {}
    if drafter is not None:
        defaults |= {
            "--speculative-algorithm": algorithm,
            "--speculative-draft-model-path": drafter,
        }
        if not _given(args, "--speculative-num-steps"):
            defaults |= _cpu_shape(replayed, args) if on_cpu else _TREE_FLAGS
    if on_cpu:
        defaults |= _CPU_FLAGS
        if not _given(args, "--dtype"):
            defaults["--dtype"] = "bfloat16"
        if not _given(args, "--sleep-on-idle"):
            flags.append("--sleep-on-idle")  # else a waiting scheduler keeps one core busy
    for flag, value in defaults.items():
        if not _given(flags, flag):
            flags += [flag, value]
    return flags


def main(argv: list[str]) -> None:
    """Run SGLang's HTTP server in this process with the given flags."""
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    if os.environ.get("AURORA_EXIT_WITH_PARENT") == "1":
        companion.exit_with_parent()
    if os.environ.get("AURORA_CPU") == "1":
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
    companion.stop()
    kill_process_tree(os.getpid(), include_parent=False)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at a normal exit compiled modules print pages about what they leaked


if __name__ == "__main__":
    main(sys.argv[1:])
