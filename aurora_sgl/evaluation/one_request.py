"""``python -m aurora_sgl.evaluation.one_request``: one request replayed under two versions, step by
step, for the operator's page.

A process of its own: a task comes as JSON on its input, an answer or one line of refusal goes as
JSON to its output. The kernel ends it when its time is used up; it ends itself when it takes more
memory than it may. It looks up for itself whether the request may be used.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence as Several
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aurora_sgl.errors import AuroraError

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from aurora_sgl.artifacts import ArtifactRoot
    from aurora_sgl.drafter.config import DrafterConfig
    from aurora_sgl.drafter.model import Drafter
    from aurora_sgl.drafter.target import TargetHead
    from aurora_sgl.evaluation.settings import EvaluationSettings
    from aurora_sgl.sequences.sequence import Sequence
    from aurora_sgl.store.queries.requests import RecentRequest

#: Seconds, and bytes of memory beyond which a replay is ended: less where less is free.
SECONDS, MEMORY_BYTES = 120.0, 8 << 30
#: Of what is free; the servers need the rest.
MEMORY_SHARE = 0.5
NICENESS, THREADS, _LOOKS = 10, 1, 0.2


@dataclass(frozen=True)
class PairTask:
    """``served_dtype``: in which the server runs its drafter."""

    url: str  # of the store
    group_id: int
    request_id: int
    version_ids: tuple[int, int]
    shape: tuple[int, int, int]  # depth, top-k, nodes
    served_dtype: str


@dataclass(frozen=True)
class SteppedRequest:
    """``steps[i]`` of version i: rows of root, draft tokens, their parents, accepted nodes and the
    target's own token behind them (``None``: the log ends before it). ``replayed[i]``: tokens of
    the answer that they cover."""

    request_id: int
    tokens: int  # of the answer
    steps: tuple[list[list[Any]], list[list[Any]]]
    replayed: tuple[int, int]


def main() -> None:
    from aurora_sgl.processes.priority import step_back
    from aurora_sgl.store.sql_child import limit_time

    task = json.load(sys.stdin)
    step_back(NICENESS)
    limit_time(SECONDS)
    try:
        limit_memory()
        answer: dict[str, Any] = asdict(stepped(PairTask(**task)))
    except AuroraError as error:
        answer = {"error": str(error)}
    json.dump(answer, sys.stdout)


def limit_memory() -> None:
    """Watch over what this process alone holds. (A limit of its addresses would count the target's
    files too, which are only mapped.) Raises ``AuroraError`` where next to nothing is free."""
    from aurora_sgl import memory

    most = min(MEMORY_BYTES, int(MEMORY_SHARE * memory.available()))

    def watch() -> None:
        while held() <= most:
            time.sleep(_LOOKS)
        json.dump({"error": f"stopped: it takes more than {most >> 20:,} MB of memory"}, sys.stdout)
        sys.stdout.flush()
        os._exit(0)

    threading.Thread(target=watch, name="memory", daemon=True).start()


def held() -> int:
    """Bytes of memory that are no file's; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    kilobytes = (line.split()[1] for line in lines if line.startswith("RssAnon"))
    return 1024 * int(next(kilobytes, 0))


def stepped(task: PairTask) -> SteppedRequest:
    """Raises ``AuroraError`` with why it can't be replayed."""
    import torch

    from aurora_sgl import store
    from aurora_sgl.artifacts import ArtifactRoot
    from aurora_sgl.drafter import hub
    from aurora_sgl.drafter.target import TargetHead, read_target
    from aurora_sgl.evaluation.compare import load_version
    from aurora_sgl.evaluation.device import as_served
    from aurora_sgl.evaluation.settings import EvaluationSettings
    from aurora_sgl.store import queries

    torch.set_num_threads(THREADS)
    engine, artifacts = store.connect(task.url), ArtifactRoot()
    store.require_current(engine)
    with store.session(engine, write=False) as s:
        row, donors = usable(s, task)
        group = queries.groups.group(s, task.group_id)
    folder = hub.local(group.target_model, revision=group.target_revision or None)
    if not (folder / "config.json").exists():
        raise AuroraError("the target's files are not on the machine of this page")
    info, head = read_target(folder), TargetHead.load(folder)
    depth, topk, nodes = task.shape
    settings = EvaluationSettings(
        depth=depth, topk=topk, nodes=nodes, device="cpu", served_dtype=task.served_dtype
    )
    sides, length = [], 0
    for version_id in task.version_ids:
        drafter = as_served(load_version(engine, artifacts, version_id, info), settings)
        sequence = read_sequence(artifacts, row, donors, drafter.config)
        sides.append(steps_of(drafter, sequence, settings, head))
        length = len(sequence.tokens) - sequence.output_start
        del drafter, sequence  # one at a time in memory
    covered = [sum(len(step[3]) + (step[4] is not None) for step in side) for side in sides]
    return SteppedRequest(task.request_id, length, (sides[0], sides[1]), (covered[0], covered[1]))


def usable(s: Session, task: PairTask) -> tuple[RecentRequest, list[RecentRequest]]:
    """The request and those whose traces fill its prefix. Raises ``AuroraError`` for one that may
    not be learnt from, was deleted or purged, has no trace, or is of another group."""
    from aurora_sgl.sequences.held_out import left_out_in_words
    from aurora_sgl.sequences.splits import REJECTION, why_not_judged
    from aurora_sgl.store import queries

    rows = queries.requests.with_traces(s, [task.request_id])
    groups = queries.traces.groups_of_traces(s, [task.request_id])
    if not rows or list(groups) != [task.group_id]:
        raise AuroraError("its trace is gone, or it may not be used")
    if reason := why_not_judged(rows[0]):
        raise AuroraError(f"it can't be replayed{left_out_in_words({reason: 1})}")
    if rows[0].accept_rule == REJECTION:
        raise AuroraError(
            "it was sampled by rejection: what is accepted is then a matter of chance, and a "
            "replay only knows its expectation"
        )
    return rows[0], queries.requests.donors(s, rows)


def read_sequence(
    artifacts: ArtifactRoot,
    row: RecentRequest,
    donors: Several[RecentRequest],
    config: DrafterConfig,
) -> Sequence:
    """As this drafter's rows take it. Raises ``AuroraError``."""
    from aurora_sgl.config import get_settings
    from aurora_sgl.sequences.dataset import Loader
    from aurora_sgl.sequences.prefixes import Prefixes
    from aurora_sgl.sequences.trace_cache import TraceFiles

    files = TraceFiles(artifacts, get_settings().home / "cache")
    pieces = Prefixes([row, *donors], files).pieces(row)
    if pieces is None:
        raise AuroraError("no trace holds the prefix that it took from the cache")
    return Loader(config, files).load(row, pieces)


def steps_of(
    drafter: Drafter, sequence: Sequence, settings: EvaluationSettings, head: TargetHead
) -> list[list[Any]]:
    """See :class:`SteppedRequest`."""
    import torch

    from aurora_sgl.drafter.model import accepted_nodes
    from aurora_sgl.evaluation.replay import determined_steps

    log = sequence.tokens.tolist()
    steps = []
    with torch.inference_mode():
        roots = [root for root, _ in determined_steps(drafter, sequence, settings.shape, head)]
        drafts = drafter.propose(
            sequence.tokens, sequence.features, torch.tensor(roots, dtype=torch.int64),
            settings.shape, head,
        ) if roots else []  # fmt: skip
    for root, draft in zip(roots, drafts, strict=True):
        nodes = accepted_nodes(draft, log[root + 1 : root + 1 + settings.depth])
        after = root + 1 + len(nodes)
        target = log[after] if after < len(log) else None
        steps.append([root, draft.tokens, draft.parents, nodes, target])
    return steps


if __name__ == "__main__":
    main()
