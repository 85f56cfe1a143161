"""Links from one page to another that keep what was chosen beside the pages: the group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import streamlit as st

#: In the session's state: the pages by name.
PAGES = "pages"


def keep(pages: Iterable[st.Page]) -> None:
    """Parts that refresh draw links without the shell around them."""
    st.session_state[PAGES] = {page.title.lower(): page for page in pages}


def to(page: str, label: str, icon: str, parameters: Mapping[str, str] | None = None) -> None:
    """``page``: its name in addresses, such as ``alerts``."""
    target = st.session_state.get(PAGES, {}).get(page)
    if target is not None:
        st.page_link(target, label=label, icon=f":material/{icon}:",
                     query_params=dict(parameters or {}) or None)  # fmt: skip
