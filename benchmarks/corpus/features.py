"""Hidden states of the corpus, as a server would have captured them: one file a shard, made once.

They depend on the tokens before them alone, so a prefill of the finished text gives what decoding
gave, but for the rounding of bfloat16: the target's best token, recomputed, is the logged one at
all but a few positions. A shard is made when it is first read, or beforehand:

    python -m benchmarks.corpus.features [--requests 1200]

which also says how many of the logged tokens are the recomputed best (about 30 s a shard and core;
with a GPU all of a shard at once, in a second).
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import aurora_sgl.compat  # noqa: F401  (torchvision beside a CPU torch)
from aurora_sgl.demo.model import demo_model
from aurora_sgl.drafter.architectures.eagle3 import aux_layers_of
from aurora_sgl.errors import AuroraError
from aurora_sgl.evaluation.device import device_of
from aurora_sgl.machine import computes_bfloat16
from aurora_sgl.sequences.sequence import Sequence, TargetSampling
from aurora_sgl.training.settings import TrainSettings
from benchmarks.corpus.shards import DATA, Answered, read_shard, shards

DEVICE = device_of(TrainSettings())  # where the trainer computes too
CACHE = Path(os.environ.get("AURORA_CORPUS_CACHE", "~/.cache/aurora-sgl/corpus")).expanduser()
DOMAINS = ("narrow", "code", "chat")
#: What the static drafter was not trained on (see new_traffic.py).
NEW_DOMAINS = ("extraction", "ticket", "ticket-sampled", "ticket-chats")
_SHORTEST = 8  # answer tokens


def target_folder() -> Path:
    return demo_model(Path(os.environ.get("AURORA_HOME", "aurora-data")), quiet=True)


@dataclass(frozen=True)
class Place:
    """Where the features of one answer are: a shard, and the first row there."""

    answered: Answered
    shard: Path
    begin: int


@dataclass(frozen=True)
class CorpusSet:
    """Answers with their features; reads what is asked for. Fits ``sequence.Sequences``."""

    rows: tuple[Place, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sequence:
        place = self.rows[index]
        answered = place.answered
        end = place.begin + len(answered.tokens)
        file = _features(place.shard)
        return Sequence(
            request_id=identity(answered),
            tokens=torch.from_numpy(answered.tokens.astype("int64")),
            features=file.get_slice("aux")[place.begin : end],
            last=file.get_slice("last")[place.begin : end],
            output_start=answered.prompt_tokens,
            greedy=not answered.temperature,
            accept_rule="target_sampling" if answered.temperature else "greedy",
            sampling=TargetSampling(answered.temperature) if answered.temperature else None,
            domain=answered.domain,
            conversation=answered.key,
        )

    def length(self, index: int) -> int:
        """Rows of a request, without reading its features."""
        return len(self.rows[index].answered.tokens) - 1

    def prepare(self) -> CorpusSet:
        """The same set, with all its features made: nothing that is timed may wait for them."""
        for shard in dict.fromkeys(place.shard for place in self.rows):
            _features(shard)
        return self

    def part(self, begin: int, end: int | None = None) -> CorpusSet:
        return CorpusSet(self.rows[begin:end])

    def __add__(self, other: CorpusSet) -> CorpusSet:
        return CorpusSet(self.rows + other.rows)


def corpus(domain: str, *, data: Path = DATA) -> CorpusSet:
    """All answers of a domain in order, but for very short ones.

    Raises ``AuroraError`` when there is none.
    """
    rows = []
    for shard in shards(domain, data):
        begin = 0
        for one in _usable(shard):
            rows.append(Place(one, shard, begin))
            begin += len(one.tokens)
    if not rows:
        raise AuroraError(
            f"no answers of {domain} in {data / domain}: run python -m benchmarks.corpus.generate"
        )
    return CorpusSet(tuple(rows))


def identity(answered: Answered) -> int:
    """A number of its own for every answer of the corpus."""
    place = (*DOMAINS, *NEW_DOMAINS).index(answered.domain)
    return (place + 1) * 1_000_000 + answered.number


def _usable(shard: Path) -> list[Answered]:
    return [one for one in read_shard(shard) if len(one.tokens) - one.prompt_tokens >= _SHORTEST]


@lru_cache(maxsize=64)
def _features(shard: Path) -> Any:
    path = CACHE / shard.parent.name / f"{shard.stem}.safetensors"
    if not path.exists():
        _make(path, _usable(shard))
    return safe_open(str(path), framework="pt")


def _make(path: Path, answers: list[Answered]) -> None:
    model = _model()
    layers = aux_layers_of(model.config.num_hidden_layers)
    aux, last = [], []
    together = 1 if DEVICE.type == "cpu" else 96
    with torch.inference_mode():
        for place in range(0, len(answers), together):
            texts = [torch.from_numpy(a.tokens.astype("int64")) for a in answers[place:][:together]]
            # Padded behind: no row sees what comes after it.
            ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(DEVICE)
            hidden = model(ids, output_hidden_states=True).hidden_states
            for row, text in enumerate(texts):
                own = [hidden[layer][row, : len(text)] for layer in (*layers, -1)]
                aux.append(torch.cat(own[:-1], -1).cpu())
                last.append(own[-1].cpu())
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    rows = {"aux": torch.cat(aux), "last": torch.cat(last)}
    save_file({name: one.to(torch.bfloat16) for name, one in rows.items()}, beside)
    beside.rename(path)


@lru_cache(maxsize=1)
def _model() -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(target_folder(), dtype=quick_dtype()).eval().to(DEVICE)


def quick_dtype() -> torch.dtype:
    """bfloat16, as it is served, but where a CPU would take bfloat16 products apart."""
    return torch.bfloat16 if computes_bfloat16(DEVICE.type) else torch.float32


def main() -> None:
    from aurora_sgl.drafter.target import TargetHead

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000, help="of each domain")
    parser.add_argument("--compared", type=int, default=60, help="requests whose tokens to compare")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sets = {domain: corpus(domain).part(0, given.requests) for domain in DOMAINS if shards(domain)}
    made = {
        domain: list(dict.fromkeys(p.shard for p in rows.rows)) for domain, rows in sets.items()
    }
    for number in range(max(map(len, made.values()), default=0)):
        for domain in made:  # in turns, so that a stop leaves something of each
            for shard in made[domain][number : number + 1]:
                print(f"hidden states of {domain} {shard.stem}", file=sys.stderr, flush=True)
                _features(shard)
    head = TargetHead.load(target_folder()).wide_lm_head
    for domain, rows in sets.items():
        same = count = 0
        for one in (rows[index] for index in range(min(given.compared, len(rows)))):
            best = (one.last[one.output_start - 1 : -1].float() @ head.T).argmax(-1)
            same += int((best == one.tokens[one.output_start :]).sum())
            count += len(best)
        print(f"{domain}: {same} of {count} answer tokens are the recomputed best")


if __name__ == "__main__":
    main()
