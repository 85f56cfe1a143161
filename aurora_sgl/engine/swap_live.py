"""The running drafter's own tensors after a swap: written back in pieces, compared, or hashed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

import torch

from aurora_sgl.drafter.checkpoint import content_sha256
from aurora_sgl.engine.cpu.packed import Packed
from aurora_sgl.engine.swap_file import FileTensor, SwapRefused, WeightsFile
from aurora_sgl.engine.swap_names import Home, rows_in
from aurora_sgl.engine.swap_pieces import PIECE, Carrier, Part, Slot

#: Of a task: true after a small piece of work, false when no more should be done in this step.
Task = Iterator[bool]


@dataclass(slots=True)
class StagedWeights:
    """One version: where its tensors go, and when all have come, what it takes to go live."""

    version_id: int
    weights_sha256: str
    entries: dict[str, FileTensor]  # of the file
    homes: dict[str, Home]  # of its weights
    parts: dict[str, list[Part]] = field(default_factory=dict)  # as the loader puts them
    packed: dict[str, Packed] = field(default_factory=dict)
    hot: torch.Tensor | None = None  # [draft vocab] target ids on the CPU; None: it stays
    hot_exchanged: bool = False
    exchanged: list[str] = field(default_factory=list)  # parameters that have gone live
    replaced: dict[str, Packed] = field(default_factory=dict)  # packed copies of before
    staged_ms: float = 0.0
    apply_ms: float = 0.0
    applied: torch.cuda.Event | None = None  # on a GPU: reached when the copies are made


class LiveWeights:
    """Reads the parameters of SGLang's model, and what it looks draft tokens up in."""

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        hot_token_id: torch.Tensor | None,
        target_vocabulary: int,
    ) -> None:
        self._parameters, self._hot = parameters, hot_token_id
        self._target_vocabulary = target_vocabulary
        self._device = next(iter(parameters.values())).device

    def write_back(self, staged: StagedWeights, file: WeightsFile, carrier: Carrier) -> Task:
        """Into the file, in its names and dtypes."""
        for name, value in self.tensors(staged):
            entry = staged.entries[name]
            if tuple(value.shape) != entry.shape:
                raise SwapRefused(f"'{name}' is {tuple(value.shape)} in the model")
            part = Part(value.reshape(-1), (1,), entry.begin, entry.dtype)
            for host, piece in carrier.to_host(part.pieces()):
                if host is not None and piece is not None:
                    file.write(host, piece.offset)
                yield host is not None
        for name, value in self.vocabulary(staged.entries, carrier).items():
            file.write(value, staged.entries[name].begin)
            yield True

    def compare(
        self,
        staged: StagedWeights,
        file: WeightsFile,
        carrier: Carrier,
        shadows: dict[str, torch.nn.Parameter],
    ) -> Task:
        """Every part of the parameters with the file's, where that was copied part by part."""
        other = Slot(torch.empty(PIECE, dtype=torch.uint8))
        for name, parts in staged.parts.items():
            parameter = self._parameters[staged.homes[name].parameter].data
            live = (part.of(parameter).pieces() for part in parts)
            for host, piece in carrier.to_host(chain.from_iterable(live)):
                if host is not None and piece is not None:
                    file.read(other.buffer[: piece.span], piece.offset)
                    served = piece.here.dtype  # the file may have been more exact
                    if not torch.equal(host.to(served), other.view(piece).to(served)):
                        raise SwapRefused(f"'{name}' is not what was staged")
                yield host is not None
        for name in staged.homes.keys() - staged.parts.keys():  # of a loader that does more
            where = staged.homes[name].parameter
            # On a CPU the memory that it was loaded into is the parameter's.
            on_gpu = self._device.type == "cuda"
            if on_gpu and not torch.equal(self._parameters[where].data, shadows[where].data):
                raise SwapRefused(f"'{name}' is not what was staged")
            yield False

    def tensors(self, staged: StagedWeights) -> Iterator[tuple[str, torch.Tensor]]:
        """The parts of the model's parameters that are the file's tensors."""
        shapes = {name: staged.entries[name].shape for name in staged.homes}
        for name, (where, rows) in rows_in(staged.homes, shapes).items():
            yield name, self._parameters[where].data[rows]

    def vocabulary(
        self, entries: dict[str, FileTensor], carrier: Carrier
    ) -> dict[str, torch.Tensor]:
        """``d2t`` and ``t2d`` of what the running drafter looks tokens up in."""
        if "d2t" not in entries or self._hot is None:
            return {}
        with carrier.beside():
            hot = self._hot.to("cpu", torch.int64)
        maps = {"d2t": (hot - torch.arange(hot.numel())).to(entries["d2t"].dtype)}
        if "t2d" in entries:
            inside = torch.zeros(self._target_vocabulary, dtype=torch.bool)
            inside[hot] = True
            maps["t2d"] = inside.to(entries["t2d"].dtype)
        return maps

    def sha256(self, staged: StagedWeights, carrier: Carrier) -> str:
        """Content hash, at once, where no step waits."""
        weights = {
            name: value.to("cpu", staged.entries[name].dtype)
            for name, value in self.tensors(staged)
        }
        return content_sha256(weights | self.vocabulary(staged.entries, carrier))
