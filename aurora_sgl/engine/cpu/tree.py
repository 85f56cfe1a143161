"""Draft trees on CPU: building, greedy verification, and the drafter's decode metadata.

A tree has ``nodes`` nodes per request, node 0 the root (the previous bonus token). SGLang links
them as first child (``retrieve_next_token``) and next sibling (``retrieve_next_sibling``), -1 for
none; ``retrieve_index`` is the node's row in the flattened batch.
"""

from __future__ import annotations

import torch

KERNELS = (
    "build_draft_decode_metadata_cpu",
    "build_tree_kernel_efficient_cpu",
    "verify_tree_greedy_cpu",
)

_QLEN_ONLY = 1  # TreeMaskMode.QLEN_ONLY, the only mode of SGLang's CPU attention


def parents_of(
    selected: list[int],  # the chosen candidates of one request, ascending; one per node 1..n-1
    parent_list: list[int],
    topk: int,
) -> list[int]:
    """Parent node of node 1..n-1; -1 for an orphan.

    Candidate ``c`` was drafted below group ``c // topk``; group 0 is the root's, the others name
    the candidate that they were drafted from in ``parent_list``. A child can be chosen without its
    parent when their scores are equal (a probability that rounds to 1, or to 0). Such an orphan
    hangs on nothing and is never accepted, as in SGLang's CUDA kernel.
    """
    node_of_candidate = {candidate: node for node, candidate in enumerate(selected, start=1)}
    parents = []
    for candidate in selected:
        group = candidate // topk
        parents.append(0 if group == 0 else node_of_candidate.get(parent_list[group], -1))
    return parents


def build_tree_kernel_efficient_cpu(
    parent_list: torch.Tensor,  # [batch, groups]
    selected_index: torch.Tensor,  # [batch, nodes - 1]
    verified_seq_len: torch.Tensor,  # [batch]
    tree_mask: torch.Tensor,  # [batch * nodes * nodes] bool, written; True where node i sees node j
    positions: torch.Tensor,  # [batch * nodes], written
    retrieve_index: torch.Tensor,  # [batch, nodes], written
    retrieve_next_token: torch.Tensor,  # [batch, nodes], written
    retrieve_next_sibling: torch.Tensor,  # [batch, nodes], written
    topk: int,
    depth: int,
    draft_token_num: int,
    tree_mask_mode: int = _QLEN_ONLY,
) -> None:
    """Links, positions and the node-to-node mask of every request's draft tree.

    Raises ``NotImplementedError`` for another mask layout than QLEN_ONLY.
    """
    if int(tree_mask_mode) != _QLEN_ONLY:
        raise NotImplementedError("the CPU kernels build QLEN_ONLY tree masks only")
    batch, nodes = verified_seq_len.numel(), draft_token_num
    lengths = verified_seq_len.to(torch.int64)
    retrieve_index.copy_(torch.arange(batch * nodes).view(batch, nodes))
    mask = tree_mask[: batch * nodes * nodes].view(batch, nodes, nodes)
    if topk == 1:
        chain = torch.arange(1, nodes)
        retrieve_next_token[:, : nodes - 1] = chain
        mask.copy_(torch.ones(nodes, nodes, dtype=torch.bool).tril())
        positions.view(batch, nodes).copy_(lengths[:, None] + torch.arange(nodes))
        return
    below: list[list[int]] = []
    visible = []
    first_child, next_sibling = [], []
    for chosen, groups in zip(selected_index.tolist(), parent_list.tolist(), strict=True):
        parents = parents_of(chosen, groups, topk)
        child, sibling = [-1] * nodes, [-1] * nodes
        for node in range(nodes - 1, 0, -1):
            parent = parents[node - 1]
            if parent >= 0:
                sibling[node], child[parent] = child[parent], node
        rows = [[True] + [False] * (nodes - 1)]
        depths = [0]
        for node, parent in enumerate(parents, start=1):
            row = list(rows[max(parent, 0)])  # an orphan sees the root, for want of anything else
            row[node] = True
            rows.append(row)
            depths.append(depths[max(parent, 0)] + 1)
        visible.append(rows)
        below.append(depths)
        first_child.append(child)
        next_sibling.append(sibling)
    mask.copy_(torch.tensor(visible))
    positions.view(batch, nodes).copy_(lengths[:, None] + torch.tensor(below))
    retrieve_next_token.copy_(torch.tensor(first_child))
    retrieve_next_sibling.copy_(torch.tensor(next_sibling))


def verify_tree_greedy_cpu(
    predicts: torch.Tensor,  # [batch * nodes] int32, written: the token that follows a node
    accept_index: torch.Tensor,  # [batch, depth + 1] int32, written: rows of the accepted path
    accept_token_num: torch.Tensor,  # [batch] int32, written: accepted drafts, without the bonus
    candidates: torch.Tensor,  # [batch, nodes] drafted tokens
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,  # [batch, nodes] the target's argmax after each node
) -> None:
    """Follow the target's own tokens down the tree as far as drafts agree with them."""
    batch, nodes = candidates.shape
    drafted = candidates.tolist()
    wanted = target_predict.reshape(batch, nodes).tolist()
    first, sibling = retrive_next_token.tolist(), retrive_next_sibling.tolist()
    levels = accept_index.shape[1]
    for row in range(batch):
        base = row * nodes
        path, node = [0], 0
        while len(path) < levels:
            child = first[row][node]
            while child != -1 and drafted[row][child] != wanted[row][node]:
                child = sibling[row][child]
            if child == -1:
                break
            path.append(child)
            node = child
        for node in path:
            predicts[base + node] = wanted[row][node]
        accept_index[row, : len(path)] = torch.tensor(path, dtype=accept_index.dtype) + base
        accept_token_num[row] = len(path) - 1


def build_draft_decode_metadata_cpu(
    req_to_token: torch.Tensor,  # [rows, pool_len]
    req_pool_indices: torch.Tensor,  # [batch]
    seq_lens: torch.Tensor,  # [batch]
    topk: int,
    num_steps: int,
    pool_len: int,
) -> torch.Tensor:
    """A table of slots for ``batch * topk`` drafting branches: [batch * topk, longest + steps].

    Every branch sees the request's prefix and then its own drafted tokens; branch ``t`` of a
    request owns slots ``len + t * steps .. len + (t + 1) * steps`` of the request's row.
    """
    lengths = seq_lens.to(torch.int64)
    rows = req_to_token[req_pool_indices.to(torch.int64)]
    batch, longest = lengths.numel(), int(lengths.max()) if lengths.numel() else 0
    width = longest + num_steps
    branch = torch.arange(topk)[None, :, None]
    column = torch.arange(width)[None, None, :]
    length = lengths[:, None, None]
    own = column - length
    source = torch.where(own < 0, column, length + branch * num_steps + own)
    source = source.clamp(max=rows.shape[1] - 1).expand(batch, topk, width)
    table = torch.gather(rows, 1, source.reshape(batch, topk * width).to(torch.int64))
    return table.view(batch * topk, width)
