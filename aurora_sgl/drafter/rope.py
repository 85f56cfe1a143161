"""Rotary positions as SGLang computes them: neox halves, cosines rounded to the working dtype."""

from __future__ import annotations

import math

import torch

from aurora_sgl.drafter.config import DrafterConfig


def inverse_frequencies(config: DrafterConfig) -> torch.Tensor:  # [head_dim / 2] float32
    """Frequencies of a default, linear or llama3 rope (SGLang 0.5.21, layers/rotary_embedding)."""
    # On the CPU even where a drafter is laid out on the meta device, which would import three
    # seconds' worth of PyTorch's compiler for this one line.
    places = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    steps = places / config.head_dim
    plain = 1.0 / config.rope_theta**steps
    rope = config.rope
    if rope is None:
        return plain
    factor = float(rope["factor"])
    if rope["rope_type"] == "linear":
        return plain / factor
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original = float(rope["original_max_position_embeddings"])
    wavelength = 2 * math.pi / plain
    smooth = (original / wavelength - low) / (high - low) if high != low else 0.0
    blended = (1 - smooth) * plain / factor + smooth * plain
    slow = torch.where(wavelength > original / low, plain / factor, blended)
    return torch.where(wavelength < original / high, plain, slow)


def rotate(
    x: torch.Tensor,  # [rows, heads, head_dim]
    positions: torch.Tensor,  # [rows] int64
    frequencies: torch.Tensor,  # [head_dim / 2] float32
) -> torch.Tensor:
    angles = positions.to(torch.float32)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype)[:, None], angles.sin().to(x.dtype)[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
