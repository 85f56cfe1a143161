"""The store: every table, every SQL statement. See docs of the public names in the modules."""

from aurora_sgl.store.connection import connect, reading, require_writable, session
from aurora_sgl.store.schema import current, head, require_current, upgrade

__all__ = [
    "connect",
    "current",
    "head",
    "reading",
    "require_current",
    "require_writable",
    "session",
    "upgrade",
]
