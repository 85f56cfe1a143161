"""Sampled verification on CPU: the target's distribution, exactly.

SGLang answers greedily on CPU whatever the temperature. These are the kernels that its CUDA
path uses for sampled requests; with them the plugin sends such requests down the sampling path.
"""

from __future__ import annotations

import importlib

import torch

KERNELS = (
    "top_k_renorm_prob",
    "top_p_renorm_prob",
    "tree_speculative_sampling_target_only",
)


#: Where SGLang 0.5.22 and later have these names, None on a CPU; the last takes them over.
PLACES = (
    "sglang.kernels.ops.sampling.renorm",
    "sglang.kernels.ops.speculative.verify_sampling",
    "sglang.srt.speculative.eagle_utils",
)


def provide() -> None:
    """Put our kernels where SGLang has none; until 0.5.21 it asks ``sgl_kernel`` for them."""
    for place in PLACES:
        try:
            module = importlib.import_module(place)
        except ImportError:
            continue
        for name in KERNELS:
            if getattr(module, name, name) is None:
                setattr(module, name, globals()[name])


def top_k_renorm_prob(
    probs: torch.Tensor,  # [rows, vocabulary]
    top_ks: torch.Tensor,  # [rows]
) -> torch.Tensor:  # [rows, vocabulary]
    """Keep the k most probable tokens of each row and renormalise."""
    vocabulary = probs.shape[-1]
    ks = top_ks.to(torch.int64).clamp(1, vocabulary)
    limited = ks < vocabulary
    if not bool(limited.any()):
        return probs
    widest = int(ks[limited].max())
    values, indices = torch.topk(probs, widest, dim=-1)
    if widest == 1:  # topk's choice among ties differs from argmax's, and greedy rows need argmax
        indices = probs.argmax(dim=-1, keepdim=True)
        values = torch.gather(probs, 1, indices)
    elif bool((ks == 1).any()):
        best = probs.argmax(dim=-1)
        rows = ks == 1
        indices[rows, 0] = best[rows]
        values[rows, 0] = probs[rows, best[rows]]
    values = values * (torch.arange(widest) < ks[:, None])
    kept = torch.zeros_like(probs).scatter_(1, indices, values)
    kept /= kept.sum(dim=-1, keepdim=True)
    return torch.where(limited[:, None], kept, probs)


def top_p_renorm_prob(
    probs: torch.Tensor,  # [rows, vocabulary]
    top_ps: torch.Tensor,  # [rows]
) -> torch.Tensor:  # [rows, vocabulary]
    """Keep the smallest set of most probable tokens whose mass reaches p, and renormalise."""
    ordered, indices = torch.sort(probs, dim=-1, descending=True)
    before = torch.cumsum(ordered, dim=-1) - ordered
    ordered = torch.where(before < top_ps.to(probs.dtype)[:, None], ordered, 0.0)
    kept = torch.zeros_like(probs).scatter_(1, indices, ordered)
    return kept / kept.sum(dim=-1, keepdim=True)


def _draw(weights: torch.Tensor, coin: float) -> int:
    """Index drawn from unnormalised ``weights`` [vocabulary] by inverting their sum at ``coin``."""
    cumulative = torch.cumsum(weights.to(torch.float64), 0)
    index = int(torch.searchsorted(cumulative, coin * float(cumulative[-1]), right=True))
    return min(index, int(torch.nonzero(weights)[-1]))


def tree_speculative_sampling_target_only(
    predicts: torch.Tensor,  # [batch * nodes] int32, written
    accept_index: torch.Tensor,  # [batch, depth + 1] int32, written
    accept_token_num: torch.Tensor,  # [batch] int32, written
    candidates: torch.Tensor,  # [batch, nodes]
    retrive_index: torch.Tensor,  # [batch, nodes]
    retrive_next_token: torch.Tensor,  # [batch, nodes]
    retrive_next_sibling: torch.Tensor,  # [batch, nodes]
    uniform_samples: torch.Tensor,  # [batch, nodes] in [0, 1)
    uniform_samples_for_final_sampling: torch.Tensor,  # [batch] in [0, 1)
    target_probs: torch.Tensor,  # [batch, nodes, vocabulary]
    draft_probs: torch.Tensor,  # not used: proposals are accepted by the target alone
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,
) -> None:
    """Verify a tree of deterministic proposals against sampled target tokens.

    At a node with children c_1..c_m one coin decides: child i is taken with probability p(c_i),
    by inverting the running sum of the children's probabilities; when none is taken, the bonus
    token is drawn from p without the children, renormalised. Every token therefore follows p.

    Raises ``ValueError`` for acceptance thresholds other than 1, which would not be lossless.
    """
    if threshold_single != 1.0 or threshold_acc != 1.0:
        raise ValueError("acceptance thresholds other than 1 do not keep the target's distribution")
    batch, nodes = candidates.shape
    drafted = candidates.tolist()
    first, sibling = retrive_next_token.tolist(), retrive_next_sibling.tolist()
    coins = uniform_samples.tolist()
    last_coins = uniform_samples_for_final_sampling.tolist()
    levels = accept_index.shape[1]
    for row in range(batch):
        base = row * nodes
        path, node = [0], 0
        tried: list[int] = []
        while len(path) < levels:
            probs = target_probs[row, node]
            child, mass = first[row][node], 0.0
            tried = []
            while child != -1:
                mass += float(probs[drafted[row][child]])
                if coins[row][node] < mass:
                    break
                tried.append(drafted[row][child])
                child = sibling[row][child]
            if child == -1:
                break
            predicts[base + node] = drafted[row][child]
            path.append(child)
            node, tried = child, []
        weights = target_probs[row, node]
        if tried:
            weights = weights.clone()
            weights[tried] = 0.0
            if float(weights.sum()) <= 0.0:  # all mass sat on the children but for rounding
                weights = target_probs[row, node]
        predicts[base + node] = _draw(weights, last_coins[row])
        accept_index[row, : len(path)] = torch.tensor(path, dtype=accept_index.dtype) + base
        accept_token_num[row] = len(path) - 1
