"""Trace files: full and compact rows, as training reads them."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from aurora_sgl import wire
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.errors import AuroraError
from aurora_sgl.sequences.trace_reader import read_tokens, read_trace
from aurora_sgl.sidecar.traces.assembler import AssembledTrace
from aurora_sgl.sidecar.traces.writer import TraceWriter
from aurora_sgl.trace_format import WIDE, file_row_bytes

ROWS = 9


class House:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = ArtifactRoot(str(folder / "artifacts"))

    def writer(self, form: str) -> TraceWriter:
        return TraceWriter(self.root, self.folder / "tmp", form)

    def path(self, uri: str) -> Path:
        path = self.root.local_path(uri)
        assert path is not None
        return path


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def trace(hidden: int, request_id: int = 1) -> tuple[AssembledTrace, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(request_id)
    aux = torch.randn(ROWS, 3 * hidden, generator=generator).to(torch.bfloat16)
    last = torch.randn(ROWS, hidden, generator=generator).to(torch.bfloat16)
    header = wire.TraceHeader(
        1, request_id, 0, [], "bfloat16", 3 * hidden, hidden, True, 4, True, []
    )
    one = AssembledTrace(header, np.arange(ROWS + 3), 2, raw(aux), raw(last), np.zeros(0, np.int64))
    return one, aux, last


def raw(rows: torch.Tensor) -> np.ndarray:
    return rows.view(torch.uint8).numpy()


@pytest.mark.parametrize(
    ("form", "hidden", "exact"),
    [("full", WIDE, True), ("auto", 64, True), ("compact", 64, False), ("auto", WIDE, False)],
)
def test_rows_come_back_as_bfloat16(house: House, form: str, hidden: int, exact: bool) -> None:
    one, aux, last = trace(hidden)
    row = house.writer(form).write(one, None)
    assert row is not None and (row.start, row.end) == (2, 2 + ROWS)
    there = read_trace(house.path(row.uri), start=row.start)
    assert there.tokens.tolist() == list(range(ROWS + 3)) and there.end == 2 + ROWS
    assert there.aux.dtype == there.last.dtype == torch.bfloat16
    assert (torch.equal(there.aux, aux) and torch.equal(there.last, last)) == exact
    off = [float((a.float() - b).norm() / b.float().norm()) for a, b in
           ((there.aux, aux), (there.last, last))]  # fmt: skip
    assert off[0] < 0.11 and off[1] < 0.025
    assert torch.equal(read_tokens(house.path(row.uri)), there.tokens)
    with safe_open(str(house.path(row.uri)), framework="pt") as file:
        assert file.metadata()["format"] == ("1" if exact else "2")
    rows = file_row_bytes(3 * hidden, hidden, 2, form) * ROWS
    assert rows < row.bytes < rows + 2000 + (0 if exact else 4 * hidden), "and the channels"


def test_a_trace_with_numbers_that_are_not_finite_is_refused_in_one_line(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    writer = house.writer("compact")
    for request_id in (1, 2, 3):
        one, aux, _ = trace(64, request_id)
        aux[4, 7] = torch.nan
        assert one.aux is not None and writer.write(one, None) is None
    assert writer.dropped == {"not_finite": 3} and writer.written == 0
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert "request 1" in line and "not finite" in line
    assert writer.write(trace(64, 4)[0], None) is not None
    assert not list(house.folder.glob("tmp/*")), "what was begun is gone"


def changed(path: Path, **metadata: str) -> None:
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = {**file.metadata(), **metadata}
    save_file(tensors, path, text)


def test_a_file_of_a_later_format_says_so(house: House) -> None:
    row = house.writer("full").write(trace(64)[0], None)
    assert row is not None
    changed(house.path(row.uri), format="3")
    with pytest.raises(AuroraError, match="is of format 3, and this version reads 1 and 2"):
        read_trace(house.path(row.uri))


@pytest.mark.parametrize("odd", [{"aux_bits": "5"}, {"last_width": "96"}, {"aux_width": "x"}])
def test_a_compact_file_whose_parts_do_not_fit_is_broken(house: House, odd: dict[str, str]) -> None:
    row = house.writer("compact").write(trace(64)[0], None)
    assert row is not None
    changed(house.path(row.uri), **odd)
    with pytest.raises(AuroraError, match=r"trace 1\.safetensors"):
        read_trace(house.path(row.uri))


def test_a_file_from_before_there_were_formats_is_read(house: House) -> None:
    one, aux, last = trace(64)
    path = house.folder / "old.safetensors"
    tensors = {"tokens": torch.arange(ROWS + 3), "aux": aux, "last": last}
    save_file(tensors, path, {"format": "1", "request_id": "1", "output_start": "4"})
    assert torch.equal(read_trace(path).aux, aux) and one.rows == ROWS
