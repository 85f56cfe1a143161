"""Parts of pages: what goes wrong in one is said there, and some draw themselves again."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import streamlit as st
from sqlalchemy.exc import DBAPIError

from aurora_sgl.errors import AuroraError

from . import login, words
from .context import in_words


def guarded(draw: Callable[..., Any]) -> Callable[..., Any]:
    """What goes wrong while a part of a page is drawn is said in words, there."""

    @wraps(draw)
    def safe(*args: Any, **kwargs: Any) -> Any:
        try:
            return draw(*args, **kwargs)
        except (AuroraError, DBAPIError) as error:
            st.error(words.literal(in_words(error)), icon=":material/error:")
        return None

    return safe


def private(draw: Callable[..., Any]) -> Callable[..., Any]:
    """A part that may be drawn without the page around it: whoever was logged out meanwhile sees
    the login instead, and whose role changed the page as it is for him."""

    @wraps(draw)
    def checked(*args: Any, **kwargs: Any) -> Any:
        user = login.account()
        if user is None or not login.owns_page(user):
            st.rerun()
        return draw(*args, **kwargs)

    return checked


def refreshing(seconds: float | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A part that draws itself again every so many seconds (``None``: only when it is used)."""

    def decorate(draw: Callable[..., Any]) -> Callable[..., Any]:
        return st.fragment(private(guarded(draw)), run_every=seconds)

    return decorate
