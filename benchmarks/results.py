"""Finished cells of a benchmark, kept at once: a run can be killed and goes on where it was.

A cell is one JSON line in ``benchmarks/results/<name>.jsonl``: its key (what was run, with the hash
of its settings, so that results of another recipe are never mixed in) and what came out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aurora_sgl.hashing import sha256_bytes
from aurora_sgl.training.settings import TrainSettings

#: Where cells are kept; ``AURORA_RESULTS`` names another folder, for those of another machine.
RESULTS = Path(os.environ.get("AURORA_RESULTS") or Path(__file__).with_name("results"))

#: What changes no weight.
_OF_THE_MACHINE = {"nice", "threads", "resume", "checkpoint_seconds", "device"}
#: What the trainer itself does not read (a run does). Cells are older than these, or than their
#: present defaults.
_OF_A_RUN: dict[str, Any] = {"dev_share": 0.0}
_OF_A_RUN_LATER = {
    "mature_learning_rate", "dev_requests", "explore", "line_search", "training_cost",
    "reservoir", "repeat_prefixes", "young_updates",
    "mature_replay_share",
}  # fmt: skip
#: Knobs that cells are older than: named only where they are not at their default.
_NEWER = {
    "lk_eta", "reward_weight", "inclusion_temperature", "rl_kl_weight", "rl_group", "rl_reuse",
    "rl_clip", "rl_beta", "rl_logged_weight", "rl_depth_cost", "reach_topk", "reach_decay",
    "tree_reward_weight", "optimizer",
}  # fmt: skip


class Cells:
    """The cells of one benchmark. Several processes may add to one file."""

    def __init__(self, name: str, folder: Path = RESULTS) -> None:
        self.path = folder / f"{name}.jsonl"
        self.cells: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:  # cut off by a kill
                continue
            self.cells[_name(row["key"])] = (row["key"], row["result"])

    def get(self, **key: Any) -> dict[str, Any] | None:
        found = self.cells.get(_name(key))
        return found[1] if found else None

    def cell(self, **key: Any) -> dict[str, Any]:
        """A cell that must be there. Raises ``KeyError`` when it is not."""
        return self.cells[_name(key)][1]

    def put(self, result: Mapping[str, Any], **key: Any) -> None:
        """Add a cell; it is on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, "result": dict(result)}, separators=(",", ":"))
        with self.path.open("ab+") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else f"\n{line}"
            file.write(f"{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        self.cells[_name(key)] = (key, dict(result))

    def __iter__(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """(key, result) of every cell, in the order in which they were added."""
        return iter(self.cells.values())


def settings_hash(settings: TrainSettings, *more: Any) -> str:
    """Twelve hexadecimal digits of all that a cell's weights follow from."""
    plain = {k: v for k, v in as_measured(settings).items() if k not in _OF_THE_MACHINE}
    return sha256_bytes(json.dumps([plain, *more], sort_keys=True).encode())[:12]


#: What cells of the whole loop depend on beside the recipe: named anew when the loop changes.
_LOOP = "judged again by what was served since; as far as traffic of now gains"


def loop_hash(settings: TrainSettings, *more: Any) -> str:
    """The same where the whole loop ran (``offline_loop``): of every field, and of its rules."""
    plain = {k: v for k, v in settings.as_json().items() if k not in _OF_THE_MACHINE}
    return sha256_bytes(json.dumps([_LOOP, plain, *more], sort_keys=True).encode())[:12]


def as_measured(settings: TrainSettings) -> dict[str, Any]:
    """The settings under which cells are kept: those that the trainer itself reads."""
    defaults = {name: TrainSettings.model_fields[name].default for name in _NEWER}
    plain = {k: v for k, v in settings.as_json().items() if k not in _OF_A_RUN_LATER}
    return {k: v for k, v in plain.items() if k not in defaults or v != defaults[k]} | _OF_A_RUN


def _name(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
