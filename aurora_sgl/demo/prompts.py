"""Sample traffic: the project's own prompts, or the user's from a JSON Lines file.

One line is one request, of which only ``prompt`` is required:
``{"prompt": "...", "domain": "chat", "max_tokens": 128, "temperature": 0.7}``.
``"follow_ups": ["...", ...]`` are what the user says after each answer: the line is a chat.
``"held_out": true`` marks prompts that measure drafters and are never trained on; in a file without
such marks a tenth of each domain is taken, by the hash of the prompt.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aurora_sgl.errors import AuroraError
from aurora_sgl.hashing import sha256_bytes

SAMPLES = Path(__file__).with_name("prompts.jsonl")
DEFAULT_MAX_TOKENS = 128
HELD_OUT_SHARE = 0.1
MAX_TOKENS_LIMIT = 100_000
MAX_TEMPERATURE = 2.0

#: What a file of another encoding begins with; the longer ones first.
_OTHER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
#: What the header x-aurora-domain carries unchanged.
_DOMAIN = re.compile(r"[A-Za-z0-9_.\-]{1,64}")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request of the sample traffic, or the chat that begins with it."""

    domain: str
    prompt: str
    max_tokens: int
    held_out: bool = False
    temperature: float | None = None  # None: the demo's
    follow_ups: tuple[str, ...] = ()  # the user's next turns


def sample_prompts() -> list[Prompt]:
    """The 420 prompts of the project's own, in the order in which the demo sends them."""
    return load_prompts(SAMPLES)


def load_prompts(path: Path) -> list[Prompt]:
    """Reads a JSON Lines file; empty lines are skipped.

    Raises ``AuroraError`` with file, line number and reason for the first line that is broken, and
    when the file can't be read or holds no prompt to train on.
    """
    lines = _text_of(path).split("\n")
    prompts = [
        _prompt_of(line, f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not any(prompt.held_out for prompt in prompts):
        prompts = _with_some_held_out(prompts)
    if all(prompt.held_out for prompt in prompts):
        raise AuroraError(f"{path}: holds no prompt that may be trained on")
    return prompts


def _text_of(path: Path) -> str:
    """UTF-8, with or without the mark that Windows' editors put before it."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AuroraError(f"{path}: cannot be read: {error.strerror}") from error
    for mark, name in _OTHER_MARKS:
        if content.startswith(mark):
            raise AuroraError(f"{path}: is {name} text and not UTF-8; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AuroraError(f"{path}: is not UTF-8 text (byte {error.start})") from error


def to_serve(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The traffic: what is sent, recorded and trained on."""
    return [prompt for prompt in prompts if not prompt.held_out]


def to_measure(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The held-out prompts; send them with ``x-aurora-train: no``."""
    return [prompt for prompt in prompts if prompt.held_out]


def _prompt_of(line: str, where: str) -> Prompt:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise AuroraError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise AuroraError(f"{where}: expected an object such as {{'prompt': '...'}}")
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise AuroraError(f"{where}: 'prompt' must be a text that is not empty")
    if _half_a_character(prompt):
        raise AuroraError(f"{where}: 'prompt' must be text; it holds half of a character")
    domain = row.get("domain", "default")
    if not isinstance(domain, str) or not _DOMAIN.fullmatch(domain):
        raise AuroraError(f"{where}: 'domain' must be 1 to 64 letters, digits or any of _ . -")
    max_tokens = row.get("max_tokens", DEFAULT_MAX_TOKENS)
    if type(max_tokens) is not int or not 1 <= max_tokens <= MAX_TOKENS_LIMIT:
        raise AuroraError(f"{where}: 'max_tokens' must be a whole number of at least 1")
    held_out = row.get("held_out", False)
    if not isinstance(held_out, bool):
        raise AuroraError(f"{where}: 'held_out' must be true or false")
    follow_ups = _follow_ups(row, where)
    return Prompt(domain, prompt, max_tokens, held_out, _temperature(row, where), follow_ups)


def _follow_ups(row: dict[str, Any], where: str) -> tuple[str, ...]:
    texts = row.get("follow_ups", [])
    if not isinstance(texts, list) or not all(map(_is_text, texts)):
        raise AuroraError(f"{where}: 'follow_ups' must be a list of texts that are not empty")
    return tuple(texts)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and not _half_a_character(value)


def _half_a_character(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _temperature(row: dict[str, Any], where: str) -> float | None:
    value = row.get("temperature")
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value <= MAX_TEMPERATURE:
        raise AuroraError(f"{where}: 'temperature' must be a number from 0 to {MAX_TEMPERATURE:g}")
    return float(value)


def _with_some_held_out(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Marks a tenth of each domain, at least one of a domain with two different prompts."""
    texts: dict[str, set[str]] = defaultdict(set)
    for prompt in prompts:
        texts[prompt.domain].add(prompt.prompt)
    chosen = {
        (domain, text)
        for domain, domain_texts in texts.items()
        if len(domain_texts) > 1
        for text in sorted(domain_texts, key=lambda text: sha256_bytes(text.encode()))[
            : max(1, round(len(domain_texts) * HELD_OUT_SHARE))
        ]
    }
    return [
        replace(prompt, held_out=(prompt.domain, prompt.prompt) in chosen) for prompt in prompts
    ]
