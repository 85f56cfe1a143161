"""The CPU kernels against plain twins: slow loops in float64 that follow the definitions."""

from __future__ import annotations

import random

import pytest
import torch
from scipy import stats

from aurora_sgl.engine.cpu import attention, locations, sampling, tree


def _random_tree(rng: random.Random, topk: int, depth: int, nodes: int):
    """Scores, selection and parent list as SGLang's organize_draft_results lays them out."""
    # Level 0 has topk candidates below the root; every later level expands topk survivors by topk.
    candidate_scores = [rng.random() for _ in range(topk)]
    parent_list = [-1, *range(topk)]  # parents of the groups of level 1
    survivors = list(range(topk))
    base = topk
    for level in range(1, depth):
        level_scores = []
        for survivor in survivors:
            for _ in range(topk):
                level_scores.append(candidate_scores[survivor] * rng.random())
        candidate_scores += level_scores
        order = sorted(range(len(level_scores)), key=lambda i: -level_scores[i])[:topk]
        survivors = [base + i for i in order]
        base += len(level_scores)
        if level < depth - 1:
            parent_list += survivors
    chosen = sorted(sorted(range(base), key=lambda i: -candidate_scores[i])[: nodes - 1])
    return parent_list, chosen


def _paths(parents: list[int]) -> list[list[int]]:
    """For every node, the nodes on its way to the root, itself included."""
    paths = [[0]]
    for node, parent in enumerate(parents, start=1):
        paths.append([*paths[parent], node])
    return paths


@pytest.mark.parametrize(("topk", "depth", "nodes"), [(1, 4, 5), (4, 3, 8), (8, 4, 16), (2, 5, 7)])
def test_trees_have_the_links_masks_and_positions_that_their_parents_say(topk, depth, nodes):
    rng = random.Random(topk * 100 + nodes)
    batch = 3
    if topk == 1:
        parent_lists = [[-1, *range(depth - 1)]] * batch
        chosen = [list(range(nodes - 1))] * batch
    else:
        parent_lists, chosen = zip(
            *(_random_tree(rng, topk, depth, nodes) for _ in range(batch)), strict=True
        )
    lengths = torch.tensor([5, 11, 7])
    mask = torch.zeros(batch * nodes * nodes, dtype=torch.bool)
    positions = torch.zeros(batch * nodes, dtype=torch.long)
    index, child, sibling = (torch.full((batch, nodes), -1) for _ in range(3))
    tree.build_tree_kernel_efficient_cpu(
        torch.tensor(parent_lists),
        torch.tensor(chosen),
        lengths,
        mask,
        positions,
        index,
        child,
        sibling,
        topk,
        depth,
        nodes,
    )
    for row in range(batch):
        parents = tree.parents_of(list(chosen[row]), list(parent_lists[row]), topk)
        paths = _paths(parents)
        seen = mask.view(batch, nodes, nodes)[row]
        for node, path in enumerate(paths):
            assert seen[node].nonzero().flatten().tolist() == sorted(path)
            assert positions.view(batch, nodes)[row, node] == lengths[row] + len(path) - 1
            children, at = [], int(child[row, node])
            while at != -1:
                children.append(at)
                at = int(sibling[row, at])
            assert children == [n for n, p in enumerate(parents, start=1) if p == node]
    assert index.flatten().tolist() == list(range(batch * nodes))


@pytest.mark.parametrize("seed", range(5))
def test_greedy_verification_accepts_the_longest_path_that_the_target_would_have_written(seed):
    rng = random.Random(seed)
    topk, depth, nodes, batch = 3, 3, 8, 4
    made = [_random_tree(rng, topk, depth, nodes) for _ in range(batch)]
    index, child, sibling = (torch.full((batch, nodes), -1) for _ in range(3))
    tree.build_tree_kernel_efficient_cpu(
        torch.tensor([m[0] for m in made]),
        torch.tensor([m[1] for m in made]),
        torch.full((batch,), 9),
        torch.zeros(batch * nodes * nodes, dtype=torch.bool),
        torch.zeros(batch * nodes, dtype=torch.long),
        index,
        child,
        sibling,
        topk,
        depth,
        nodes,
    )
    drafted = torch.randint(0, 4, (batch, nodes), generator=torch.Generator().manual_seed(seed))
    wanted = torch.randint(0, 4, (batch, nodes), generator=torch.Generator().manual_seed(seed + 9))
    predicts = torch.zeros(batch * nodes, dtype=torch.int32)
    accept_index = torch.full((batch, depth + 1), -1, dtype=torch.int32)
    accepted = torch.zeros(batch, dtype=torch.int32)
    tree.verify_tree_greedy_cpu(
        predicts, accept_index, accepted, drafted, index, child, sibling, wanted
    )
    for row in range(batch):
        parents = tree.parents_of(made[row][1], made[row][0], topk)
        node, path = 0, [0]
        while True:
            match = [
                n
                for n, p in enumerate(parents, start=1)
                if p == node and drafted[row, n] == wanted[row, node]
            ]
            if not match:
                break
            node = match[0]
            path.append(node)
        got = accept_index[row][accept_index[row] >= 0].tolist()
        assert [g - row * nodes for g in got] == path
        assert int(accepted[row]) == len(path) - 1
        assert [int(predicts[g]) for g in got] == [int(wanted[row, n]) for n in path]


def _naive_attention(q, keys, values, visible, scale, cap):
    """One query row against its visible keys, heads repeated, in float64."""
    groups = q.shape[0] // keys.shape[1]
    keys = keys.double().repeat_interleave(groups, dim=1)
    values = values.double().repeat_interleave(groups, dim=1)
    logits = torch.einsum("hd,lhd->hl", q.double(), keys) * scale
    if cap > 0:
        logits = cap * torch.tanh(logits / cap)
    logits = logits.masked_fill(~visible[None], float("-inf"))
    return torch.einsum("hl,lhd->hd", torch.softmax(logits, -1), values)


@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("new", [[1, 1, 1], [4, 4, 4], [6, 1, 3]])
def test_extend_attention_equals_the_definition(new, window, cap):
    torch.manual_seed(0)
    heads, kv_heads, dim, slots = 6, 2, 8, 64
    totals = [new[0] + 7, new[1], new[2] + 3]
    pool = torch.randperm(slots)[: sum(totals) + 5]
    table = torch.zeros(5, 32, dtype=torch.int32)
    rows = torch.tensor([4, 1, 2])
    at = 0
    for row, total in zip(rows.tolist(), totals, strict=True):
        table[row, :total] = pool[at : at + total].to(torch.int32)
        at += total
    k_buffer, v_buffer = torch.randn(slots, kv_heads, dim), torch.randn(slots, kv_heads, dim)
    q = torch.randn(sum(new), heads, dim)
    out = torch.empty_like(q)
    starts = [0, new[0], new[0] + new[1]]
    tree_mask = None
    if new == [4, 4, 4]:
        # Node 3 hangs below node 1, node 2 below the root.
        one = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]).bool()
        tree_mask = one.repeat(3, 1, 1).flatten()
    attention.begin_forward()
    arguments = (
        q,
        None,
        None,
        out,
        k_buffer,
        v_buffer,
        1.0,
        1.0,
        table,
        rows,
        torch.tensor(totals),
        torch.tensor(new),
        torch.tensor(starts),
        max(new),
        dim**-0.5,
        cap,
        False,
        window,
        None,
        None,
        tree_mask,
        True,
    )
    attention.extend_attention_cpu(*arguments)
    for r, (total, fresh) in enumerate(zip(totals, new, strict=True)):
        where = table[rows[r], :total].long()
        for i in range(fresh):
            visible = torch.zeros(total, dtype=torch.bool)
            visible[: total - fresh + i + 1] = True
            if tree_mask is not None:
                visible[total - fresh :] = tree_mask.view(3, fresh, fresh)[r, i]
            if window:
                visible[: max(0, total - fresh + i - window + 1)] = False
            wanted = _naive_attention(
                q[starts[r] + i], k_buffer[where], v_buffer[where], visible, dim**-0.5, cap
            )
            torch.testing.assert_close(out[starts[r] + i].double(), wanted, rtol=1e-5, atol=1e-5)


def test_decode_attention_stores_the_new_keys_and_equals_the_definition():
    torch.manual_seed(1)
    heads, kv_heads, dim, slots = 4, 2, 8, 40
    totals = torch.tensor([9, 3, 1])
    table = torch.stack([torch.randperm(slots) for _ in range(3)])[:, :12].to(torch.int32)
    table[1], table[2] = table[0].roll(5), table[0].roll(9)
    rows = torch.tensor([2, 0, 1])
    k_buffer, v_buffer = torch.randn(slots, kv_heads, dim), torch.randn(slots, kv_heads, dim)
    new_k, new_v = torch.randn(3, kv_heads * dim), torch.randn(3, kv_heads * dim)
    loc = torch.tensor([int(table[r, n - 1]) for r, n in zip(rows, totals, strict=True)])
    q = torch.randn(3, heads, dim)
    out = torch.empty_like(q)
    attention.begin_forward()
    attention.decode_attention_cpu(
        q, k_buffer, v_buffer, 1.0, 1.0, out, new_k, new_v, loc, torch.empty(0), table, rows,
        totals, dim**-0.5, 0.0,
    )  # fmt: skip
    assert torch.equal(k_buffer[loc], new_k.view(3, kv_heads, dim))
    assert torch.equal(v_buffer[loc], new_v.view(3, kv_heads, dim))
    for r in range(3):
        where = table[rows[r], : totals[r]].long()
        visible = torch.ones(int(totals[r]), dtype=torch.bool)
        wanted = _naive_attention(q[r], k_buffer[where], v_buffer[where], visible, dim**-0.5, 0)
        torch.testing.assert_close(out[r].double(), wanted, rtol=1e-5, atol=1e-5)


def test_location_kernels_read_and_write_the_ranges_that_they_are_given():
    torch.manual_seed(2)
    table = torch.arange(60).view(4, 15).to(torch.int32)
    rows, start, end = torch.tensor([2, 0, 3]), torch.tensor([1, 4, 0]), torch.tensor([4, 4, 2])
    out = torch.empty(5, dtype=torch.int64)
    locations.assign_extend_cache_locs_cpu(rows, table, start, end, out, 15)
    assert out.tolist() == [31, 32, 33, 45, 46]
    fresh = torch.tensor([900, 901, 902, 903, 904])
    locations.assign_req_to_token_pool_cpu(rows, table, start, end, fresh, 15)
    assert table[2, 1:4].tolist() == [900, 901, 902]
    assert table[3, 0:2].tolist() == [903, 904]
    draft = torch.empty(3 * 4, dtype=torch.int64)
    locations.assign_draft_cache_locs_contiguous_cpu(
        rows, table, torch.tensor([5, 6, 7]), draft, 15, 2, 2
    )
    assert draft.tolist() == [35, 36, 37, 38, 6, 7, 8, 9, 52, 53, 54, 55]
    bonus = torch.empty(2, dtype=torch.int32)
    locations.fill_bonus_tokens_cpu(
        torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([2, 3]), bonus, 3
    )
    assert bonus.tolist() == [2, 6]
    packed = torch.zeros(6, dtype=torch.int64)
    locations.fill_accept_out_cache_loc_cpu(
        torch.tensor([[0, 2, -1], [4, -1, -1]]), torch.arange(10, 20), packed
    )
    assert packed.tolist() == [10, 12, 14, 0, 0, 0]


def test_a_child_that_was_chosen_without_its_parent_is_never_accepted():
    # Candidate 5 was drafted from candidate 1, which was not chosen: equal scores can do that.
    child, sibling, index = (torch.full((1, 3), -1) for _ in range(3))
    tree.build_tree_kernel_efficient_cpu(
        torch.tensor([[-1, 0, 1]]), torch.tensor([[0, 5]]), torch.tensor([4]),
        torch.zeros(9, dtype=torch.bool), torch.zeros(3, dtype=torch.long), index, child, sibling,
        2, 2, 3,
    )  # fmt: skip
    assert child.tolist() == [[1, -1, -1]]
    assert sibling.tolist() == [[-1, -1, -1]]


def test_moving_accepted_slots_reads_everything_before_it_writes():
    buffers = [torch.randn(12, 2, 4), torch.randn(12, 2, 8).bfloat16()]
    before = [b.clone() for b in buffers]
    target, source = torch.tensor([3, 4, 5, 0]), torch.tensor([4, 5, 3, 0])
    locations.copy_all_layer_kv_cache_cpu(
        torch.tensor([b.data_ptr() for b in buffers]),
        torch.tensor([b.stride(0) * b.element_size() for b in buffers]),
        target,
        source,
    )
    for buffer, old in zip(buffers, before, strict=True):
        assert torch.equal(buffer[target], old[source])
        assert torch.equal(buffer[6:], old[6:])


def test_branches_of_the_drafter_see_the_prefix_and_their_own_slots():
    table = torch.arange(100).view(2, 50).to(torch.int32)
    got = tree.build_draft_decode_metadata_cpu(
        table, torch.tensor([1, 0]), torch.tensor([3, 5]), 2, 3, 50
    )
    assert got.shape == (4, 8)
    assert got[0, :6].tolist() == [50, 51, 52, 53, 54, 55]
    assert got[1, :6].tolist() == [50, 51, 52, 56, 57, 58]
    assert got[3, :8].tolist() == [0, 1, 2, 3, 4, 8, 9, 10]


def test_renormalising_keeps_top_k_and_top_p():
    torch.manual_seed(3)
    probs = torch.softmax(torch.randn(4, 50), -1)
    kept = sampling.top_k_renorm_prob(probs, torch.tensor([1, 5, 50, 1 << 30]))
    assert [(row > 0).sum().item() for row in kept] == [1, 5, 50, 50]
    assert kept[0].argmax() == probs[0].argmax()
    assert torch.allclose(kept.sum(-1), torch.ones(4))
    nucleus = sampling.top_p_renorm_prob(probs, torch.tensor([0.1, 0.5, 0.9, 1.0]))
    for row, p in enumerate([0.1, 0.5, 0.9, 1.0]):
        ordered = probs[row].sort(descending=True).values
        size = int((ordered.cumsum(0) < p).sum()) + 1
        assert (nucleus[row] > 0).sum() == min(size, 50)
    assert torch.allclose(nucleus.sum(-1), torch.ones(4))


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_sampled_verification_draws_every_token_from_the_target(shape):
    """The joint of the first two tokens of a run, over many draws, against its exact law."""
    torch.manual_seed(4)
    vocabulary, draws = 5, 20_000
    first = torch.softmax(torch.randn(vocabulary), -1)
    second = torch.softmax(torch.randn(vocabulary, vocabulary), -1)  # given the first token
    if shape == "chain":
        drafted, child, sibling = [0, 1, 3], [1, 2, -1], [-1, -1, -1]
    else:  # two children below the root, two below the first of them
        drafted, child, sibling = [0, 1, 2, 0, 3], [1, 3, -1, -1, -1], [-1, 2, -1, 4, -1]
    nodes = len(drafted)
    probs = torch.zeros(nodes, vocabulary)
    probs[0] = first
    for node in range(1, nodes):
        probs[node] = second[drafted[node]]
    counts = torch.zeros(vocabulary, vocabulary)
    levels = 3
    candidates = torch.tensor([drafted] * draws)
    predicts = torch.zeros(draws * nodes, dtype=torch.int32)
    accept_index = torch.full((draws, levels), -1, dtype=torch.int32)
    accepted = torch.zeros(draws, dtype=torch.int32)
    index = torch.arange(draws * nodes).view(draws, nodes)
    sampling.tree_speculative_sampling_target_only(
        predicts, accept_index, accepted, candidates, index,
        torch.tensor([child] * draws), torch.tensor([sibling] * draws),
        torch.rand(draws, nodes), torch.rand(draws), probs.expand(draws, -1, -1), torch.empty(0),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    for row in range(draws):
        path = accept_index[row][accept_index[row] >= 0]
        tokens = predicts[path.long()].tolist()
        if len(tokens) == 1:  # the next verify step draws the second token from the same law
            tokens.append(int(torch.multinomial(second[tokens[0]], 1, generator=generator)))
        counts[tokens[0], tokens[1]] += 1
    assert int(accepted.sum()) > 0 and int((accepted == 0).sum()) > 0
    expected = (first[:, None] * second * draws).flatten().double()
    expected *= counts.sum() / expected.sum()
    assert stats.chisquare(counts.flatten().double(), expected).pvalue > 1e-4


def test_acceptance_thresholds_that_are_not_lossless_are_refused():
    with pytest.raises(ValueError, match="thresholds"):
        sampling.tree_speculative_sampling_target_only(
            *[torch.zeros(1, 1)] * 11, threshold_single=0.9
        )
