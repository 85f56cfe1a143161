"""``python -m aurora_sgl.drafter.unpickle OUT SECONDS FILE ...``: pickled tensors as safetensors.

Started by ``drafter.convert``, as a process that has nothing else. One line on stderr says why it
failed.
"""

from __future__ import annotations

import os
import pickle
import resource
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from aurora_sgl.errors import AuroraError

#: Bytes beside the weights, which are held three times at most.
_SPARE_BYTES = 1 << 30


def limit(size: int, seconds: int) -> None:
    """Memory, time and disk of this process from here on, for so many bytes of weights."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = {
        resource.RLIMIT_AS: pages * os.sysconf("SC_PAGE_SIZE") + _SPARE_BYTES + 4 * size,
        resource.RLIMIT_FSIZE: (64 << 20) + 2 * size,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_CORE: 0,
    }
    for which, most in limits.items():
        hard = resource.getrlimit(which)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (most, most))


def read(path: Path) -> dict[str, torch.Tensor]:
    """Named tensors alone, less the target's embedding; PyTorch builds nothing else from the file.

    Raises ``AuroraError`` for a file that holds more.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise AuroraError("it asks for more memory than its size allows") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError,
            AttributeError, IndexError, OSError) as error:  # fmt: skip
        why = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise AuroraError(f"it can't be read as weights alone: {why}") from None
    if not isinstance(state, dict):
        raise AuroraError("it holds more than named tensors")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise AuroraError("it holds more than named tensors")
    return {name: tensor for name, tensor in state.items() if "embed_tokens" not in name}


def main(out: str, seconds: str, *files: str) -> int:
    tensors: dict[str, torch.Tensor] = {}
    try:
        limit(sum(Path(path).stat().st_size for path in files), int(seconds))
        for path in files:
            tensors |= read(Path(path))
        whole = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
        save_file(whole, out, metadata={"format": "pt"})
    except (AuroraError, MemoryError, RuntimeError, ValueError, OSError) as error:
        print(str(error).splitlines()[0] if str(error) else "no memory", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
