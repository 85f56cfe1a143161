"""A new drafter into the running server: staged beside, in pieces between steps, then exchanged.

No bulk work is done in the scheduler's process: the sidecar has checked the values and the hash,
and hashes what is read back. Here each tensor of the file finds its parameter in SGLang's model,
and all that can fail fails there. Its contents then go into a shadow of the parameter, as SGLang's
own weight loader would put it there, a few pieces each step. On a CPU going live exchanges shadows
and parameters, whatever their size; on a GPU, where CUDA graphs hold addresses, it is a copy in
place. Afterwards the parameters themselves are written back into the file, again in pieces.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from aurora_sgl.drafter.checkpoint import WEIGHTS, content_sha256
from aurora_sgl.engine import shadows
from aurora_sgl.engine.cpu import layer, linear
from aurora_sgl.engine.cpu.packed import Packed, pack
from aurora_sgl.engine.swap_file import SwapRefused, WeightsFile
from aurora_sgl.engine.swap_live import LiveWeights, StagedWeights, Task
from aurora_sgl.engine.swap_names import SHARED, Home, find_home, is_weight, lacking
from aurora_sgl.engine.swap_pieces import Carrier, NotInPieces, Part, copies_of

_NO_SIDECAR = "this server has no sidecar"


class Swapper:
    """Stages, applies and reads back the weights of the running drafter.

    One task at a time, a piece of it whenever :meth:`work` is called. The shadows take as much
    memory as the drafter; they are made here, once, so that no swap waits for memory.
    """

    def __init__(
        self,
        draft_model: Any,
        target_model: Any,
        hot_token_id: torch.Tensor | None,
        target_vocabulary: int,
        *,
        swaps: bool = True,
        reserved: Mapping[str, torch.nn.Parameter] | None = None,
    ) -> None:
        """Without ``swaps`` no memory is taken, and every one is refused. ``reserved``: shadows
        that were made before, see ``shadows``."""
        self._parameters: dict[str, torch.nn.Parameter] = dict(draft_model.named_parameters())
        self._device = next(iter(self._parameters.values())).device
        self._target_storages = {p.untyped_storage().data_ptr() for p in target_model.parameters()}
        self._live = LiveWeights(self._parameters, hot_token_id, target_vocabulary)
        self._hot = hot_token_id
        self._hot_here = None if hot_token_id is None else hot_token_id.to("cpu", torch.int64)
        self._target_vocabulary = target_vocabulary
        self._task: Task | None = None
        self._file: WeightsFile | None = None
        self._carrier: Carrier | None = None
        self._applied: torch.cuda.Event | None = None
        self._shadows: dict[str, torch.nn.Parameter] = {}
        self._exchangeable = self._with_memory_of_their_own()
        self._no_room = self._make_shadows(reserved or {}) if swaps else _NO_SIDECAR
        self.staged: StagedWeights | None = None
        self.failure: tuple[int, str] | None = None  # (version, reason) of a failed staging
        self.unread = ""  # why the last reading back failed

    @property
    def shadow_bytes(self) -> int:
        """Memory that waits for the next version."""
        return sum(shadow.numel() * shadow.element_size() for shadow in self._shadows.values())

    def _make_shadows(self, reserved: Mapping[str, torch.nn.Parameter]) -> str:
        """Shadows of all parameters that are the drafter's own; why there are none, or ""."""
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._carrier = Carrier(self._device)
                self._shadows = {
                    name: shadows.of(parameter, reserved.get(name))
                    for name, parameter in self._parameters.items()
                    if not self._is_the_targets(parameter) and not name.endswith(SHARED)
                }
        except (RuntimeError, MemoryError) as error:
            self._shadows = {}
            return f"no memory for a second copy of the drafter ({str(error).splitlines()[0]})"
        return ""

    def _is_the_targets(self, parameter: torch.Tensor) -> bool:
        return parameter.untyped_storage().data_ptr() in self._target_storages

    def _with_memory_of_their_own(self) -> set[str]:
        """Parameters on a CPU that may lie elsewhere: nothing else is in their memory."""
        storages = [p.untyped_storage().data_ptr() for p in self._parameters.values()]
        return {
            name
            for name, p in self._parameters.items()
            if p.device.type == "cpu"
            and p.is_contiguous()
            and p.untyped_storage().nbytes() == p.numel() * p.element_size()
            and storages.count(p.untyped_storage().data_ptr()) == 1
        }

    # -- a task, in pieces ---------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return self._task is not None

    def work(self, seconds: float, pieces: int) -> None:
        """Go on with the task for so long, or so many pieces. Never raises."""
        deadline = time.perf_counter() + seconds
        with torch.inference_mode(False), torch.no_grad():
            for _ in range(pieces):
                if self._task is None or not self._next(self._task):
                    return
                if time.perf_counter() >= deadline:
                    return

    def _next(self, task: Task) -> bool:
        if next(task, None) is None:
            self._task = None
            return False
        return True

    def drop(self) -> None:
        """Leave the task, and what has been staged."""
        if self._task is not None:
            self._task.close()  # type: ignore[attr-defined]
        self._task = self.staged = self.failure = None
        self.unread = ""
        if self._carrier is not None:
            self._carrier.forget()
        if self._file is not None:
            self._file.close()
            self._file = None

    # -- staging -------------------------------------------------------------------------------

    def begin_staging(
        self, version_id: int, path: Path, weights_sha256: str, *, consume: bool = False
    ) -> None:
        """Start staging a file (or a folder's), whose values and hash have been checked.

        ``staged`` or ``failure`` is set when it is done. ``consume``: nobody else reads the file;
        of what has been staged nothing is left in it, so that what is read back later into it is
        the model's.
        """
        self.drop()
        path = path / WEIGHTS if path.is_dir() else path
        self._task = self._staging(version_id, path, weights_sha256, consume)

    def _staging(self, version_id: int, path: Path, weights_sha256: str, consume: bool) -> Task:
        begun = time.perf_counter()
        try:
            if self._no_room:
                raise SwapRefused(self._no_room)
            self._file = WeightsFile(path, writable=consume)
            staged = self._plan(version_id, weights_sha256, self._file)
            yield True
            stream = self._carrier.stream if self._carrier is not None else None
            if stream is not None and self._applied is not None:
                stream.wait_event(self._applied)  # the copy from the shadows before
            yield from self._fill(staged, self._file, consume)
            yield from self._pack(staged)
        except Exception as error:  # whatever it is, serving goes on with the old weights
            self.failure = (version_id, _one_line(error))
            return
        staged.staged_ms = 1000 * (time.perf_counter() - begun)
        self.staged = staged

    def stage(self, version_id: int, path: Path, weights_sha256: str | None) -> StagedWeights:
        """Stage at once, where no step waits. Raises :class:`SwapRefused`."""
        self.begin_staging(version_id, path, weights_sha256 or "")
        self._finish()
        if self.staged is None:
            raise SwapRefused(self.failure[1] if self.failure else "nothing was staged")
        return self.staged

    def _finish(self) -> None:
        while self.busy:
            self.work(1.0, 1 << 20)

    def _plan(self, version_id: int, weights_sha256: str, file: WeightsFile) -> StagedWeights:
        """Where everything goes. Raises :class:`SwapRefused` where it can't."""
        entries = file.tensors
        hot = self._vocabulary(file)
        homes = {name: find_home(name, self._parameters) for name in entries if is_weight(name)}
        for name, home in homes.items():
            if self._is_the_targets(self._parameters[home.parameter]):
                raise SwapRefused(f"'{name}' would overwrite the target: they share storage")
        self._check_complete(homes)
        return StagedWeights(version_id, weights_sha256, entries, homes, hot=hot)

    def _check_complete(self, homes: dict[str, Home]) -> None:
        name = lacking(homes.values(), self._shadows)
        if name:
            raise SwapRefused(f"the weights lack '{name}' of the running drafter")

    def _vocabulary(self, file: WeightsFile) -> torch.Tensor | None:
        """Target ids of the new draft vocabulary where it is another one of the same size.

        SGLang reads ``d2t`` once at start into a tensor that it looks tokens up in; like a weight
        it is overwritten in place. The first draft after that starts from candidates of the old
        vocabulary, read with the new one: worth nothing, but verified like any other.
        """
        entry = file.tensors.get("d2t")
        if self._hot_here is None:
            if entry is not None:
                raise SwapRefused("the running drafter has no draft vocabulary, the new one has")
            return None
        if entry is None:
            raise SwapRefused("the weights lack the draft vocabulary 'd2t'")
        hot = self._hot_here
        if entry.shape != tuple(hot.shape):
            raise SwapRefused(
                f"the new version drafts {torch.Size(entry.shape).numel()} tokens, the running one "
                f"{hot.numel()}; it can go live at the next start"
            )
        offsets = torch.empty(entry.shape, dtype=entry.dtype)
        file.read(offsets, entry.begin)
        new = offsets.to(torch.int64) + torch.arange(offsets.numel())
        if not bool(((new >= 0) & (new < self._target_vocabulary)).all()):
            raise SwapRefused("'d2t' names tokens that the target does not have")
        return None if torch.equal(new, hot) else new

    def _fill(self, staged: StagedWeights, file: WeightsFile, consume: bool) -> Task:
        """The file's tensors into the shadows, the last one first, so that it can be cut."""
        last_first = sorted(staged.entries.items(), key=lambda item: -item[1].begin)
        for name, entry in last_first:
            if name in staged.homes:
                try:
                    parts = copies_of(self._loader(staged, name), entry.shape, entry.dtype,
                                      entry.begin)  # fmt: skip
                except NotInPieces:
                    yield from self._load_whole(staged, name, file)
                else:
                    staged.parts[name] = parts
                    cuts = consume and _descend(parts)
                    for piece in chain.from_iterable(part.pieces() for part in parts):
                        yield from self._fetch(piece, file)
                        if cuts:
                            file.cut(piece.offset)
            if consume:
                file.cut(entry.begin)
                yield True

    def _loader(self, staged: StagedWeights, name: str) -> Any:
        """Puts a tensor of the file where SGLang would; raises :class:`SwapRefused`."""
        home = staged.homes[name]
        shadow = self._shadows[home.parameter]

        def load(tensor: torch.Tensor) -> None:
            loader = getattr(shadow, "weight_loader", None)
            try:
                if loader is not None:
                    args = (tensor,) if home.shard is None else (tensor, home.shard)
                    loader(shadow, *args)
                elif shadow.shape == tensor.shape:
                    shadow.data.copy_(tensor)
                else:
                    raise ValueError(f"expected {tuple(shadow.shape)}")
            except (ValueError, RuntimeError, AssertionError) as error:
                raise SwapRefused(
                    f"'{name}' {tuple(tensor.shape)} does not fit the running drafter ({error})"
                ) from error

        return load

    def _load_whole(self, staged: StagedWeights, name: str, file: WeightsFile) -> Task:
        """For a loader that does more than to copy parts of a tensor."""
        assert self._carrier is not None
        entry = staged.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        for part in Part(tensor.view(-1), (1,), entry.begin, entry.dtype).pieces():
            file.read(part.here, part.offset)
            yield True
        with self._carrier.beside():
            self._loader(staged, name)(tensor)
        yield False

    def _fetch(self, part: Part, file: WeightsFile) -> Task:
        """A part of the file into its shadow."""
        assert self._carrier is not None
        if self._carrier.direct and part.plain:
            file.read(part.here, part.offset)
        else:
            while (slot := self._carrier.take()) is None:
                yield False
            file.read(slot.buffer[: part.span], part.offset)
            with self._carrier.beside():
                part.here.copy_(slot.view(part), non_blocking=True)
            self._carrier.sent(slot)
        yield True

    def _pack(self, staged: StagedWeights) -> Task:
        """Where the CPU kernels keep packed copies of weights, make those of the shadows too.

        A library packs a weight as a whole, which took 140 ms for 9.4 MB (FBGEMM, EPYC): a thread
        does that, outside the interpreter lock, and the steps come first.
        """
        for name, shadow in self._shadows.items():
            if linear.uses(self._parameters[name]):
                packed = _in_the_background(partial(pack, shadow))
                while not packed.done():
                    yield False
                staged.packed[name] = packed.result()

    # -- going live ----------------------------------------------------------------------------

    def apply(self, staged: StagedWeights, forward_stream: Any = None) -> float:
        """Make the shadows live; returns milliseconds. Call between two steps. When it raises, the
        old weights are live; on a GPU perhaps not all of them.

        On a GPU the last step may still run, on ``forward_stream``: the copies wait for it there,
        and the next step for them, as SGLang has it wait for all that its scheduler did before.
        """
        begun = time.perf_counter()
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        if stream is not None:
            if forward_stream is not None:
                stream.wait_stream(forward_stream)
            if self._carrier is not None and self._carrier.stream is not None:
                stream.wait_stream(self._carrier.stream)
        with torch.inference_mode(False), torch.no_grad():
            try:
                for name in self._shadows:
                    self._exchange(staged, name)
                if staged.hot is not None:
                    self._exchange_vocabulary(staged)
            except BaseException:
                self.undo(staged)
                raise
        layer.forget_moved()
        if stream is not None:
            self._applied = staged.applied = stream.record_event()
        return 1000 * (time.perf_counter() - begun)

    def undo(self, staged: StagedWeights) -> None:
        """Bring back what was live before :meth:`apply`, on a CPU."""
        if self._device.type == "cuda":
            return
        staged.packed, staged.replaced = staged.replaced, {}
        with torch.inference_mode(False), torch.no_grad():
            if staged.hot_exchanged:
                self._exchange_vocabulary(staged)
            for name in list(staged.exchanged):
                self._exchange(staged, name)
        staged.exchanged.clear()
        layer.forget_moved()

    def _exchange(self, staged: StagedWeights, name: str) -> None:
        parameter, shadow = self._parameters[name], self._shadows[name]
        address = parameter.data_ptr()
        if name in self._exchangeable:
            parameter.data, shadow.data = shadow.data, parameter.data
        elif self._device.type == "cuda":
            parameter.data.copy_(shadow.data)
        else:
            old = parameter.data.clone()
            parameter.data.copy_(shadow.data)
            shadow.data.copy_(old)
        staged.exchanged.append(name)
        replaced = linear.moved(parameter, address, staged.packed.pop(name, None))
        if replaced is not None:
            staged.replaced[name] = replaced  # let go of later: that takes time too

    def _exchange_vocabulary(self, staged: StagedWeights) -> None:
        assert self._hot is not None and staged.hot is not None
        self._hot.copy_(staged.hot)
        self._hot_here, staged.hot = staged.hot, self._hot_here
        staged.hot_exchanged = not staged.hot_exchanged

    # -- reading back --------------------------------------------------------------------------

    def begin_read_back(self, staged: StagedWeights, *, whole: bool, leads: bool) -> None:
        """Start to write the live parameters into the file, in the file's names and dtypes; or,
        where a rank of a tensor-parallel group holds shards only (``whole`` is false), to compare
        them with the file. ``unread`` says afterwards what went wrong; "": nothing.

        On other ranks than the leading one only what was replaced is let go of.
        """
        self.unread = ""
        self._task = self._reading_back(staged, whole, leads)

    def _reading_back(self, staged: StagedWeights, whole: bool, leads: bool) -> Task:
        try:
            assert self._file is not None and self._carrier is not None
            applied = staged.applied
            while applied is not None and not applied.query():  # type: ignore[no-untyped-call]
                yield False
            if leads and whole:
                yield from self._live.write_back(staged, self._file, self._carrier)
            elif leads:
                yield from self._live.compare(staged, self._file, self._carrier, self._shadows)
            while staged.replaced:  # to free a large one takes milliseconds
                staged.replaced.popitem()
                yield False
        except Exception as error:
            self.unread = _one_line(error)
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None

    def read_back(self, staged: StagedWeights, *, whole: bool) -> str:
        """Content hash of the tensors that the model holds now, at once, where no step waits.

        With shards only they are compared with those of the file: equal, they stand for it.
        """
        if staged.applied is not None:
            staged.applied.synchronize()
        if not whole:
            self.begin_read_back(staged, whole=False, leads=True)
            self._finish()
            if self.unread:
                raise SwapRefused(self.unread)
            return staged.weights_sha256
        self.drop()
        assert self._carrier is not None
        return self._live.sha256(staged, self._carrier)

    def read_back_at_start(self, drafter: Path, *, whole: bool) -> str:
        """The live hash of the drafter that the server was started with; "" where it can't be
        told for want of memory."""
        if self._no_room:
            return ""
        path = drafter / WEIGHTS if drafter.is_dir() else drafter
        if whole:
            file = WeightsFile(path)
            try:
                staged = self._plan(0, "", file)
            finally:
                file.close()
            return self.read_back(staged, whole=True)
        staged = self.stage(0, path, content_sha256(load_file(path)))
        return self.read_back(staged, whole=False)


def _in_the_background(work: Callable[[], Packed]) -> Future[Packed]:
    done: Future[Packed] = Future()

    def run() -> None:
        with contextlib.suppress(OSError, AttributeError):  # not Linux
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="aurora-pack", daemon=True).start()
    return done


def _descend(parts: list[Part]) -> bool:
    """Whether each part lies in the file before the one that it follows."""
    return all(after.offset + after.span <= part.offset for part, after in pairwise(parts))


def _one_line(error: Exception) -> str:
    kind = "" if isinstance(error, SwapRefused) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())
