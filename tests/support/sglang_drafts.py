"""Run by test_drafter_parity: drafts of SGLang's own models and draft loop, as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aurora_sgl.compat  # noqa: F401  (torchvision must import before transformers asks for it)
from aurora_sgl.engine import cpu

cpu.install()

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402


class PagedAttention(torch.nn.Module):
    """Plain attention over numbered cache places; who sees which is set from outside."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, places: int) -> None:
        super().__init__()
        self.shape = (heads, kv_heads, head_dim)
        self.keys = torch.zeros(places, kv_heads, head_dim)
        self.values = torch.zeros(places, kv_heads, head_dim)
        self.sees: list[list[int]] = []

    def forward(self, q: Any, k: Any, v: Any, batch: Any) -> torch.Tensor:
        heads, kv_heads, head_dim = self.shape
        at = batch.out_cache_loc
        self.keys[at] = k.view(-1, kv_heads, head_dim)
        self.values[at] = v.view(-1, kv_heads, head_dim)
        out = []
        for row, places in zip(q.view(-1, heads, head_dim), self.sees, strict=True):
            keys = self.keys[places].repeat_interleave(heads // kv_heads, 1)
            values = self.values[places].repeat_interleave(heads // kv_heads, 1)
            weights = (torch.einsum("hd,phd->hp", row, keys) * head_dim**-0.5).softmax(-1)
            out.append(torch.einsum("hp,phd->hd", weights, values).flatten())
        return torch.stack(out)


def prepare(root: Path, shape: list[int], algorithm: str) -> Any:
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    depth, topk, nodes = shape
    args = ServerArgs(
        model_path=str(root / "target"),
        device="cpu",
        dtype="float32",
        skip_tokenizer_init=True,
        speculative_algorithm=algorithm,
        speculative_draft_model_path=str(root / "drafter"),
        speculative_num_steps=depth,
        speculative_eagle_topk=topk,
        speculative_num_draft_tokens=nodes,
        prefill_attention_backend="intel_amx",
        decode_attention_backend="intel_amx",
    )
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    if not torch.distributed.is_initialized():
        init_distributed_environment(
            world_size=1,
            rank=0,
            local_rank=0,
            backend="gloo",
            distributed_init_method=f"file://{root / 'rendezvous'}",
        )
        initialize_model_parallel()


def load_model(root: Path) -> Any:
    from sglang.srt.models.llama_eagle import LlamaForCausalLMEagle
    from sglang.srt.models.llama_eagle3 import LlamaForCausalLMEagle3
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(root / "drafter"))
    torch.set_default_dtype(torch.float32)
    eagle3 = config.architectures == ["LlamaForCausalLMEagle3"]
    model = LlamaForCausalLMEagle3(config) if eagle3 else LlamaForCausalLMEagle(config)
    model.load_weights(load_file(str(root / "drafter" / "model.safetensors")).items())
    target = load_file(str(root / "target" / "model.safetensors"))
    embedding = torch.nn.Parameter(target["model.embed_tokens.weight"])
    if eagle3:
        model.set_embed(embedding)
    else:
        model.set_embed_and_head(embedding, torch.nn.Parameter(target["lm_head.weight"]))
    model.model.layers[0].self_attn.attn = PagedAttention(
        config.num_attention_heads, config.num_key_value_heads, config.head_dim, 256
    )
    return model.eval()


def forward(model: Any, batch: Any) -> Any:
    out = model.model(batch.input_ids, batch.positions, batch)
    read, (state,) = out if isinstance(out, tuple) else (out, [out])
    logits = (read @ model.lm_head.weight.T).float()
    return SimpleNamespace(next_token_logits=logits, hidden_states=state)


def draft(model: Any, case: Any, root: int, shape: list[int]) -> dict[str, list[int]]:
    from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker
    from sglang.srt.utils.common import fast_topk

    depth, topk, nodes = shape
    attention = model.model.layers[0].self_attn.attn
    # Draft-extend over the committed text: rows 0 .. root - 1.
    batch = batch_of(
        case["tokens"][1 : root + 1],
        torch.arange(root),
        torch.arange(root),
        case["features"][:root],
    )
    attention.sees = [list(range(i + 1)) for i in range(root)]
    out = forward(model, batch)
    probs = out.next_token_logits[-1:].softmax(-1)
    topk_p, topk_index = fast_topk(probs, topk, dim=-1)
    steps: list[int] = []

    def run(inner: Any) -> Any:
        step = len(steps)
        steps.append(step)
        text = list(range(root))
        attention.sees = [
            text + [root + slot * depth + s for s in range(step + 1)] for slot in range(topk)
        ]
        return SimpleNamespace(logits_output=forward(model, inner))

    worker = SimpleNamespace(
        hot_token_id=getattr(model, "hot_token_id", None),
        topk=topk,
        speculative_num_steps=depth,
        speculative_num_draft_tokens=nodes,
        index_share_for_mtp_iteration=False,
        seed_dsa_topk_from_draft_extend=False,
        _topk1_parents_prealloc=torch.zeros(0, depth),
        draft_attn_backend=SimpleNamespace(attn_backends=[None] * depth),
        draft_runner=SimpleNamespace(
            forward=run,
            canary_manager=None,
            model_config=SimpleNamespace(
                model_is_mrope=False,
                hf_config=SimpleNamespace(architectures=["LlamaForCausalLMEagle3"]),
            ),
        ),
    )
    inner = batch_of(
        None, torch.full((topk,), root), root + torch.arange(topk * depth), out.hidden_states[-1:]
    )
    inner.spec_info.topk_p, inner.spec_info.topk_index = topk_p, topk_index
    parent_list, chosen, tokens, _ = EagleDraftWorker.draft_forward(worker, inner)
    return {
        "tokens": tokens[0].tolist(),
        "parents": parents(parent_list[0].tolist(), chosen[0].tolist(), topk),
    }


def parents(parent_list: list[int], chosen: list[int], topk: int) -> list[int]:
    """Parent node of each chosen candidate, as SGLang's tree kernel finds it."""
    found = []
    for candidate in chosen:
        group = candidate // topk
        found.append(0 if group == 0 else chosen.index(parent_list[group]) + 1)
    return found


class Batch(SimpleNamespace):
    """What it was not given is None, as most fields of SGLang's ``ForwardBatch``."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def batch_of(input_ids: Any, positions: Any, places: Any, hidden: Any) -> Any:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    mode = ForwardMode.DECODE
    return Batch(
        input_ids=input_ids,
        positions=positions.clone(),
        out_cache_loc=places,
        batch_size=1,
        forward_mode=mode,
        mm_input_embeds=None,
        sampling_info=None,
        contains_mm_inputs=lambda: False,
        spec_info=SimpleNamespace(hidden_states=hidden),
    )


def drafts(root: Path, algorithm: str, shapes: list[list[int]], roots: list[int]) -> None:
    case = load_file(str(root / "case.safetensors"))
    found = []
    with torch.no_grad():
        for shape in shapes:
            prepare(root, shape, algorithm)
            model = load_model(root)
            found.append([draft(model, case, at, shape) for at in roots])
    (root / "drafts.json").write_text(json.dumps(found))


def main() -> int:
    """Each drafter in a child of its own: SGLang's context of a process takes one, and importing
    SGLang, which takes longest, is done once for all."""
    import sglang.srt.models.llama_eagle
    import sglang.srt.models.llama_eagle3
    import sglang.srt.speculative.eagle_worker_v2  # noqa: F401

    shapes, roots = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    for root, algorithm in json.loads(sys.argv[3]):
        child = os.fork()
        if not child:
            drafts(Path(root), algorithm, shapes, roots)
            sys.stdout.flush()
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
