"""Errors that a user can cause. Each message is one line: what is wrong, and what to do."""

from __future__ import annotations

import unicodedata

#: Control characters, half characters, and separators that end a line.
_ODD = frozenset(("Cc", "Cs", "Zl", "Zp"))


def printable(text: str) -> str:
    """A text in which U+FFFD stands for whatever can't be stored or printed on one line."""
    if text.isprintable():  # nearly always; what is printable has none of the odd ones
        return text
    return "".join("\ufffd" if unicodedata.category(c) in _ODD else c for c in text)


class AuroraError(Exception):
    """Something that the user can mend; the command line prints the message and exits with 1.

    As text it is one line that can be printed and stored, whatever it quotes of a file or a
    statement.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text if text.isprintable() else printable(" ".join(text.split()))


class Refused(AuroraError):
    """A rollout action that was refused; nothing was changed."""


class Unusable(AuroraError):
    """A drafter that can't become a version as it is; trying again does not help."""
