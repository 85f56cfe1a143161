"""What the client says about a request, on its way from the HTTP process to the scheduler.

Headers do not reach the scheduler by themselves. An ASGI middleware keeps them in a context
variable; when the tokenizer manager builds the tokenized request, which happens in the same
task, they are put into ``sampling_params.custom_params``, which survives the journey and which
SGLang reads only for custom logit processors.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

KEY = "aurora"
DEFAULT_DOMAIN = "default"
MAX_LABEL = 64

_headers: ContextVar[dict[str, str] | None] = ContextVar("aurora_headers", default=None)

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


class HeaderMiddleware:
    """Pure ASGI: remembers the ``x-aurora-*`` headers of the request that is being served."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(
        self,
        scope: Scope,
        receive: Callable[..., Awaitable[Any]],
        send: Callable[..., Awaitable[None]],
    ) -> None:
        if scope["type"] == "http":
            found = {
                name.decode("latin-1"): value.decode("latin-1").strip()[:MAX_LABEL]
                for name, value in scope["headers"]
                if name.startswith(b"x-aurora-")
            }
            _headers.set(found)
        await self.app(scope, receive, send)


def attach(sampling_params: Any, *, warmup: bool) -> None:
    """Put the labels of the current HTTP request into ``sampling_params.custom_params``."""
    headers = _headers.get() or {}
    if not headers and not warmup:
        return
    labels: dict[str, Any] = {"warmup": True} if warmup else {}
    if domain := headers.get("x-aurora-domain"):
        labels["domain"] = domain
    if conversation := headers.get("x-aurora-conversation"):
        labels["conversation"] = conversation
    for name in ("train", "speculate"):
        if said := headers.get(f"x-aurora-{name}"):
            labels[name] = said.lower() not in ("no", "false", "0", "off")
    labels["whole"] = headers.get("x-aurora-speculate", "").lower() == "whole"
    params = sampling_params.custom_params
    sampling_params.custom_params = {**(params if isinstance(params, dict) else {}), KEY: labels}


def read(sampling_params: Any) -> Labels:
    """The labels that :func:`attach` put there; defaults when there are none."""
    params = getattr(sampling_params, "custom_params", None)
    found = params.get(KEY) if isinstance(params, dict) else None
    if not isinstance(found, dict):
        return Labels()
    train, speculate = found.get("train"), found.get("speculate")
    return Labels(
        domain=str(found.get("domain") or DEFAULT_DOMAIN)[:MAX_LABEL],
        conversation=str(found.get("conversation") or "")[:MAX_LABEL],
        may_train=train if isinstance(train, bool) else None,
        speculate=speculate if isinstance(speculate, bool) else None,
        whole=found.get("whole") is True,
        warmup=bool(found.get("warmup")),
    )
