"""Case "greedy with frequency_penalty, ignore_eos": requests whose answers drafts would change are
served without drafts, whatever else asks for them."""

from __future__ import annotations

from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aurora_sgl.compat  # noqa: F401  (torchvision must import before transformers asks for it)
from aurora_sgl.engine import cpu

cpu.install()

import msgspec  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from sglang.srt.managers.schedule_batch import Req  # noqa: E402
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor  # noqa: E402
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402

from aurora_sgl.engine import one_token  # noqa: E402
from aurora_sgl.engine.cpu.sampling import tree_speculative_sampling_target_only  # noqa: E402
from aurora_sgl.engine.cpu.tree import verify_tree_greedy_cpu  # noqa: E402

DOCS = Path(__file__).resolve().parents[3] / "docs" / "operations.md"

#: A value of every parameter that is not its default; what drafts do to it stands in the module.
VALUES: dict[str, Any] = {
    "max_new_tokens": 3, "stop": ["x"], "stop_token_ids": {5}, "stop_regex": ["x+"],
    "temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "frequency_penalty": 0.5,
    "presence_penalty": -0.5, "repetition_penalty": 1.2, "min_new_tokens": 2, "n": 2,
    "beam_width": 2, "json_schema": "{}", "regex": "a", "ebnf": "root ::= 'a'",
    "structural_tag": "{}", "ignore_eos": True, "skip_special_tokens": False,
    "spaces_between_special_tokens": False, "no_stop_trim": True, "stream_interval": 2,
    "logit_bias": {"5": 1.0}, "sampling_seed": 7, "custom_params": {"mine": 1},
    "watermark": {"enabled": True}, "stop_strs": ["x"], "stop_regex_strs": ["x+"],
    "stop_str_max_len": 3, "stop_regex_max_len": 3, "is_normalized": True,
    "ebnf_full_assistant": True,
}  # fmt: skip
FIELDS = SamplingParams.__struct_fields__


def request(processor: str | None = None, **sampling: Any) -> Any:
    params = SamplingParams()
    for name, value in sampling.items():
        setattr(params, name, value)
    return SimpleNamespace(sampling_params=params, custom_logit_processor=processor)


def test_of_every_sampling_parameter_of_this_release_it_is_decided_what_drafts_do_to_it() -> None:
    """Fails when a release adds one: read what its verification does with it (eagle_utils), put it
    into ``one_token`` and into the table of docs/operations.md, and give it a value here."""
    decided = {*one_token.UNTOUCHED, *one_token.CHANGED, *one_token.SOMETIMES}
    assert set(FIELDS) == decided
    assert set(FIELDS) == set(VALUES)
    assert one_token.undecided(SamplingParams) == ()


@pytest.mark.parametrize("name", FIELDS)
def test_drafts_are_withheld_for_what_they_change_and_for_nothing_else(name: str) -> None:
    reasons = one_token.reasons(request(**{name: VALUES[name]}))
    assert reasons == ((name,) if name in one_token.CHANGED else ())


@pytest.mark.parametrize(
    ("made", "seeds", "reasons"),
    [
        (request(), True, ()),
        (request(frequency_penalty=0.0, repetition_penalty=1.0, min_new_tokens=0), False, ()),
        (request(frequency_penalty=-2.0), False, ("frequency_penalty",)),
        (
            request(presence_penalty=0.1, min_new_tokens=1),
            False,
            ("presence_penalty", "min_new_tokens"),
        ),
        (request(processor="{}"), False, ("custom_logit_processor",)),
        (request(processor=""), False, ()),
        (request(custom_params={"thinking_budget": 0}), False, ("thinking_budget",)),
        (request(custom_params={"thinking_budget": None}), False, ()),
        (request(custom_params=["thinking_budget"]), False, ()),
        (request(sampling_seed=3), True, ("sampling_seed",)),
        (request(sampling_seed=3), False, ()),
        (request(sampling_seed=3, top_k=1), True, ()),
    ],
)
def test_the_conditions_under_which_drafts_are_withheld(
    made: Any, seeds: bool, reasons: tuple[str, ...]
) -> None:
    assert one_token.reasons(made, seeds=seeds) == reasons


def test_a_parameter_of_a_later_release_counts_unless_it_has_its_default() -> None:
    class Later(SamplingParams, kw_only=True, array_like=True):
        new_penalty: float = 0.5

    assert one_token.undecided(Later) == (("new_penalty", 0.5),)
    later = SimpleNamespace(sampling_params=Later())
    assert one_token.reasons(later) == ()
    later.sampling_params.new_penalty = 0.6
    assert one_token.reasons(later) == ("new_penalty",)


def test_the_table_in_the_docs_has_every_parameter() -> None:
    table = DOCS.read_text()
    names = {*one_token.CHANGED, *one_token.SOMETIMES, one_token.PROCESSOR, "max_thinking_tokens"}
    public = {name for name in one_token.UNTOUCHED if not name.startswith(("stop_str", "is_norm"))}
    public -= {"stop_regex_strs", "stop_regex_max_len", "ebnf_full_assistant"}
    missing = {name for name in names | public if f"`{name}`" not in table}
    assert not missing


# -- the tree ------------------------------------------------------------------------------------

NODES, LEVELS, VOCABULARY = 6, 4, 12


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, ...]:
    """Trees of random links and tokens, and a target's answers after each node."""
    rows = draw(st.integers(1, 4))
    first = torch.full((rows, NODES), -1)
    sibling = torch.full((rows, NODES), -1)
    for row in range(rows):
        for node in range(NODES - 1, 0, -1):
            parent = draw(st.integers(0, node - 1))
            sibling[row, node], first[row, parent] = int(first[row, parent]), node
    tokens = st.lists(st.integers(0, 3), min_size=rows * NODES, max_size=rows * NODES)
    candidates = torch.tensor(draw(tokens)).view(rows, NODES)
    target = torch.tensor(draw(tokens)).view(rows, NODES)
    return first, sibling, candidates, target


def verify(
    first: torch.Tensor, sibling: torch.Tensor, candidates: torch.Tensor, target: torch.Tensor
) -> tuple[list[int], list[list[int]], list[int]]:
    rows = len(first)
    predicts = torch.zeros(rows * NODES, dtype=torch.int32)
    index = torch.full((rows, LEVELS), -1, dtype=torch.int32)
    accepted = torch.empty(rows, dtype=torch.int32)
    places = torch.arange(rows * NODES).view(rows, NODES)
    verify_tree_greedy_cpu(predicts, index, accepted, candidates, places, first, sibling, target)
    return predicts.tolist(), index.tolist(), accepted.tolist()


@settings(max_examples=100, deadline=None)
@given(batches(), st.data())
def test_a_row_without_drafts_gets_the_targets_token_and_the_others_what_they_had(
    batch: tuple[torch.Tensor, ...], data: st.DataObject
) -> None:
    first, sibling, candidates, target = batch
    alone = data.draw(st.lists(st.integers(0, len(first) - 1), unique=True, min_size=1))
    before = first.clone()
    verified = SimpleNamespace(retrieve_next_token=first)
    one_token.leave_alone(verified, alone)
    assert torch.equal(first, before), "SGLang may keep the links for later steps"
    _, index, accepted = verify(first, sibling, candidates, target)
    predicts, now_index, now_accepted = verify(
        verified.retrieve_next_token, sibling, candidates, target
    )
    for row in range(len(first)):
        if row in alone:
            assert now_accepted[row] == 0 and now_index[row] == [row * NODES, -1, -1, -1]
            assert predicts[row * NODES] == int(target[row, 0])
        else:
            assert (now_accepted[row], now_index[row]) == (accepted[row], index[row])


def test_a_sampled_row_without_drafts_draws_from_the_whole_distribution() -> None:
    first, sibling = torch.tensor([[1, -1]]), torch.full((1, 2), -1)
    verified = SimpleNamespace(retrieve_next_token=first)
    one_token.leave_alone(verified, [0])
    probs = torch.tensor([[[0.25, 0.75], [1.0, 0.0]]])
    drawn = []
    for coin in (0.0, 0.2, 0.3, 0.9):
        predicts = torch.zeros(2, dtype=torch.int32)
        index, accepted = torch.full((1, 2), -1).int(), torch.empty(1).int()
        tree_speculative_sampling_target_only(
            predicts, index, accepted, torch.tensor([[0, 1]]), torch.tensor([[0, 1]]),
            verified.retrieve_next_token, sibling, torch.zeros(1, 2), torch.tensor([coin]),
            probs, probs,
        )  # fmt: skip
        drawn.append(int(predicts[0]))
        assert int(accepted[0]) == 0, "its draft would have been taken at every coin"
    assert drawn == [0, 0, 1, 1]


# -- a client's own logit processor --------------------------------------------------------------


class Batch(SimpleNamespace):
    """Something that a weak reference can hold."""


class OnlyThree(CustomLogitProcessor):
    """Token 3, whatever the model says."""

    def __call__(
        self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None
    ) -> torch.Tensor:
        logits[:, 3] = 100.0
        return logits


@pytest.mark.parametrize("nodes", [1, 4])
def test_a_clients_logit_processor_reaches_the_rows_of_its_request_alone(
    monkeypatch: pytest.MonkeyPatch, nodes: int
) -> None:
    """SGLang's EAGLE verification leaves it out; here its own function is called with a batch as
    its scheduler makes one."""
    from sglang.srt.sampling import sampling_batch_info as info

    exec_ = SimpleNamespace(
        deterministic=SimpleNamespace(enable_deterministic_inference=False),
        features=SimpleNamespace(enable_custom_logit_processor=True, enable_watermark=False),
    )
    monkeypatch.setattr(info, "get_exec", lambda: exec_)
    reqs = []
    for processor in (None, OnlyThree.to_str()):
        req = Req("r", "", array("q", [1]), SamplingParams(temperature=0.0))
        req.custom_logit_processor = processor
        reqs.append(req)
    batch = Batch(reqs=reqs, device="cpu")
    batch.sampling_info = SamplingBatchInfo.from_schedule_batch(batch, VOCABULARY)
    logits = SimpleNamespace(next_token_logits=torch.zeros(2 * nodes, VOCABULARY))
    one_token.process_logits(SimpleNamespace(draft_token_num=nodes), batch, logits)
    best = logits.next_token_logits.argmax(-1).tolist()
    assert best == [0] * nodes + [3] * nodes
    assert not msgspec.structs.asdict(reqs[0].sampling_params)["custom_params"]
