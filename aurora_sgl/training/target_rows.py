"""The target's side of training: its distribution where the drafter's rows predict."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from aurora_sgl.drafter import vocabulary
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.sequences.sequence import Sequence
from aurora_sgl.training.objectives.base import UnrolledStep
from aurora_sgl.training.proposals import logged_step, logged_tokens


class TargetRows:
    """The target's distribution at the positions that a drafter predicts, over its vocabulary."""

    def __init__(self, drafter: Drafter, head: TargetHead) -> None:
        ids = drafter.target_ids
        self.head = head
        self.draft_of = vocabulary.inverse(ids, drafter.config.vocab_size)
        self.draft_of_on_host = self.draft_of.cpu()  # read token by token
        self.rows_of_head = head.lm_head[ids].float()  # [draft_vocab, H]

    def best_tokens(self, sequence: Sequence) -> torch.Tensor:  # [n] int64 target ids
        """The target's best token after each position; read from the log where it is greedy and
        nothing but the target chose (under a grammar or a bias the log has what was allowed)."""
        count = min(len(sequence.last), len(sequence.tokens) - 1)
        is_own = sequence.greedy and not sequence.constrained
        known_from = sequence.output_start - 1 if is_own else count
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
        needs_proposals: bool = False,
        reference: list[torch.Tensor] | None = None,  # logits of the frozen drafter
    ) -> list[UnrolledStep]:
        """Pair the drafter's logits with the target's distribution of the same positions."""
        begin = first_row + 1
        end = min(len(best), begin + len(logits[0]) + len(logits) - 1)
        last = sequence.last[begin:end].float()
        scores = last @ self.rows_of_head.T
        log_p = scores.log_softmax(-1)
        token = self.draft_of[best[begin:end]]
        follows = best[begin:end] == sequence.tokens[begin + 1 : end + 1]
        logged = (
            logged_tokens(sequence, first_row, self.draft_of_on_host) if needs_proposals else {}
        )
        mass = self._mass(last, scores) if needs_mass else None
        paired = []
        for k, step_logits in enumerate(logits):
            count = min(len(step_logits), len(last) - k)
            if count <= 0:
                break
            rows = slice(k, k + count)
            paired.append(
                UnrolledStep(
                    log_q=F.log_softmax(step_logits[:count], -1),
                    log_p=log_p[rows],
                    mass=mass[rows] if mass is not None else None,
                    token=token[rows],
                    weight=weight[:count],
                    follows=follows[rows],
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
