"""FlashInfer's kernels on CUDA: ragged prefill for the text rows, ``merge_state`` for the rest.

Written against flashinfer_python 0.6.15 (SGLang 0.5.17) and 0.6.18 (SGLang 0.5.21), whose wrappers
take the same arguments. FlashInfer has no backward: :class:`function.AttentionFunction` supplies
it. Its first use compiles kernels, a minute once for each machine, unless flashinfer-jit-cache is
there.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from aurora_sgl.drafter.attention.kernels import Kernels, plain
from aurora_sgl.drafter.attention.seen import Seen
from aurora_sgl.drafter.attention.states import AttentionState, merge

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128, 256)

#: FlashInfer's own advice for the split-k workspace.
_WORKSPACE_BYTES = 128 * 1024**2
#: Plans in flight. A plan's numbers go to the GPU from a pinned buffer of its wrapper, which must
#: not be filled again before they arrived.
_RING = 4
_WRONG = 0.03


def unfit(query: torch.Tensor) -> str | None:
    """Why these tensors are not for FlashInfer, or ``None``."""
    if query.device.type != "cuda":
        return f"the tensors are on {query.device.type}, not on CUDA"
    if query.dtype not in DTYPES:
        return f"its kernels take bfloat16 and float16, not {str(query.dtype)[6:]}"
    if query.shape[-1] not in HEAD_DIMS:
        return f"its kernels take head_dim {HEAD_DIMS}, not {query.shape[-1]}"
    return None


def trouble(query: torch.Tensor, kv_heads: int) -> str | None:
    """Why FlashInfer does not work on this machine for such tensors, or ``None``.

    Runs a small problem of each kind once and compares it with the definition.
    """
    return _probe(query.device, query.dtype, query.shape[1], kv_heads, query.shape[2])


def kernels() -> Kernels:
    return Kernels("flashinfer", _text, _merge)


@lru_cache(maxsize=16)
def _probe(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> str | None:
    generator = torch.Generator(device).manual_seed(0)

    def random(rows: int, count: int) -> torch.Tensor:
        return torch.randn(
            rows, count, head_dim, generator=generator, device=device, dtype=torch.float32
        ).to(dtype)

    causal = Seen.run([0, 3], [5, 9])
    tree = Seen.masks([torch.ones(5, 5, device=device).tril() > 0, _checkered(9, 12, device)])
    query, key, value = random(14, heads), random(17, kv_heads), random(17, kv_heads)
    try:
        for visibility in (causal, tree):
            given = _text(query, key, value, visibility)
            wanted = plain(query, key, value, visibility)
            both = ((given, wanted), (_merge(given, given), merge(wanted, wanted)))
            for ours, theirs in both:
                off = (ours.out.float() - theirs.out.float()).abs().max()
                if float(off) > _WRONG or float((ours.lse - theirs.lse).abs().max()) > _WRONG:
                    return "its answers differ from the definition"
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return None


def _checkered(queries: int, rows: int, device: torch.device) -> torch.Tensor:
    number = torch.arange(queries, device=device)[:, None] + torch.arange(rows, device=device)
    return number % 3 != 0


def _text(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visibility: Seen
) -> AttentionState:
    with torch.cuda.device(query.device):
        wrapper = _wrappers(query.device, visibility.mask is not None).plan(
            visibility, query, key.shape[1]
        )
        tensors = (x.contiguous() for x in (query, key, value))
        return AttentionState(*wrapper.run(*tensors, return_lse=True))


def _merge(a: AttentionState, b: AttentionState) -> AttentionState:
    from flashinfer import merge_state

    return AttentionState(
        *merge_state(a.out, a.lse, b.out.to(a.out.dtype), b.lse.float().contiguous())
    )


@lru_cache(maxsize=8)
def _wrappers(device: torch.device, masked: bool) -> _Wrappers:
    with torch.inference_mode(False):  # replay may come first, training writes to them after it
        return _Wrappers(device)


@lru_cache(maxsize=4)
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


class _Wrappers:
    """A ring of wrappers. Those with a mask are never planned without one: a wrapper that has had
    a mask goes on using it (``_custom_mask_buf`` is not cleared, 0.6.18)."""

    def __init__(self, device: torch.device) -> None:
        from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

        # fa2 runs everywhere and is the one that takes masks; its log-sum-exp is in base 2.
        self.ring: list[Any] = [
            BatchPrefillWithRaggedKVCacheWrapper(_workspace(device), "NHD", backend="fa2")
            for _ in range(_RING)
        ]
        self.planned = [torch.cuda.Event() for _ in range(_RING)]  # type: ignore[no-untyped-call]
        self.turn = 0
        self.device = device

    def plan(self, visibility: Seen, query: torch.Tensor, kv_heads: int) -> Any:
        self.turn = (self.turn + 1) % _RING
        wrapper, planned = self.ring[self.turn], self.planned[self.turn]
        planned.synchronize()
        # On the host a causal plan waits for nothing; packing a mask needs them on the device
        # (0.6.15 does not move them there).
        place = self.device if visibility.mask is not None else torch.device("cpu")
        query_indptr, text_indptr = (
            torch.tensor(x, dtype=torch.int32, device=place)
            for x in (visibility.query_indptr, visibility.text_indptr)
        )
        wrapper.plan(
            query_indptr,
            text_indptr,
            num_qo_heads=query.shape[1],
            num_kv_heads=kv_heads,
            head_dim_qk=query.shape[2],
            custom_mask=visibility.mask,
            causal=visibility.mask is None,
            sm_scale=query.shape[2] ** -0.5,
            q_data_type=query.dtype,
            kv_data_type=query.dtype,
        )
        planned.record()
        return wrapper
