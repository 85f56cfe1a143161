"""Which layouts of processes the plugin takes part in: one rank, tensor-parallel ranks of one
machine, and data-parallel replicas of either. Every other one is left to SGLang as it is.

What ranks do in a step must be the same on all of them, and who leads, who has a drafter and who
sees a request from its begin to its end differs by layout. None of those refused here was ever run.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Refusal(NamedTuple):
    flag: str  # as users write it
    fields: tuple[str, ...]  # of SGLang's ``ServerArgs``, in any release that we know
    why: str


REFUSED = (
    Refusal("--pp-size", ("pp_size",), "the first stage has no drafter"),
    Refusal(
        "--enable-dp-attention",
        ("enable_dp_attention", "attn_dp_size"),
        "its ranks choose their requests apart and must make the same steps",
    ),
    Refusal(
        "context parallelism",
        ("attn_cp_size", "dcp_size", "enable_prefill_cp", "enable_cp_decode_attn_tp"),
        "each of its ranks has a part of the hidden states only",
    ),
    Refusal(
        "--disaggregation-mode",
        ("disaggregation_mode",),
        "no server sees a request from its prompt to its end",
    ),
    Refusal("--nnodes", ("nnodes",), "a version is handed to the ranks of one machine only"),
    Refusal("--elastic-ep-backend", ("elastic_ep_backend",), "its ranks come and go"),
    Refusal("--enable-two-batch-overlap", ("enable_two_batch_overlap",), "it splits batches"),
    Refusal("--enable-pdmux", ("enable_pdmux",), "it runs two batches at once"),
)


def refusal(server_args: Any) -> str:
    """Why a server of these arguments is left alone; "": it is not."""
    for one in REFUSED:
        if any(_is_asked(getattr(server_args, field, None)) for field in one.fields):
            return f"{one.flag} is not supported ({one.why}); serving is untouched"
    return ""


def _is_asked(value: object) -> bool:
    """Whether an argument asks for a layout; a size of one and "null" do not."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value > 1
    return value not in (None, False, "", "null", "none")
