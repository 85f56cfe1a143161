"""Our compiled ways beside SGLang's own, which go on wherever ours do not fit.

Signatures, modules and their attributes move between SGLang's releases. What is not known here is
left to SGLang: slower, never wrong, and said once.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

logger = logging.getLogger("aurora_sgl")

#: What a module or a function of another make raises where ours looks for what it knows.
_ANOTHER_MAKE = (AttributeError, ImportError, TypeError)

_notices: MutableMapping[str, str] = {}


def tell(notices: MutableMapping[str, str]) -> None:
    """From now on say what is left to SGLang in ``notices``: see ``wire.Hello``."""
    global _notices
    notices.update(_notices)
    _notices = notices


class Beside:
    """A hook around a function of SGLang: our own way for the calls that it covers, else SGLang's.

    ``ours`` has SGLang's first parameters under SGLang's names, and returns None, with nothing
    done, for a call that it does not cover. ``spare``: another hook covers the same work, so that
    nobody misses this one.
    """

    def __init__(self, ours: Callable[..., Any], *, spare: bool = False) -> None:
        self.ours, self.spare = ours, spare
        self.names = tuple(inspect.signature(ours).parameters)[1:]  # without SGLang's self
        self._keywords = frozenset(self.names)
        self._original: Callable[..., Any] | None = None
        self._left = False

    def fits(self, parameters: Sequence[str]) -> bool:
        """Whether a function with these parameters, after self, is the one that ours stands for:
        it may have more of them behind ours."""
        return tuple(parameters[: len(self.names)]) == self.names

    def __call__(self, original: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        if original is not self._original:
            self._look_at(original)
        takes = len(args) <= len(self.names) + 1 and (not kw or kw.keys() <= self._keywords)
        if takes and not self._left:
            try:
                done = self.ours(*args, **kw)
            except Exception as error:
                done = None
                self._failed(original, error)
            if done is not None:
                return done
        return original(*args, **kw)

    def _look_at(self, original: Callable[..., Any]) -> None:
        parameters = tuple(inspect.signature(original).parameters)[1:]
        self._original, self._left = original, not self.fits(parameters)
        if self._left and self.spare:
            logger.info("aurora: %s is SGLang's own in this release", _name(original))
        elif self._left:
            self._say(original, f"takes ({', '.join(parameters)})")

    def _failed(self, original: Callable[..., Any], error: Exception) -> None:
        """SGLang's own way takes this call: it fails alike where the call itself is wrong."""
        if isinstance(error, _ANOTHER_MAKE):
            self._left = True
            self._say(original, f'is of another make ("{error}")')
        else:
            logger.warning("aurora: %s: SGLang's own way is tried", _name(original), exc_info=error)

    def _say(self, original: Callable[..., Any], why: str) -> None:
        name = _name(original)
        notice = (
            f"{name} of this SGLang {why}, which our compiled code does not know: SGLang's own is "
            "used, which is slower."
        )
        _notices[f"not compiled: {name}"] = notice[:400]
        logger.warning("aurora: %s", notice)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", str(function))


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
