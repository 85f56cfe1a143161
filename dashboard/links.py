"""Links from one page to another that keep what was chosen beside the pages: the group."""

from __future__ import annotations

from collections.abc import Mapping

import streamlit as st

#: Where the shell keeps the pages, by name.
PAGES = "pages"


def to(page: str, label: str, icon: str, parameters: Mapping[str, str] | None = None) -> None:
    """``page``: its name in addresses, such as ``alerts``."""
    target = st.session_state.get(PAGES, {}).get(page)
    if target is not None:
        st.page_link(target, label=label, icon=f":material/{icon}:",
                     query_params=dict(parameters or {}))  # fmt: skip
