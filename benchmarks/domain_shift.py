r"""Traffic turns from A to B, to C, and back to A: what does a drafter that adapts gain over one
that does not, and what does it lose on A?

Both are the same drafter, trained on ``--trained`` requests of A (broad chat) by our recipe. Then
come requests of B (one narrow form), of C (code), and of A again. *static* stays as it is;
*adapting* trains every 50 requests with ``ADAPT``, the older requests that it replays among them
those of A. Accept lengths are exact replays on 60 held-out requests of the domain that
is being served, and of A all along, as the demo's tree (4, 4, 16) and as a chain of 4.

    python -m benchmarks.domain_shift [--trained 200] [--each 200] [--seed 0] [--show] [--json]
        [--picture domain_shift.png]
    python -m benchmarks.domain_shift --trained 400 --each 600 --show --shape tree \
        --cells benchmarks/results/h200 --well-trained narrow=2.77,code=2.26,chat=2.30 \
        --picture docs/pictures/domain_shift.svg
    python -m benchmarks.domain_shift --serve [--prompts 12] ...

``--serve`` then starts a real SGLang server and swaps the drafters of five checkpoints (the turn to
B, half of B, the ends of B, C and A) into it, each in turns with the static one, on a CPU also with
no drafts, for the same held-out prompts: tokens/s of the whole answers, one stream.

Cells are kept in ``benchmarks/results/domain_shift.jsonl``: stop it at any time, call it again.
"""

from __future__ import annotations

import argparse
import base64
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx

from aurora_sgl import store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.drafter import checkpoint
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.rollout.versions import import_version
from aurora_sgl.serving import runs_on_cpu
from benchmarks.corpus.features import CACHE, CorpusSet, target_folder
from benchmarks.learning import head, in_rounds, untrained
from benchmarks.measure import SHAPES, accept_length, measure
from benchmarks.recipes import OURS
from benchmarks.results import RESULTS, Cells, as_measured, settings_hash
from benchmarks.servers import first_live, put_live, report, server, sglang_flags
from benchmarks.traffic import HELD_OUT, held_out, stream

A, B, C = "chat", "narrow", "code"
PHASES = (B, C, A)
EVERY = 50
#: Adapting looks at the last hundred requests, and for two of five that it trains on at older ones:
#: among as many of A the first requests of B would hardly count.
ADAPT = OURS.model_copy(update={"window": 100, "replay_share": 0.4, "least_updates": 200})
ANSWER_TOKENS = 96


@dataclass(frozen=True)
class Shift:
    """One shift: how many requests A was trained on, how many come of each domain, the seed."""

    trained: int
    each: int
    seed: int

    @property
    def settings(self) -> Any:
        return ADAPT.model_copy(update={"seed": self.seed})

    def requests(self) -> CorpusSet:
        """All requests in the order in which they are served, A's first ones among them."""
        again = stream(A, self.seed).part(self.trained, self.trained + self.each)
        parts = [stream(domain, self.seed).part(0, self.each) for domain in (B, C)]
        return stream(A, self.seed).part(0, self.trained) + parts[0] + parts[1] + again

    def phase(self, served: int) -> str:
        """The domain of the requests before the ``served``-th after the turn."""
        return PHASES[min(max(0, served - 1) // self.each, len(PHASES) - 1)]

    def stops(self) -> list[int]:
        return [0, *range(EVERY, len(PHASES) * self.each + 1, EVERY)]

    def served_at(self) -> list[int]:
        """The five checkpoints of ``--serve``."""
        half = self.each // 2 // EVERY * EVERY
        return sorted({0, half, self.each, 2 * self.each, 3 * self.each})

    def key(self, what: str, served: int, domain: str) -> dict[str, Any]:
        digest = settings_hash(ADAPT, as_measured(OURS), EVERY, HELD_OUT, self.trained, self.each)
        where = {"served": served, "domain": domain, "seed": self.seed}
        return {"what": what, "settings": digest, **where}

    def folder(self, served: int) -> Path:
        """Where the drafter of a checkpoint is kept; 0 is the static one."""
        digest = settings_hash(ADAPT, as_measured(OURS), EVERY, self.trained, self.each, self.seed)
        name = f"{digest}-{served}"
        return CACHE.parent / "domain-shift" / name


def replay_all(cells: Cells, shift: Shift) -> None:
    """The offline part: train, adapt, and replay at every stop."""
    static = _static(shift)
    for domain in (A, B, C):
        _measured(cells, shift, "static", 0, domain, static)
    rows, stops = shift.requests().prepare(), shift.stops()[1:]
    wanted = [shift.trained + n for n in stops]
    learned = in_rounds(
        static, rows, shift.settings, wanted, rounds=wanted, since=shift.trained,
        name=str(shift.key("adapting", 0, "")),
    )  # fmt: skip
    for now in learned:
        served = now.served - shift.trained
        if served in shift.served_at() and not shift.folder(served).exists():
            checkpoint.save(now.drafter, shift.folder(served))
        for domain in dict.fromkeys((shift.phase(served), A)):
            _measured(cells, shift, "adapting", served, domain, now.drafter, seconds=now.seconds)


def _static(shift: Shift) -> Drafter:
    folder = shift.folder(0)
    if not folder.exists():
        last, settings = None, OURS.model_copy(update={"seed": shift.seed})
        stops = list(range(EVERY * 2, shift.trained + 1, EVERY * 2)) or [shift.trained]
        for last in in_rounds(
            untrained(shift.seed), shift.requests(), settings, stops, rounds=stops,
            name=str(shift.key("static", 0, "")),
        ):  # fmt: skip
            print(f"static: {last.served} requests", file=sys.stderr, flush=True)
        assert last is not None
        checkpoint.save(last.drafter, folder)
    return checkpoint.load(folder)


def _measured(
    cells: Cells, shift: Shift, what: str, served: int, domain: str, drafter: Drafter,
    *, seconds: float = 0.0,
) -> None:  # fmt: skip
    key = shift.key(what, served, domain)
    if cells.get(**key):
        return
    found = measure(drafter, held_out(domain), head())
    cells.put({**found, "seconds": round(seconds, 1)}, **key)
    now = {shape: round(accept_length(found, shape), 3) for shape in SHAPES}
    print(f"{what} {served} {domain}: {now}", file=sys.stderr, flush=True)


# Served.

FLAGS = ("--speculative-num-steps", "4", "--speculative-eagle-topk", "4",
         "--speculative-num-draft-tokens", "16")  # fmt: skip


def serve_all(cells: Cells, shift: Shift, prompts: int, more_flags: Sequence[str] = ()) -> None:
    """Tokens/s of both drafters, and on a CPU without drafts too (under CUDA graphs every request
    drafts), on a real server at the five checkpoints."""
    keys = {n: shift.key("served", n, shift.phase(max(1, n))) for n in shift.served_at()}
    if all(cells.get(**key) for key in keys.values()):
        return
    always = {"AURORA_SPECULATION": "on"}
    flags = [*FLAGS, *more_flags]
    arms = ("none", "static", "adapting") if runs_on_cpu(flags) else ("static", "adapting")
    with server(target_folder(), str(shift.folder(0)), flags=flags, environment=always) as (
        process,
        home,
    ):
        engine = store.connect(f"sqlite:///{home / 'aurora.db'}")
        group_id, server_id, static = first_live(engine)
        artifacts = ArtifactRoot(str(home / "artifacts"))
        for served, key in keys.items():
            domain, folder = key["domain"], shift.folder(served)
            if cells.get(**key) or not folder.exists():
                continue
            now = import_version(engine, artifacts, folder, group_id).id if served else static
            rows = held_out(domain).rows[:prompts]
            ids = [p.answered.tokens[: p.answered.prompt_tokens].tolist() for p in rows]
            timed: dict[str, list[tuple[int, float]]] = {who: [] for who in arms}
            for who in (*reversed(arms), *arms):
                put_live(engine, server_id, now if who == "adapting" else static)
                _answer(process.url, ids[0], who)  # what a first answer waits for is not timed
                timed[who] += [_answer(process.url, prompt, who) for prompt in ids]
            found = {who: _speed(answers) for who, answers in timed.items()}
            cells.put({**found, "prompts": len(ids)}, **key)
            print(f"served {served} {domain}: {found}", file=sys.stderr, flush=True)


def _answer(url: str, ids: Sequence[int], who: str) -> tuple[int, float]:
    """(answer tokens, seconds) of one greedy answer."""
    body = {
        "input_ids": list(ids),
        "sampling_params": {"temperature": 0, "max_new_tokens": ANSWER_TOKENS},
    }
    headers = {"x-aurora-speculate": "no" if who == "none" else "yes"}
    began = time.monotonic()
    answer = httpx.post(f"{url}/generate", json=body, headers=headers, timeout=600)
    answer.raise_for_status()
    return int(answer.json()["meta_info"]["completion_tokens"]), time.monotonic() - began


def _speed(answers: Sequence[tuple[int, float]]) -> float:
    tokens, seconds = (sum(column) for column in zip(*answers, strict=True))
    return round(tokens / seconds, 2)


# Tables.


def table(cells: Cells, shift: Shift, shape: str) -> list[dict[str, Any]]:
    rows = []
    on_a = cells.get(**shift.key("static", 0, A))
    for served in shift.stops():
        domain = shift.phase(max(1, served))
        static = cells.get(**shift.key("static", 0, domain))
        now = cells.get(**shift.key("adapting", served, domain)) if served else static
        a_now = cells.get(**shift.key("adapting", served, A)) if served else on_a
        if not (static and now and a_now and on_a):
            continue
        fast = cells.get(**shift.key("served", served, domain))
        old, new = accept_length(static, shape), accept_length(now, shape)
        loss = accept_length(a_now, shape) / accept_length(on_a, shape) - 1
        rows.append(
            {
                "requests": served,
                "traffic": domain,
                "static": old,
                "adapting": new,
                "ratio": new / old,
                "on A": f"{100 * loss:+.1f}%",
                "tokens/s plain": fast.get("none", "-") if fast else "-",
                "tokens/s static": fast["static"] if fast else "-",
                "tokens/s adapting": fast["adapting"] if fast else "-",
                "tokens/s ratio": fast["adapting"] / fast["static"] if fast else "-",
            }
        )
    return rows


def until_ninety(rows: Sequence[dict[str, Any]], each: int) -> list[dict[str, Any]]:
    """Requests of each new domain until nine tenths of what was gained on it in the end."""
    found = []
    for number, domain in enumerate(PHASES[:2]):
        own = [row for row in rows if number * each < row["requests"] <= (number + 1) * each]
        if not own or own[-1]["requests"] != (number + 1) * each:
            continue
        gain = own[-1]["adapting"] - own[-1]["static"]
        first = next(r for r in own if r["adapting"] - r["static"] >= 0.9 * gain)
        found.append(
            {
                "traffic turns to": domain,
                "gain": gain,
                "90% of it after requests": first["requests"] - number * each,
            }
        )
    return found


COLOURS = {"adapting": "#1f77b4", "static": "#888888", "well trained": "#c44e00"}


def picture(
    cells: Cells, shift: Shift, path: Path, shapes: Sequence[str], well_trained: dict[str, float]
) -> None:
    """Accept lengths over requests: ``.html`` as a Plotly page, ``.svg`` and ``.png`` from it.

    ``well_trained``: by domain what ``benchmarks.static_drafter`` prints, drawn beside them.
    """
    import plotly.graph_objects as go  # type: ignore[import-untyped]

    figure = go.Figure()
    for shape in shapes:
        rows = table(cells, shift, shape)
        for who in ("static", "adapting"):
            name = (
                "adapting, every 50 requests" if who == "adapting" else "the same drafter, static"
            )
            style = {"dash": "dot" if shape == "chain" else "solid", "color": COLOURS[who]}
            figure.add_scatter(
                x=[row["requests"] for row in rows], y=[row[who] for row in rows],
                name=name if len(shapes) == 1 else f"{name}, {shape}", line=style,
                mode="lines+markers" if who == "adapting" else "lines",
            )  # fmt: skip
    for number, domain in enumerate(PHASES):
        begin, end = number * shift.each, (number + 1) * shift.each
        figure.add_vrect(
            x0=begin, x1=end, annotation_text=domain, annotation_position="top",
            annotation_yshift=20, fillcolor="#f1f1f1" if number % 2 else "#ffffff",
            layer="below", line_width=0,
        )  # fmt: skip
        if domain in well_trained:
            figure.add_scatter(
                x=[begin, end], y=2 * [well_trained[domain]], mode="lines",
                name="a static drafter trained on all three", showlegend=number == 0,
                line={"dash": "dash", "color": COLOURS["well trained"]},
            )  # fmt: skip
    figure.update_layout(
        xaxis_title=f"requests since the traffic turned away from {A}",
        yaxis_title=f"accept length ({' and '.join(shapes)})",
        template="plotly_white", width=880, height=400, margin={"t": 40, "r": 20, "b": 90, "l": 60},
        legend={"orientation": "h", "y": -0.2},
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    page = path.with_suffix(".html")
    figure.write_html(page, include_plotlyjs=True)
    if path.suffix in (".png", ".svg"):
        _drawn(page, path)
        page.unlink()
    print(f"picture: {path}", file=sys.stderr)


def _drawn(page: Path, path: Path) -> None:
    """The page's chart as an image, by the browser that the dashboard's tests use."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        tab = browser.new_page()
        tab.goto(page.resolve().as_uri())
        tab.wait_for_selector(".main-svg")
        url = tab.evaluate(
            "kind => Plotly.toImage(document.querySelector('.js-plotly-plot'), {format: kind})",
            path.suffix[1:],
        )
        browser.close()
    text = url.partition(",")[2]
    path.write_bytes(base64.b64decode(text) if path.suffix == ".png" else unquote(text).encode())


def _by_domain(text: str) -> dict[str, float]:
    return {name: float(number) for name, number in (one.split("=") for one in text.split(","))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trained", type=int, default=200, help="requests of A beforehand")
    parser.add_argument("--each", type=int, default=200, help="requests of each domain")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", action="store_true", help="also on real servers")
    parser.add_argument("--prompts", type=int, default=12, help="of each checkpoint, with --serve")
    parser.add_argument("--flags", default="", help="more flags of SGLang, with --serve")
    parser.add_argument("--picture", type=Path, help="a file .html, .svg or .png")
    parser.add_argument("--shape", choices=("tree", "chain"), help="of the picture; default: both")
    parser.add_argument(
        "--well-trained", type=_by_domain, default={}, metavar="DOMAIN=LENGTH,...",
        help="in the picture too: what benchmarks.static_drafter prints",
    )  # fmt: skip
    parser.add_argument("--show", action="store_true", help="only print what is there")
    parser.add_argument("--cells", type=Path, default=RESULTS, help="the folder that they lie in")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    cells, shift = Cells("domain_shift", given.cells), Shift(given.trained, given.each, given.seed)
    if not given.show:
        head()
        replay_all(cells, shift)
        if given.serve:
            serve_all(cells, shift, given.prompts, sglang_flags(given))
    for shape in ("tree", "chain"):
        if rows := table(cells, shift, shape):
            report(f"accept length, {shape}", rows, as_json=given.json)
            if ends := until_ninety(rows, shift.each):
                report(f"how fast, {shape}", ends, as_json=given.json)
    if given.picture:
        shapes = [given.shape] if given.shape else ["tree", "chain"]
        picture(cells, shift, given.picture, shapes, given.well_trained)


if __name__ == "__main__":
    main()
