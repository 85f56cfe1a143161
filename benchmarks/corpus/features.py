"""Hidden states of the corpus, as a server would have captured them: one file a shard, made once.

They depend on the tokens before them alone, so a prefill of the finished text gives what decoding
gave, but for the rounding of bfloat16: the target's best token, recomputed, is the logged one at
all but a few positions (``python -m benchmarks.corpus.features`` says how many).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import aurora_sgl.compat  # noqa: F401  (torchvision beside a CPU torch)
from aurora_sgl.demo.model import demo_model
from aurora_sgl.drafter.config import aux_layers_of
from aurora_sgl.training.sequence import Sequence
from benchmarks.corpus.shards import DATA, Answered, read_shard, shards

CACHE = Path(os.environ.get("AURORA_CORPUS_CACHE", "~/.cache/aurora-sgl/corpus")).expanduser()


def target_folder() -> Path:
    return demo_model(Path(os.environ.get("AURORA_HOME", "aurora-data")), quiet=True)


@dataclass
class CorpusSet:
    """Answers with their features; reads what is asked for. Fits ``trainer.Sequences``."""

    rows: list[tuple[Answered, Path, int]]  # the answer, its shard's features, first row there

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sequence:
        answered, path, begin = self.rows[index]
        end = begin + len(answered.tokens)
        file = _opened(path)
        return Sequence(
            request_id=_identity(answered),
            tokens=torch.from_numpy(answered.tokens.astype("int64")),
            features=file.get_slice("aux")[begin:end],
            last=file.get_slice("last")[begin:end],
            output_start=answered.prompt_tokens,
            domain=answered.domain,
            conversation=answered.key,
        )

    def part(self, begin: int, end: int) -> CorpusSet:
        return CorpusSet(self.rows[begin:end])

    def __add__(self, other: CorpusSet) -> CorpusSet:
        return CorpusSet(self.rows + other.rows)


def corpus(
    domain: str, requests: int, *, data: Path = DATA, say: Callable[[str], None] | None = None
) -> CorpusSet:
    """The first ``requests`` answers of a domain (fewer when fewer were made), features made."""
    rows: list[tuple[Answered, Path, int]] = []
    for shard in shards(domain, data):
        if len(rows) >= requests:
            break
        answers = [one for one in read_shard(shard) if len(one.tokens) - one.prompt_tokens >= 8]
        path = CACHE / domain / f"{shard.stem}.safetensors"
        if not path.exists():
            if say is not None:
                say(f"hidden states of {domain} {shard.stem} ...")
            _make(path, answers)
        begin = 0
        for one in answers:
            rows.append((one, path, begin))
            begin += len(one.tokens)
    return CorpusSet(rows[:requests])


def _make(path: Path, answers: list[Answered]) -> None:
    model = _model()
    layers = aux_layers_of(model.config.num_hidden_layers)
    aux, last = [], []
    with torch.inference_mode():
        for one in answers:
            ids = torch.from_numpy(one.tokens.astype("int64"))[None]
            hidden = model(ids, output_hidden_states=True).hidden_states
            aux.append(torch.cat([hidden[layer][0] for layer in layers], -1))
            last.append(hidden[-1][0])
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({"aux": torch.cat(aux), "last": torch.cat(last)}, beside)
    beside.rename(path)


@lru_cache(maxsize=1)
def _model() -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(target_folder(), dtype=torch.bfloat16).eval()


@lru_cache(maxsize=64)
def _opened(path: Path) -> Any:
    return safe_open(str(path), framework="pt")


def _identity(answered: Answered) -> int:
    return {"chat": 1, "code": 2, "narrow": 3}[answered.domain] * 1_000_000 + answered.number


def main() -> None:
    from aurora_sgl.drafter.target import TargetHead

    head = TargetHead.load(target_folder()).wide_lm_head
    for domain in ("narrow", "code", "chat"):
        rows = corpus(domain, 60, say=lambda text: print(text, file=sys.stderr))
        same = count = 0
        for one in (rows[index] for index in range(len(rows))):
            best = (one.last[one.output_start - 1 : -1].float() @ head.T).argmax(-1)
            same += int((best == one.tokens[one.output_start :]).sum())
            count += len(best)
        print(f"{domain}: {same} of {count} answer tokens are the recomputed best")


if __name__ == "__main__":
    main()
