"""An SGLang plugin of the tests' own: parts of ours fail for requests whose id asks for it.

A rid ``break NAME ...`` makes the function behind NAME raise while that request is in its hands. A
NAME in the file that ``SWAPS`` names makes a part of swaps raise on the second of the ranks.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

_AGENT, _RECORDER = "aurora_sgl.engine.agent.Agent.", "aurora_sgl.engine.recorder.Recorder."
BREAKS = {
    # What concerns one request.
    "started": f"{_RECORDER}started",
    "step": f"{_RECORDER}verify_step",
    "finish": f"{_RECORDER}finish",
    # What concerns the whole batch.
    "prefill": f"{_AGENT}observe_prefill",
    "verify": f"{_AGENT}observe_verify",
    "results": f"{_AGENT}after_decode_results",
    "before": f"{_AGENT}before_decode_results",
    "shape": f"{_AGENT}choose_shape",
    "marks": "aurora_sgl.engine.draft_kv.DraftKV.mark",
}
SWAPS = "BREAK_SWAPS_OF_A_RANK"
SWAP_BREAKS = {
    "staging": "aurora_sgl.engine.swap.Swapper.begin_staging",
    "apply": "aurora_sgl.engine.swap.Swapper.apply",
    "word": "aurora_sgl.engine.swap_driver.SwapDriver._stands",
    # After the first parameters are exchanged.
    "middle": "aurora_sgl.engine.cpu.linear.moved",
}
_calls = [0]
_rids: list[str] = []  # of the batch at hand, for what is not given it


def _rids_in(args: tuple[Any, ...]) -> list[str]:
    found = [str(req.rid) for arg in args for req in getattr(arg, "reqs", ())]
    if found:
        _rids[:] = found
    alone = [str(arg.rid) for arg in args if hasattr(arg, "rid")]
    return alone or found or _rids


def _breaking(name: str) -> Callable[..., Any]:
    def hook(original: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        if any(rid.startswith(f"break {name} ") for rid in _rids_in((*args, *kw.values()))):
            raise RuntimeError(f"{name} is broken by a test")
        return original(*args, **kw)

    return hook


def _breaking_swap(name: str) -> Callable[..., Any]:
    def hook(original: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        from sglang.srt.runtime_context import get_parallel

        asked = Path(os.environ[SWAPS]).read_text().strip() == name
        _calls[0] = _calls[0] + 1 if asked else 0
        if asked and get_parallel().tp_rank == 1 and (name != "middle" or _calls[0] == 3):
            raise RuntimeError(f"{name} is broken by a test")
        return original(*args, **kw)

    return hook


def register() -> None:
    """The plugin's entry point: hooks in the scheduler process only."""
    if multiprocessing.parent_process() is None:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for name, target in BREAKS.items():
        HookRegistry.register(target, _breaking(name), HookType.AROUND)
    for name, target in SWAP_BREAKS.items() if SWAPS in os.environ else ():
        HookRegistry.register(target, _breaking_swap(name), HookType.AROUND)


def installed(folder: Path) -> dict[str, str]:
    """The environment in which SGLang finds the plugin, whose files come into a new folder."""
    info = folder / "aurora_breaking-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: aurora-breaking\n")
    (info / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\naurora_breaking = tests.support.breaking:register\n"
    )
    root = str(Path(__file__).parents[2])
    paths = [str(folder), root, os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
