"""Plain twins: one row, one position, one branch at a time, written without our modules.

They read a drafter's tensors and follow SGLang 0.5.21 line by line (models/llama_eagle3.py,
models/llama_eagle.py, eagle_worker_v2.draft_forward, the tree kernels), as slowly as it needs.
"""

from __future__ import annotations

import torch

from aurora_sgl.drafter.config import DrafterConfig

State = dict[str, torch.Tensor]
Rows = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values, one pair a row


class PlainDrafter:
    def __init__(
        self, config: DrafterConfig, state: State, embedding: torch.Tensor, lm_head: torch.Tensor
    ) -> None:
        self.config, self.embedding, self.lm_head = config, embedding, lm_head
        self.is_fused = "norm.weight" in state  # as llama_eagle3.py has it
        prefix = "midlayer." if self.is_fused else "layers.0."
        self.state = {n.replace(prefix, ""): t for n, t in state.items()}

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scale = (x.pow(2).mean() + self.config.rms_norm_eps).rsqrt()
        return x * scale * self.state[name + ".weight"]

    def rope(self, x: torch.Tensor, position: int) -> torch.Tensor:
        half = self.config.head_dim // 2
        out = x.clone()
        for i in range(half):
            angle = torch.tensor(position * self.config.rope_theta ** (-i / half))
            a, b = x[:, i], x[:, i + half]
            out[:, i] = a * angle.cos() - b * angle.sin()
            out[:, i + half] = b * angle.cos() + a * angle.sin()
        return out

    def row(
        self,
        token: int,
        hidden: torch.Tensor,
        position: int,
        before: Rows,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Probabilities, the hidden state for the next row, this row's key and value."""
        c, w = self.config, self.state
        embed = self.embedding[token]
        if self.is_fused:
            if len(hidden) != c.hidden_size:
                hidden = w["fc.weight"] @ hidden
            x = torch.cat((self.norm(embed, "input_layernorm"), self.norm(hidden, "hidden_norm")))
            residual = hidden
        else:
            x = residual = w["fc.weight"] @ torch.cat((embed, hidden)) + w["fc.bias"]
        q, k, v = ((w[f"self_attn.{n}_proj.weight"] @ x).reshape(-1, c.head_dim) for n in "qkv")
        q, k = self.rope(q, position), self.rope(k, position)
        rows = [*before, (k, v)]
        heads = []
        for h in range(c.num_heads):
            kv = h // (c.num_heads // c.num_kv_heads)
            scores = torch.stack([q[h] @ key[kv] for key, _ in rows]) * c.head_dim**-0.5
            weights = scores.softmax(0)
            heads.append(sum(a * value[kv] for a, (_, value) in zip(weights, rows, strict=True)))
        x = w["self_attn.o_proj.weight"] @ torch.cat(heads) + residual
        y = self.norm(x, "post_attention_layernorm")
        gate, up = w["mlp.gate_proj.weight"] @ y, w["mlp.up_proj.weight"] @ y
        out = w["mlp.down_proj.weight"] @ (torch.nn.functional.silu(gate) * up) + x
        read = self.norm(out, "norm") if self.is_fused else out
        logits = (w["lm_head.weight"] if self.is_fused else self.lm_head) @ read
        return logits.softmax(0), out, (k, v)

    def target_id(self, draft_id: int) -> int:
        return draft_id + int(self.state["d2t"][draft_id]) if self.is_fused else draft_id

    def best(self, probs: torch.Tensor, topk: int) -> list[tuple[float, int]]:
        if topk == 1:
            return [(1.0, self.target_id(int(probs.argmax())))]
        top = probs.topk(topk)
        return [
            (p, self.target_id(i))
            for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]


def verify_step(
    drafter: PlainDrafter,
    tokens: list[int],
    features: torch.Tensor,
    root: int,
    depth: int,
    topk: int,
    nodes: int,
    text: Rows,
) -> tuple[int, list[int]]:
    """Accepted drafts and the proposed tokens of one verify step from position ``root``.

    ``text`` holds the rows of the steps before, which stay as they are, and gets those of this one.
    """
    for i in range(len(text), root):
        probs, hidden, kv = drafter.row(tokens[i + 1], features[i], i, text)
        text.append(kv)
    first = drafter.best(probs, topk)
    # A candidate: score, token, index of its parent candidate (-1: the root).
    candidates = [(p, t, -1) for p, t in first]
    beam = [(p, t, i) for i, (p, t) in enumerate(first)]
    hiddens = [hidden] * topk
    slots: list[Rows] = [[] for _ in range(topk)]
    for step in range(1, depth):
        expanded = []
        outputs = []
        for slot, (score, token, index) in enumerate(beam):
            rows = text + slots[slot]
            probs, out, kv = drafter.row(token, hiddens[slot], root + step - 1, rows)
            slots[slot].append(kv)
            outputs.append(out)
            expanded += [(score * p, t, index, slot) for p, t in drafter.best(probs, topk)]
        base = len(candidates)
        candidates += [(s, t, i) for s, t, i, _ in expanded]
        order = sorted(range(len(expanded)), key=lambda j: -expanded[j][0])[:topk]
        beam = [(expanded[j][0], expanded[j][1], base + j) for j in order]
        hiddens = [outputs[expanded[j][3]] for j in order]
    ranked = sorted(range(len(candidates)), key=lambda j: -candidates[j][0])
    chosen = sorted(ranked[: nodes - 1])
    accepted, at = 0, -1
    while root + 1 + accepted < len(tokens):
        want = tokens[root + 1 + accepted]
        hit = [j for j in chosen if candidates[j][2] == at and candidates[j][1] == want]
        if not hit:
            break
        accepted, at = accepted + 1, hit[0]
    return accepted, [candidates[j][1] for j in chosen]


def served(
    drafter: PlainDrafter,
    tokens: list[int],
    features: torch.Tensor,
    output_start: int,
    depth: int,
    topk: int,
    nodes: int,
) -> list[tuple[int, int]]:
    """(root, accepted) of every verify step of a request, as a server would go through it."""
    steps = []
    text: Rows = []
    root = output_start
    while root < len(tokens) - 1 and root <= len(features):
        accepted, _ = verify_step(drafter, tokens, features, root, depth, topk, nodes, text)
        steps.append((root, accepted))
        root += accepted + 1
    return steps
