"""Case "llama3 rope scaling without its factors", and its kind: what is missing from a
``config.json`` or of another type is one line, in ``serve`` and in ``versions import``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_sgl import store
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.drafter import architectures, checkpoint, rope_json
from aurora_sgl.drafter.rope import inverse_frequencies
from aurora_sgl.errors import AuroraError, Unusable
from aurora_sgl.rollout.versions import import_version
from aurora_sgl.store import queries
from tests.support import published
from tests.support.drafter_cases import VOCAB

LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR: dict[str, Any] = {"rope_type": "linear", "factor": 2.0}
ODD: tuple[Any, ...] = (None, "8", [8], {}, True, -1, 0, math.nan, math.inf, 10**400)


def config(**change: Any) -> dict[str, Any]:
    raw = {
        **published.COMMON,
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": published.DRAFT_VOCAB,
        **change,
    }
    return {name: value for name, value in raw.items() if value is not ...}


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", [LLAMA3, LINEAR])
def test_a_whole_rope_is_read_under_both_names(kind: dict[str, Any], key: str) -> None:
    read = architectures.from_json(config(**{key: kind}))
    assert read.rope == kind and len(inverse_frequencies(read)) == 2
    old = {"type" if name == "rope_type" else name: value for name, value in kind.items()}
    assert architectures.from_json(config(**{key: old})).rope == kind
    json.dumps(architectures.to_json(read))


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("value", [..., *ODD], ids=repr)
@pytest.mark.parametrize(
    ("kind", "name"),
    [(rope, name) for rope in (LLAMA3, LINEAR) for name in rope if name != "rope_type"],
)
def test_a_scaled_rope_without_a_number_it_needs_is_one_line(
    kind: dict[str, Any], name: str, value: Any, key: str
) -> None:
    rope = {n: v for n, v in {**kind, name: value}.items() if v is not ...}
    with pytest.raises(AuroraError) as refused:
        architectures.from_json(config(**{key: rope}))
    line = str(refused.value)
    assert name in line and "\n" not in line and len(line) < 200


@pytest.mark.parametrize(
    "kind", ["yarn", "dynamic", "longrope", "su", "mrope", "proportional", "x" * 999, "", None]
)
def test_a_kind_of_rope_that_is_not_ours_is_refused(kind: Any) -> None:
    with pytest.raises(AuroraError, match="rope") as refused:
        architectures.from_json(config(rope_scaling={"rope_type": kind, "factor": 2.0}))
    assert len(str(refused.value)) < 120


@pytest.mark.parametrize("rope", ["llama3", [LLAMA3], 3, {"full_attention": LLAMA3}])
def test_a_rope_of_another_form_is_refused(rope: Any) -> None:
    with pytest.raises(AuroraError):
        architectures.from_json(config(rope_scaling=rope))


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {**LLAMA3, "high_freq_factor": 0.5}},
        {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1]}},
        {"partial_rotary_factor": 0.5},
        {"rope_theta": "10000"},
        {"rope_theta": 0},
        {"head_dim": 5},
        {"num_key_value_heads": 3},
        {"draft_vocab_size": VOCAB + 1},
        {"architectures": "LlamaForCausalLMEagle3"},
        {"architectures": [3]},
        {"eagle_config": ["x"]},
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": "123"}},
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, "2", 3]}},
        {"aurora": "x"},
    ],
    ids=repr,
)
def test_what_no_drafter_can_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(AuroraError) as refused:
        architectures.from_json(config(**change))
    assert "\n" not in str(refused.value)


def test_the_original_positions_may_stand_beside_the_rope() -> None:
    beside = {name: value for name, value in LLAMA3.items() if not name.startswith("original")}
    read = architectures.from_json(config(rope_scaling=beside, original_max_position_embeddings=32))
    assert read.rope == LLAMA3


#: Values that a damaged or a foreign config.json can hold.
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(),
    st.text(max_size=8),
    st.just(LLAMA3),
    st.lists(st.one_of(st.integers(), st.text(max_size=3)), max_size=3),
    st.dictionaries(st.sampled_from([*LLAMA3, "rope_theta", "x"]), st.integers(-9, 9), max_size=4),
)
KEYS = st.sampled_from([*config(), "head_dim", "rope_scaling", "rope_parameters", "rope_theta",
                        "eagle_config", "target_hidden_size", "aurora", "fc_norm", "bias",
                        "partial_rotary_factor", "original_max_position_embeddings"])  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=3))
def test_any_value_of_any_key_is_read_or_refused(change: dict[str, Any]) -> None:
    try:
        read = architectures.from_json(config(**change))
    except AuroraError as error:
        assert "\n" not in str(error)
        return
    assert inverse_frequencies(read).isfinite().all()
    assert architectures.from_json(json.loads(json.dumps(architectures.to_json(read)))) == read


def test_an_import_refuses_such_a_rope_in_one_line(tmp_path: Path) -> None:
    folder = published.eagle3_for_sglang(tmp_path / "drafter")
    raw = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "llama3"}
    (folder / "config.json").write_text(json.dumps({**raw, "rope_scaling": rope}))
    (problem,) = checkpoint.validate(folder)
    assert "rope_scaling of type llama3 lacks 'factor'" in problem
    engine = store.connect(f"sqlite:///{tmp_path / 'store.db'}")
    store.upgrade(engine)
    with store.session(engine) as s:
        queries.groups.ensure_group(s, "default", "target", "r1", "LlamaForCausalLMEagle3")
    with pytest.raises(Unusable, match="lacks 'factor'"):
        import_version(engine, ArtifactRoot(str(tmp_path / "files")), folder, "default")
    engine.dispose()


def test_what_the_reader_needs_is_what_the_arithmetic_takes() -> None:
    for kind, names in rope_json.NEEDS.items():
        if kind != "default":
            assert set(names) <= (LLAMA3 if kind == "llama3" else LINEAR).keys()
