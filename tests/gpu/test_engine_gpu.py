"""What the engine does with CUDA graphs: a swap that they see, and hidden states out of them.

Graphs are captured from a small module here; SGLang itself does not run in these tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("msgspec")
pytest.importorskip("zmq")

from aurora_sgl.drafter.checkpoint import content_sha256
from aurora_sgl.engine.capture import LastHiddenState, keep_last
from aurora_sgl.engine.swap import Swapper, SwapRefused

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda", 0)


def captured(run: Any) -> torch.cuda.CUDAGraph:
    """A graph of ``run``, warmed up on another stream as PyTorch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        run()
    return graph


def drafter() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Module()
    module.fc = nn.Linear(24, 8, bias=False)
    module.lm_head = nn.Linear(8, 16, bias=False)
    return module.to(GPU, torch.bfloat16)


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "fc.weight": torch.randn(8, 24, generator=generator).bfloat16(),
        "lm_head.weight": torch.randn(16, 8, generator=generator).bfloat16(),
    }


def test_a_captured_graph_runs_on_with_the_weights_that_were_swapped_in(tmp_path: Path) -> None:
    model, target = drafter(), nn.Linear(4, 4).to(GPU)
    x = torch.randn(3, 24, device=GPU, dtype=torch.bfloat16)
    out = torch.empty(3, 16, device=GPU, dtype=torch.bfloat16)
    graph = captured(lambda: out.copy_(model.lm_head(model.fc(x))))
    swapper = Swapper(model, target, None, 16)
    for version in (1, 2):
        new = weights(version)
        save_file(new, str(tmp_path / f"{version}.safetensors"))
        staged = swapper.stage(version, tmp_path / f"{version}.safetensors", content_sha256(new))
        graph.replay()
        before = out.clone()
        swapper.apply(staged)
        graph.replay()
        wanted = x @ new["fc.weight"].to(GPU).T @ new["lm_head.weight"].to(GPU).T
        torch.testing.assert_close(out, wanted)
        assert not torch.equal(out, before)
        assert swapper.read_back(staged, whole=True) == content_sha256(new)


def test_pieces_go_to_the_gpu_and_back_beside_the_steps_and_addresses_stay(tmp_path: Path) -> None:
    model, target = drafter(), nn.Linear(4, 4).to(GPU)
    model.lm_head = nn.Linear(8, 100_000, bias=False, dtype=torch.bfloat16, device=GPU)
    swapper = Swapper(model, target, None, 16)
    addresses = [p.data_ptr() for p in model.parameters()]
    for version in (1, 2):
        new = {**weights(version), "lm_head.weight": torch.randn(100_000, 8).bfloat16()}
        path = tmp_path / f"{version}.safetensors"
        save_file(new, str(path))
        swapper.begin_staging(version, path, "", consume=True)
        while swapper.busy:
            swapper.work(0.0, 1)
        staged = swapper.staged
        assert staged is not None, swapper.failure
        assert path.stat().st_size < 2000
        swapper.apply(staged)
        swapper.begin_read_back(staged, whole=True, leads=True)
        while swapper.busy:
            swapper.work(0.0, 1)
        assert swapper.unread == ""
        assert content_sha256(load_file(str(path))) == content_sha256(new)
    assert addresses == [p.data_ptr() for p in model.parameters()]


def test_weights_that_share_the_targets_storage_are_refused_on_the_gpu(tmp_path: Path) -> None:
    model = drafter()
    new = weights(1)
    save_file(new, str(tmp_path / "1.safetensors"))
    with pytest.raises(SwapRefused, match="share storage"):
        Swapper(model, model.lm_head, None, 16).stage(1, tmp_path / "1.safetensors", None)


class Mode:
    def __init__(self, verify: bool) -> None:
        self.forward_mode = self
        self.is_target_verify = lambda: verify


class LogitsProcessor:
    """What SGLang's does, with the hook on its forward that the plugin sets."""

    def __call__(self, hidden_states: torch.Tensor, metadata: Any) -> torch.Tensor:
        keep_last(self, hidden_states, metadata)
        return hidden_states.sum(-1)


def test_hidden_states_come_out_of_replayed_graphs() -> None:
    """Captured before anybody asks for them, the largest batch first, as SGLang does."""
    processor = LogitsProcessor()
    x = torch.zeros(4, 8, device=GPU)
    graphs = {
        rows: captured(lambda rows=rows: processor(2 * x[:rows], Mode(True))) for rows in (4, 2)
    }
    kept = LastHiddenState.of(processor)
    for value in (1.0, 5.0):
        processor(torch.ones(6, 8, device=GPU), Mode(False))  # a prefill in between
        x.fill_(value)
        for rows, graph in graphs.items():
            graph.replay()
            found = kept.take(rows, from_graph=True)
            assert found is not None
            torch.testing.assert_close(found, torch.full((rows, 8), 2 * value, device=GPU))
    assert kept.take(5, from_graph=True) is None
    eager = kept.take(6)
    assert eager is not None and bool((eager == 1).all())
    assert kept.take(7) is None


def test_a_drafters_graphs_leave_no_buffer() -> None:
    processor = LogitsProcessor()
    x = torch.zeros(4, 8, device=GPU)
    captured(lambda: processor(2 * x, Mode(False)))
    assert LastHiddenState.of(processor).take(1, from_graph=True) is None


def test_a_swap_waits_for_the_step_before_and_the_next_step_for_it(tmp_path: Path) -> None:
    """Steps run on a stream of their own, as under SGLang's overlap scheduling."""
    model, target = drafter(), nn.Linear(4, 4).to(GPU)
    swapper = Swapper(model, target, None, 16)
    new = weights(1)
    save_file(new, str(tmp_path / "1.safetensors"))
    staged = swapper.stage(1, tmp_path / "1.safetensors", None)
    old = model.fc.weight.detach().clone()
    schedule, forward = torch.cuda.Stream(), torch.cuda.Stream()
    busy = torch.randn(4096, 4096, device=GPU)
    torch.cuda.synchronize()
    with torch.cuda.stream(forward):
        for _ in range(50):
            busy = busy @ busy * 1e-2
        before = model.fc.weight.detach().clone()
    with torch.cuda.stream(schedule):
        swapper.apply(staged, forward)
    with torch.cuda.stream(forward):
        forward.wait_stream(schedule)
        after = model.fc.weight.detach().clone()
    assert swapper.read_back(staged, whole=True) == content_sha256(new)
    torch.cuda.synchronize()
    torch.testing.assert_close(before, old, rtol=0, atol=0)
    torch.testing.assert_close(after.cpu(), new["fc.weight"], rtol=0, atol=0)
