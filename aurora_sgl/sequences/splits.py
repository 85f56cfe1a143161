"""Which requests may be learned from, and which never are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from aurora_sgl.split_place import GATE_SHARE as GATE_SHARE
from aurora_sgl.split_place import place
from aurora_sgl.store.queries.requests import RecentRequest

#: Sampling parameters that change the target's logits, with the value that leaves them alone.
#: SGLang applies them in place, and relaxes penalties under speculation: what was emitted is then
#: not what the captured hidden states say.
_NEUTRAL: Mapping[str, Any] = {
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
}
_CONSTRAINTS = (
    "logit_bias",
    "json_schema",
    "regex",
    "ebnf",
    "structural_tag",
    "grammar",
    "custom_logit_processor",
    "custom_params",
)

FEWEST_OUTPUT = 3  # fewer output tokens hold nothing to predict
#: Accept rules under which a request's log tells what any drafter would have had accepted: the
#: emitted token is the target's own, drawn without a look at the proposal (see replay.py).
JUDGED_RULES = ("greedy", "target_sampling")


def why_unusable(row: RecentRequest) -> str:
    """Why a request is neither trained on nor judged: ``sampling`` (its logits were changed),
    ``short`` (hardly an answer); empty: it can be used."""
    if not is_plain(row.sampling):
        return "sampling"
    return "short" if row.end - row.output_start + 1 < FEWEST_OUTPUT else ""


def why_not_judged(row: RecentRequest) -> str:
    """Why a held-out request says nothing of a drafter: as :func:`why_unusable`, or the accept
    rule that replay does not cover; empty: it can be judged."""
    if reason := why_unusable(row):
        return reason
    return "" if row.accept_rule in JUDGED_RULES else row.accept_rule or "unknown_rule"


def is_plain(sampling: Mapping[str, Any]) -> bool:
    """Whether a request was answered by the target alone: no penalty, bias or grammar."""
    if any(sampling.get(name) for name in _CONSTRAINTS):
        return False
    return all(
        sampling.get(name) is None or float(sampling[name]) == neutral
        for name, neutral in _NEUTRAL.items()
    )


def split_of(key: str, *, dev_share: float, gate_share: float) -> str:
    """``train``, ``dev`` or ``gate``: fixed by the key alone, so a request never changes sides.

    The key is a conversation's hash, or the hash of the prompt, so that two requests of one
    conversation and two copies of one prompt land on the same side. The gate is cut off first:
    its requests stay held out whatever the dev share.
    """
    own = place(key)
    if own < gate_share:
        return "gate"
    return "dev" if own < gate_share + dev_share else "train"


def split_key(row: RecentRequest) -> str:
    """What a request shares with those that must land on its side: conversation, or prompt."""
    return row.conversation_hash or row.prompt_sha256


def sides(
    rows: Iterable[RecentRequest],
    alike: Mapping[int, str],  # request id -> key of its near-duplicates (see duplicates.alike)
    *,
    dev_share: float,
    gate_share: float,
) -> dict[int, str]:
    """``train``, ``dev``, ``gate`` or ``duplicate`` (on no side) for each request id.

    A request is on the side of its conversation. Near-duplicates of several conversations have a
    side of their own, and members whose conversation is on another side are left out: no prompt
    is trained on that a held-out one nearly repeats, and a held-out conversation stays so in
    every run, whatever else is looked at.
    """

    def of(key: str) -> str:
        return split_of(key, dev_share=dev_share, gate_share=gate_share)

    rows = list(rows)
    keys: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.request_id in alike:
            keys[alike[row.request_id]].add(split_key(row))
    side_of = {}
    for row in rows:
        own = of(split_key(row))
        group = alike.get(row.request_id, "")
        shared = own if len(keys[group]) < 2 else of(group)
        side_of[row.request_id] = own if own == shared else "duplicate"
    return side_of
