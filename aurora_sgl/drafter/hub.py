"""Models by their name on the Hugging Face hub (``org/name``): where they lie on this machine."""

from __future__ import annotations

import os.path
import re
import sys
from pathlib import Path

from aurora_sgl.errors import AuroraError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ["*.json", "*.safetensors", "*.bin", "*.txt", "*.model", "*.jinja"]
_WEIGHTS = ("*.safetensors", "*.bin")


def is_name(text: str) -> bool:
    """Whether it names a model on the hub: no folder here is called so."""
    return bool(_NAME.fullmatch(text)) and not Path(text).exists()


def cached(name: str, *, revision: str | None = None, cache: str | None = None) -> Path | None:
    """The folder of a model that was downloaded before; None without a whole one."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, cache_dir=cache,
                                        local_files_only=True))  # fmt: skip
    except Exception:  # not there, or a name that the hub does not allow
        return None
    has_weights = any(path for kind in _WEIGHTS for path in folder.glob(kind) if path.exists())
    return folder if has_weights and (folder / "config.json").exists() else None


def local(place: str | Path, *, revision: str | None = None, cache: str | None = None) -> Path:
    """A folder for what may be a name on the hub: itself unless it is one that was downloaded."""
    text = str(place)
    folder = cached(text, revision=revision, cache=cache) if is_name(text) else None
    return folder or _path(text)


def fetch(place: str, what: str, *, revision: str | None = None, cache: str | None = None) -> Path:
    """The same, and what was not downloaded yet is.

    Raises ``AuroraError`` with one line when it can't be.
    """
    if not is_name(place):
        return _path(place)
    if folder := cached(place, revision=revision, cache=cache):
        return folder
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        raise AuroraError(_not_here(place, what, "HF_HUB_OFFLINE is set"))
    print(f"aurora-sgl: downloading {place} ...", file=sys.stderr, flush=True)
    try:
        return Path(snapshot_download(place, revision=revision, cache_dir=cache,
                                      allow_patterns=_FILES))  # fmt: skip
    except Exception as error:  # no network, no such name, no right to it, no room on the disk
        why = " ".join(str(error).split())[:200]
        raise AuroraError(_not_here(place, what, why)) from None


def _path(text: str) -> Path:
    """A shell leaves ``--drafter=~/x`` as it is."""
    return Path(os.path.expanduser(text))


def _not_here(place: str, what: str, why: str) -> str:
    return (
        f"the {what} {place} is neither a folder nor in this machine's Hugging Face cache, and "
        f"can't be downloaded ({why}); run: hf download {place} where the hub can be reached, or "
        "give a folder"
    )
