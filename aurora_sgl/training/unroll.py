"""Training-time test: the drafter runs on from its own hidden states, as it will in serving.

From base row b the first step takes the target's features; step k takes the token b + 1 + k of the
log and the drafter's own hidden state of step k - 1, stands at rotary position b + k, and sees the
text rows 0..b and its own earlier steps from b: the very attention of a served chain whose drafts
were all accepted. All base rows of a request run side by side (EAGLE-3, arXiv 2503.01840).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from aurora_sgl.drafter import vocabulary
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.sequences.sequence import Sequence
from aurora_sgl.training.objectives.base import Step
from aurora_sgl.training.proposals import logged_step, proposed_at


def unroll(
    drafter: Drafter,
    sequence: Sequence,
    head: TargetHead,
    *,
    first_row: int,
    last_row: int,  # exclusive
    steps: int,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:  # one [rows, draft_vocab] float32 a step
    """Logits of ``steps`` unrolled steps from base rows ``first_row .. last_row - 1``.

    Step k holds the base rows whose input token is known: those below ``len(tokens) - 1 - k``.
    Drafter, sequence and head must be on one device.
    """
    tokens = sequence.tokens
    rows = min(sequence.rows, last_row)
    embeds = head.embed(tokens, dtype)
    features = sequence.features[:rows].to(dtype)
    mixed, residual = drafter.mix(embeds[1 : rows + 1], drafter.start(features))
    text = drafter.keys_values(mixed, torch.arange(rows, device=drafter.device))
    base = torch.arange(first_row, rows, device=drafter.device)
    lm_head = None if drafter.config.is_eagle3 else head.lm_head
    read, state = drafter.rows(mixed[base], residual[base], base, text, base)
    logits = [drafter.logits(read, lm_head)]
    own: tuple[torch.Tensor, torch.Tensor] | None = None
    for k in range(1, steps):
        count = min(len(base), len(tokens) - 1 - k - first_row)
        if count <= 0:
            break
        base, state = base[:count], state[:count]
        mixed, residual = drafter.mix(embeds[base + 1 + k], state)
        new = drafter.keys_values(mixed, base + k)
        key, value = (x[:, None] for x in new)
        if own is not None:
            key, value = torch.cat((own[0][:count], key), 1), torch.cat((own[1][:count], value), 1)
        own = (key, value)
        read, state = drafter.rows(mixed, residual, base + k, text, base, own)
        logits.append(drafter.logits(read, lm_head))
    return logits


class TargetRows:
    """The target's distribution at the positions that a drafter predicts, over its vocabulary."""

    def __init__(self, drafter: Drafter, head: TargetHead) -> None:
        ids = drafter.target_ids
        self.head = head
        self.draft_of = vocabulary.inverse(ids, drafter.config.vocab_size)
        self.draft_of_on_host = self.draft_of.cpu()  # read token by token
        self.rows_of_head = head.lm_head[ids].float()  # [draft_vocab, H]

    def best_tokens(self, sequence: Sequence) -> torch.Tensor:  # [n] int64 target ids
        """The target's best token after each position; read from the log where it is greedy."""
        count = min(len(sequence.last), len(sequence.tokens) - 1)
        known_from = sequence.output_start - 1 if sequence.greedy else count
        best = sequence.tokens[1 : count + 1].clone()
        for begin in range(0, known_from, 256):
            end = min(begin + 256, known_from)
            best[begin:end] = (sequence.last[begin:end].float() @ self.head.wide_lm_head.T).argmax(
                -1
            )
        return best

    def steps(
        self,
        logits: list[torch.Tensor],
        sequence: Sequence,
        best: torch.Tensor,  # [n] from best_tokens
        *,
        first_row: int,
        weight: torch.Tensor,  # [rows of step 0]
        needs_mass: bool,
        reference: list[torch.Tensor] | None = None,  # logits of the frozen drafter
    ) -> list[Step]:
        """Pair the drafter's logits with the target's distribution of the same positions."""
        begin = first_row + 1
        end = min(len(best), begin + len(logits[0]) + len(logits) - 1)
        last = sequence.last[begin:end].float()
        scores = last @ self.rows_of_head.T
        log_p = scores.log_softmax(-1)
        token = self.draft_of[best[begin:end]]
        follows = best[begin:end] == sequence.tokens[begin + 1 : end + 1]
        logged = proposed_at(sequence, first_row, self.draft_of_on_host)
        mass = self._mass(last, scores) if needs_mass else None
        paired = []
        for k, step_logits in enumerate(logits):
            count = min(len(step_logits), len(last) - k)
            if count <= 0:
                break
            at = slice(k, k + count)
            paired.append(
                Step(
                    log_q=F.log_softmax(step_logits[:count], -1),
                    log_p=log_p[at],
                    mass=mass[at] if mass is not None else None,
                    token=token[at],
                    weight=weight[:count],
                    follows=follows[at],
                    log_r=F.log_softmax(reference[k][:count], -1) if reference else None,
                    logged=logged_step(logged.get(k, ()), count, log_p.device),
                )
            )
        return paired

    def _mass(self, last: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        whole = torch.cat(
            [(part @ self.head.wide_lm_head.T).logsumexp(-1) for part in torch.split(last, 256)]
        )
        return (scores.logsumexp(-1) - whole).exp()
