"""Compiles ``kernels.cpp`` once for this machine, keeps it on disk, and calls it.

The compiled file lies in the user's cache under a name that hashes the source, the flags, the
compiler and the processor, so that a change of any of them builds anew. Without a compiler, or
where the result does not load, :func:`library` is None and the callers stay with PyTorch.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import torch

from aurora_sgl.config import get_settings
from aurora_sgl.hashing import sha256_bytes

logger = logging.getLogger("aurora_sgl")

SOURCE = Path(__file__).with_name("kernels.cpp")  # includes the headers beside it
KINDS = {torch.float32: 0, torch.bfloat16: 1}
_FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math", "-w"),
)
_COMPILERS = ("c++", "g++", "clang++")
_SECONDS = 300
_VERSION = 4  # what aurora_version() of the source returns

_I, _L, _F, _P = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_SIGNATURES: dict[str, tuple[object, ...]] = {
    "aurora_rmsnorm": (_I, _P, _P, _P, _P, _L, _L, _L, _L, _L, _F),
    "aurora_silu_and_mul": (_I, _P, _P, _L, _L, _L),
    "aurora_rotary": (_I, _I, _P, _P, _P, _L, _P, _L, _L, _L, _L, _L, _L, _L, _I),
    "aurora_attention": (_I, _P, _P, _P, _P, _P, _L, _L, _L, _L, _L, _L, _F, _F),
    "aurora_linear": (_I, _P, _L, _P, _P, _P, _L, _L, _L, _L),
    "aurora_layer": (_P, _P, _P, _P, _L, _P, _P, _P, _P),
    "aurora_layers": (_P, _L, _P, _P, _P, _L, _P, _P, _P),
}


class KernelPlan(ctypes.Structure):
    """``struct Plan`` of the source: what is the same for all layers of a forward."""

    _fields_ = (
        *((name, _P) for name in ("table", "rows", "lengths", "news", "starts", "tree")),
        *((name, _L) for name in ("table_stride", "batch", "longest_new", "total", "window")),
        ("causal", ctypes.c_int32),
    )


class Layer(ctypes.Structure):
    """``struct Layer`` of the source: a decoder layer's weights, cache and sizes."""

    _fields_ = (
        *(
            (name, _P)
            for name in (
                *("norm", "second_norm", "qkv", "qkv_bias", "o", "o_bias", "post_norm"),
                *("gate_up", "gate_up_bias", "down", "down_bias", "angles", "keys", "values"),
            )
        ),
        *(
            (name, _L)
            for name in ("hidden", "inner", "heads", "kv_heads", "dim", "rotary_dim", "positions")
        ),
        *((name, _F) for name in ("eps", "second_eps", "post_eps", "scale", "cap")),
        *((name, ctypes.c_int32) for name in ("kind", "angles_kind", "neox")),
    )


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``$XDG_CACHE_HOME/aurora-sgl/kernels``."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "aurora-sgl" / "kernels"


def compiler() -> str | None:
    """``$CXX``, or the first C++ compiler on the path."""
    given = os.environ.get("CXX")
    return shutil.which(given) if given else next(filter(None, map(shutil.which, _COMPILERS)), None)


def _processor() -> str:
    """What ``-march=native`` looks at, as far as Linux says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    import platform

    fields = [line for line in lines if line.startswith(("model name", "flags", "Features"))][:2]
    return "\n".join([platform.machine(), *fields])


def _target(command: str) -> Path:
    version = subprocess.run(
        [command, "--version"], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    sources = [path.read_text() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    parts = [*sources, *_FLAGS, version, _processor()]
    return cache_folder() / f"kernels-{sha256_bytes(chr(0).join(parts).encode())[:16]}.so"


def build(say: Callable[[str], None] | None = None) -> Path | None:
    """The compiled file, made now if it is not there; None when this machine can't make it.

    ``say`` gets one line before a compilation and one after it.
    """
    say = say or (lambda line: None)
    command = compiler()
    if command is None:
        logger.warning("aurora: no C++ compiler: small operations stay in PyTorch, which is slower")
        return None
    try:
        binary = _target(command)
        if binary.exists():
            return binary
        binary.parent.mkdir(parents=True, exist_ok=True)
        with _alone(binary.parent):
            if not binary.exists():  # another process may have made it meanwhile
                _compile(command, binary, say)
        return binary
    except (OSError, subprocess.SubprocessError) as error:
        message = getattr(error, "stderr", None) or str(error)
        first = next(iter(str(message).strip().splitlines()), "no message")
        logger.warning("aurora: the CPU kernels did not compile, PyTorch is used: %s", first)
        return None


def _compile(command: str, binary: Path, say: Callable[[str], None]) -> None:
    say("compiling the CPU kernels for this machine (once, a few seconds) ...")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=binary.parent) as folder:
        fresh = Path(folder) / binary.name
        subprocess.run(
            [command, *_FLAGS, str(SOURCE), "-o", str(fresh)],
            check=True,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        fresh.replace(binary)  # whole, or not there
    say(f"compiled the CPU kernels in {time.monotonic() - begun:.0f} s: {binary}")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The ranks of a server start together: the first compiles, the others wait for it instead of
    taking its cores for the same work. On the folder itself, so that no lock file is left; whoever
    holds it may die, the system lets go. Where a disk knows no locks, each compiles."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch's operations and the compiled ones on this thread alone, for the time being."""
    loaded, before = library(), torch.get_num_threads()
    ours = loaded.aurora_threads(1) if loaded is not None else 1
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if loaded is not None:
            loaded.aurora_threads(ours)


@lru_cache(maxsize=1)
def library() -> ctypes.PyDLL | None:
    """The compiled functions, or None. Built at the first call of a process, if need be.

    None without a word where ``AURORA_CPU_COMPILED=0``.
    """
    if not get_settings().cpu_compiled:
        return None
    binary = build(lambda line: print(f"aurora-sgl: {line}", file=sys.stderr, flush=True))
    if binary is None:
        return None
    try:
        # PyDLL: the functions take microseconds, less than giving the interpreter lock away.
        loaded = ctypes.PyDLL(str(binary))
        if loaded.aurora_version() != _VERSION:
            raise OSError("another version of the source")
        for name, types in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = types, None
        return loaded
    except (OSError, AttributeError) as error:
        logger.warning("aurora: the CPU kernels did not load, PyTorch is used: %s", error)
        return None
