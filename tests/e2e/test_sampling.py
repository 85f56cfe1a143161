"""Sampled requests follow the target's distribution under speculation, on CPU too."""

from __future__ import annotations

import copy
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from scipy import stats

from tests.e2e.conftest import Running

SAMPLES = 320
LENGTH = 4  # token 1 comes from the prefill and bypasses verification


def exact_law(
    hugging_face: Any,
    prompt: list[int],
    firsts: list[int],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> dict[tuple[int, ...], float]:
    """Probability of every run of tokens 2 to 4 given token 1, by enumeration in float32. The
    prompt is computed once, each run that goes on from it only where it differs."""
    with torch.no_grad():
        cache = hugging_face(torch.tensor([prompt]), use_cache=True).past_key_values
    runs: dict[tuple[int, ...], float] = {(first,): 1.0 for first in firsts}
    for _ in range(LENGTH - 1):
        longer: dict[tuple[int, ...], float] = {}
        heads = list(runs)
        for some in _chunks(heads):
            head_cache = copy.deepcopy(cache)
            head_cache.batch_repeat_interleave(len(some))
            with torch.no_grad():
                logits = hugging_face(torch.tensor(some), past_key_values=head_cache).logits[:, -1]
            probs = torch.softmax(logits / temperature, -1).double()
            for head, row in zip(some, probs, strict=True):
                for token, p in _truncated(row, top_k, top_p):
                    longer[(*head, token)] = runs[head] * p
        runs = longer
    return runs


def _chunks(items: list[Any]) -> list[list[Any]]:
    return [items[at : at + 64] for at in range(0, len(items), 64)]


def _truncated(probs: torch.Tensor, top_k: int, top_p: float) -> list[tuple[int, float]]:
    values, tokens = probs.sort(descending=True)
    values, tokens = values[:top_k], tokens[:top_k]
    values = values / values.sum()
    kept = values.cumsum(0) - values < top_p
    values, tokens = values[kept], tokens[kept]
    values = values / values.sum()
    return list(zip(tokens.tolist(), values.tolist(), strict=True))


def sample(server: Running, prompt: list[int], count: int, **sampling: Any) -> list[Any]:
    """``count`` answers of four tokens with drafts, eight at a time."""
    body = {
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": LENGTH, "ignore_eos": True, "n": 8, **sampling},
    }

    def eight(_: int) -> list[Any]:
        drafts = {"x-aurora-speculate": "yes"}
        answer = httpx.post(f"{server.url}/generate", json=body, headers=drafts, timeout=300)
        assert answer.status_code == 200, answer.text
        return answer.json()

    with ThreadPoolExecutor(2) as pool:
        return [one for some in pool.map(eight, range(count // 8)) for one in some]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 3, 1.0), (1.3, 4, 0.8)],
    ids=["temperature and top-k", "temperature, top-k and top-p"],
)
def test_joint_frequencies_of_sampled_tokens_follow_the_target_on_trees(
    server: Running,
    prompts: list[list[int]],
    hugging_face: Any,
    temperature: float,
    top_k: int,
    top_p: float,
) -> None:
    assert_targets_law(
        server, prompts[2], hugging_face, temperature=temperature, top_k=top_k, top_p=top_p
    )


def assert_targets_law(
    server: Running,
    prompt: list[int],
    hugging_face: Any,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> None:
    """Chi-square test of the joint of tokens 2 to 4 against the target's exact distribution."""
    answers = sample(server, prompt, SAMPLES, temperature=temperature, top_k=top_k, top_p=top_p)
    seen = Counter(tuple(answer["output_ids"]) for answer in answers)
    accepted = sum(a["meta_info"]["spec_num_correct_drafts"] for a in answers)
    steps = sum(a["meta_info"]["spec_verify_ct"] for a in answers)
    assert 0 < accepted < 3 * steps, "the run needs accepts and rejects"
    # Token 1 comes from the prefill's own sampler: expected counts are conditioned on it.
    firsts = Counter(run[0] for run in seen.elements())
    law = exact_law(
        hugging_face, prompt, list(firsts), temperature=temperature, top_k=top_k, top_p=top_p
    )
    assert set(seen) <= set(law), "a token outside the truncated support was sampled"
    expected = {run: firsts[run[0]] * p for run, p in law.items()}
    pooled_seen, pooled_expected, rest_seen, rest_expected = [], [], 0.0, 0.0
    for run, count in expected.items():
        if count >= 5:
            pooled_seen.append(seen[run])
            pooled_expected.append(count)
        else:
            rest_seen += seen[run]
            rest_expected += count
    if rest_expected > 0:
        pooled_seen.append(rest_seen)
        pooled_expected.append(rest_expected)
    assert len(pooled_seen) > 3
    degrees_lost = len(firsts) - 1
    assert stats.chisquare(pooled_seen, pooled_expected, ddof=degrees_lost).pvalue > 1e-3
