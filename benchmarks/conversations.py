"""How many held-out answers stand in a training prompt, where no client names its conversation?

Chats of four turns through the demo model's tokenizer and chat template, under one system prompt,
many at a time; each request sends all messages again. Texts are those of the demo's prompts,
answers random words of them. Each request is placed in the index that a sidecar has, and its side
decided as training decides it. A held-out answer leaks when its text stands in the prompt of a
request that is trained on. *named by prompt* is what it came to without the index: each request on
the side of its own prompt.

    python -m benchmarks.conversations [--chats 500] [--seed 0] [--json]
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aurora_sgl.config import get_settings
from aurora_sgl.demo.model import demo_model
from aurora_sgl.demo.prompts import sample_prompts
from aurora_sgl.hashing import sha256_ints
from aurora_sgl.sequences.splits import GATE_SHARE, split_of
from aurora_sgl.sidecar.traces.turns import ChatTurn, PrefixHash, TurnIndex
from benchmarks.servers import report

TURNS, WORDS, AT_ONCE = 4, 45, 16
SYSTEM = "You are a helpful assistant of a small shop. Answer in a few sentences."
#: Share of answers with a token that their text is not cut into again, as sampled ones have.
ODD = 0.1
LEAKED = 0.01
LONG = 8192


@dataclass(frozen=True)
class Served:
    """One request as it was placed."""

    chat: int
    prompt: str
    answer: str
    own_key: str
    conversation: str


@dataclass
class Chat:
    """``opening``: its first message, if it is not its own; ``thinks``: what later prompts lack."""

    number: int
    opening: str = ""
    thinks: bool = False
    messages: list[dict[str, str]] = field(
        default_factory=lambda: [{"role": "system", "content": SYSTEM}]
    )


def answer_ids(tokenizer: Any, text: str, rng: random.Random) -> list[int]:
    """Tokens of an answer: those of the text, or of the text cut within a word."""
    if rng.random() >= ODD:
        return list(tokenizer.encode(text, add_special_tokens=False))
    cut = rng.randrange(1, len(text))
    parts = (text[:cut], text[cut:])
    return [one for part in parts for one in tokenizer.encode(part, add_special_tokens=False)]


def serve(chat: Chat, texts: list[str], index: TurnIndex, tokenizer: Any, rng: random.Random,
          request_id: int) -> Served:  # fmt: skip
    """The next turn of a chat."""
    is_first = len(chat.messages) == 1
    text = chat.opening if is_first and chat.opening else f"{rng.choice(texts)} ({request_id})"
    chat.messages.append({"role": "user", "content": text})
    prompt = tokenizer.apply_chat_template(
        chat.messages, tokenize=False, add_generation_prompt=True
    )
    ids = list(tokenizer.encode(prompt, add_special_tokens=False))
    words = " ".join(texts).split()
    answer = " ".join(rng.choices(words, k=WORDS))
    thought = "<think>" + " ".join(rng.choices(words, k=WORDS)) + "</think>" if chat.thinks else ""
    tokens = np.array([*ids, *answer_ids(tokenizer, thought + answer, rng)], np.int32)
    own_key = sha256_ints(ids)
    turn = index.place(request_id, tokens, len(ids), own_key)
    chat.messages.append({"role": "assistant", "content": answer})
    return Served(chat.number, prompt, answer, own_key, turn.conversation)


def run(chats: list[Chat], turns: int, tokenizer: Any, seed: int) -> list[Served]:
    """All chats, ``AT_ONCE`` of them at a time."""
    rng, index = random.Random(seed), TurnIndex(PrefixHash(b"benchmark"))
    texts = [one.prompt for one in sample_prompts()]
    waiting, served = list(chats), []
    active = [(waiting.pop(0), turns) for _ in range(min(AT_ONCE, len(waiting)))]
    while active:
        chat, left = active.pop(rng.randrange(len(active)))
        served.append(serve(chat, texts, index, tokenizer, rng, len(served) + 1))
        if left > 1:
            active.append((chat, left - 1))
        elif waiting:
            active.append((waiting.pop(0), turns))
    return served


def leaked(served: list[Served], key_of: Callable[[Served], str]) -> tuple[int, int]:
    """(held-out answers, those that stand in the prompt of a request that is trained on)."""
    sides = [split_of(key_of(one), dev_share=0.0, gate_share=GATE_SHARE) for one in served]
    trained = "\n".join(
        one.prompt for one, side in zip(served, sides, strict=True) if side == "train"
    )
    held_out = [one.answer for one, side in zip(served, sides, strict=True) if side == "gate"]
    return len(held_out), sum(answer in trained for answer in held_out)


def milliseconds() -> float:
    """To place a prompt of ``LONG`` tokens beside a full index: the median of 50."""
    index, rng = TurnIndex(PrefixHash(b"benchmark")), np.random.default_rng(0)
    for n, length in enumerate(rng.integers(1, LONG, index.most).tolist()):
        index.put(ChatTurn(n + 1000, length, f"{n:032x}", length + 9, f"{n + 1:032x}", "c"))
    times = []
    for n in range(50):
        tokens = rng.integers(0, 49_152, LONG + 200, dtype=np.int32)
        begun = time.perf_counter()
        index.place(n, tokens, LONG, "")
        times.append(time.perf_counter() - begun)
    return 1000 * float(np.median(times))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--keep", action="store_true", help="add them to results/operation.jsonl")
    parser.add_argument("--chats", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        str(Path(demo_model(get_settings().home, quiet=True)))
    )
    cost = milliseconds()
    kinds: dict[str, tuple[list[Chat], int]] = {
        "chats": ([Chat(n) for n in range(given.chats)], TURNS),
        "a third begin with Hi!": (
            [Chat(n, opening="" if n % 3 else "Hi!") for n in range(given.chats)], TURNS,
        ),
        "thinking left out": ([Chat(n, thinks=True) for n in range(given.chats)], TURNS),
        "single turns": ([Chat(n) for n in range(given.chats)], 1),
    }  # fmt: skip
    rows = []
    for kind, (chats, turns) in kinds.items():
        served = run(chats, turns, tokenizer, given.seed)
        _, before = (total := leaked(served, lambda one: one.own_key))
        held_out, after = leaked(served, lambda one: one.conversation.partition(":")[0])
        split = {(one.chat, one.conversation) for one in served}
        rows.append(
            {"kind": kind, "requests": len(served), "chats": len(chats),
             "conversations": len({one.conversation for one in served}),
             "chats in several": len(split) - len(chats),
             "leaked, named by prompt": before / max(1, total[0]), "held out": held_out,
             "leaked": after / max(1, held_out), "ms for 8,192": round(cost, 2),
             "met": after <= LEAKED * held_out and cost < 1.0}
        )  # fmt: skip
    report("conversations that nobody names", rows, as_json=given.json,
           keep="conversations" if given.keep else "")  # fmt: skip
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
