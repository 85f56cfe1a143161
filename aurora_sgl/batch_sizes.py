"""Groups of batch sizes: how the engine times its steps, and how the store sums them."""

from __future__ import annotations


def batch_bucket(batch_size: int) -> int:
    """The largest batch size of the group that this one is in: 1, 2, 3 to 4, 5 to 8, 9 to 16 and so
    on are each looked at as one. It is what ``acceptance_minute.batch_bucket`` holds."""
    return 1 << max(0, batch_size - 1).bit_length()
