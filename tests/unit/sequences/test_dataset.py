"""From served requests to training sequences: what is taken, made whole, split and left out."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from aurora_sgl.clock import utc_now
from aurora_sgl.drafter import scratch
from aurora_sgl.drafter.architectures.eagle import EAGLE
from aurora_sgl.drafter.config import DrafterConfig
from aurora_sgl.errors import AuroraError
from aurora_sgl.hashing import sha256_ints
from aurora_sgl.sequences.dataset import Dataset, build
from aurora_sgl.sequences.splits import split_of, why_not_judged
from aurora_sgl.store.queries.requests import RecentRequest
from tests.support.drafter_cases import HIDDEN, VOCAB, target_folder


def feature(tokens: list[int], position: int, width: int) -> torch.Tensor:
    """Like hidden states, features depend on the tokens up to their position alone."""
    seed = int(sha256_ints(tokens[: position + 1])[:8], 16)
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def whole(tokens: list[int], begin: int, end: int, width: int) -> torch.Tensor:
    return torch.stack([feature(tokens, t, width) for t in range(begin, end)])


class Traffic:
    """Writes trace files and the rows that the store would return for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[RecentRequest] = []

    def add(
        self,
        tokens: list[int],
        output_start: int,
        *,
        start: int = 0,
        greedy: bool = True,
        **fields: object,
    ) -> RecentRequest:
        number = len(self.rows) + 1
        end = len(tokens) - 1
        save_file(
            {
                "tokens": torch.tensor(tokens),
                "aux": whole(tokens, start, end, 3 * HIDDEN),
                "last": whole(tokens, start, end, HIDDEN),
                "step_starts": torch.zeros(0, dtype=torch.int64),
            },
            str(self.folder / f"{number}.safetensors"),
            metadata={"request_id": str(number), "output_start": str(output_start), "greedy": "1"},
        )
        row = RecentRequest(
            request_id=number,
            domain="chat",
            conversation_hash="",
            admitted_at=utc_now(),
            finished_at=utc_now() + timedelta(seconds=number),
            sampling={},
            prompt_tokens=output_start,
            completion_tokens=len(tokens) - output_start,
            uri=f"{number}.safetensors",
            sha256="",
            bytes=1,
            start=start,
            end=end,
            output_start=output_start,
            prompt_sha256=sha256_ints(tokens[:output_start]),
            head_sha256=sha256_ints(tokens[:16]),
            greedy=greedy,
            accept_rule="greedy" if greedy else "target_sampling",
        )
        row = replace(row, **fields)  # type: ignore[arg-type]
        self.rows.append(row)
        return row

    def build(self, config: DrafterConfig, **options: float) -> Dataset:
        shares = {"dev_share": 0.0, "gate_share": 0.0, **options}
        return build(self.rows, lambda uri: self.folder / uri, config, **shares)  # type: ignore[arg-type]


@pytest.fixture
def traffic(tmp_path: Path) -> Traffic:
    return Traffic(tmp_path)


@pytest.fixture
def config(tmp_path: Path) -> DrafterConfig:
    return scratch.make(target_folder(tmp_path / "target"), draft_vocab_size=24).config


def tokens(seed: int, count: int = 30, shared: int = 0) -> list[int]:
    common = torch.randint(0, VOCAB, (shared,), generator=torch.Generator().manual_seed(99))
    own = torch.randint(0, VOCAB, (count - shared,), generator=torch.Generator().manual_seed(seed))
    return [*common.tolist(), *own.tolist()]


def test_a_whole_trace_becomes_a_sequence_as_it_is(traffic: Traffic, config: DrafterConfig) -> None:
    text = tokens(1)
    traffic.add(text, 20)
    (sequence,) = traffic.build(config).train
    assert sequence.tokens.tolist() == text and sequence.output_start == 20
    assert torch.equal(sequence.features, whole(text, 0, 29, 3 * HIDDEN))
    assert torch.equal(sequence.last, whole(text, 0, 29, HIDDEN))


def test_an_eagle_drafter_gets_the_last_hidden_state(traffic: Traffic, tmp_path: Path) -> None:
    config = scratch.make(target_folder(tmp_path / "t"), architecture=EAGLE).config
    traffic.add(tokens(1), 20)
    (sequence,) = traffic.build(config).train
    assert torch.equal(sequence.features, sequence.last)


def test_a_cached_prefix_is_filled_from_a_trace_that_shares_its_tokens(
    traffic: Traffic, config: DrafterConfig
) -> None:
    text = tokens(2, shared=18)
    traffic.add(tokens(1, shared=18), 22)
    traffic.add(text, 22, start=18)
    data = traffic.build(config)
    assert not data.left_out
    assert torch.equal(data.train[1].features, whole(text, 0, 29, 3 * HIDDEN))


def test_a_prefix_may_be_pieced_together_from_several_traces(
    traffic: Traffic, config: DrafterConfig
) -> None:
    first = tokens(1, shared=17)
    second = [*first[:24], *tokens(2, 8)]
    third = [*second[:28], *tokens(3, 6)]
    traffic.add(first, 26)
    traffic.add(second, 28, start=24)
    traffic.add(third, 31, start=28)
    data = traffic.build(config)
    assert not data.left_out
    assert torch.equal(data.train[2].features, whole(third, 0, len(third) - 1, 3 * HIDDEN))


def test_a_prefix_shorter_than_the_indexed_head_is_found_too(
    traffic: Traffic, config: DrafterConfig
) -> None:
    text = tokens(2, shared=5)
    traffic.add(tokens(1, shared=5), 22)
    traffic.add(text, 22, start=5)
    data = traffic.build(config)
    assert torch.equal(data.train[1].features, whole(text, 0, 29, 3 * HIDDEN))


def test_a_prefix_that_no_trace_holds_leaves_the_request_out_and_counts_it(
    traffic: Traffic, config: DrafterConfig
) -> None:
    traffic.add(tokens(1, shared=17), 22)
    traffic.add(tokens(2, shared=17), 22, start=19)  # they share 17 tokens only
    data = traffic.build(config)
    assert [row.request_id for row, _ in data.train.items] == [1]
    assert data.left_out == {"prefix": 1}


def test_penalised_processed_short_and_broken_requests_are_left_out_and_counted(
    traffic: Traffic, config: DrafterConfig
) -> None:
    traffic.add(tokens(1), 20)
    traffic.add(tokens(2), 20, sampling={"frequency_penalty": 0.5})
    traffic.add(tokens(3), 20, sampling={"custom_logit_processor": True})
    traffic.add(tokens(4, 22), 20)
    traffic.add(tokens(5), 20, uri="gone.safetensors")
    traffic.add(tokens(6), 20, sampling={"without_drafts": "thinking_budget"})
    data = traffic.build(config)
    assert len(data.train) == 1
    assert data.left_out == {"penalties": 1, "processor": 2, "short": 1, "broken": 1}


@pytest.mark.parametrize("rule", ["greedy", "target_sampling"])
@pytest.mark.parametrize("name", ["json_schema", "regex", "ebnf", "structural_tag", "logit_bias"])
def test_requests_under_a_grammar_or_a_bias_are_judged_and_known_as_such(
    traffic: Traffic, config: DrafterConfig, name: str, rule: str
) -> None:
    """A server records a bias under its name and every grammar as one; others may say more."""
    names = (name, name if name == "logit_bias" else "grammar")
    for number, each in enumerate(names):
        traffic.add(tokens(number), 20, sampling={each: True}, accept_rule=rule)
    data = traffic.build(config, gate_share=1.0)
    assert len(data.gate) == 2 and not data.left_out
    assert all(sequence.constrained for sequence in data.gate)


@pytest.mark.parametrize(
    ("sampling", "rule", "reason"),
    [
        ({"temperature": 0.7, "repetition_penalty": 1.0, "regex": None}, "target_sampling", ""),
        ({"presence_penalty": 0, "min_new_tokens": 0}, "greedy", ""),
        ({"min_new_tokens": 4}, "greedy", "penalties"),
        ({"grammar": True, "presence_penalty": -0.5}, "greedy", "penalties"),
        ({"custom_params": {"a": 1}}, "greedy", "processor"),
        ({"without_drafts": "sampling_seed"}, "target_sampling", ""),
        ({"without_drafts": "watermark, sampling_seed"}, "target_sampling", "processor"),
        ({}, "block_verification", "block_verification"),
        ({"temperature": 0.7, "top_k": 1 << 30}, "rejection_sampling", ""),
        ({"temperature": 0.7, "grammar": True}, "rejection_sampling", "unknown_law"),
        ({}, "rejection_sampling", "unknown_law"),
        ({}, "mixed", "mixed_rules"),
        ({}, "", "unknown_rule"),
    ],
)
def test_each_request_has_one_word_for_why_it_is_not_judged(
    traffic: Traffic, sampling: dict[str, object], rule: str, reason: str
) -> None:
    row = traffic.add(tokens(1), 20, sampling=sampling, accept_rule=rule)
    assert why_not_judged(row) == reason


def test_a_truncated_file_is_one_clear_error(traffic: Traffic, config: DrafterConfig) -> None:
    traffic.add(tokens(1), 20)
    data = traffic.build(config)
    path = traffic.folder / "1.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(AuroraError, match="cut short"):
        data.train[0]


def test_features_of_another_width_are_refused(traffic: Traffic, tmp_path: Path) -> None:
    wide = scratch.make(target_folder(tmp_path / "w", hidden_size=32), draft_vocab_size=24).config
    traffic.add(tokens(1), 20)
    with pytest.raises(AuroraError, match="width 48, the drafter takes 96"):
        traffic.build(wide).train[0]


def test_splits_are_disjoint_by_conversation_and_by_prompt(
    traffic: Traffic, config: DrafterConfig
) -> None:
    for i in range(60):
        traffic.add(tokens(i % 30), 20, conversation_hash=f"c{i % 7}" if i % 2 else "")
    data = traffic.build(config, dev_share=0.2, gate_share=0.3)
    keys = [
        {row.conversation_hash or row.prompt_sha256 for row, _ in part.items}
        for part in (data.train, data.dev, data.gate)
    ]
    assert all(keys)
    assert not (keys[0] & keys[1] or keys[0] & keys[2] or keys[1] & keys[2])
    prompts = [
        {row.prompt_sha256 for row, _ in part.items} for part in (data.train, data.dev, data.gate)
    ]
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])
    kept = sum(len(part) for part in (data.train, data.dev, data.gate))
    assert kept + data.left_out["duplicate"] == 60 and kept > 30


def test_a_request_never_leaves_the_gate_when_the_dev_share_changes() -> None:
    held = [k for k in map(str, range(500)) if split_of(k, dev_share=0, gate_share=0.2) == "gate"]
    assert 60 < len(held) < 140
    assert all(split_of(k, dev_share=0.5, gate_share=0.2) == "gate" for k in held)


def test_memory_stays_within_the_budget_while_all_requests_are_read(
    traffic: Traffic, config: DrafterConfig
) -> None:
    for i in range(12):
        traffic.add(tokens(i), 20)
    data = build(
        traffic.rows,
        lambda uri: traffic.folder / uri,
        config,
        dev_share=0,
        gate_share=0,
        cache_bytes=30_000,
    )
    for _ in range(2):
        assert len(list(data.train)) == 12
    loader = data.train.loader
    assert 0 < loader.held <= 30_000 and len(loader.cache) < 12
