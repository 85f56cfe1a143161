"""Whether SGLang's own functions and modules are of the make that our compiled ones stand for.

Signatures and attributes move between releases. Where one is not known here, SGLang's own code goes
on, and one line says so: slower, never wrong.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

logger = logging.getLogger("aurora_sgl")


@lru_cache(maxsize=64)
def takes(function: Callable[..., Any], *names: str) -> bool:
    """Whether a method's parameters, after ``self``, are exactly these."""
    found = tuple(inspect.signature(function).parameters)[1:]
    if found != names:
        name = getattr(function, "__qualname__", str(function))
        logger.info("aurora: %s takes (%s): it is left to SGLang", name, ", ".join(found))
    return found == names


def processes(part: Any) -> int:
    """Among how many processes the weights of a linear or embedding layer are shared.

    Until SGLang 0.5.21 a linear layer says ``tp_size``; from 0.5.22 on it has a group. Raises
    ``AttributeError`` for one that has neither.
    """
    size = getattr(part, "tp_size", None)
    if size is None:
        group = part.tp_group
        size = 1 if group is None else group.world_size
    return int(size)
