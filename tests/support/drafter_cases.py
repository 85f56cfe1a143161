"""Small random targets and drafters for the tests of drafter and training."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from aurora_sgl.drafter import scratch
from aurora_sgl.drafter.model import Drafter
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.sequences.sequence import Sequence
from aurora_sgl.training.settings import TrainSettings
from aurora_sgl.training.trainer import train

HIDDEN, VOCAB, LAYERS = 16, 40, 8

#: Settings of training that learn :func:`requests` in a second or two: with five of them an update
#: at twice the rate each objective gains what it gained one by one, in a third of the time.
RECIPE: dict[str, Any] = {
    "passes": 8,
    "batch_requests": 5,
    "young_updates": 0,
    "learning_rate": 1e-2,
    "autocast": False,
    "depth": 3,
    "topk": 2,
    "nodes": 6,
    "served_dtype": "float32",
}


def target_folder(
    folder: Path, *, tied: bool = True, files: int = 1, head_scale: float = 1.0, **config: Any
) -> Path:
    """A folder with the config and the two tensors that a drafter reads of a target."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "vocab_size": VOCAB,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000.0,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "eos_token_id": 2,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN, generator=generator),
        "model.norm.weight": torch.ones(HIDDEN),
    }
    if not tied:
        tensors["lm_head.weight"] = head_scale * torch.randn(VOCAB, HIDDEN, generator=generator)
    if files == 1:
        save_file(tensors, str(folder / "model.safetensors"))
        return folder
    names = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        names[name] = f"model-{number}.safetensors"
        save_file({name: tensor}, str(folder / names[name]))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def requests(head: TargetHead, count: int, seed: int = 0) -> list[Sequence]:
    """Each token t is followed by 3 t + 1; the target is sure of it, and features carry t."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        tokens = [int(torch.randint(0, VOCAB, (1,), generator=generator))]
        while len(tokens) < 24:
            tokens.append((3 * tokens[-1] + 1) % VOCAB)
        ids = torch.tensor(tokens)
        last = 3 * head.lm_head[ids[1:]]
        features = head.embedding[ids[:-1]].repeat(1, 3)
        found.append(Sequence(number, ids, features, last, 6, domain=f"d{number % 2}"))
    return found


def good_drafter() -> Drafter:
    """An untrained drafter of :func:`target_folder` (seed 1) after thirty :func:`requests` with
    :data:`RECIPE` and forward KL: a copy of the one that a test process makes once."""
    return copy.deepcopy(_good_drafter())


@functools.cache
def _good_drafter() -> Drafter:
    with tempfile.TemporaryDirectory(prefix="aurora-test-") as folder:
        target = target_folder(Path(folder))
        drafter = scratch.make(target, draft_vocab_size=VOCAB, seed=1)
        head = TargetHead.load(target)
        return train(
            drafter, requests(head, 30), head, TrainSettings(**RECIPE, objective="forward_kl")
        ).drafter
