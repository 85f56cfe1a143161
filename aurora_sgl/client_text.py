"""Texts that clients choose, as records have them: the engine writes them so, and who names one
later as its client did must find it."""

from __future__ import annotations

from aurora_sgl.errors import printable

MAX_TEXT, MAX_LABEL = 128, 64  # characters


def clean(text: str, most: int = MAX_TEXT) -> str:
    """Its first characters, those replaced that cannot be stored or printed."""
    return printable(text[:most])


def label(text: str) -> str:
    """What a header says: without the space around it."""
    return text.strip()[:MAX_LABEL].rstrip()
