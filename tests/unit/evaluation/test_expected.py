"""What a log that was sampled by rejection says of any drafter: expectations, as the rule gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.drafter.architectures.eagle import EAGLE
from aurora_sgl.drafter.architectures.eagle3 import EAGLE3
from aurora_sgl.evaluation.expected import _drafted, _target, over_roots, target_law
from aurora_sgl.evaluation.replay import is_determined, replay_one
from aurora_sgl.sequences.sequence import TargetSampling
from tests.support.drafter_twin import PlainDrafter
from tests.unit.evaluation.test_replay import request, tiny

WORDS, LENGTH = 5, 12


def law(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.dirichlet(np.full(WORDS, 0.7), shape)


def draw(rng: np.random.Generator, p: np.ndarray) -> int:
    return min(int(np.searchsorted(p.cumsum(), rng.random() * p.sum(), side="right")), WORDS - 1)


def serve(
    rng: np.random.Generator, p: np.ndarray, q: np.ndarray, depth: int
) -> tuple[list[int], int, int]:
    """One request, token by token as a server samples by rejection: its log, and its determined
    steps with the drafts accepted in them. ``p``: [position, word]; ``q``: [root, depth, word]."""
    log, steps = [draw(rng, p[0])], []
    while len(log) < LENGTH:
        root, accepted = len(log) - 1, 0
        for k in range(depth):
            mine, theirs = q[root, k], p[root + 1 + k]
            x = draw(rng, mine)
            if rng.random() * mine[x] < theirs[x]:
                log.append(x)
                accepted += 1
                continue
            rest = np.maximum(theirs - mine, 0)
            log.append(draw(rng, rest))
            break
        else:
            log.append(draw(rng, p[root + 1 + depth]))
        steps.append((root, accepted))
    log = log[:LENGTH]
    counted = [a for r, a in steps if is_determined(r, min(a, LENGTH - 1 - r), LENGTH, depth)]
    return log, len(counted), sum(counted)


@pytest.mark.parametrize("depth", [1, 3])
def test_over_many_draws_the_expected_counts_are_those_of_the_rule_itself(depth: int) -> None:
    rng = np.random.default_rng(depth)
    p, q = law(rng, LENGTH + depth + 2), law(rng, LENGTH + 1, depth)
    other = law(rng, LENGTH + 1, depth)  # of a drafter that has not served
    differences, others = [], []
    for _ in range(1000):
        log, steps, accepted = serve(rng, p, q, depth)
        for proposals, found in ((q, differences), (other, others)):
            accepts = [
                [
                    min(1.0, proposals[r, k, log[r + 1 + k]] / p[r + 1 + k, log[r + 1 + k]])
                    if r + 1 + k < LENGTH else 0.0
                    for r in range(LENGTH)
                ]
                for k in range(depth)
            ]  # fmt: skip
            expected = over_roots(accepts, LENGTH)
            found.append((*expected, expected[0] - steps, expected[1] - accepted))
    for columns in np.array(differences).T[2:]:
        assert abs(columns.mean()) < 4 * columns.std() / len(columns) ** 0.5
    served = np.array([serve(rng, p, other, depth)[1:] for _ in range(1000)], dtype=float)
    for mine, theirs in zip(np.array(others).T[:2], served.T, strict=True):
        error = (mine.var() / len(mine) + theirs.var() / len(theirs)) ** 0.5
        assert abs(mine.mean() - theirs.mean()) < 4 * error
        assert error < 0.1


@pytest.mark.parametrize("architecture", [EAGLE3, EAGLE])
def test_q_is_the_drafters_own_along_the_log_and_nothing_outside_its_vocabulary(
    architecture: str,
) -> None:
    drafter, head = tiny(architecture, seed=3)
    plain = PlainDrafter(drafter.config, drafter.state_dict(), head.embedding, head.lm_head)
    sequence, depth, heat = request(drafter, head, 5), 3, 0.7
    with torch.no_grad():
        q = _drafted(drafter, sequence, depth, head, heat)
        tokens, rows, outside = sequence.tokens.tolist(), [], 0
        for base in range(sequence.rows - 1):
            hidden, own = sequence.features[base], list(rows)
            for k in range(depth):
                if base + 2 + k > sequence.rows:
                    break
                probs, hidden, kv = plain.row(tokens[base + 1 + k], hidden, base + k, own)
                own.append(kv)
                if k == 0:
                    rows.append(kv)
                root = base + 1 - sequence.output_start
                if root < 0:
                    continue
                drawn = probs ** (1 / heat) / (probs ** (1 / heat)).sum()
                ids = [plain.target_id(i) for i in range(len(drawn))]
                token = tokens[base + 2 + k]
                wanted = float(drawn[ids.index(token)]) if token in ids else 0.0
                outside += token not in ids
                assert float(q[k, root]) == pytest.approx(wanted, abs=1e-5)
    assert (outside > 0) == (architecture == EAGLE3)


def test_p_is_what_sglang_draws_from() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0, -1.0]])
    half = target_law(logits, TargetSampling(0.5))
    torch.testing.assert_close(half, (logits * 2).softmax(-1))
    two = target_law(logits, TargetSampling(1.0, top_k=2))
    torch.testing.assert_close(two[0, [0, 2]], torch.tensor([3.0, 2.0]).softmax(-1))
    assert two[0, [1, 3, 4]].tolist() == [0, 0, 0]
    # 0.64 of the mass is not 0.7; the second token takes it beyond.
    most = target_law(logits, TargetSampling(1.0, top_p=0.7))
    torch.testing.assert_close(most, two)
    assert target_law(logits, TargetSampling(1.0, top_p=0.6))[0].tolist() == [1, 0, 0, 0, 0]


def test_replay_of_a_request_that_was_sampled_by_rejection_is_an_expectation() -> None:
    drafter, head = tiny(EAGLE, seed=1)
    shape = DraftShape(3)
    sequence = replace(
        request(drafter, head, 2), accept_rule="rejection_sampling",
        sampling=TargetSampling(0.8),
    )  # fmt: skip
    found = replay_one(drafter, sequence, shape, head)
    assert found.accept_rule == "rejection_sampling"
    assert 0 < found.accepted < 3 * found.verify_steps and found.verify_steps % 1
    with torch.no_grad():
        p = _target(sequence, head, TargetSampling(0.8))
        q = _drafted(drafter, sequence, 3, head, 0.8)
    accepts = torch.zeros_like(q)
    for k in range(3):
        accepts[k, : len(p) - k] = (q[k, : len(p) - k] / p[k:]).clamp_max(1)
    length = sequence.rows + 1 - sequence.output_start
    assert over_roots(accepts.tolist(), length) == pytest.approx(
        (found.verify_steps, found.accepted)
    )
    short = replace(sequence, output_start=len(sequence.tokens) - 1)
    assert replay_one(drafter, short, shape, head).verify_steps == 0
