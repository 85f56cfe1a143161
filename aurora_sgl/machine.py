"""What this machine's CPU computes in hardware."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def cpu_flags() -> frozenset[str]:
    """The CPU's features as Linux names them; empty where they can't be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    row = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(row.partition(":")[2].split())


def native_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself.

    Where it does not, bfloat16 products are taken apart into float32 ones: over 64 rows and more
    they take 3 to 4 times as long as float32 (Intel Ice Lake, PyTorch 2.13).
    """
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def computes_bfloat16(device_type: str) -> bool:
    """Whether a device (as ``torch.device.type`` names it) multiplies bfloat16 itself."""
    return device_type != "cpu" or native_bfloat16()
