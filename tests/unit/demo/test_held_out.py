"""Case "a prompts file with a single prompt repeated": nothing is held out, so nothing is measured,
and the summary at the end says "-"."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from aurora_sgl import store
from aurora_sgl.demo.held_out import HeldOutPrompts, spread
from aurora_sgl.demo.prompts import load_prompts, to_measure, to_serve
from aurora_sgl.demo.screen import Screen
from aurora_sgl.demo.summary import sentence
from aurora_sgl.demo.traffic import TrafficSample
from aurora_sgl.draft_shape import DraftShape

SPEEDS = ("no_speculation", "first", "no_speculation_last", "last")


def test_a_run_without_held_out_prompts_sums_up_with_dashes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "the only one"}\n' * 30)
    prompts = load_prompts(path)
    assert len(to_serve(prompts)) == 30
    engine = store.connect(f"sqlite:///{tmp_path / 'aurora.db'}")
    store.upgrade(engine)
    held = HeldOutPrompts(
        "http://127.0.0.1:9", engine, Screen(), spread(to_measure(prompts), 24),
        DraftShape(3, 4, 8), 0.0,
    )  # fmt: skip
    for name in SPEEDS:
        asyncio.run(held.measure_speed(name))
    for name in ("first", "last"):
        assert held.is_stored(name, asyncio.run(held.serve_whole_drafts(name)))
    engine.dispose()
    summary = {
        "requests": 30,
        "failed_requests": held.failed,
        "live_version": 1,
        "accept_length": held.accept_length("first", "last"),
        "tokens_per_second": held.tokens_per_second(),
    }
    assert json.loads(json.dumps(summary, allow_nan=False))["tokens_per_second"]["last"] is None
    line = sentence(summary)
    assert line == (
        "30 requests, 0 failed; accept length with whole drafts (depth 3, 8 nodes) - -> - (95% of "
        "the difference: - to -); tokens/s as served -, without speculation -; at the end -, "
        "without -; live version 1"
    )
    assert "held-out prompts, first: - tokens/s" in capsys.readouterr().err


def test_a_speed_is_one_only_where_something_was_sent() -> None:
    assert TrafficSample((), 0.3).tokens_per_second is None
