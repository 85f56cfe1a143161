"""Lets ``torchvision`` import beside a torch that its compiled library was not built for.

transformers and SGLang import torchvision for image models. No torchvision wheel fits the CPU build
of torch, and without its compiled library it fails on two operators whose schemas are missing. A
finder waits for that import and, where the library does not load, defines the two schemas first.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _TorchvisionFinder(MetaPathFinder):
    library: Any = None  # a torch.library.Library undefines its operators when it is collected

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            spec = PathFinder.find_spec(fullname)
            if spec is not None and spec.origin is not None:
                _define_missing_schemas(Path(spec.origin).parent)
        return None


def _define_missing_schemas(package: Path) -> None:
    import torch

    compiled = [*package.glob("_C*.so"), *package.glob("_C*.pyd")]
    try:
        for library in compiled:
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        if compiled:
            return
    except OSError:
        pass
    _TorchvisionFinder.library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        _TorchvisionFinder.library.define(schema)


def install() -> None:
    """Idempotent; costs nothing until torchvision is imported."""
    if not any(isinstance(finder, _TorchvisionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TorchvisionFinder())
