"""Room for the drafter's next version: a second copy of its parameters.

It is taken before SGLang sizes its KV pool by the memory that is left, so that the pool leaves room
for it. Which parameters will be the target's own is known from the architecture then: SGLang puts
those in later.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from aurora_sgl.drafter import architectures
from aurora_sgl.drafter.checkpoint import canonical_name

_RESERVED = "_aurora_shadows"  # on SGLang's worker until the swapper takes it


def shadow(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """A second parameter with the attributes that SGLang's weight loaders look at."""
    # Its memory is touched now, so that staging meets no page faults.
    twin = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
    if parameter.__class__ is not torch.nn.Parameter:
        twin.__class__ = parameter.__class__
    twin.__dict__.update(parameter.__dict__)
    return twin


def reserve(worker: Any) -> int:
    """Before the KV pool is made. Returns bytes; 0 for a drafter that is not known.

    Raises ``RuntimeError`` or ``MemoryError`` where there is no room.
    """
    model = worker.draft_worker.draft_runner.model
    kind = architectures.ARCHITECTURES.get(type(model).__name__)
    if kind is None:
        return 0
    with torch.inference_mode(False), torch.no_grad():
        room = {
            name: shadow(parameter)
            for name, parameter in model.named_parameters()
            if kind.parameter_name(canonical_name(name)) is not None
        }
    setattr(worker, _RESERVED, room)
    return sum(one.numel() * one.element_size() for one in room.values())


def take(worker: Any) -> Mapping[str, torch.nn.Parameter]:
    """What was reserved, once; what of it is not used is free again."""
    room: Mapping[str, torch.nn.Parameter] = vars(worker).pop(_RESERVED, {})
    return room


def of(parameter: torch.nn.Parameter, reserved: torch.nn.Parameter | None) -> torch.nn.Parameter:
    """The shadow that was reserved for a parameter, if it fits; else one that is made now."""
    if reserved is None:
        return shadow(parameter)
    same = (reserved.shape, reserved.dtype, reserved.device, reserved.stride())
    if same != (parameter.shape, parameter.dtype, parameter.device, parameter.stride()):
        return shadow(parameter)
    reserved.data.copy_(parameter.data)
    if parameter.__class__ is not reserved.__class__:
        reserved.__class__ = parameter.__class__
    reserved.__dict__.clear()
    reserved.__dict__.update(parameter.__dict__)
    return reserved
