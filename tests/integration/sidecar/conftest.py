"""A data folder for a sidecar."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def home(tmp_path: Path, upgraded_sqlite: Path) -> Path:
    """One whose store has its tables, which take a second of a processor to make. That a sidecar
    makes them itself is tried where its store does not exist yet."""
    folder = tmp_path / "home"
    folder.mkdir()
    shutil.copy(upgraded_sqlite, folder / "aurora.db")
    return folder
