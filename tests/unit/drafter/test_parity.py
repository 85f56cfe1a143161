"""SGLang's own drafters and draft loop against ours, on the same features.

The real ``LlamaForCausalLMEagle3`` (and ``LlamaForCausalLMEagle``) loads our folder, and the real
``EagleDraftWorker.draft_forward`` drafts with it; only the paged attention is a few plain lines
here, with the cache layout of ``prepare_for_draft`` (each beam slot has its own places and they
never move). It runs in a process of its own, because SGLang's process-wide context stays behind.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.drafter import checkpoint, scratch
from aurora_sgl.drafter.architectures.eagle import EAGLE
from aurora_sgl.drafter.architectures.eagle3 import EAGLE3
from aurora_sgl.drafter.target import TargetHead
from tests.support import SUPPORT
from tests.support.drafter_cases import VOCAB, target_folder

SHAPES = [DraftShape(4), DraftShape(3, 2, 5), DraftShape(3, 4, 8), DraftShape(4, 8, 16)]
ROOTS = [6, 9, 15, 22]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One an architecture, with what SGLang drafts there (one list a shape, one entry a root)."""
    made = {one: case_of(one, tmp_path_factory.mktemp("parity")) for one in (EAGLE3, EAGLE)}
    jobs = [(str(root), checkpoint.load(root / "drafter").algorithm) for root in made.values()]
    shapes = [[s.depth, s.topk, s.nodes] for s in SHAPES]
    command = [sys.executable, str(SUPPORT / "sglang_drafts.py")]
    command += [json.dumps(shapes), json.dumps(ROOTS), json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return made


def case_of(architecture: str, root: Path) -> Path:
    """A target, a drafter of it, and a text with features."""
    # A soft head: saturated scores tie, and then SGLang itself may pick a child without its parent.
    target = target_folder(root / "target", tied=False, head_scale=0.05)
    drafter = scratch.make(target, draft_vocab_size=24, architecture=architecture, seed=2)
    torch.manual_seed(0)
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, mean=0.05, std=0.25)
    checkpoint.save(drafter, root / "drafter", dtype=torch.float32)
    save_file(
        {
            "tokens": torch.randint(0, VOCAB, (25,)),
            "features": torch.randn(24, drafter.config.feature_width),
        },
        str(root / "case.safetensors"),
    )
    return root


@pytest.mark.process
@pytest.mark.timeout(400)
@pytest.mark.parametrize("architecture", [EAGLE3, EAGLE])
@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_sglang_and_ours_draft_the_same_tokens_in_the_same_tree(
    folders: dict[str, Path], number: int, architecture: str
) -> None:
    from safetensors.torch import load_file

    folder = folders[architecture]
    upstream = json.loads((folder / "drafts.json").read_text())
    case = load_file(str(folder / "case.safetensors"))
    drafter = checkpoint.load(folder / "drafter")
    head = TargetHead.load(folder / "target")
    ours = drafter.propose(
        case["tokens"], case["features"], torch.tensor(ROOTS), SHAPES[number], head
    )
    for mine, theirs in zip(ours, upstream[number], strict=True):
        assert mine.tokens == theirs["tokens"]
        assert mine.parents == theirs["parents"]
    assert len({tuple(p.tokens) for p in ours}) > 1
