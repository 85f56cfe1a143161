"""Which requests may be learned from, and which never are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from aurora_sgl.sequences.sequence import TargetSampling
from aurora_sgl.split_place import GATE_SHARE as GATE_SHARE
from aurora_sgl.split_place import place
from aurora_sgl.store.queries.requests import RecentRequest
from aurora_sgl.store.queries.traces import DERIVED
from aurora_sgl.store.rollup import MIXED
from aurora_sgl.wire import WITHOUT_DRAFTS

#: Penalties, with the value that leaves the target's logits alone. SGLang relaxes them under
#: speculation: what was emitted is then not the target's own, whatever rule is named.
_PENALTIES: Mapping[str, Any] = {
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
}
#: What a client or an operator put between the target and its tokens.
_PROCESSORS = ("custom_logit_processor", "custom_params", "thinking_budget", "watermark")
#: What is done to the target's logits at each node of a draft, by the tokens before that node
#: alone (SGLang 0.5.21 to 0.5.23: ``eagle_utils.eagle_sample`` adds the bias to every row,
#: ``spec_utils.traverse_tree`` walks the grammar along each path). The emitted token is the changed
#: target's own, whatever was proposed; the captured hidden states are the plain target's.
_CONSTRAINTS = ("logit_bias", "json_schema", "regex", "ebnf", "structural_tag", "grammar")

FEWEST_OUTPUT = 3  # fewer output tokens hold nothing to predict
#: Accept rules under which a request's log tells what any drafter would have had accepted: the
#: emitted token is the target's own, drawn without a look at the proposal (see replay.py).
JUDGED_RULES = ("greedy", "target_sampling")
#: The rule under which it tells with which probability (see evaluation/expected.py).
REJECTION = "rejection_sampling"
#: From here on SGLang's top-k means all tokens (0.5.21: TOP_K_ALL in sampling_params.py).
_BOUNDLESS = 1 << 30


def why_unusable(row: RecentRequest) -> str:
    """Why a request is neither trained on nor judged: ``penalties``, ``processor`` (its tokens are
    not the target's own), ``short`` (hardly an answer); empty: it can be used."""
    if reason := _why_not_its_own(row.sampling):
        return reason
    return "short" if row.end - row.output_start + 1 < FEWEST_OUTPUT else ""


def why_not_judged(row: RecentRequest) -> str:
    """Why a held-out request says nothing of a drafter: as :func:`why_unusable`, or the accept
    rule that replay does not cover; empty: it can be judged."""
    if reason := why_unusable(row):
        return reason
    if row.accept_rule in JUDGED_RULES:
        return ""
    if row.accept_rule == REJECTION:
        is_known = sampling_of(row.sampling) is not None and not is_constrained(row.sampling)
        return "" if is_known else "unknown_law"
    return _RULE_REASONS.get(row.accept_rule, row.accept_rule)


#: Rules that are none, as reasons.
_RULE_REASONS = {"": "unknown_rule", MIXED: "mixed_rules"}


def is_constrained(sampling: Mapping[str, Any]) -> bool:
    """Whether a grammar or a bias stood between the target and its tokens: of a greedy request the
    log then does not say which token the target itself likes best."""
    return any(sampling.get(name) for name in _CONSTRAINTS)


def sampling_of(sampling: Mapping[str, Any]) -> TargetSampling | None:
    """How a request was drawn; ``None``: greedily, or it does not say."""
    temperature, top_k = sampling.get("temperature"), sampling.get("top_k") or 0
    if not temperature or temperature < 0:
        return None
    top_p = sampling.get("top_p")
    return TargetSampling(
        float(temperature),
        top_k if 0 < top_k < _BOUNDLESS else 0,
        1.0 if top_p is None else float(top_p),
    )


def _why_not_its_own(sampling: Mapping[str, Any]) -> str:
    without_drafts = str(sampling.get(WITHOUT_DRAFTS) or "").split(", ")
    if any(name in without_drafts or _differs(sampling, name) for name in _PENALTIES):
        return "penalties"
    if any(name in without_drafts or sampling.get(name) for name in _PROCESSORS):
        return "processor"
    return ""


def _differs(sampling: Mapping[str, Any], name: str) -> bool:
    return sampling.get(name) is not None and float(sampling[name]) != _PENALTIES[name]


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
    """What a request shares with those that must land on its side: conversation, or prompt. A
    derived conversation names its side (see ``sidecar.traces.turns``)."""
    return row.conversation_hash.partition(DERIVED)[0] or row.prompt_sha256


def conversation_of(row: RecentRequest) -> str:
    """What correlated requests share."""
    return row.conversation_hash or row.prompt_sha256


def sides(
    rows: Iterable[RecentRequest],
    alike: Mapping[int, str],  # request id -> key of its near-duplicates (see duplicates.alike)
    *,
    dev_share: float,
    gate_share: float,
    trained: Collection[int] = (),
    unlearnt: Collection[int] = (),
) -> dict[int, str]:
    """``train``, ``dev``, ``gate`` or ``duplicate`` (on no side) for each request id.

    A request is on the side of its conversation. Near-duplicates of several conversations have a
    side of their own, and members whose conversation is on another side are left out: no prompt
    is trained on that a held-out one nearly repeats, and a held-out conversation stays so in
    every run, whatever else is looked at. What nearly repeats a request that was ``trained`` on
    already is on its side. ``unlearnt`` requests are the gate's, whatever their conversation's
    side, and change no other's, unless they nearly repeat one that was trained on.
    """

    def of(key: str) -> str:
        return split_of(key, dev_share=dev_share, gate_share=gate_share)

    rows = list(rows)
    keys: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.request_id in alike and row.request_id not in unlearnt:
            keys[alike[row.request_id]].add(split_key(row))
    learnt = {alike[request_id] for request_id in trained if request_id in alike}
    side_of = {}
    for row in rows:
        group = alike.get(row.request_id, "")
        if row.request_id in unlearnt:
            side_of[row.request_id] = "duplicate" if group in learnt else "gate"
            continue
        own = of(split_key(row))
        shared = own if len(keys[group]) < 2 else "train" if group in learnt else of(group)
        side_of[row.request_id] = own if own == shared else "duplicate"
    return side_of
