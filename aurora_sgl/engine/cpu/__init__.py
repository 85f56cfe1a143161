"""The kernels that SGLang lacks on machines without AMX and without a GPU.

SGLang's CPU path imports a compiled ``sgl_kernel`` that is on no package index. :func:`install`
puts a finder on ``sys.meta_path`` that builds that module from our own functions when it is first
imported, so that an unmodified SGLang finds it. Nothing heavy is imported until then.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def needed() -> bool:
    """True where torch has no CUDA device and no compiled ``sgl_kernel`` is installed."""
    import torch

    if torch.cuda.is_available():
        return False
    finders = [f for f in sys.meta_path if not isinstance(f, _Finder)]
    return all(f.find_spec("sgl_kernel", None) is None for f in finders if f is not None)


def install() -> None:
    """Make ``sgl_kernel`` importable from our functions. Idempotent, costs microseconds.

    Must run in every process before sglang is imported: call it at the top of the main module,
    which a spawned process imports again.
    """
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # halves the time of the first request
    # oneDNN and torch keep a compiled kernel for every prompt length that they have seen, 1,024 of
    # half a megabyte each. The shapes of decoding, which come again, are far fewer.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "128")
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> ModuleSpec | None:
        if fullname == "sgl_kernel":
            return importlib.util.spec_from_loader(fullname, self)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        import torch

        from aurora_sgl.engine.cpu import attention, linear, locations, sampling, tree

        for part in (locations, sampling, tree):
            for name in part.KERNELS:
                setattr(module, name, getattr(part, name))
        for part in (attention, linear):
            for name in part.KERNELS:
                setattr(torch.ops.sgl_kernel, name, getattr(part, name))
