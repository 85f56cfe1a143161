"""What the client says about a request, on its way from the HTTP process to the scheduler.

Headers do not reach the scheduler by themselves. An ASGI middleware keeps them in a context
variable; when the tokenizer manager builds the tokenized request, which happens in the same
task, they are put into ``sampling_params.custom_params``, which survives the journey. The
scheduler takes them out again before SGLang reads the request.

A stamp says that the middleware saw the request: a random token of this start, which processes
inherit and clients don't know. What comes without it, because its front end has no middleware or
because a client wrote labels by itself, is not learnt from.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from aurora_sgl import environment
from aurora_sgl.client_text import MAX_LABEL, of_header

KEY = "aurora"
DEFAULT_DOMAIN = "default"
STAMP_VARIABLE = environment.STAMP
WARM_UP = "x-aurora-warmup"  # with the stamp: a warm-up of SGLang's, not a client's request

_YES = frozenset(("yes", "true", "1", "on"))
_NO = frozenset(("no", "false", "0", "off"))
_WHOLE = "whole"
_NO_LIMIT = 2**31 - 1
#: The second is for gateways that pass on no header but a few and these: SGLang's from 0.3.1 on.
_PREFIXES = (b"x-aurora-", b"x-request-id-aurora-")

_header_labels: ContextVar[dict[str, Any] | None] = ContextVar("aurora_said", default=None)

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Callable[..., Awaitable[Any]], Callable[..., Awaitable[None]]], Any]


@dataclass(frozen=True, slots=True)
class Labels:
    """What a request says: its domain, its conversation, its consent, its wish for drafts."""

    domain: str = DEFAULT_DOMAIN
    conversation: str = ""
    may_train: bool | None = None  # None: the server's setting decides
    speculate: bool | None = None  # None: the server's phase decides
    whole: bool = False  # with drafts of the whole shape in every step
    warmup: bool = False
    stamped: bool = True  # a middleware of ours saw its headers
    rid: str = ""  # the client's own id, where SGLang gives a request another one
    samples: str = ""  # a token of its own for each prompt that is answered several times
    prompt_of: int | None = None  # it is the prompt alone of samples with so many tokens each
    unreadable: bool = False  # its x-aurora-train says neither yes nor no, and counts as a no


#: Of a request whose headers nobody saw.
UNKNOWN = Labels(may_train=False, stamped=False)


class HeaderMiddleware:
    """Pure ASGI: remembers what the ``x-aurora-*`` headers of the request being served say."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(
        self,
        scope: Scope,
        receive: Callable[..., Awaitable[Any]],
        send: Callable[..., Awaitable[None]],
    ) -> None:
        if scope["type"] in ("http", "websocket"):
            _header_labels.set(parse(scope["headers"]))
        await self.app(scope, receive, send)


def parse(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, Any]:
    """What a request's headers say, as JSON values."""
    ours: dict[str, list[bytes]] = {}
    for header, value in headers:
        lower = header.lower()
        for prefix in _PREFIXES:
            if lower.startswith(prefix):
                name = lower.removeprefix(prefix).decode("latin-1")
                ours.setdefault(name, []).append(value)
    labels: dict[str, Any] = {}
    for name in ("domain", "conversation"):
        if text := next(filter(None, map(of_header, ours.get(name, ()))), ""):
            labels[name] = text
    if "train" in ours:
        words = _words(ours["train"])
        labels["train"] = words <= _YES
        labels["train_unreadable"] = not words <= _YES | _NO
    wish = of_header(ours["speculate"][0]).lower() if "speculate" in ours else ""
    if wish == _WHOLE or wish in _YES or wish in _NO:
        labels["speculate"] = wish not in _NO
    labels["whole"] = wish == _WHOLE
    labels["warmup"] = any(_is_stamp(value) for value in ours.get("warmup", ()))
    return labels


def _words(values: list[bytes]) -> set[str]:
    """Every value of every copy of a header."""
    parts = [part for value in values for part in value.split(b",")]
    return {part.strip().lower().decode("latin-1") for part in parts}


def new_stamp() -> None:
    """A stamp for the server that starts now, and for all processes that it will start."""
    os.environ[STAMP_VARIABLE] = secrets.token_urlsafe(24)


def attach(sampling_params: Any, *, warmup: bool, rid: str = "") -> None:
    """Put what the current HTTP request says into ``sampling_params.custom_params``; ``rid``: the
    client's own id, for when the request gets another one."""
    header_labels, stamp = _header_labels.get(), environment.value(STAMP_VARIABLE)
    if not stamp or (header_labels is None and not warmup):
        return
    params = sampling_params.custom_params
    own = params if isinstance(params, dict) else None
    labels = {**(header_labels or {}), "stamp": stamp, "alone": own is None}
    labels["warmup"] = warmup or labels.get("warmup") is True
    if (getattr(sampling_params, "n", 1) or 1) > 1:
        labels["rid"], labels["samples"] = rid, secrets.token_hex(8)
        labels["tokens"] = sampling_params.max_new_tokens
    sampling_params.custom_params = {**(own or {}), KEY: labels}


def take(sampling_params: Any) -> Labels:
    """What :func:`attach` put there, which leaves the parameters as the client sent them.

    ``UNKNOWN`` for whatever has no valid stamp.
    """
    params = getattr(sampling_params, "custom_params", None)
    if not isinstance(params, dict):
        return UNKNOWN
    labels = params.get(KEY)
    if not isinstance(labels, dict) or not _is_stamp(
        str(labels.get("stamp")).encode("utf-8", "replace")
    ):
        return UNKNOWN
    rest = {name: value for name, value in params.items() if name != KEY}
    sampling_params.custom_params = None if labels.get("alone") is True else rest
    train, speculate = labels.get("train"), labels.get("speculate")
    return Labels(
        domain=str(labels.get("domain") or DEFAULT_DOMAIN)[:MAX_LABEL],
        conversation=str(labels.get("conversation") or "")[:MAX_LABEL],
        may_train=train if isinstance(train, bool) else None,
        speculate=speculate if isinstance(speculate, bool) else None,
        whole=labels.get("whole") is True,
        warmup=labels.get("warmup") is True,
        unreadable=labels.get("train_unreadable") is True,
        rid=str(labels.get("rid") or ""),
        samples=str(labels.get("samples") or ""),
        prompt_of=_prompt_of(labels, sampling_params),
    )


def _prompt_of(labels: dict[str, Any], sampling_params: Any) -> int | None:
    """SGLang asks for no tokens of the prompt of several samples (0.5.21 to 0.5.23)."""
    tokens = labels.get("tokens")
    alone = labels.get("samples") and sampling_params.max_new_tokens == 0 and tokens != 0
    return (tokens if isinstance(tokens, int) else _NO_LIMIT) if alone else None


def _is_stamp(value: bytes) -> bool:
    stamp = environment.value(STAMP_VARIABLE)
    return bool(stamp) and secrets.compare_digest(value, str(stamp).encode())
