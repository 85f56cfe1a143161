"""Which rows of a prompt another request of a training set holds too: a system prompt, a form's
wording, the earlier turns of a chat. Such rows teach once what they teach.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

_BLOCK = 16  # tokens
#: Tokens behind a row on which what it teaches depends: its input token, and those up to its
#: deepest unrolled step (``TrainSettings.steps`` is 8 at most).
_BEHIND = 10


def own_rows(
    #: By request the tokens that its rows reach [T], and how many of them are the prompt.
    prompts: Mapping[int, tuple[NDArray[np.int32], int]],
) -> dict[int, int]:
    """By request the first row that no shorter one has, where that is not row 0.

    What is shared counts in whole blocks from position 0. Rows of an answer are always a request's
    own: what is served often is to be trained on often. A later turn of a chat has the answers of
    earlier ones in its prompt.
    """
    prefixes: set[bytes] = set()
    first = {}
    for number in sorted(prompts, key=lambda one: (len(prompts[one][0]), one)):
        tokens, prompt = prompts[number]
        names = _prefixes(tokens)
        shared = next((k for k, name in enumerate(names) if name not in prefixes), len(names))
        row = min(shared * _BLOCK - _BEHIND, prompt - 1)
        if row > 0:
            first[number] = row
        prefixes.update(names[shared:])
    return first


def _prefixes(tokens: NDArray[np.int32]) -> list[bytes]:
    """A name for the tokens up to the end of each block."""
    digest, names = hashlib.sha256(), []
    whole = np.ascontiguousarray(tokens, np.int32)
    for end in range(_BLOCK, len(tokens) + 1, _BLOCK):
        digest.update(whole[end - _BLOCK : end].tobytes())
        names.append(digest.copy().digest())
    return names
