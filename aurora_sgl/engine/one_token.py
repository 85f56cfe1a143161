"""Requests whose answers drafts would change: of every step they get one token, the target's own.

SGLang's verification computes some of what shapes a token once a step, for all nodes of a draft
alike: penalties see the last token of the step before, whatever stands between it and a node
("a relaxed version", 0.5.21 to 0.5.23: eagle_utils). Which tokens come out then depends on how many
drafts were accepted, and so on the drafter. Such a request is served without drafts. In a batch
with requests that draft its row is verified as a tree of the root alone, so that one client's
penalty costs the others nothing.

What is decided here of each parameter stands in docs/operations.md, with why.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from functools import lru_cache
from typing import Any

import torch

ENDS = "is looked at token by token after the step"
EACH_NODE = "is computed for each node of a draft"
LEFT_OUT = "is left out by SGLang's verification, with drafts or without"
NO_TOKEN = "changes what is sent of the tokens, not which they are"
APART = "makes requests of its own, or is refused beside speculation"

#: Sampling parameters that drafts leave as they are, and why.
UNTOUCHED: dict[str, str] = {
    **dict.fromkeys(
        ("max_new_tokens", "stop", "stop_token_ids", "stop_regex", "ignore_eos", "stop_strs",
         "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len"), ENDS,
    ),
    **dict.fromkeys(
        ("temperature", "top_p", "top_k", "logit_bias", "json_schema", "regex", "ebnf",
         "structural_tag", "ebnf_full_assistant"), EACH_NODE,
    ),
    "min_p": LEFT_OUT,
    **dict.fromkeys(
        ("skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim", "stream_interval",
         "is_normalized"), NO_TOKEN,
    ),
    **dict.fromkeys(("n", "beam_width"), APART),
}  # fmt: skip

#: Those that drafts change, with the value at which they do nothing.
CHANGED: dict[str, Any] = {
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
    "watermark": None,
}
#: Those that drafts change under some condition: see :func:`reasons`.
SOMETIMES = ("custom_params", "sampling_seed")
#: What a request has beside its sampling parameters.
PROCESSOR = "custom_logit_processor"
THINKING_BUDGET = "thinking_budget"


def reasons(request: Any, *, seeds: bool = False) -> tuple[str, ...]:
    """The parameters for which a request is served without drafts; none for most.

    ``request``: SGLang's, tokenized or as its scheduler holds it. ``seeds``: whether the server
    draws by the request's seed (``--enable-deterministic-inference``). A parameter of a release
    that nobody here decided on counts, unless it has its default.
    """
    params = request.sampling_params
    names = [name for name, neutral in CHANGED.items() if getattr(params, name, neutral) != neutral]
    if getattr(request, PROCESSOR, None):
        names.append(PROCESSOR)
    custom = getattr(params, "custom_params", None)
    if isinstance(custom, dict) and custom.get(THINKING_BUDGET) is not None:
        names.append(THINKING_BUDGET)
    if seeds and getattr(params, "sampling_seed", None) is not None and params.top_k != 1:
        names.append("sampling_seed")
    kind: Any = type(params)
    names += [name for name, default in undecided(kind) if getattr(params, name) != default]
    return tuple(names)


@lru_cache(maxsize=8)
def undecided(parameters: Any) -> tuple[tuple[str, Any], ...]:
    """(name, default) of the sampling parameters of a release that this file does not know."""
    decided = {*UNTOUCHED, *CHANGED, *SOMETIMES}
    names = [name for name in getattr(parameters, "__struct_fields__", ()) if name not in decided]
    default = parameters() if names else None
    return tuple((name, getattr(default, name)) for name in names)


class NoDrafts:
    """Which requests of a scheduler process go without drafts. ``notices``: see ``wire.Hello``."""

    def __init__(
        self, worker: Any, description: Mapping[str, Any], notices: MutableMapping[str, str]
    ) -> None:
        #: SGLang's rejection sampling takes every draft for a chain, whatever hangs on what.
        self.can_withhold = not description["rejection_sampling"]
        arguments = getattr(worker, "server_args", None)
        self._seeds = bool(getattr(arguments, "enable_deterministic_inference", False))
        self._notices = notices
        self._had_drafts = 0  # requests that should have had none

    def applies(self, received: Any) -> bool:
        """Whether a request that comes in is one of them; tells where it can't go without."""
        why = reasons(received, seeds=self._seeds)
        if why and not self.can_withhold:
            self._had_drafts += 1
            self._notices["drafts"] = (
                f"{self._had_drafts} requests had drafts that may change their answers, the last "
                f"one for its {', '.join(why)}: with SGLang's rejection sampling "
                "(--speculative-use-rejection-sampling) no request can go without."
            )
        return bool(why)

    def begin(self, req: Any) -> None:
        """At its first prefill, on every rank."""
        req._aurora_no_drafts = reasons(req, seeds=self._seeds) if self.can_withhold else ()

    def withhold(self, batch: Any, verify_input: Any) -> None:
        """Before a verify step, on every rank: some requests of a batch get none of its drafts."""
        if int(verify_input.draft_token_num) == 1:
            return
        rows = [row for row, req in enumerate(batch.reqs) if getattr(req, "_aurora_no_drafts", ())]
        if rows:
            leave_alone(verify_input, rows)


def leave_alone(verify_input: Any, rows: list[int]) -> None:
    """Take the drafts of these rows of a batch out of its trees: nothing hangs on their roots."""
    links = verify_input.retrieve_next_token  # [batch, nodes]; may be kept for later steps
    where = torch.tensor(rows, device=links.device)
    verify_input.retrieve_next_token = links.index_fill(0, where, -1)


def process_logits(verify_input: Any, batch: Any, logits_output: Any) -> None:
    """Apply the clients' own logit processors: SGLang's EAGLE verification leaves them out, with
    drafts or without (0.5.21 to 0.5.23; that of DFlash does the same as here)."""
    info = batch.sampling_info
    if getattr(info, "has_custom_logit_processor", False):
        from sglang.srt.layers.sampler import apply_custom_logit_processor

        nodes = int(verify_input.draft_token_num)
        apply_custom_logit_processor(logits_output.next_token_logits, info, nodes)
