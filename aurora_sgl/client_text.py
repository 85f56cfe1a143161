"""Texts that clients choose, as records have them: the engine writes them so, and who names one
later as its client did must find it."""

from __future__ import annotations

from aurora_sgl.errors import printable

MAX_TEXT, MAX_LABEL = 128, 64  # characters


def clean(text: str, most: int = MAX_TEXT) -> str:
    """Its first characters, those replaced that cannot be stored or printed."""
    return printable(text[:most])


def of_header(value: bytes) -> str:
    """What a header says, without the space around it: UTF-8 as browsers and most clients send it,
    else Latin-1, the old rule of HTTP."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = value.decode("latin-1")
    return text.strip()[:MAX_LABEL].rstrip()


def as_sent(text: str) -> bytes:
    """The bytes of a text as a client or a shell had it: Python keeps what is no UTF-8 of a
    command's argument as halves of surrogate pairs."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
