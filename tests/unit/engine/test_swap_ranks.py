"""Two ranks swap together or not at all, and none waits for another whose part of it failed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from aurora_sgl.drafter.checkpoint import content_sha256
from tests.support import SUPPORT

SCRIPT = SUPPORT / "swap_ranks.py"
CASES = (
    *("no file", "no agent", "no text", "no word", "staging breaks", "good"),
    *("apply fails", "good again"),
)


@pytest.mark.slow
def test_whatever_fails_on_one_rank_the_other_goes_on_with_it(tmp_path: Path) -> None:
    shapes = {
        "fc.weight": (4, 4),
        "fc.bias": (4,),
        "self_attn.q_proj.weight": (16, 4),
        "self_attn.k_proj.weight": (8, 4),
        "self_attn.v_proj.weight": (8, 4),
        "mlp.gate_proj.weight": (6, 4),
        "mlp.up_proj.weight": (6, 4),
        "mlp.down_proj.weight": (4, 6),
        "lm_head.weight": (100, 4),
    }
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "weights.safetensors", {"format": "pt"})
    (tmp_path / "cases.json").write_text(
        json.dumps([(case, content_sha256(weights)) for case in CASES])
    )
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    both = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = both.communicate(timeout=150)  # and not for ever
    finally:
        with suppress(ProcessLookupError):
            os.killpg(both.pid, signal.SIGKILL)
    assert both.returncode == 0, said
    first, second = (json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in range(2))
    assert first["ok"] == [False] * 5 + [True, False, True]
    assert first["right"] and second["right"]
    for rank in (first, second):  # all or none, also where one rank's copy failed
        assert list(rank["live"].values()) == [0] * 5 + [6, 6, 8]
    # Nothing is told where we did not start.
    assert second["ok"].count(False) == 5
