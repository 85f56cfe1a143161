"""What a request asks for, held to what SGLang's processes behind the front can take.

An exception there ends the server (0.5.21 to 0.5.23), so such a request is refused here: a
``ValueError`` with one line, which SGLang answers with 400. What SGLang serves in spite of an odd
type (an int for a float, 1 for true) is converted. A number beyond those that a sampler tells
apart is put at the last one that it does, from where no logit becomes infinite or NaN.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import msgspec

MAX_SAMPLES = 65_536  # of a prompt: SGLang copies the request for each before it looks at one
_LARGEST = 2**31 - 1  # of the int32 tensors that counts and top-k become
_INT64 = 2**63 - 1
_BOUNDED = frozenset(("top_k", "sampling_seed"))  # refused beyond their bounds
_FINITE = 1e30  # float32 ends at 3.4e38, and the smallest temperature is 1e-6
_SMALLEST_TOP_P = 1e-6  # no vocabulary has a million tokens, so the likeliest has more
_SMALLEST_REPETITION = 1e-20
_SHOWN = 200  # characters of a client's text in a refusal

#: SGLang fills these in by itself; a client's ``is_normalized`` would keep it from that.
_SGLANGS_OWN = frozenset(
    ("stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len", "is_normalized")
)
#: Made by SGLang, or checked below by itself.
_NOT_BY_ANNOTATION = frozenset(
    ("input_text", "input_ids", "input_embeds", "mm_inputs", "token_type_ids", "sampling_params",
     "session_params", "positional_embed_overrides", "num_items_assigned", "time_stats",
     "kv_hints")
)  # fmt: skip
_WORDS = {"true": True, "false": False}


def sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    """A body's ``sampling_params`` with the types of SGLang's ``SamplingParams``."""
    from sglang.srt.sampling.sampling_params import SamplingParams

    annotations, typed = _annotations(SamplingParams), {}
    for name, value in values.items():
        if name in _SGLANGS_OWN or (name == "n" and value is None):
            continue
        typed[name] = _sampling_value(name, value, annotations.get(name, Any))
    if typed.get("n", 1) > MAX_SAMPLES:
        raise ValueError(f"n must be at most {MAX_SAMPLES}.")
    return typed


def check_names(values: Mapping[str, Any] | None) -> None:
    """Raises ``ValueError`` for a sampling parameter that SGLang does not have; for when processors
    of sound have taken theirs out of ``values``."""
    if not values:
        return
    from sglang.srt.sampling.sampling_params import SamplingParams

    names = _annotations(SamplingParams)
    unknown = [name for name in values if name not in names]
    if names and unknown:
        raise ValueError(f"sampling_params has no {shown(unknown[0])}; see SGLang's documentation.")


def session(values: Mapping[str, Any]) -> dict[str, Any]:
    """A body's ``session_params`` with the types of SGLang's ``SessionParams``."""
    from sglang.srt.managers.io_struct import SessionParams

    annotations = _annotations(SessionParams)
    unknown = [name for name in values if name not in annotations]
    if annotations and unknown:
        raise ValueError(f"session_params has no {shown(unknown[0])}.")
    typed = {
        name: _typed(name, value, annotations.get(name, Any)) for name, value in values.items()
    }
    if typed.get("replace") and typed.get("rid") is None:  # its scheduler would end at it
        raise ValueError("session_params: replace needs the rid of the request to replace.")
    return typed


def fit_sampling(params: Any, vocab_size: int | None) -> None:
    """Hold finished sampling parameters, which SGLang verified, to what its samplers take."""
    check_top_k(params.top_k)
    params.temperature = min(params.temperature, _FINITE)
    params.top_p = max(params.top_p, _SMALLEST_TOP_P)
    params.repetition_penalty = max(params.repetition_penalty, _SMALLEST_REPETITION)
    for name in ("max_new_tokens", "min_new_tokens"):
        if (count := getattr(params, name)) is not None:
            setattr(params, name, min(count, _LARGEST))
    stops = params.stop_token_ids
    if not stops or not vocab_size:
        return
    outside = {token for token in stops if not 0 <= token < vocab_size}
    if outside and params.min_new_tokens > 0:
        raise ValueError(_outside("stop_token_ids", min(outside), vocab_size))
    # No answer has such a token; a neighbour's min_new_tokens would look for it in the logits.
    params.stop_token_ids = (set(stops) - outside) or None


def fit(request: Any, vocab_size: int | None, width: int | None) -> None:
    """Hold a finished tokenized request to what the scheduler takes; ``width``: the target's
    hidden size."""
    kind: Any = type(request)
    for name, annotation in _annotations(kind).items():
        if name not in _NOT_BY_ANNOTATION:
            value = getattr(request, name)
            setattr(request, name, _typed(name, _alone(value, annotation), annotation))
    _fit_logprobs(request, vocab_size)
    length = len(request.input_ids or ())
    for name in ("multi_item_delimiter_indices", "token_indices_to_pool"):
        if any(not 0 <= place < length for place in getattr(request, name, None) or ()):
            raise ValueError(f"{name}: a place outside the prompt's {length} tokens.")
    _check_embeds(request, width)


def check_top_k(top_k: object) -> None:
    """Raises ``ValueError`` with one line for a number that SGLang's samplers can't hold."""
    if isinstance(top_k, int) and not -_LARGEST - 1 <= top_k <= _LARGEST:
        raise ValueError(f"top_k must be at most {_LARGEST}; -1 means no limit.")


def check_labels(labels: Mapping[str, str] | None, names: Iterable[str]) -> None:
    """Raises ``ValueError`` for labels that SGLang's metrics don't have: the process of the front
    would end at them."""
    if unknown := next((name for name in labels or () if name not in names), None):
        raise ValueError(f"custom_labels: this server's metrics have no label {shown(unknown)}.")


def _fit_logprobs(request: Any, vocab_size: int | None) -> None:
    if not request.return_logprob:  # a neighbour's would be taken by these numbers too
        request.top_logprobs_num, request.logprob_start_len = 0, -1
        return
    most = vocab_size or _LARGEST
    if not 0 <= request.top_logprobs_num <= most:
        raise ValueError(f"top_logprobs_num must be from 0 to {most}.")
    if request.logprob_start_len < -1:
        raise ValueError("logprob_start_len must be a place in the prompt, or -1 for its end.")
    for token in request.token_ids_logprob or ():
        if not 0 <= token < most:
            raise ValueError(_outside("token_ids_logprob", token, most))


def _check_embeds(request: Any, width: int | None) -> None:
    if isinstance(request.positional_embed_overrides, dict | list | str | float | int):
        raise ValueError("positional_embed_overrides can't be sent as JSON.")
    if request.input_embeds is None:
        return
    import numpy as np

    try:
        rows = np.asarray(request.input_embeds, dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        rows = np.empty(0, np.float32)
    if rows.ndim != 2 or rows.shape[1] != (width or rows.shape[1]) or not np.isfinite(rows).all():
        raise ValueError(f"input_embeds must be rows of {width or 'equally many'} finite numbers.")


@cache
def _annotations(struct: type) -> dict[str, Any]:
    """Of each field; nothing of a class of another kind, whose processes decode no types."""
    if not issubclass(struct, msgspec.Struct):
        return {}
    return {field.name: field.type for field in msgspec.structs.fields(struct)}


def _sampling_value(name: str, value: Any, annotation: Any) -> Any:
    if name == "stop_token_ids":
        return _stop_ids(value)
    if name == "logit_bias":
        return _bias(value)
    if name == "watermark" or (name == "custom_params" and _pickles()):
        return value  # SGLang looks at the one; to the other nothing is odd
    value = None if value is None else _typed(name, value, annotation)
    for text in [value] if isinstance(value, str) else value if isinstance(value, list) else ():
        _check_text(name, text)
    return value


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        return
    try:
        text.encode()
        if name == "stop_regex":
            re.compile(text)
    except (UnicodeEncodeError, re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{name}: {shown(error)}") from None


def _stop_ids(value: Any) -> set[int] | None:
    if value is None:
        return None
    try:
        return {int(token) for token in value if token is not None}
    except (TypeError, ValueError, OverflowError):
        raise ValueError("stop_token_ids must be a list of token ids.") from None


def _bias(value: Any) -> dict[Any, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("logit_bias must be an object of token ids and numbers.")
    bias = {}
    for token, each in value.items():
        try:
            number = float(each) if isinstance(each, int | float) else math.nan
        except OverflowError:
            number = math.inf
        if math.isnan(number) or number == math.inf:
            raise ValueError(f"logit_bias: {shown(token)} needs a finite number.")
        bias[token] = min(max(number, -_FINITE), _FINITE)  # -inf bans a token, and so does this
    return bias


def _typed(name: str, value: Any, annotation: Any) -> Any:
    try:
        typed = msgspec.convert(_lenient(value, annotation), annotation)
    except msgspec.ValidationError as error:
        raise ValueError(f"{name}: {shown(error)}") from None
    if type(typed) is int and name not in _BOUNDED:
        return min(max(typed, -_INT64 - 1), _INT64)  # what messages carry
    return typed


def _lenient(value: Any, annotation: Any) -> Any:
    """``value`` as what SGLang's code would have taken it for."""
    wanted = _members(annotation)
    if bool in wanted:
        if value is None and type(None) not in wanted:
            return False
        if isinstance(value, int | float):
            return bool(value)
        return _WORDS.get(value.lower(), value) if isinstance(value, str) else value
    if isinstance(value, bool) and wanted & {int, float}:
        return int(value)
    if isinstance(value, float) and value.is_integer() and wanted & {int, float} == {int}:
        return int(value)
    return value


def _alone(value: Any, annotation: Any) -> Any:
    """A list of one, of a single prompt."""
    listed = any(typing.get_origin(each) is list for each in _members(annotation))
    return value[0] if isinstance(value, list) and len(value) == 1 and not listed else value


@cache
def _members(annotation: Any) -> frozenset[Any]:
    union = typing.get_origin(annotation) is typing.Union
    return frozenset(typing.get_args(annotation) if union else (annotation,))


def _pickles() -> bool:
    """Whether SGLang's processes talk in pickles, which carry every value."""
    from sglang.srt.managers import io_struct

    return bool(getattr(io_struct, "_USE_PICKLE_IPC", True))


def _outside(name: str, token: int, vocab_size: int) -> str:
    return f"{name} has the token id {token}; this model knows 0 to {vocab_size - 1}."


def shown(value: object) -> str:
    """What a client sent, in a refusal: on one line, in ASCII, and short."""
    text = ascii(str(value))[1:-1]
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
