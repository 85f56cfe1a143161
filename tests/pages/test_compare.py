"""The page Compare: two versions beside each other, and one request under both."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlencode

import pytest
from streamlit.testing.v1 import AppTest

from aurora_sgl import store
from aurora_sgl.config import get_settings
from aurora_sgl.evaluation import one_request
from aurora_sgl.evaluation.one_request import PairTask
from aurora_sgl.rollout.comparison import pair_facts
from aurora_sgl.rollout.replayed_pair import RequestContrast
from aurora_sgl.store import queries
from aurora_sgl.store.models import Request
from dashboard import replays
from dashboard.screens import compare
from tests.pages.test_pages import draw, said
from tests.support import compared, store_samples
from tests.support import dashboard_house as samples
from tests.support.dashboard_house import House

pytestmark = pytest.mark.timeout(240)
Use = Callable[..., None]
A, B = "compared a", "compared b"


def pair(home: Path, one: int, other: int, tab: str, name: str = "ada", **more: object) -> AppTest:
    return draw(home, "Compare", name, query=f"a={one}&b={other}",
                **{"compared by": tab, **more})  # fmt: skip


def text(app: AppTest) -> str:
    """Words without the markup around them."""
    return re.sub(r"<[^>]*>", " ", said(app))


# -- what is chosen -----------------------------------------------------------------------------


def test_without_an_address_the_candidate_is_compared_with_what_is_live(
    house: House, settings_of: Use
) -> None:
    settings_of(house.home)
    app = draw(house.home, "Compare")
    assert (app.selectbox(key=A).value, app.selectbox(key=B).value) == (3, 4)
    assert "Version 4 comes from version 3, in 1 step." in text(app)
    app.button[0 if app.button[0].label == "Swap" else 1].click().run()
    assert (app.selectbox(key=A).value, app.selectbox(key=B).value) == (4, 3)
    assert not app.exception and "3 less 4" in text(app)


@pytest.mark.parametrize("asked", ["12345678901234567890", "<b>x</b>", "99", "²"])
def test_an_address_that_names_no_version_of_the_group_is_told_and_compares_nothing(
    house: House, settings_of: Use, asked: str
) -> None:
    settings_of(house.home)
    app = draw(house.home, "Compare", query=urlencode({"a": asked, "b": "3"}))
    assert [one.value for one in app.warning] and "no version" in app.warning[0].value
    assert app.selectbox(key=A).value is None and "known from" not in said(app)


def test_a_version_of_another_group_is_none_of_this_one_and_one_beside_itself_says_so(
    tmp_path: Path, settings_of: Use
) -> None:
    house = samples.empty(tmp_path)
    ids = [samples.add_version(house) for _ in range(2)]
    with store.session(house.engine) as s:
        group = queries.groups.ensure_group(s, "other", "t", "", "LlamaForCausalLMEagle3")
        foreign = store_samples.add_version(s, group.id, "z")
    house.engine.dispose()
    settings_of(tmp_path)
    app = draw(tmp_path, "Compare", query=f"a={foreign}&b={ids[0]}")
    assert f"no version {foreign} in this group" in app.warning[0].value
    app = draw(tmp_path, "Compare", query=f"a={ids[0]}&b={ids[0]}")
    assert "Both sides are version 1" in text(app)
    for tab in compare.TABS:  # neither served, was judged or tried
        words = text(pair(tmp_path, *ids, tab))
        assert "never replayed against each other" in words
    assert "have no ancestor in common" in text(pair(tmp_path, *ids, compare.TABS[0]))


def test_two_of_two_hundred_versions(tmp_path: Path, settings_of: Use) -> None:
    house = samples.empty(tmp_path)
    with store.session(house.engine) as s:
        last = None
        for number in range(200):
            last = queries.versions.add_version(
                s, group_id=house.group_id, architecture="LlamaForCausalLMEagle3",
                weights_uri=f"v/{number}/", weights_sha256=f"{number:064x}",
                vocab_sha256=f"{number // 100:064x}", draft_vocab_size=8, target_model="t",
                source="train" if last else "import", parent_id=last,
            )[0].id  # fmt: skip
        queries.versions.set_pruned(s, 1)
    house.engine.dispose()
    settings_of(tmp_path)
    words = text(pair(tmp_path, 1, 200, compare.TABS[0]))
    assert "Version 200 comes from version 1, in 199 steps." in words
    assert "The first 30 of 199 steps" in words and "different draft vocabularies" in words
    words = text(pair(tmp_path, 1, 200, "Replay"))
    assert "The weights of version 1 were deleted" in words and "aurora-sgl replay" not in words


# -- what is known ------------------------------------------------------------------------------


def test_replay_traffic_and_positions_are_told_by_domain_and_from_either_side(
    house: House, settings_of: Use
) -> None:
    settings_of(house.home)
    words = text(pair(house.home, 2, 3, "Replay"))
    assert re.search(r"\+0\.21 \(\+0\.16 to \+0\.26\)", words)
    assert all(domain in words for domain in samples.DOMAINS)
    assert "aurora-sgl replay --version 2 --version 3" in words
    assert re.search(r"-0\.21 \(-0\.26 to -0\.16\)", text(pair(house.home, 3, 2, "Replay")))
    words = text(pair(house.home, 2, 3, "Served"))
    assert "depth 3, top-k 2, 6 nodes, greedy" in words and "3 strata of both" in words
    app = pair(house.home, 2, 3, "By position")
    assert "of those that came so far" in text(app)
    (chart,) = app.get("plotly_chart")
    drawn = json.loads(chart.proto.spec)["data"]
    assert [bar["name"] for bar in drawn] == ["version 2", "version 3"]


def test_what_was_never_replayed_is_told_by_a_third_version_and_how_to_do_it(
    house: House, settings_of: Use
) -> None:
    settings_of(house.home)
    words = text(pair(house.home, 4, 5, "Replay"))
    assert "Both were replayed against version 3" in words
    assert "aurora-sgl replay --version 4 --version 5" in words


def test_a_viewer_sees_signs_and_cannot_have_a_request_replayed(
    house: House, settings_of: Use
) -> None:
    settings_of(house.home)
    mine, others = (pair(house.home, 3, 4, "Requests", name) for name in ("ada", "vera"))
    assert "Replay it under both" in [button.label for button in mine.button]
    assert "Replay it under both" not in [button.label for button in others.button]
    assert "shown to operators only" in text(others) and "drafter" not in tokens_of(others)
    assert "drafter" in tokens_of(mine)


def tokens_of(app: AppTest) -> str:
    bodies = (html.proto.body for html in app.get("html"))
    return "".join(body for body in bodies if 'class="aurora-text"' in body)


# -- one request under both ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[House, int, int]]:
    house, one, other = compared.fill(tmp_path_factory.mktemp("compared"), count=4)
    yield house, one, other
    house.engine.dispose()


def best(house: House, one: int, other: int) -> tuple[PairTask, RequestContrast]:
    """The request on which the second is better by most."""
    with store.session(house.engine, write=False) as s:
        known = pair_facts(s, house.group_id, one, other)
    contrast = known.contrasts[1][0]
    task = PairTask(house.url, house.group_id, contrast.request_id, (one, other), (3, 2, 6),
                    "float32")  # fmt: skip
    return task, contrast


def test_a_request_is_replayed_token_by_token_and_comes_to_what_the_gate_counted(
    both: tuple[House, int, int], settings_of: Use
) -> None:
    house, one, other = both
    settings_of(house.home)
    task, contrast = best(*both)
    app = pair(house.home, one, other, "Requests")
    assert "Only these sums are kept" in text(app)
    next(button for button in app.button if button.label == "Replay it under both").click().run()
    until = time.monotonic() + 150
    while replays.ALL.seconds(task) is not None:
        assert time.monotonic() < until
        time.sleep(0.2)
    outcome = replays.ALL.outcome(task)
    assert outcome is not None and outcome.answer is not None, outcome
    for side, steps in enumerate(outcome.answer["steps"]):
        assert len(steps) == contrast.verify_steps[side]
        assert sum(len(step[3]) for step in steps) == contrast.accepted[side]
    app.run()
    assert not app.exception and tokens_of(app).count('class="aurora-text"') == 2
    for side, version in enumerate((one, other)):
        length = f"accept length {contrast.accept_length[side]:.2f}"
        assert f"**Version {version}**, replayed: {length}" in said(app)
    with store.session(house.engine) as s:
        row = s.get(Request, task.request_id)
        assert row is not None
        row.may_train = False  # somebody took the consent back: what was kept is not shown
    try:
        app.run()
        assert "may not be used any more" in text(app)
        assert "Replay it under both" not in [button.label for button in app.button]
        assert tokens_of(app).count('class="aurora-text"') == 1  # what was served, as before
        answer = ended(task)
        assert "may not be used" in answer["error"]
    finally:
        with store.session(house.engine) as s:
            s.merge(Request(id=task.request_id, may_train=True))


def ended(task: PairTask, before: str = "") -> dict[str, str]:
    """What the process of a replay says, after some words of Python."""
    code = f"from aurora_sgl.evaluation import one_request\n{before}\none_request.main()"
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(asdict(task)).encode(),
                          capture_output=True, check=False)  # fmt: skip
    return dict(json.loads(done.stdout)) if done.stdout else {"code": str(done.returncode)}


def test_a_replay_that_takes_too_much_memory_or_time_is_ended(
    both: tuple[House, int, int], settings_of: Use
) -> None:
    settings_of(both[0].home)
    task, _ = best(*both)
    answer = ended(task, "one_request.MEMORY_BYTES = 20 << 20")
    assert "it takes more than 20 MB of memory" in answer["error"]
    late = (
        "one_request.SECONDS = -0.9\none_request.stepped = lambda task: __import__('time').sleep(9)"
    )
    code = ended(task, late)["code"]
    assert int(code) == -signal.SIGALRM
    assert "took more than" in replays._outcome(int(code), b"").error


def test_what_can_not_be_replayed_says_why(both: tuple[House, int, int], settings_of: Use) -> None:
    house = both[0]
    settings_of(house.home)
    task, _ = best(*both)

    def why(**changes: object) -> str:
        with store.session(house.engine, write=False) as s, pytest.raises(Exception) as refused:
            one_request.usable(s, PairTask(**{**asdict(task), **changes}))
        return str(refused.value)

    assert "its trace is gone" in why(request_id=5)
    assert "may not be used" in why(group_id=house.group_id + 1)
    with store.session(house.engine) as s:
        row = s.get(Request, task.request_id)
        assert row is not None
        row.accept_rule = "mixed_rules"
    assert "can't be replayed" in why()
    with store.session(house.engine) as s:
        s.merge(Request(id=task.request_id, accept_rule="greedy"))
    get_settings.cache_clear()
