"""What uvicorn imports in each HTTP worker of a server with several: SGLang's app, with us inside.

SGLang loads no plugins in these processes. Without what is done here requests are served all the
same, and not learnt from (see ``labels``).
"""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.entrypoints import http_server
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager

app = http_server.app

_logger = logging.getLogger("aurora_sgl")


def _install() -> None:
    from aurora_sgl.engine import front, labels

    original = TokenizerManager._create_tokenized_object
    normalizes = GenerateReqInput.normalize_batch_and_arguments

    def create_tokenized_object(manager: Any, *args: Any, **kw: Any) -> Any:
        return front.create_tokenized_object(original, manager, *args, **kw)

    def normalize(obj: Any, *args: Any, **kw: Any) -> Any:
        return front.normalize(normalizes, obj, *args, **kw)

    app.add_middleware(labels.HeaderMiddleware)
    TokenizerManager._create_tokenized_object = create_tokenized_object
    GenerateReqInput.normalize_batch_and_arguments = normalize
    http_server.requests = front.WarmUpRequests()


try:
    _install()
except Exception:
    _logger.exception("aurora: could not start in this HTTP worker; serving goes on without")
