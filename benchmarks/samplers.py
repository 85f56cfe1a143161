"""SGLang's own way from a request to the probabilities of its next token, without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

#: Of a server that was started without flags, where SGLang would read its published settings.
_SETTINGS = SimpleNamespace(
    deterministic=SimpleNamespace(enable_deterministic_inference=False),
    features=SimpleNamespace(enable_custom_logit_processor=False),
)


class Tokenizer:
    """A token for each byte."""

    additional_stop_token_ids: set[int] | None = None
    eos_token_id = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())


class _Batch:
    """What penalizers hold on to by a weak reference."""

    def __init__(self, reqs: list[Any]) -> None:
        self.reqs, self.device = reqs, "cpu"


def verified(values: dict[str, Any], vocab_size: int) -> Any:
    """``SamplingParams`` as SGLang's tokenizer manager makes them of a body's."""
    from sglang.srt.sampling.sampling_params import SamplingParams

    params = SamplingParams(**values)
    params.normalize(Tokenizer())
    params.verify(vocab_size)
    return params


def probabilities(params: Any, vocab_size: int) -> Any:
    """torch.Tensor of shape (2, vocab_size): for a request with these parameters, and for its
    neighbour, for whom penalties of the first are prepared too."""
    import torch
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling import sampling_batch_info
    from sglang.srt.sampling.sampling_params import SamplingParams

    neighbour = SamplingParams(min_new_tokens=1, frequency_penalty=0.5)
    neighbour.normalize(Tokenizer())
    reqs = [Req("rid", "", [1, 2], each, vocab_size=vocab_size) for each in (params, neighbour)]
    for req in reqs:
        req.tokenizer = Tokenizer()
    batch = _Batch(reqs)
    with patch.object(sampling_batch_info, "get_exec", lambda: _SETTINGS):
        info = sampling_batch_info.SamplingBatchInfo.from_schedule_batch(batch, vocab_size)
        info.penalizer_orchestrator.cumulate_output_tokens(torch.full((2,), vocab_size - 1))
        logits = torch.linspace(-20.0, 20.0, vocab_size).repeat(2, 1)
        info.apply_logits_bias(logits)
    return logits.div_(info.temperatures).softmax(-1)
