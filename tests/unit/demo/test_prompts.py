"""The sample traffic, and what a broken prompts file says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from aurora_sgl.demo.prompts import SAMPLES, load_prompts, sample_prompts, to_measure, to_serve
from aurora_sgl.errors import AuroraError
from tools import make_prompts


def test_the_samples_are_at_least_120_different_prompts_in_each_of_three_domains() -> None:
    prompts = sample_prompts()
    assert len({prompt.prompt for prompt in prompts}) == len(prompts)
    counts = Counter(prompt.domain for prompt in prompts)
    assert set(counts) == {"chat", "code", "extraction"}
    assert min(counts.values()) >= 120


def test_each_domain_has_held_out_prompts_that_are_never_served() -> None:
    prompts = sample_prompts()
    measured = to_measure(prompts)
    assert min(Counter(prompt.domain for prompt in measured).values()) >= 12
    assert not {prompt.prompt for prompt in measured} & {p.prompt for p in to_serve(prompts)}
    assert len(measured) + len(to_serve(prompts)) == len(prompts)


def test_prompts_about_one_function_are_served_or_held_out_together() -> None:
    names = [line.split("(")[0] for line in make_prompts.FUNCTIONS.strip().splitlines()]
    for name in names:
        about = [prompt for prompt in sample_prompts() if f"`{name}(" in prompt.prompt]
        assert len({prompt.held_out for prompt in about}) <= 1, name


def test_the_data_file_is_what_its_generator_writes() -> None:
    assert SAMPLES.read_text() == make_prompts.content()


def test_only_the_prompt_is_required_and_a_tenth_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question {n}"}) + "\n\n" for n in range(40)))
    prompts = load_prompts(path)
    assert {(prompt.domain, prompt.max_tokens) for prompt in prompts} == {("default", 128)}
    assert len(to_measure(prompts)) == 4
    assert to_measure(load_prompts(path)) == to_measure(prompts)


def test_a_prompt_may_have_a_temperature_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    lines = [{"prompt": "a", "temperature": 1}, {"prompt": "b", "temperature": 0}, {"prompt": "c"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [prompt.temperature for prompt in load_prompts(path)] == [1.0, 0.0, None]


def test_a_repeated_prompt_is_not_both_trained_on_and_held_out(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question {n % 3}"}) + "\n" for n in range(9)))
    prompts = load_prompts(path)
    assert len({prompt.prompt for prompt in to_measure(prompts)}) == 1
    assert not {p.prompt for p in to_measure(prompts)} & {p.prompt for p in to_serve(prompts)}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "x"', "not JSON"),
        ('["x"]', "expected an object"),
        ('{"text": "x"}', "'prompt' must be"),
        ('{"prompt": "  "}', "'prompt' must be"),
        ('{"prompt": "half \\ud83d"}', "'prompt' must be"),
        ("[" * 20_000, "not JSON"),
        ('{"prompt": "x", "domain": "a b"}', "'domain' must be"),
        ('{"prompt": "x", "domain": 3}', "'domain' must be"),
        ('{"prompt": "x", "max_tokens": 0}', "'max_tokens' must be"),
        ('{"prompt": "x", "max_tokens": true}', "'max_tokens' must be"),
        ('{"prompt": "x", "held_out": "yes"}', "'held_out' must be"),
        ('{"prompt": "x", "temperature": -0.1}', "'temperature' must be"),
        ('{"prompt": "x", "temperature": 2.5}', "'temperature' must be"),
        ('{"prompt": "x", "temperature": NaN}', "'temperature' must be"),
        ('{"prompt": "x", "temperature": true}', "'temperature' must be"),
        ('{"prompt": "x", "temperature": "warm"}', "'temperature' must be"),
        ('{"prompt": "x", "follow_ups": "why?"}', "'follow_ups' must be"),
        ('{"prompt": "x", "follow_ups": ["why?", " "]}', "'follow_ups' must be"),
        ('{"prompt": "x", "follow_ups": [1]}', "'follow_ups' must be"),
        ('{"prompt": "x", "follow_ups": ["half \\ud83d"]}', "'follow_ups' must be"),
    ],
)
def test_a_broken_line_is_named_with_its_number_and_its_fault(
    tmp_path: Path, line: str, reason: str
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(AuroraError) as caught:
        load_prompts(path)
    message = str(caught.value)
    assert "mine.jsonl, line 3: " in message
    assert reason in message
    assert "\n" not in message


def test_a_file_that_cannot_be_read_or_is_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AuroraError, match="cannot be read"):
        load_prompts(tmp_path / "absent.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AuroraError, match="not UTF-8"):
        load_prompts(tmp_path / "binary.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(AuroraError, match="holds no prompt"):
        load_prompts(tmp_path / "empty.jsonl")


def test_the_mark_that_editors_put_before_utf_8_is_no_part_of_the_first_line(
    tmp_path: Path,
) -> None:
    path = tmp_path / "mine.jsonl"
    lines = [json.dumps({"prompt": f"Häuser {n}"}, ensure_ascii=False) for n in "ab"]
    path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    assert [prompt.prompt for prompt in load_prompts(path)] == ["Häuser a", "Häuser b"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_text_of_another_encoding_is_named_in_one_line(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes('\ufeff{"prompt": "x"}\n'.encode(encoding))
    words = f"is {encoding[:6].upper()} text and not UTF-8"
    with pytest.raises(AuroraError, match=words) as caught:
        load_prompts(path)
    assert "\n" not in str(caught.value)
