"""What the prefix cache holds for the drafter: followed step by step, told, and renewed.

One object of the agent: it marks who made the draft KV of each place (``draft_kv``), looks up what
new requests found in the cache, and has heads that are met again and again computed again
(``renewal``).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from aurora_sgl.engine.draft_kv import DraftKV, LiveVersion
from aurora_sgl.engine.draft_tree import to_host
from aurora_sgl.engine.parts import Parts
from aurora_sgl.engine.renewal import StaleHeads, leave_cache, renew
from aurora_sgl.engine.request_state import RequestState

_FOLLOWING = "following draft KV"
_RENEWING = "renewing draft KV"


class CachedKV:
    """One per scheduler process; ``leads``: whether this rank says what is renewed."""

    def __init__(self, worker: Any, live: LiveVersion, parts: Parts) -> None:
        self._live, self._parts = live, parts
        self._marks = DraftKV(_places(worker), worker.device)
        self._heads = StaleHeads()
        self._pool = worker.draft_worker.draft_runner.token_to_kv_pool
        self._tree: Any = None  # SGLang's prefix cache

    def before_prefill(self, batch: Any) -> None:
        """On the leading rank, whatever else of ours is left alone: look up what the requests of
        a prefill found, and mark what it writes."""
        self._follow(partial(self._look, batch))

    def after_step(self, places: torch.Tensor, *, plain: bool) -> None:
        """Mark what a verify step wrote; a plain one leaves its places without draft KV."""
        self._follow(partial(self._marks.mark, places, None if plain else self._live.maker))

    def after_prefill(self, batch: Any, places: torch.Tensor) -> None:
        """After the drafter's prefill, on every rank: renew the heads that it computed again."""
        if any(hasattr(req, "_aurora_renews") for req in batch.reqs):
            work = partial(
                renew, batch, places, self._tree, self._pool, self._marks, self._live.maker
            )
            self._parts.attempt(_RENEWING, work, None)

    def met(self, req: Any, state: RequestState) -> None:
        """A request's prefill is over: remember what it found of another drafter."""
        if state.strangers is None or state.steps:
            return
        self._heads.found(self._live.swap_count, int(req.cached_tokens))
        _, others, in_head = map(int, state.strangers)
        if others:
            namespace, cached = req.extra_key or "", int(req.cached_tokens)
            prompt, swaps = req.origin_input_ids, self._live.swap_count
            self._heads.met(swaps, namespace, prompt, cached, in_head=bool(in_head))

    def renews(self, received: Any) -> bool:
        """Whether a request that comes in is the one to compute its head again."""
        if not received.input_ids:
            return False
        namespace = received.extra_key or ""
        return self._heads.renews(self._live.swap_count, namespace, received.input_ids)

    def take_out(self, scheduler: Any, rids: set[str]) -> None:
        """On every rank: have these requests, which just came in, use no cached prefix."""
        self._tree = scheduler.tree_cache
        for req in scheduler.waiting_queue:
            if req.rid in rids:
                leave_cache(req)

    def _follow(self, work: Any) -> None:
        def done() -> bool:
            work()
            return True

        if not self._parts.attempt(_FOLLOWING, done, False):
            self._marks.doubt()  # a step is not marked

    def _look(self, batch: Any) -> None:
        for row, req in enumerate(batch.reqs):
            state: RequestState | None = getattr(req, "_aurora", None)
            cached = batch.prefix_lens[row]
            # A request that was retracted finds another prefix than at first; what a later part of
            # a prompt finds is what the parts before it have put there.
            if state is not None and cached and (state.strangers is None or state.steps):
                places, head = _prefix(batch, row, cached), StaleHeads.level(cached)
                state.strangers = to_host(self._marks.strangers(places, head, self._live.maker))
        self._marks.mark(batch.out_cache_loc, self._live.maker)


def _prefix(batch: Any, row: int, cached: int) -> torch.Tensor:
    """Places of what a request of a prefill found in the cache. SGLang 0.5.22 no longer keeps them
    with the request; the table that its attention reads has them in every release."""
    # A slice: a number would wait for the device.
    pool_index = batch.req_pool_indices[row : row + 1]
    places: torch.Tensor = batch.req_to_token_pool.req_to_token[pool_index, :cached][0]
    return places


def _places(worker: Any) -> int:
    """How many places the KV cache has, with those that SGLang keeps free."""
    runner = worker.target_worker.model_runner
    pool = getattr(runner, "token_to_kv_pool_allocator", None)
    size = max(int(runner.max_total_num_tokens), int(getattr(pool, "size", 0) or 0))
    return size + int(getattr(pool, "page_size", 1) or 1) + 1
