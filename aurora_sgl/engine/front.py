"""What we do in the processes that take requests, before SGLang's scheduler sees one."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from aurora_sgl import environment
from aurora_sgl.engine import clean, labels

logger = logging.getLogger("aurora_sgl")

_LARGEST = 2**31 - 1  # of the int32 tensor that top-k becomes

_rid: ContextVar[Any] = ContextVar("aurora_rid", default=None)


def create_tokenized_object(
    original: Callable[..., Any], manager: Any, obj: Any, *args: Any, **kw: Any
) -> Any:
    """Around ``TokenizerManager._create_tokenized_object``: refuse what would end the server, and
    send along what the client says.

    Raises ``ValueError``, which SGLang answers with 400.
    """
    if environment.is_set(environment.IDLE):
        return original(manager, obj, *args, **kw)
    ids = kw.get("input_ids", args[1] if len(args) > 1 else None)
    images = kw.get("mm_inputs", args[3] if len(args) > 3 else None)
    size = getattr(getattr(manager, "model_config", None), "vocab_size", None)
    if size and ids is not None and images is None and not getattr(obj, "lora_path", None):
        # Beside images, and with an adapter, there are ids that the vocabulary does not have.
        check_ids(ids, int(size))
    result = original(manager, obj, *args, **kw)
    params = getattr(result, "sampling_params", None)
    check_top_k(getattr(params, "top_k", None))
    if params is not None and hasattr(params, "custom_params"):
        try:
            _attach(manager, params, client_rid(obj))
        except Exception:  # then its labels are unknown, and it is not learnt from
            logger.warning("aurora: a request's headers are lost", exc_info=True)
    return result


def _attach(manager: Any, params: Any, rid: str) -> None:
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    labels.attach(params, warmup=manager.server_status == ServerStatus.Starting, rid=rid)


def normalize(original: Callable[..., Any], obj: Any, *args: Any, **kw: Any) -> Any:
    """Around ``GenerateReqInput.normalize_batch_and_arguments``, after which several samples of a
    prompt have ids that no client knows: remember what the client called its request."""
    _rid.set(getattr(obj, "rid", None))
    return original(obj, *args, **kw)


def client_rid(obj: Any) -> str:
    """What the client calls a request; "" when it said nothing."""
    rid = _rid.get()
    if isinstance(rid, list):  # one for each prompt
        rid = getattr(obj, "rid", None)
    return clean.text(rid) if isinstance(rid, str) else ""


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raises ``ValueError`` with one line for a token that the target's embedding does not have:
    SGLang's scheduler would end at it (0.5.21 to 0.5.23)."""
    if not ids:
        return
    try:
        wrong = next((one for one in (min(ids), max(ids)) if not 0 <= one < vocab_size), None)
        if wrong is None:
            array("q", ids)  # at the speed of C: whether all of them are whole numbers
    except TypeError:
        raise ValueError("The prompt has a token id that is not a whole number.") from None
    if wrong is not None:
        raise ValueError(
            f"The prompt has the token id {wrong}; this model knows 0 to {vocab_size - 1}."
        )


def check_top_k(top_k: object) -> None:
    """Raises ``ValueError`` with one line for a number that SGLang's samplers can't hold: its
    scheduler would end at it (0.5.21)."""
    if isinstance(top_k, int) and not -_LARGEST - 1 <= top_k <= _LARGEST:
        raise ValueError(f"top_k must be at most {_LARGEST}; -1 means no limit.")


class WarmUpRequests:
    """The module ``requests`` for SGLang's warm-up, whose posts say that they are one.

    With several HTTP workers the warm-up of one can reach another that is through with its own.
    """

    def __getattr__(self, name: str) -> Any:
        import requests

        return getattr(requests, name)

    def post(self, url: str, headers: Mapping[str, str] | None = None, **kw: Any) -> Any:
        import requests

        stamp = environment.value(environment.STAMP)
        return requests.post(url, headers={**(headers or {}), labels.WARM_UP: stamp}, **kw)
