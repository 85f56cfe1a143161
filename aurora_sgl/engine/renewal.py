"""Draft KV of heads that many requests share, made again by the drafter that is live.

After a swap the prefix cache still holds the old drafter's draft KV. A conversation leaves it
behind; a system prompt never does, since it is met again and again and so never leaves the cache:
all requests behind it would draft a little worse, and none would say something about the new
drafter alone. So of the requests that meet such a head one computes it again as if it were not
cached, and what its drafter makes is copied to where the cache has that head. The same for a whole
prompt that comes again. All of it together stays within half a percent of what the cache saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aurora_sgl.engine.draft_kv import DraftKV

#: Tokens by which a head is known, the more of it are cached the more.
_LEVELS = (1024, 256, 64, 16)
_HITS_EACH = 64  # tokens of a head for each request that has to meet it first
_MOST_HEADS = 1024
#: The request that computes a head again may be so much longer than what others found cached.
_TIMES, _MORE = 2, 256
#: Tokens that all of them together may compute again since a swap: of what others found cached
#: since then, and so many to begin with.
_SHARE, _FIRST = 0.005, 192


@dataclass(slots=True)
class _Head:
    hits: int
    shortest: int  # tokens found in the cache


Key = tuple[str, int, int]


class StaleHeads:
    """Heads in the prefix cache that requests met since the swap, with draft KV of others."""

    def __init__(self) -> None:
        self._heads: dict[Key, _Head] = {}
        self._swap_count = 0
        self._allowed = float(_FIRST)  # tokens

    @staticmethod
    def level(cached: int) -> int:
        """How many tokens a head is known by of which so many are cached; 0: too few."""
        return next((level for level in _LEVELS if level <= cached), 0)

    def found(self, swap_count: int, cached: int) -> None:
        """A request found so many tokens in the cache, of whichever drafter."""
        self._since(swap_count)
        self._allowed += _SHARE * cached

    def met(
        self,
        swap_count: int,
        namespace: str,
        prompt: Sequence[int],
        cached: int,
        *,
        in_head: bool,
    ) -> None:
        """A request found places of others, ``in_head``: in its first ``level(cached)`` too."""
        self._since(swap_count)
        keys = [_key(namespace, prompt, len(prompt))]
        if in_head and self.level(cached):
            keys.append(_key(namespace, prompt, self.level(cached)))
        for key in keys:
            head = self._heads.setdefault(key, _Head(0, cached))
            head.hits += 1
            head.shortest = min(head.shortest, cached)
        while len(self._heads) > _MOST_HEADS:
            del self._heads[next(iter(self._heads))]

    def renews(self, swap_count: int, namespace: str, prompt: Sequence[int]) -> bool:
        """Whether this request is the one that computes what others met again."""
        self._since(swap_count)
        if not self._heads:
            return False
        for length in (len(prompt), *(level for level in _LEVELS if level < len(prompt))):
            key = _key(namespace, prompt, length)
            head = self._heads.get(key)
            if head is None or head.hits < min(length, head.shortest) // _HITS_EACH:
                continue
            if len(prompt) <= min(_TIMES * head.shortest + _MORE, self._allowed):
                del self._heads[key]
                self._allowed -= len(prompt)
                return True
        return False

    def _since(self, swap_count: int) -> None:
        if swap_count != self._swap_count:
            self._swap_count = swap_count
            self._allowed = float(_FIRST)
            self._heads.clear()


def _key(namespace: str, prompt: Sequence[int], level: int) -> Key:
    return namespace, level, hash(tuple(prompt[:level]))


def leave_cache(req: Any) -> None:
    """Let SGLang look for nothing of this waiting request in the prefix cache."""
    req._compute_max_prefix_len = lambda _: 0
    req._aurora_renews = True


def use_cache(req: Any) -> None:
    """After its prefill a request is like any other again, if it is retracted for example."""
    del req._compute_max_prefix_len
    del req._aurora_renews


def renew(
    batch: Any, places: torch.Tensor, tree: Any, pool: Any, marks: DraftKV, maker: int
) -> None:
    """After the drafter's prefill of a batch that wrote to ``places``: copy what it made of heads
    that are computed again to where ``tree`` has them in the drafter's ``pool``."""
    offset = 0
    for row, req in enumerate(batch.reqs):
        begin, rows = batch.prefix_lens[row], batch.extend_lens[row]
        if getattr(req, "_aurora_renews", False):
            cached = _cached(tree, req)[begin : begin + rows]
            pool.move_kv_cache(cached, places[offset : offset + len(cached)])
            marks.mark(cached, maker)
            if begin + rows >= len(req.origin_input_ids):
                use_cache(req)
        offset += rows


def _cached(tree: Any, req: Any) -> torch.Tensor:
    """Where the prefix cache has the start of a request's prompt at this moment."""
    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    key = RadixKey(req.origin_input_ids, extra_key=req.extra_key, cache_salt=req.cache_salt)
    match = tree.match_prefix(MatchPrefixParams(key=key))
    indices: torch.Tensor | None = getattr(match, "device_indices", None)  # until SGLang 0.5.21
    return tree.path_device_indices(match.last_device_node) if indices is None else indices
