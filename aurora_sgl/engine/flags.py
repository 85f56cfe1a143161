"""SGLang's flags: what a command line gives, and what we add to it. Starts and sets nothing."""

from __future__ import annotations

from aurora_sgl.config import get_settings
from aurora_sgl.draft_shape import DraftShape, ReplayedShape
from aurora_sgl.errors import AuroraError

_CPU_FLAGS = {
    "--device": "cpu",
    "--prefill-attention-backend": "intel_amx",
    "--decode-attention-backend": "intel_amx",
}
_TREE_FLAGS = DraftShape(3, 4, 8).flags


def _given(args: list[str], flag: str) -> bool:
    return any(arg == flag or arg.startswith(f"{flag}=") for arg in args)


def value_of(args: list[str], flag: str) -> str | None:
    """What a command line gives for ``flag``, as ``--flag value`` or ``--flag=value``."""
    for index, arg in enumerate(args):
        if arg == flag and index + 1 < len(args):
            return args[index + 1]
        if arg.startswith(f"{flag}="):
            return arg.partition("=")[2]
    return None


def _cpu_shape(replayed: ReplayedShape | None, args: list[str]) -> dict[str, str]:
    processes = value_of(args, "--tp-size") or value_of(args, "--tensor-parallel-size") or "1"
    if get_settings().speculation == "auto" and processes == "1":
        return _TREE_FLAGS  # the server makes a busy step's tree smaller by itself
    from aurora_sgl.engine.cpu import start_shape

    return start_shape.choose(replayed).flags


def server_flags(
    model: str,
    drafter: str | None,
    algorithm: str,
    args: list[str],
    *,
    on_cpu: bool,
    replayed: ReplayedShape | None = None,
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
