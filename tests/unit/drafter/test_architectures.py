"""Drafter architectures: what is asked of their table, and that nobody asks for their names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aurora_sgl.draft_shape import DraftShape
from aurora_sgl.drafter import architectures, scratch
from aurora_sgl.drafter.architectures import ARCHITECTURES
from aurora_sgl.drafter.model import Draft, Drafter, accepted_of
from aurora_sgl.drafter.target import TargetHead
from aurora_sgl.errors import AuroraError
from tests.support.drafter_cases import requests, target_folder

ROOT = Path(__file__).resolve().parents[3]
OURS = ROOT / "aurora_sgl" / "drafter" / "architectures"
#: What a question may not be about: names in config.json, SGLang's flags, our classes, constants.
NAMES = {
    word
    for name, kind in ARCHITECTURES.items()
    for word in (name, kind.algorithm, kind.__name__, kind.__name__.upper())
} | {word.lower() for kind in ARCHITECTURES.values() for word in (kind.algorithm, kind.__name__)}
#: engine/cpu/drafting.py covers the forward of one class of SGLang's; it says why there.
ALLOWED = {"aurora_sgl/engine/cpu/drafting.py: type(model).__name__ != 'LlamaForCausalLMEagle3'"}
ASKING = {"isinstance", "issubclass", "startswith", "endswith", "removesuffix", "removeprefix"}


def names_in(node: ast.AST) -> set[str]:
    found = set()
    for one in ast.walk(node):
        if isinstance(one, ast.Constant) and isinstance(one.value, str):
            found.add(one.value)
        elif isinstance(one, ast.Name):
            found.add(one.id)
        elif isinstance(one, ast.Attribute):
            found.add(one.attr)
    return found


def questions(code: str) -> Iterator[str]:
    """Comparisons, matches, type checks and look-ups in a table that name an architecture, and
    whatever is called ``is_eagle...``."""
    for node in ast.walk(ast.parse(code)):
        asked: list[ast.AST] = []
        if isinstance(node, ast.Compare | ast.match_case):
            asked = [node] if isinstance(node, ast.Compare) else [node.pattern]
        elif isinstance(node, ast.Dict):
            asked = [key for key in node.keys if key is not None]
        elif isinstance(node, ast.Call):
            called = (
                node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
            )
            asked = [*node.args] if called in ASKING else []
        names = {name for part in asked for name in names_in(part)}
        if isinstance(node, ast.Attribute | ast.Name | ast.FunctionDef | ast.arg):
            name = getattr(node, "attr", "") or getattr(node, "id", "") or getattr(node, "name", "")
            names |= (
                {"Eagle"} if (name or getattr(node, "arg", "")).startswith("is_eagle") else set()
            )
        if names & NAMES:
            yield ast.unparse(node)


def test_only_an_architectures_own_module_asks_which_one_it_is() -> None:
    folders = ("aurora_sgl", "benchmarks", "dashboard", "migrations", "tools")
    found = {
        f"{path.relative_to(ROOT)}: {question}"
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if OURS not in path.parents
        for question in questions(path.read_text())
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    "code",
    [
        "if config.is_eagle: pass",
        "x = architecture == EAGLE3",
        "x = name in ('EAGLE', 'EAGLE3')",
        "x = {'EAGLE3': 3, 'EAGLE': 1}[algorithm]",
        "x = isinstance(drafter, Eagle3)",
        "x = type(drafter) is eagle3.Eagle3",
        "x = architecture.endswith('Eagle3')",
        "match algorithm:\n    case 'EAGLE': pass",
        "x = config.architecture != 'LlamaForCausalLMEagle'",
    ],
)
def test_every_spelling_of_the_question_is_seen(code: str) -> None:
    assert list(questions(code))


def test_what_only_names_an_architecture_is_no_question() -> None:
    code = "x = make(EAGLE3)\nraw['eagle_config'] = {'eagle_aux_hidden_state_layer_ids': []}"
    assert list(questions(code)) == []


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(AuroraError, match="LlamaForCausalLMEagle3 or LlamaForCausalLMEagle"):
        architectures.named("LlamaForCausalLM")
    with pytest.raises(AuroraError, match="not a drafter: architecture LlamaForCausalLM"):
        architectures.from_json({"architectures": ["LlamaForCausalLM"]}, shapes={"norm.weight": ()})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_accepted_drafts_are_counted_as_a_walk_through_the_whole_drafts_counts_them(
    tmp_path: Path, name: str
) -> None:
    # A soft head: saturated scores tie, and ties have no order.
    target = target_folder(tmp_path / "t", tied=False, head_scale=0.05)
    head = TargetHead.load(target)
    drafter = scratch.make(target, draft_vocab_size=40, architecture=name, seed=3)
    torch.manual_seed(0)
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, mean=0.05, std=0.3)
    shape, roots = DraftShape(3, 4, 8), torch.arange(6, 22)
    for one in requests(head, 4):
        features = drafter.features(one.features, one.last)
        counts = drafter.accepted(one.tokens, features, roots, shape, head)
        walked = Drafter.accepted(drafter, one.tokens, features, roots, shape, head)
        assert counts.tolist() == walked.tolist()
        # A text that goes on as it was drafted is accepted to the end of the path.
        root = roots[5:6]
        draft = drafter.propose(one.tokens, features, root, shape, head)[0]
        path, node = [], 0
        while node in draft.parents:
            node = draft.parents.index(node) + 1
            path.append(draft.tokens[node - 1])
        followed = torch.cat((one.tokens[: int(root) + 1], torch.tensor(path)))
        assert drafter.accepted(followed, features, root, shape, head).tolist() == [len(path)]
        assert path


def test_a_walk_through_a_draft_stops_at_the_first_token_that_no_child_has() -> None:
    draft = Draft(tokens=[4, 5, 6, 5], parents=[0, 0, 2, 1])
    assert [accepted_of(draft, log) for log in ([5, 6, 9], [4, 5], [4, 6], [6], [])] == [
        2, 2, 1, 0, 0,
    ]  # fmt: skip
