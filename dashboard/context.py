"""What a page needs to know first: the store, the group, the viewer's zone and theme."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import streamlit as st
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from aurora_sgl import store
from aurora_sgl.clock import utc_now
from aurora_sgl.config import get_settings
from aurora_sgl.store import queries
from aurora_sgl.store.accounts import Accounts

from .server import accounts_path


@dataclass(frozen=True)
class Group:
    """The deployment group that is looked at. Hashable: the key of everything that is cached."""

    url: str  # of the store
    id: int
    name: str

    @property
    def engine(self) -> Engine:
        return engine_of(self.url)


@st.cache_resource(show_spinner=False)
def engine_of(url: str) -> Engine:
    """Raises ``AuroraError`` when the store can't be reached or has another schema."""
    engine = store.connect(url)
    try:
        store.require_current(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


@st.cache_resource(show_spinner=False)
def _accounts(path: str) -> Accounts:
    return Accounts(accounts_path())


def accounts() -> Accounts:
    return _accounts(str(accounts_path()))


def find_groups() -> list[Group]:
    """Every group of the store, the one of the settings first."""
    settings = get_settings()
    url = settings.store_url
    with store.session(engine_of(url), write=False) as s:
        groups = [Group(url, row.id, row.name) for row in queries.groups.groups(s)]
    return sorted(groups, key=lambda group: (group.name != settings.group, group.name))


def group() -> Group:
    """The chosen one; set by the shell before any page runs."""
    chosen: Group = st.session_state["group"]
    return chosen


def zone() -> ZoneInfo:
    """The viewer's; UTC when the browser does not say."""
    try:
        return ZoneInfo(st.context.timezone or "UTC")
    except (ZoneInfoNotFoundError, ValueError):
        return ZoneInfo("UTC")


def local(moment: datetime) -> datetime:
    return moment.astimezone(zone())


def now() -> datetime:
    return utc_now()


def in_words(error: Exception) -> str:
    """What a person can do something about."""
    if not isinstance(error, DBAPIError):
        return str(error)
    lines = str(error.orig).strip().splitlines()
    return (
        f"The store did not answer ({lines[0] if lines else 'no reason given'}). Check "
        "AURORA_DATABASE_URL and that the database is running; then look again."
    )
