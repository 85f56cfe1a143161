"""Sample traffic in several turns: what a user says next, whatever the answer was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from aurora_sgl.demo.prompts import Prompt
from aurora_sgl.hashing import sha256_bytes

#: By domain; of others ``_ANY``.
FOLLOW_UPS: Mapping[str, Sequence[str]] = {
    "chat": (
        "Can you say that in one sentence?",
        "Give me an example, please.",
        "Now put it more politely.",
        "Which part of that matters most?",
        "Turn it into a short list.",
        "How would you explain it to a child?",
        "What would you leave out?",
        "And what should I do first?",
    ),
    "code": (
        "Explain the first lines.",
        "Write a test for it.",
        "What happens with empty input?",
        "Can you make it shorter?",
        "Add type hints and a docstring.",
        "What does it cost for a million items?",
        "Write the same in JavaScript.",
        "Which error should it raise, and when?",
    ),
    "extraction": (
        "Write the same as YAML.",
        "Write only the keys, one a line.",
        "Now sort the keys by name.",
        "Write every value as a string.",
        "Write it on one line.",
        'Add a key "source" with the value "user".',
        "Write it as a Markdown table.",
        "Leave out the first key.",
    ),
}
_ANY = FOLLOW_UPS["chat"]


def with_turns(prompts: Iterable[Prompt], turns: int) -> list[Prompt]:
    """Each prompt as a chat of so many user turns; those with follow-ups of their own keep them.
    The same prompt always goes on in the same way."""
    return [
        replace(prompt, follow_ups=_follow_ups(prompt, turns - 1))
        if turns > 1 and not prompt.follow_ups
        else prompt
        for prompt in prompts
    ]


def _follow_ups(prompt: Prompt, count: int) -> tuple[str, ...]:
    texts = FOLLOW_UPS.get(prompt.domain, _ANY)
    begin = int(sha256_bytes(f"follow-ups:{prompt.prompt}".encode())[:8], 16)
    return tuple(texts[(begin + 3 * number) % len(texts)] for number in range(count))


def limited(prompts: Iterable[Prompt], requests: int | None) -> Iterator[Prompt]:
    """The first chats that make so many requests; the last one may be cut short. None: all."""
    left = requests
    for prompt in prompts:
        if left is None:
            yield prompt
            continue
        if left <= 0:
            return
        yield replace(prompt, follow_ups=prompt.follow_ups[: left - 1])
        left -= 1 + len(prompt.follow_ups)
