"""A random target and drafter as wide as those of an 8B, for what only sizes show.

What drafts are worth can't be seen with them. The target is shallow, so that a CPU serves it; the
drafter has as many bytes as asked for (bfloat16), by the width of its MLP.

    python -m benchmarks.wide FOLDER [--hidden 4096] [--layers 8] [--bytes 1e9]
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch

from aurora_sgl.demo.model import demo_model
from aurora_sgl.drafter import architectures, checkpoint, scratch
from aurora_sgl.drafter.target import read_target
from tests.support.random_llama import make_target

DRAFT_VOCABULARY = 32_000


def make_drafter(target: Path, folder: Path, size: float) -> Path:
    """An untrained drafter of about ``size`` bytes in bfloat16."""
    small = scratch.make(
        target, counts={n: 1 for n in range(DRAFT_VOCABULARY)}, draft_vocab_size=DRAFT_VOCABULARY
    )
    have = sum(p.numel() for p in small.parameters())
    config = small.config
    more = (size / 2 - have) / (3 * config.hidden_size)
    inner = max(64, 64 * round((config.intermediate_size + more) / 64))
    wide = architectures.build(replace(config, intermediate_size=inner)).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in wide.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)
    wide.d2t, wide.t2d = small.d2t, small.t2d
    return checkpoint.save(wide, folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--bytes", type=float, default=1e9, help="of the drafter")
    given = parser.parse_args()
    tokenizer_of = demo_model(Path(os.environ.get("AURORA_HOME", "aurora-data")))
    target = make_target(
        given.folder / "target",
        tokenizer_of,
        hidden_size=given.hidden,
        layers=given.layers,
        heads=given.hidden // 128,
        inner=given.hidden // 2,
        dtype=torch.bfloat16,
    )
    info = read_target(target)
    drafter = make_drafter(target, given.folder / "drafter", given.bytes)
    size = (drafter / "model.safetensors").stat().st_size
    print(f"{target}: {info.num_layers} layers of {info.hidden_size}")
    print(f"{drafter}: {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
