"""A new drafter into the running server: validated and staged beside, then copied in place.

Staging runs in a thread: every tensor of the file finds its parameter in SGLang's model and is
loaded, by SGLang's own weight loader, into a shadow of that parameter. All that can fail fails
there. Applying is a plain copy from shadow to parameter between two decode steps; addresses stay,
so CUDA graphs stay valid. Afterwards the live hash is computed from the parameters themselves.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from aurora_sgl.drafter.checkpoint import WEIGHTS, content_sha256
from aurora_sgl.engine.cpu import linear
from aurora_sgl.engine.cpu.packed import Packed, pack

#: SGLang fuses these; (name in the file, name in the model, shard id of the weight loader).
_FUSED = (
    (".q_proj.", ".qkv_proj.", "q"),
    (".k_proj.", ".qkv_proj.", "k"),
    (".v_proj.", ".qkv_proj.", "v"),
    (".gate_proj.", ".gate_up_proj.", 0),
    (".up_proj.", ".gate_up_proj.", 1),
)
_RENAMED = (
    ("midlayer", "layers.0"),
    ("aux_norm_low", "fc_norm.0"),
    ("aux_norm_mid", "fc_norm.1"),
    ("aux_norm_high", "fc_norm.2"),
)
_VOCABULARY = ("d2t", "t2d")
_SHARED = ("embed_tokens.weight",)


class SwapRefused(Exception):
    """The weights cannot go live here; the message says why."""


@dataclass(frozen=True, slots=True)
class Home:
    """Where a tensor of the file lives in SGLang's model."""

    parameter: str
    shard: str | int | None


def find_home(name: str, parameters: dict[str, torch.nn.Parameter]) -> Home:
    """The parameter that ``name`` of a file belongs to. Raises :class:`SwapRefused`."""
    for old, new in _RENAMED:
        name = name.replace(old, new)
    for part, fused, shard in _FUSED:
        if part in name:
            candidate = name.replace(part, fused)
            for full in (candidate, f"model.{candidate}"):
                if full in parameters:
                    return Home(full, shard)
    for full in (name, f"model.{name}"):
        if full in parameters:
            return Home(full, None)
    raise SwapRefused(f"the running drafter has no parameter for '{name}'")


@dataclass(slots=True)
class StagedWeights:
    """Shadows of all parameters of one version, ready to be copied."""

    version_id: int
    weights_sha256: str
    homes: dict[str, Home]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    shadows: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    packed: dict[str, Packed] = field(default_factory=dict)
    hot: torch.Tensor | None = None  # [draft vocab] target ids; None: the draft vocabulary stays
    staged_ms: float = 0.0
    apply_ms: float = 0.0
    applied: torch.cuda.Event | None = None  # on a GPU: reached when the copies are made


def _shadow(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """An empty parameter with the attributes that SGLang's weight loaders look at."""
    twin = torch.nn.Parameter(torch.empty_like(parameter), requires_grad=False)
    if parameter.__class__ is not torch.nn.Parameter:
        twin.__class__ = parameter.__class__
    twin.__dict__.update(parameter.__dict__)
    return twin


def yield_to_the_step() -> None:
    """Lower the priority of this thread (Linux): the scheduler's step comes first."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)


class Swapper:
    """Stages, applies and reads back the weights of the running drafter."""

    def __init__(
        self,
        draft_model: Any,
        target_model: Any,
        hot_token_id: torch.Tensor | None,
        target_vocabulary: int,
    ) -> None:
        self._parameters: dict[str, torch.nn.Parameter] = dict(draft_model.named_parameters())
        self._device = next(iter(self._parameters.values())).device
        self._target_storages = {p.untyped_storage().data_ptr() for p in target_model.parameters()}
        self._hot = hot_token_id
        self._target_vocabulary = target_vocabulary
        self._thread: threading.Thread | None = None
        self.staged: StagedWeights | None = None
        self.failure: tuple[int, str] | None = None  # (version, reason) of a failed staging

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def begin_staging(self, version_id: int, path: Path, weights_sha256: str) -> None:
        """Start staging in a thread; ``staged`` or ``failure`` is set when it is done."""
        self.staged, self.failure = None, None

        def work() -> None:
            yield_to_the_step()
            try:
                self.staged = self.stage(version_id, path, weights_sha256)
            except SwapRefused as refusal:
                self.failure = (version_id, str(refusal))
            except Exception as error:  # whatever it is, serving goes on with the old weights
                self.failure = (version_id, f"{type(error).__name__}: {error}")

        self._thread = threading.Thread(target=work, name="aurora-stage", daemon=True)
        self._thread.start()

    def stage(self, version_id: int, path: Path, weights_sha256: str | None) -> StagedWeights:
        """Load a file (or a folder's) into shadows; a hash, when given, must be the content's.

        Raises :class:`SwapRefused` with the reason when the weights cannot go live here.
        """
        begun = time.perf_counter()
        path = path / WEIGHTS if path.is_dir() else path
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        actual = content_sha256(tensors)
        if weights_sha256 is not None and actual != weights_sha256:
            raise SwapRefused(
                f"the staged weights hash to {actual[:12]}, not to {weights_sha256[:12]}"
            )
        hot = self._vocabulary(tensors)
        weights = {
            name: tensor
            for name, tensor in tensors.items()
            if name not in _VOCABULARY and not name.endswith(_SHARED)
        }
        staged = StagedWeights(
            version_id=version_id,
            weights_sha256=actual,
            homes={name: find_home(name, self._parameters) for name in weights},
            shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
            dtypes={name: tensor.dtype for name, tensor in tensors.items()},
            hot=hot,
        )
        filled: dict[str, int] = {}
        for name, tensor in weights.items():
            if not bool(torch.isfinite(tensor).all()):
                raise SwapRefused(f"'{name}' has values that are not finite")
            home = staged.homes[name]
            parameter = self._parameters[home.parameter]
            if parameter.untyped_storage().data_ptr() in self._target_storages:
                raise SwapRefused(f"'{name}' would overwrite the target: they share storage")
            if home.parameter not in staged.shadows:
                staged.shadows[home.parameter] = _shadow(parameter)
                filled[home.parameter] = 0
            self._load(staged.shadows[home.parameter], tensor, home, name)
            filled[home.parameter] += tensor.numel()
        self._check_complete(staged, filled)
        self._pack(staged)
        if self._device.type == "cuda":  # others read the shadows on streams of their own
            torch.cuda.current_stream(self._device).synchronize()
        staged.staged_ms = 1000 * (time.perf_counter() - begun)
        return staged

    def _pack(self, staged: StagedWeights) -> None:
        """Where the CPU kernels keep packed copies of weights, make those of the shadows too."""
        for name, shadow in staged.shadows.items():
            if linear.uses(self._parameters[name]):
                staged.packed[name] = pack(shadow)

    def _load(
        self, shadow: torch.nn.Parameter, tensor: torch.Tensor, home: Home, name: str
    ) -> None:
        loader = getattr(shadow, "weight_loader", None)
        try:
            if loader is not None:
                loader(shadow, tensor) if home.shard is None else loader(shadow, tensor, home.shard)
            elif shadow.shape == tensor.shape:
                shadow.data.copy_(tensor)
            else:
                raise ValueError(f"expected {tuple(shadow.shape)}")
        except (ValueError, RuntimeError, AssertionError) as error:
            raise SwapRefused(
                f"'{name}' {tuple(tensor.shape)} does not fit the running drafter ({error})"
            ) from error

    def _check_complete(self, staged: StagedWeights, filled: dict[str, int]) -> None:
        for name, parameter in self._parameters.items():
            shared = parameter.untyped_storage().data_ptr() in self._target_storages
            if not shared and not name.endswith(_SHARED) and name not in filled:
                raise SwapRefused(f"the weights lack '{name}' of the running drafter")

    def _vocabulary(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """Target ids of the new draft vocabulary where it is another one of the same size.

        SGLang reads ``d2t`` once at start into a tensor that it looks tokens up in; like a weight
        it is overwritten in place. The first draft after that starts from candidates of the old
        vocabulary, read with the new one: worth nothing, but verified like any other.
        """
        if self._hot is None:
            if "d2t" in tensors:
                raise SwapRefused("the running drafter has no draft vocabulary, the new one has")
            return None
        if "d2t" not in tensors:
            raise SwapRefused("the weights lack the draft vocabulary 'd2t'")
        offsets = tensors["d2t"].to(torch.int64)
        hot = self._hot.to("cpu", torch.int64)
        if offsets.shape != hot.shape:
            raise SwapRefused(
                f"the new version drafts {offsets.numel()} tokens, the running one {hot.numel()}; "
                "it can go live at the next start"
            )
        new = offsets + torch.arange(offsets.numel())
        if not bool(((new >= 0) & (new < self._target_vocabulary)).all()):
            raise SwapRefused("'d2t' names tokens that the target does not have")
        return None if torch.equal(new, hot) else new.to(self._hot.device)

    def apply(self, staged: StagedWeights, forward_stream: Any = None) -> float:
        """Copy the shadows into the running model; returns milliseconds. Call between two steps.

        On a GPU the last step may still run, on ``forward_stream``: the copies wait for it there,
        and the next step for them, as SGLang has it wait for all that its scheduler did before.
        """
        begun = time.perf_counter()
        on_gpu = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device) if on_gpu else None
        if stream is not None and forward_stream is not None:
            stream.wait_stream(forward_stream)
        with torch.no_grad():
            for name, shadow in staged.shadows.items():
                self._parameters[name].data.copy_(shadow.data)
                if name in staged.packed:
                    linear.replace(self._parameters[name], staged.packed[name])
            if staged.hot is not None and self._hot is not None:
                self._hot.copy_(staged.hot)
        if stream is not None:
            staged.applied = stream.record_event()
            for shadow in staged.shadows.values():
                shadow.data.record_stream(stream)
        return 1000 * (time.perf_counter() - begun)

    def read_back(self, staged: StagedWeights, *, whole: bool) -> str:
        """Content hash of the tensors that the model holds now, in the file's names and dtypes.

        Where a rank of a tensor-parallel group holds shards only (``whole`` is false), the shards
        are compared with those that the hashed file was loaded into: equal, they stand for it.
        """
        if staged.applied is not None:
            staged.applied.synchronize()
        if not whole:
            for name, shadow in staged.shadows.items():
                if not torch.equal(self._parameters[name].data, shadow.data):
                    raise SwapRefused(f"'{name}' is not what was staged")
            return staged.weights_sha256
        shapes, dtypes = staged.shapes, staged.dtypes
        tensors: dict[str, torch.Tensor] = {}
        offsets: dict[str, int] = {}
        order = {"q": 0, "k": 1, "v": 2, 0: 0, 1: 1, None: 0}
        homes = {
            name: find_home(name, self._parameters)
            for name in shapes
            if name not in _VOCABULARY and not name.endswith(_SHARED)
        }
        for name, home in sorted(homes.items(), key=lambda item: order[item[1].shard]):
            rows = shapes[name][0]
            first = offsets.get(home.parameter, 0)
            value = self._parameters[home.parameter].data
            tensors[name] = value[first : first + rows].to("cpu", dtypes[name])
            offsets[home.parameter] = first + rows
        if "d2t" in shapes and self._hot is not None:
            hot = self._hot.to("cpu", torch.int64)
            tensors["d2t"] = (hot - torch.arange(hot.numel())).to(dtypes["d2t"])
            if "t2d" in shapes:
                inside = torch.zeros(self._target_vocabulary, dtype=torch.bool)
                inside[hot] = True
                tensors["t2d"] = inside.to(dtypes["t2d"])
        return content_sha256(tensors)
