"""The files among what ``benchmarks.fuzz`` makes odd: checkpoints, weights to swap in, pickles, the
spool, traces."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save as save_numpy
from safetensors.torch import load_file, save_file

from aurora_sgl.drafter import architectures, checkpoint, served, unpickle, weights
from aurora_sgl.drafter.target import TargetHead, read_target
from aurora_sgl.errors import AuroraError
from aurora_sgl.hashing import sha256_file
from benchmarks.fuzz_mutations import REFUSED, TAKEN, odd_bytes, odd_json_file
from benchmarks.fuzz_targets import Broken, copied, one_line

HIDDEN, VOCAB, LAYERS = 16, 40, 8
_TARGET: dict[str, Any] = {
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
    "tie_word_embeddings": False,
}


class TargetFolder:
    """A small target, whose weights nothing may change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(1)
        tensors = {
            name: torch.randn(VOCAB, HIDDEN, generator=generator)
            for name in ("model.embed_tokens.weight", "lm_head.weight")
        }
        (folder / "config.json").write_text(json.dumps(_TARGET))
        save_file(tensors, str(folder / "model.safetensors"))
        self.sha256 = sha256_file(folder / "model.safetensors")

    def check(self) -> None:
        if sha256_file(self.folder / "model.safetensors") != self.sha256:
            raise Broken("the target's weights were changed")


def drafters(folder: Path, target: Path) -> list[Path]:
    """One folder of each architecture, in one file and in shards, as ours and as published."""
    from aurora_sgl.drafter import scratch

    made = []
    for name in architectures.ARCHITECTURES:
        drafter = scratch.make(target, draft_vocab_size=24, architecture=name)
        made.append(checkpoint.save(drafter, folder / name))
        theirs = checkpoint.save(drafter, folder / f"published-{name}")
        raw = json.loads((theirs / "config.json").read_text())
        raw |= {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64}
        raw["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
        del raw["rope_parameters"]
        (theirs / "config.json").write_text(json.dumps(raw))
        _into_shards(theirs)
        made.append(theirs)
    return made


def _into_shards(folder: Path) -> None:
    tensors = load_file(folder / weights.WEIGHTS)
    places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for place in set(places.values()):
        part = {name: tensor for name, tensor in tensors.items() if places[name] == place}
        save_file(part, folder / place)
    index = folder / f"{weights.WEIGHTS}{weights.INDEX}"
    index.write_text(json.dumps({"weight_map": places}))
    (folder / weights.WEIGHTS).unlink()


def odd_tensors(tensors: dict[str, torch.Tensor], rng: random.Random) -> dict[str, torch.Tensor]:
    """One to three tensors gone, of another name, shape, kind or content."""
    changed = dict(tensors)
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(sorted(changed))
        tensor, what = changed[name], rng.randrange(7)
        if what == 0:
            del changed[name]
        elif what == 1:
            names = (f"model.{name}", f"{name}x", "fc.bias", "lm_head.weight", "a\nb")
            changed[rng.choice(names)] = changed.pop(name).clone()
        elif what == 2:
            changed[name] = tensor[: rng.randint(0, len(tensor))] if tensor.dim() else tensor[None]
        elif what == 3:
            kinds = (torch.float64, torch.float16, torch.int8, torch.bool, torch.float8_e4m3fn)
            changed[name] = tensor.to(rng.choice(kinds))
        elif what == 4 and tensor.is_floating_point() and tensor.numel():
            changed[name] = tensor.clone()
            changed[name].view(-1)[0] = rng.choice((float("nan"), float("inf")))
        elif what == 5 and not tensor.is_floating_point():
            most = torch.iinfo(tensor.dtype).max if tensor.dtype is not torch.bool else 1
            changed[name] = tensor.clone().fill_(min(rng.choice((-1, 1, 2**31, 2**62)), most))
        else:
            changed[name] = torch.zeros([1] * rng.randrange(4), dtype=tensor.dtype)
        if not changed:
            break
    return {name: tensor.contiguous().clone() for name, tensor in changed.items()}


class OddDrafters:
    """A drafter folder (and its target's config) through all that reads one before it serves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.target = TargetFolder(folder / "target")
        self.sources = drafters(folder / "good", self.target.folder)

    def __call__(self, rng: random.Random) -> str:
        place = copied(rng.choice(self.sources), self.folder / "odd")
        what = rng.randrange(8)
        if what < 4:
            raw = json.loads((place / "config.json").read_text())
            (place / "config.json").write_bytes(odd_json_file(raw, rng))
        if what >= 3:
            self._odd_weights(place, rng)
        try:
            return self._read(place, rng)
        except AuroraError as error:
            return one_line(error)
        finally:
            self.target.check()

    def _odd_weights(self, place: Path, rng: random.Random) -> None:
        index = place / f"{weights.WEIGHTS}{weights.INDEX}"
        if index.exists() and rng.random() < 0.3:
            index.write_bytes(odd_json_file(json.loads(index.read_text()), rng))
            return
        file = rng.choice(sorted(place.glob("*.safetensors")))
        if rng.random() < 0.5:
            file.write_bytes(odd_bytes(file.read_bytes(), rng))
        elif rng.random() < 0.1:
            file.unlink()
        else:
            save_file(odd_tensors(load_file(file), rng), str(file))

    def _read(self, place: Path, rng: random.Random) -> str:
        target = read_target(self._target(rng))
        problems = checkpoint.validate(place, target)
        for problem in problems:
            one_line(AuroraError(problem))
        config = architectures.read_config(place, target_layers=target.num_layers)
        if problems:
            return REFUSED
        checkpoint.load(place, target_layers=target.num_layers)
        length = served.context_length(target.raw)
        ready = served.folder_for(place, config, length, self.folder / "served")
        if checkpoint.validate(ready, target) or not served.is_as_served(
            ready, architectures.read_config(ready, target_layers=target.num_layers)
        ):
            raise Broken("what SGLang is given is no sound drafter")
        TargetHead.load(self.target.folder)
        return TAKEN

    def _target(self, rng: random.Random) -> Path:
        if rng.random() < 0.8:
            return self.target.folder
        place = self.folder / "odd-target"
        place.mkdir(exist_ok=True)
        (place / "config.json").write_bytes(odd_json_file(_TARGET, rng))
        return place


class OddWeights:
    """A weights file that goes live in a drafter that shares the target's embedding."""

    def __init__(self, folder: Path) -> None:
        from aurora_sgl.engine.swap import Swapper

        target = TargetFolder(folder / "target")
        self.path = folder / "odd.safetensors"
        (source,) = (one for one in drafters(folder / "good", target.folder)[:1])
        self.source = source / weights.WEIGHTS
        self.good = load_file(self.source)
        self.target = torch.nn.Module()
        self.embedding = torch.nn.Embedding(VOCAB, HIDDEN)
        self.target.embed_tokens = self.embedding
        model = torch.nn.Module()
        model.embed_tokens = self.embedding
        for name, tensor in self.good.items():
            if name not in ("d2t", "t2d"):
                _put(model, name.replace("midlayer.", "layers.0."), tensor.clone())
        hot = self.good["d2t"] + torch.arange(len(self.good["d2t"]))
        self.model, self.hot = model, hot
        self.swapper = Swapper(model, self.target, hot, VOCAB)
        self.before = self.embedding.weight.detach().clone()

    def __call__(self, rng: random.Random) -> str:
        from aurora_sgl.engine.swap_file import SwapRefused

        if rng.random() < 0.5:
            self.path.write_bytes(odd_bytes(self.source.read_bytes(), rng))
        else:
            tensors = odd_tensors(self.good, rng)
            if rng.random() < 0.2:
                tensors["embed_tokens.weight"] = torch.ones(VOCAB, HIDDEN)
            save_file(tensors, str(self.path))
        live = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        try:
            staged = self.swapper.stage(1, self.path, None)
            self._unchanged(live)
            self.swapper.apply(staged)
            self.swapper.read_back(staged, whole=True)
            answer = TAKEN
        except (SwapRefused, OSError) as error:
            answer = one_line(error)
            self.swapper.drop()
            self._unchanged(live)
        if not torch.equal(self.before, self.embedding.weight):
            raise Broken("the target's weights were changed")
        if not bool(((self.hot >= 0) & (self.hot < VOCAB)).all()):
            raise Broken("the draft vocabulary names tokens that the target does not have")
        return answer

    def _unchanged(self, live: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            if not torch.equal(live[name].view(torch.uint8), parameter.detach().view(torch.uint8)):
                raise Broken(f"{name} changed before its swap")


def _put(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    *path, last = name.split(".")
    for part in path:
        if not hasattr(model, part):
            model.add_module(part, torch.nn.Module())
        model = getattr(model, part)
    model.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))


class OddPickles:
    """What ``aurora-sgl versions convert`` reads, by the reader of its process."""

    def __init__(self, folder: Path) -> None:
        self.path, self.mark = folder / weights.PICKLE, folder / "ran"
        target = TargetFolder(folder / "target")
        state = load_file(drafters(folder / "good", target.folder)[0] / weights.WEIGHTS)
        torch.save(state, self.path)
        self.whole = self.path.read_bytes()
        torch.save({"fc.weight": _Call(str(self.mark))}, self.path)
        self.evil = self.path.read_bytes()

    def __call__(self, rng: random.Random) -> str:
        self.path.write_bytes(odd_bytes(rng.choice((self.whole, self.evil)), rng))
        try:
            unpickle.read(self.path)
            return TAKEN
        except AuroraError as error:
            return one_line(error)
        finally:
            if self.mark.exists():
                raise Broken("code of a pickle ran")


class _Call:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        import os

        return (os.mkdir, (self.mark,))


class OddSpools:
    """Segments and the cursor as a crash or a bad disk may leave them."""

    def __init__(self, folder: Path) -> None:
        from aurora_sgl import wire
        from aurora_sgl.sidecar.frames import ENVELOPE
        from aurora_sgl.sidecar.spool.cursor import Cursor
        from aurora_sgl.sidecar.spool.log import Spool

        self.folder, self.good = folder, folder / "good"
        spool = Spool(self.good, 1 << 20, segment_bytes=1 << 12)
        for seq in range(60):
            hello = wire.Hello(7, 1, {"name": "s" * (seq % 20)}, 0, 0, 0, {})
            spool.append(ENVELOPE, wire.encode(wire.Envelope(7, seq, [hello])))
        Cursor(spool).save()
        spool.close()

    def __call__(self, rng: random.Random) -> str:
        import msgspec

        from aurora_sgl.sidecar.frames import open_envelope
        from aurora_sgl.sidecar.spool.cursor import Cursor
        from aurora_sgl.sidecar.spool.log import Spool

        place = copied(self.good, self.folder / "odd")
        files = sorted(path for path in place.iterdir() if path.is_file())
        for path in rng.sample(files, rng.randint(1, min(2, len(files)))):
            path.write_bytes(odd_bytes(path.read_bytes(), rng))
        try:
            spool = Spool(place, 1 << 20, segment_bytes=1 << 12)
        except AuroraError as error:
            return one_line(error)
        try:
            position, refused = Cursor(spool).position, 0
            while frames := spool.read(position):
                if frames[-1].end <= position:
                    raise Broken("the reader of the spool does not go on")
                position = frames[-1].end
                for frame in frames:
                    try:
                        open_envelope(frame.payload)
                    except msgspec.DecodeError:
                        refused += 1
            if not spool.append(b"E", b"after"):
                raise Broken("the spool takes nothing any more")
            if not spool.read(position) and not spool.read(spool.start):
                raise Broken("what came after the damage is not read")
            return REFUSED if refused else TAKEN
        finally:
            spool.close()


class OddTraces:
    def __init__(self, folder: Path) -> None:
        from aurora_sgl.trace_format import AUX, LAST, STEP_STARTS, TOKENS, TraceMetadata

        self.path = folder / "1.safetensors"
        self.tensors = {
            TOKENS: np.arange(24, dtype=np.int64),
            AUX: np.ones((23, 3 * HIDDEN), dtype=np.float32),
            LAST: np.ones((23, HIDDEN), dtype=np.float32),
            STEP_STARTS: np.arange(3, dtype=np.int64),
        }
        self.metadata = TraceMetadata(1, 6, True, 0).to_text()

    def __call__(self, rng: random.Random) -> str:
        from aurora_sgl.sequences.trace_reader import read_tokens, read_trace

        metadata = dict(self.metadata)
        tensors = {name: torch.from_numpy(array) for name, array in self.tensors.items()}
        what = rng.randrange(4)
        if what == 0:
            metadata[rng.choice(sorted(metadata))] = rng.choice(("", "-1", "x", "1e9", "9" * 30))
        if what == 1:
            tensors = odd_tensors(tensors, rng)
            save_file(tensors, str(self.path), metadata)
        else:
            self.path.write_bytes(save_numpy(self.tensors, metadata))
        if what >= 2:
            self.path.write_bytes(odd_bytes(self.path.read_bytes(), rng))
        try:
            read_tokens(self.path)
            trace = read_trace(self.path)
        except AuroraError as error:
            return one_line(error)
        if trace.tokens.dim() != 1 or trace.aux.dim() != 2 or trace.last.dim() != 2:
            raise Broken("a trace of other shapes was taken")
        if not 0 <= trace.output_start <= len(trace.tokens):
            raise Broken(f"a trace whose output begins at {trace.output_start} was taken")
        return TAKEN
