"""Expected replay of a request that was sampled by rejection (chains, ``min(1, p / q)``).

What such a step emits depends on what was proposed, so a log does not tell what another drafter
would have had accepted. But it tells with which probability. A token x at a position is a draw from
p, whichever way it came. A step that proposes there draws from q and accepts with ``min(1, q / p)``
of p, so ``P(accepted, x) = min(p, q)(x)``, and given the logged x it was accepted with probability
``w(x) = min(1, q(x) / p(x))``, independent of the rest (Leviathan et al. 2023, arXiv 2211.17192,
appendix A.1). From a root, j drafts are accepted with probability ``w_1 .. w_j (1 - w_{j+1})``, all
of them with the product; the expected steps and accepted drafts follow over all roots that the
server may have drafted from.

p is the target's law as SGLang samples it there: temperature, top-k and top-p, without min-p; q the
drafter's at the request's temperature alone (0.5.23: ``eagle_utils.eagle_sample``,
``spec_utils.sample_draft_proposal``). A drafter of fewer tokens than the target proposes none of
the others. Steps that the end of the log leaves open are left out, as in ``replay``.
"""

from __future__ import annotations

import torch

from aurora_sgl.drafter import vocabulary
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.packed import PackedText
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.sequences.sequence import Sequence, TargetSampling

#: Rows whose distributions over the vocabulary are in memory at once.
_ROWS = 64


@torch.inference_mode()
def expected_counts(
    drafter: Drafter, sequence: Sequence, depth: int, head: TargetHead
) -> tuple[float, float]:
    """(determined verify steps, drafts accepted in them) that a chain of ``depth`` would have had
    on average. All on the drafter's device; ``sequence.sampling`` must be known."""
    assert sequence.sampling is not None
    length, first = sequence.rows + 1, sequence.output_start
    if length - first < 2:
        return 0.0, 0.0
    p = _target(sequence, head, sequence.sampling)  # [length - 1 - first]
    q = _drafted(drafter, sequence, depth, head, sequence.sampling.temperature)
    accepts = torch.zeros_like(q)
    for k in range(depth):
        count = len(p) - k
        if count > 0:
            accepts[k, :count] = (q[k, :count] / p[k:].clamp_min(1e-30)).clamp_max(1.0)
    return over_roots(accepts.double().tolist(), length - first)


def over_roots(accepts: list[list[float]], length: int) -> tuple[float, float]:
    """Expected steps and accepted drafts of a log of ``length`` tokens from the first root on.

    ``accepts[k][r]``: probability that the draft at depth k + 1 from root r was accepted if the
    ones before it were.
    """
    reach = [0.0] * (length + 1)  # probability that a step starts there
    reach[0], steps, accepted, depth = 1.0, 0.0, 0.0, len(accepts)
    for root in range(length - 1):
        logged = length - 1 - root
        on = reach[root]
        for j in range(min(depth, logged)):
            ends = on * (1 - accepts[j][root])
            steps, accepted = steps + ends, accepted + ends * j
            reach[root + j + 1] += ends
            on *= accepts[j][root]
        if depth <= logged:  # all of them; else what comes behind the log is not known
            steps, accepted = steps + on, accepted + on * depth
            if root + depth + 1 <= length:
                reach[root + depth + 1] += on
    return steps, accepted


def target_law(logits: torch.Tensor, sampling: TargetSampling) -> torch.Tensor:  # [rows, vocab]
    """What SGLang draws from under speculation: temperature, then top-k, then top-p."""
    p = (logits / sampling.temperature).softmax(-1)
    if 0 < sampling.top_k < p.shape[-1]:
        least = p.topk(sampling.top_k, -1).values[:, -1:]
        p = torch.where(p >= least, p, 0.0)
        p = p / p.sum(-1, keepdim=True)
    if sampling.top_p < 1:
        ordered, places = p.sort(-1, descending=True)
        ordered = torch.where(ordered.cumsum(-1) - ordered < sampling.top_p, ordered, 0.0)
        p = torch.zeros_like(p).scatter(-1, places, ordered)
        p = p / p.sum(-1, keepdim=True)
    return p


def _target(sequence: Sequence, head: TargetHead, sampling: TargetSampling) -> torch.Tensor:
    """p of each logged token from the second output token on."""
    first = sequence.output_start
    parts = []
    for begin in range(first, sequence.rows, _ROWS):
        rows = slice(begin, min(begin + _ROWS, sequence.rows))
        law = target_law(sequence.last[rows].float() @ head.wide_lm_head.T, sampling)
        tokens = sequence.tokens[rows.start + 1 : rows.stop + 1]
        parts.append(law.gather(-1, tokens[:, None])[:, 0])
    return torch.cat(parts)


def _drafted(
    drafter: Drafter, sequence: Sequence, depth: int, head: TargetHead, temperature: float
) -> torch.Tensor:  # [depth, roots]
    """q of the token that was logged at each depth behind each root, if those before it were
    accepted; 0 where the drafter has no such token, and behind the log."""
    first, last = sequence.output_start - 1, sequence.rows - 1  # base rows: a root's is before it
    draft_of = vocabulary.inverse(drafter.target_ids, drafter.config.vocab_size)
    q = torch.zeros(depth, last - first, device=sequence.tokens.device)
    for begin in range(first, last, _ROWS):
        end = min(begin + _ROWS, last)
        tokens = sequence.tokens[: sequence.rows + 1]
        text = PackedText.of([(tokens, sequence.features)], [(begin, end)])
        steps = drafter.unroll(text, head, steps=depth, dtype=drafter.dtype)
        for k, logits in enumerate(step.logits for step in steps):
            tokens = draft_of[sequence.tokens[begin + 2 + k : end + 2 + k]]
            count = min(len(tokens), len(logits), sequence.rows - 1 - k - begin)
            if count > 0:
                law = (logits[:count].float() / temperature).softmax(-1)
                own = law.gather(-1, tokens[:count, None].clamp_min(0))[:, 0]
                here = slice(begin - first, begin - first + count)
                q[k, here] = torch.where(tokens[:count] >= 0, own, 0.0)
    return q
