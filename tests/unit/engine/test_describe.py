"""What a server tells of itself: its shape, its ranks, and whether it can leave drafts out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import aurora_sgl.compat  # noqa: F401  (torchvision must import before transformers asks for it)
from aurora_sgl.engine import cpu

cpu.install()

import pytest  # noqa: E402
import torch  # noqa: E402
from sglang.srt import runtime_context  # noqa: E402

from aurora_sgl.config import get_settings  # noqa: E402
from aurora_sgl.engine.describe import describe_worker  # noqa: E402


class LlamaForCausalLMEagle3(torch.nn.Module):
    """The name of SGLang's own."""


def worker(*, eagle_config: Any = None, device: str = "cpu", **args: Any) -> Any:
    target = SimpleNamespace(
        model_path="some/model", revision=None, vocab_size=100, hidden_size=8, num_hidden_layers=32
    )
    drafter = SimpleNamespace(hf_config=SimpleNamespace(eagle_config=eagle_config))
    runner = SimpleNamespace(model_config=target, dtype=torch.bfloat16)
    return SimpleNamespace(
        server_args=SimpleNamespace(port=30000, speculative_algorithm="EAGLE3", **args),
        target_worker=SimpleNamespace(model_runner=runner),
        draft_worker=SimpleNamespace(
            draft_runner=SimpleNamespace(model_config=drafter, model=LlamaForCausalLMEagle3())
        ),
        speculative_num_steps=3,
        topk=4,
        speculative_num_draft_tokens=8,
        device=device,
    )


@pytest.fixture(autouse=True)
def ranks(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    parallel = SimpleNamespace(attn_dp_rank=0, tp_size=2, attn_tp_rank=0)
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: parallel)
    monkeypatch.setenv("AURORA_SERVER_NAME", "box")
    get_settings.cache_clear()
    yield parallel
    get_settings.cache_clear()


def test_a_server_tells_its_target_its_drafter_and_its_draft_shape() -> None:
    told, leads = describe_worker(worker())
    assert leads and told["name"] == "box"
    assert (told["depth"], told["topk"], told["nodes"]) == (3, 4, 8)
    assert told["draft_architecture"] == "LlamaForCausalLMEagle3" and told["algorithm"] == "EAGLE3"
    assert (told["target_hidden_size"], told["target_num_layers"]) == (8, 32)
    assert (told["dtype"], told["device"], told["tp_size"]) == ("bfloat16", "cpu", 2)
    assert told["target_revision"] == "" and told["rejection_sampling"] is False


@pytest.mark.parametrize("rank", [1, 3])
def test_ranks_that_do_not_lead_know_it(ranks: SimpleNamespace, rank: int) -> None:
    ranks.attn_tp_rank = rank
    assert describe_worker(worker())[1] is False


@pytest.mark.parametrize(("rank", "name"), [(None, "box"), (0, "box"), (2, "box/dp2")])
def test_data_parallel_ranks_have_names_of_their_own(
    ranks: SimpleNamespace, rank: int | None, name: str
) -> None:
    ranks.attn_dp_rank = rank
    told, _ = describe_worker(worker())
    assert (told["name"], told["dp_rank"]) == (name, rank or 0)


@pytest.mark.parametrize(("replica", "name"), [(0, "box"), (1, "box/dp1")])
def test_replicas_of_plain_data_parallelism_too_whose_attention_knows_no_others(
    ranks: SimpleNamespace, replica: int, name: str
) -> None:
    ranks.dp_rank = replica
    told, _ = describe_worker(worker())
    assert (told["name"], told["dp_rank"]) == (name, replica)


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (None, [1, 15, 28]),  # SGLang's own choice for 32 layers
        ({}, [1, 15, 28]),
        ({"eagle_aux_hidden_state_layer_ids": [2, 10, 30]}, [2, 10, 30]),
    ],
)
def test_the_layers_that_feed_the_drafter_are_its_configs_or_sglangs(
    config: Any, layers: list[int]
) -> None:
    assert describe_worker(worker(eagle_config=config))[0]["aux_layers"] == layers


def test_on_cuda_and_with_sglangs_adaptive_mode_every_step_carries_drafts() -> None:
    assert describe_worker(worker())[0]["plain_steps_possible"]
    assert not describe_worker(worker(device="cuda"))[0]["plain_steps_possible"]
    assert not describe_worker(worker(speculative_adaptive=True))[0]["plain_steps_possible"]


def test_a_server_of_an_older_sglang_lacks_some_flags() -> None:
    told, _ = describe_worker(worker())
    assert told["drafter_path"] == "" and told["rejection_sampling"] is False
