"""How inputs are made odd: bytes, JSON, text. All by a given random generator."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

#: What a kind answers.
TAKEN, REFUSED = "taken", "refused"
#: Bytes that parsers stumble over.
_ODD_BYTES = (
    b"\x00", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r\n", b'"', b"\\", b"{", b"[",
    b"\xc3\x28", b"\xed\xa0\xbd", b"%00", b"1e999", b"-1", b"\x7f" * 8,
)  # fmt: skip
ODD_TEXTS = (
    "", " ", "\x00", "\ud83d", "\udfff\ud800", "\u202e", "\u2028", "客服", "👩‍👩‍👧", "a" * 5000,
    "<script>alert(1)</script>", "=1+1", "../../etc/passwd", "'; DROP TABLE request; --", "NaN",
    "no", "none", "yes, no", "1e999", "-0", "%s%n", "${HOME}", "~nobody", "\x1b[31m", "\r\nX: y",
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308,
    float("nan"), float("inf"), float("-inf"), [], {}, [[]], {"": None},
    [1, "a", None], *ODD_TEXTS[:9],
)  # fmt: skip


def odd_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four changes: flipped bits, cut, repeated, written over, put in between."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        end = min(len(changed), at + rng.randint(1, 16))
        what = rng.randrange(6)
        if what == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            del changed[at:end]
        elif what == 2:
            changed[at:at] = rng.choice(_ODD_BYTES)
        elif what == 3:
            changed[at:end] = rng.randbytes(end - at)
        elif what == 4:
            changed[at:at] = changed[at:end] * rng.randint(1, 5)
        else:
            del changed[at:]
    return bytes(changed)


def odd_json(value: Any, rng: random.Random) -> Any:
    """A copy in which one to three places hold something else, are gone, or are new."""
    whole = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(whole))
        if not places:
            return rng.choice(ODD_VALUES)
        owner, key = rng.choice(places)
        what = rng.randrange(5)
        if what == 0:
            del owner[key]
        elif what == 1 and isinstance(owner, dict):
            owner[rng.choice(ODD_TEXTS)] = rng.choice(ODD_VALUES)
        elif what == 2:
            owner[key] = [copy.deepcopy(owner[key])]
        elif what == 3 and isinstance(owner[key], int | float):
            owner[key] = rng.choice((-1, 2, 1000, 1e6)) * owner[key]
        else:
            owner[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return whole


def odd_json_file(value: Any, rng: random.Random) -> bytes:
    """JSON of another content mostly, of other bytes sometimes, deep enough to be a trap rarely."""
    what = rng.randrange(10)
    if what == 0:
        return b"[" * rng.choice((900, 100_000))
    text = json.dumps(value if what < 4 else odd_json(value, rng)).encode("utf-8", "surrogatepass")
    return odd_bytes(text, rng) if what < 4 else text


def odd_text(text: str, rng: random.Random) -> str:
    """Words taken out, doubled, exchanged, odd ones put in."""
    words = text.split(" ")
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(words) + 1)
        what = rng.randrange(4)
        if what == 0:
            words.insert(at, rng.choice(ODD_TEXTS))
        elif what == 1:
            words[at:at] = words[:at][-2:]
        elif what == 2 and at < len(words):
            words[at] = rng.choice((*ODD_TEXTS, *words))
        else:
            del words[at : at + 1]
    return " ".join(words)


def _places(value: Any) -> Any:
    """Every (owner, key) in a value of JSON."""
    pairs = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in list(pairs):
        yield value, key
        yield from _places(inner)
