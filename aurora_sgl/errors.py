"""Errors that a user can cause. Each message is one line: what is wrong, and what to do."""

from __future__ import annotations


class AuroraError(Exception):
    """Something that the user can mend; the command line prints the message and exits with 1."""


class Refused(AuroraError):
    """A rollout action that was refused; nothing was changed."""


class Unusable(AuroraError):
    """A drafter that can't become a version as it is; trying again does not help."""
