"""Files for download: each is for the account that looks at the page, while it has its role."""

from __future__ import annotations

import streamlit as st

from . import login
from .guard import owned


def offer(label: str, content: bytes, name: str, kind: str, *, help: str | None = None) -> None:
    """A button; at the file's address the guard asks again who wants it.

    The file is there as long as the page shows the button. Streamlit would keep one that is made
    at the click only until it has looked twice for files that no page shows, which with a few
    pages open is a second or less.
    """
    user = login.account()
    if user is not None:
        st.download_button(
            label, content, name, owned(kind, user, content), icon=":material/download:",
            on_click="ignore", help=help,
        )  # fmt: skip
