"""Addresses of our own pages: a page and its parameters, and nothing else. What was saved is
checked on its way in and again on its way out, so that no link leads anywhere else."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode

import streamlit as st

from aurora_sgl.errors import AuroraError

#: The page at the address of the dashboard itself.
FIRST = "now"
#: Characters of the parameters: a statement of the SQL page may be among them.
LONGEST = 6000
#: Parameters that are no state of a page: a link that makes an operator, and Streamlit's own.
NEVER = re.compile(r"setup|embed.*", re.IGNORECASE)
_PAGE = re.compile(r"[a-z]{1,40}")
_KEY = re.compile(r"[A-Za-z0-9_.-]{1,40}")


@dataclass(frozen=True)
class Address:
    """``pairs``: the parameters, decoded."""

    page: str
    pairs: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, page: str, query: str, pages: Iterable[str]) -> Address:
        """From what is stored. Raises ``AuroraError`` for what is no page with parameters."""
        try:
            pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query),
                              errors="strict", max_num_fields=500)  # fmt: skip
        except ValueError:
            raise AuroraError("the parameters of this address can't be read") from None
        return cls.checked(page, pairs, pages)

    @classmethod
    def checked(cls, page: str, pairs: Iterable[tuple[str, str]], pages: Iterable[str]) -> Address:
        if not _PAGE.fullmatch(page) or page not in pages:
            raise AuroraError(f"there is no page {page[:40]!r}")
        kept = tuple((key, value) for key, value in pairs if not NEVER.fullmatch(key))
        if not all(_KEY.fullmatch(key) for key, _ in kept):
            raise AuroraError("the address has a parameter that no page of ours has")
        address = cls(page, kept)
        if len(address.query) > LONGEST:
            raise AuroraError(
                f"the address of this page is too long to be saved: its parameters have "
                f"{len(address.query):,} characters, {LONGEST:,} are possible"
            )
        return address

    @property
    def query(self) -> str:
        """Without ``?``; of letters, digits and ``%=&+-._~*`` alone."""
        return urlencode(self.pairs, errors="replace")

    @property
    def href(self) -> str:
        """Below the base path, on this machine: never another scheme or host."""
        path = f"{base()}/{'' if self.page == FIRST else self.page}"
        return f"{path}?{self.query}" if self.pairs else path


def parameters() -> tuple[tuple[str, str], ...]:
    """Those of the page that is looked at, as they are now."""
    params = st.query_params
    return tuple((key, value) for key in sorted(params) for value in params.get_all(key))


def base() -> str:
    """Path under which a proxy shows the pages, see ``reach.read_base``."""
    path = str(st.get_option("server.baseUrlPath") or "").strip("/")
    return f"/{path}" if path else ""
