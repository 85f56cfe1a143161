"""Files for download: each is for the account that looks at the page, while it has its role."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from aurora_sgl.errors import Refused

from . import login
from .guard import owned


def offer(
    label: str, make: Callable[[], bytes], name: str, kind: str, *, help: str | None = None
) -> None:
    """A button; ``make`` runs when it is clicked, in a thread without a page, so that whoever was
    logged out or made a viewer since gets no file. At its address the guard asks again."""
    user, still = login.watched()

    def make_now() -> bytes:
        if not still():
            raise Refused("you were logged out, or your role changed; look at the page again")
        return make()

    st.download_button(
        label, make_now, name, owned(kind, user), icon=":material/download:", on_click="ignore",
        help=help,
    )  # fmt: skip
