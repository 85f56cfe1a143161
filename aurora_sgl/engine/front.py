"""What we do in the processes that take requests, before SGLang's scheduler sees one."""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from aurora_sgl import environment
from aurora_sgl.engine import asked, clean, labels

logger = logging.getLogger("aurora_sgl")

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
    config = getattr(manager, "model_config", None)
    size = getattr(config, "vocab_size", None)
    if size and ids is not None and images is None and not getattr(obj, "lora_path", None):
        # Beside images, and with an adapter, there are ids that the vocabulary does not have.
        check_ids(ids, int(size))
    if getattr(manager, "enable_metrics", False):
        names = getattr(getattr(manager, "metrics_collector", None), "labels", {})
        asked.check_labels(getattr(obj, "custom_labels", None), names)
    asked.check_names(getattr(obj, "sampling_params", None))
    result = original(manager, obj, *args, **kw)
    params = getattr(result, "sampling_params", None)
    if params is None:
        return result
    asked.fit_sampling(params, size)
    if hasattr(result, "logprob_start_len"):  # a request for tokens, not for an embedding
        asked.fit(result, size, getattr(config, "hidden_size", None))
        if not getattr(obj, "lora_path", None):
            result.lora_id = None  # only SGLang says which adapter a path is
    try:
        _attach(manager, params, client_rid(obj))
    except Exception:  # then its labels are unknown, and it is not learnt from
        logger.warning("aurora: a request's headers are lost", exc_info=True)
    return result


def _attach(manager: Any, params: Any, rid: str) -> None:
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    labels.attach(params, warmup=manager.server_status == ServerStatus.Starting, rid=rid)


def normalize(original: Callable[..., Any], obj: Any, *args: Any, **kw: Any) -> Any:
    """Around ``GenerateReqInput.normalize_batch_and_arguments``: give what the body says the types
    that SGLang reads, and remember what the client called its request, since several samples of a
    prompt have ids that no client knows.

    Raises ``ValueError``, which SGLang answers with 400.
    """
    if environment.is_set(environment.IDLE):
        return original(obj, *args, **kw)
    _rid.set(getattr(obj, "rid", None))
    _type(obj)
    try:
        result = original(obj, *args, **kw)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"The request's fields don't fit together: {asked.shown(error)}") from None
    if getattr(obj, "is_single", False) and isinstance(obj.sampling_params, list):
        raise ValueError("sampling_params must be an object, not a list, for a single prompt.")
    return result


def _type(obj: Any) -> None:
    if getattr(obj, "rid", None) == "":
        obj.rid = None  # with an empty one, a client that hangs up would end all requests
    values = getattr(obj, "sampling_params", None)
    if isinstance(values, list) and all(isinstance(each, dict) for each in values):
        obj.sampling_params = [asked.sampling(each) for each in values]
    elif isinstance(values, dict):
        obj.sampling_params = asked.sampling(values)
    elif values is not None:
        raise ValueError("sampling_params must be an object, or a list of objects.")
    if isinstance(params := getattr(obj, "session_params", None), dict):
        obj.session_params = asked.session(params)
    if not math.isfinite(getattr(obj, "received_time", None) or 0.0):
        raise ValueError("received_time must be a finite number.")


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
