"""Reads of two versions beside each other, kept for as long as an operator would not notice."""

from __future__ import annotations

import shlex

import streamlit as st

from aurora_sgl import store
from aurora_sgl.config import get_settings
from aurora_sgl.rollout import equal_shape
from aurora_sgl.rollout.comparison import PairFacts, pair_facts
from aurora_sgl.rollout.equal_shape import PositionShares, ServedAtEqualShape

from .context import Group, engine_of
from .data import FRESH, LONG


@st.cache_data(ttl=FRESH, max_entries=50, show_spinner=False)
def facts(url: str, group_id: int, one: int, other: int) -> PairFacts:
    with store.session(engine_of(url), write=False) as s:
        return pair_facts(s, group_id, one, other)


@st.cache_data(ttl=LONG, max_entries=50, show_spinner=False)
def served(url: str, group_id: int, one: int, other: int) -> ServedAtEqualShape:
    with store.session(engine_of(url), write=False) as s:
        return equal_shape.served_at_equal_shape(s, group_id, one, other)


@st.cache_data(ttl=LONG, max_entries=50, show_spinner=False)
def positions(url: str, one: int, other: int) -> PositionShares | None:
    with store.session(engine_of(url), write=False) as s:
        return equal_shape.positions(s, one, other)


def replay_command(here: Group, one: int, other: int) -> str:
    """What a person types to have both replayed on the same requests."""
    command = f"aurora-sgl replay --version {one} --version {other}"
    group = "" if here.name == get_settings().group else f" --group {shlex.quote(here.name)}"
    return command + group
