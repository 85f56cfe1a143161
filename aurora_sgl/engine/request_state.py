"""What is known of one request while a server runs it, and how it is sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from aurora_sgl.draft_shape import NO_DRAFT
from aurora_sgl.engine import clean
from aurora_sgl.engine.draft_tree import VerifyObservation
from aurora_sgl.engine.labels import UNKNOWN, Labels
from aurora_sgl.engine.trace_budget import OpenTrace


@dataclass(slots=True)
class RequestState:
    """One request, from its first prefill to its end. Hangs on SGLang's ``Req``."""

    request_id: int
    traced: bool
    speculates: bool
    greedy: bool
    swap_count: int  # of the server when the request was first prefilled
    keeps: float = 0.0  # steps for which it keeps its drafts even where they lose
    turn: int = 0  # key of its turn, see ``conversations``
    whole: bool = False  # its steps carry the whole draft shape, whatever pays
    keeps_tokens: bool = True  # its records hold tokens, not counts alone
    #: Parameters for which it gets one token of every step (see ``one_token``).
    no_drafts: tuple[str, ...] = ()
    labels: Labels = UNKNOWN
    steps: int = 0
    proposed: int = 0
    accepted: int = 0
    holes: bool = False  # a plain step left holes in the draft KV
    recorded: bool = False  # its first record was made, and none is missing since
    #: [3] cached places with draft KV of others or none (see ``DraftKV.strangers``), on the CPU or
    #: on its way there
    strangers: torch.Tensor | None = None
    ticket: int = 0  # of what is reserved for its trace until it begins
    trace: OpenTrace | None = None  # None: its hidden states are not captured, or no more

    @property
    def one_token(self) -> bool:
        return bool(self.no_drafts)

    def go_without_drafts(self, parameters: tuple[str, ...]) -> None:
        """Whatever its header asked for, and whatever would pay."""
        self.no_drafts, self.speculates, self.whole = parameters, False, False


def is_mixed(state: RequestState, observation: VerifyObservation) -> bool:
    """Whether the drafts of this step were made from draft KV of more than the live version."""
    if state.swap_count != observation.swap_count:
        return True
    if observation.shape == NO_DRAFT or state.one_token:
        return False
    return state.holes or (state.strangers is not None and int(state.strangers[0]) > 0)


def visible_length(req: Any) -> int:
    """Output tokens that the client gets: SGLang keeps what lies past a stop in ``output_ids``."""
    return int(req.finished_len) if req.finished_len is not None else len(req.output_ids)


def describe_sampling(req: Any) -> dict[str, Any]:
    """The sampling parameters that matter for learning and replay."""
    params = req.sampling_params
    described: dict[str, Any] = {
        name: clean.value(getattr(params, name))
        for name in ("temperature", "top_p", "top_k", "min_p", "max_new_tokens")
    }
    for name in ("frequency_penalty", "presence_penalty", "min_new_tokens"):
        if setting := getattr(params, name, 0):
            described[name] = clean.value(setting)
    if (penalty := getattr(params, "repetition_penalty", 1.0)) != 1.0:
        described["repetition_penalty"] = clean.value(penalty)
    if getattr(params, "logit_bias", None):
        described["logit_bias"] = True
    if any(
        getattr(params, name, None) for name in ("json_schema", "regex", "ebnf", "structural_tag")
    ):
        described["grammar"] = True
    if getattr(req, "custom_logit_processor", None):
        described["custom_logit_processor"] = True
    return described


def is_greedy(params: Any) -> bool:
    """SGLang turns temperature 0 into top-k 1."""
    return bool(params.top_k == 1 or params.temperature == 0.0)
