"""Let the target answer the prompts: greedy, in batches, shard by shard, to be stopped at any time.

    python -m benchmarks.corpus.generate [--narrow 1440] [--code 1632] [--chat 9600]

Domains take turns, so that a stop leaves something of each. A shard that exists is kept. On a GPU
several shards are answered at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import aurora_sgl.compat  # noqa: F401  (torchvision beside a CPU torch)
from aurora_sgl.demo.model import demo_model
from benchmarks.corpus.features import DEVICE, quick_dtype
from benchmarks.corpus.prompts import DOMAINS, CorpusPrompt, corpus_prompts
from benchmarks.corpus.shards import DATA, Answered, read_shard, shards, write_shard

SHARD = 96  # requests
TOGETHER = 1 if DEVICE.type == "cpu" else 6  # shards
PROMPT_TOKENS = 220  # longer prompts are passed over
ANSWER_TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for domain, wanted in (("narrow", 1440), ("code", 1632), ("chat", 9600)):
        parser.add_argument(f"--{domain}", type=int, default=wanted)
    parser.add_argument("--prompts-file", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(given.threads)
    prompts = corpus_prompts(given.prompts_file)
    target = Target(demo_model(Path(os.environ.get("AURORA_HOME", "aurora-data"))))
    wanted = {domain: min(getattr(given, domain), len(prompts[domain])) for domain in DOMAINS}
    begun, made = time.monotonic(), 0
    for first in range(0, max(wanted.values()) // SHARD, TOGETHER):
        for domain in DOMAINS:
            paths = {
                shard: given.data / domain / f"{shard:04d}.npz"
                for shard in range(first, min(first + TOGETHER, wanted[domain] // SHARD))
            }
            paths = {shard: path for shard, path in paths.items() if not path.exists()}
            if not paths:
                continue
            asked = [p for s in paths for p in prompts[domain][s * SHARD : (s + 1) * SHARD]]
            answered = target.answer(asked)
            for shard, path in paths.items():
                write_shard(path, [one for one in answered if one.number // SHARD == shard])
            made += sum(len(one.tokens) - one.prompt_tokens for one in answered)
            rate = made / (time.monotonic() - begun)
            where = f"{domain} {first} to {max(paths)}"
            print(f"{where}: {made} answer tokens, {rate:.0f}/s", file=sys.stderr, flush=True)
    for domain in DOMAINS:
        rows = [one for path in shards(domain, given.data) for one in read_shard(path)]
        answer = sum(len(one.tokens) - one.prompt_tokens for one in rows)
        print(f"{domain}: {len(rows)} requests, {answer} answer tokens")


class Target:
    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=quick_dtype())
        self.model: Any = model.eval().to(DEVICE)
        self.stop = {self.tokenizer.eos_token_id, self.model.config.eos_token_id}

    def answer(
        self,
        prompts: list[CorpusPrompt],
        *,
        temperature: float = 0.0,
        most: int = PROMPT_TOKENS,
    ) -> list[Answered]:
        """Answers in the order of their numbers; prompts of more than ``most`` tokens have none."""
        rows = [(prompt, self._tokens(prompt)) for prompt in prompts]
        rows = [row for row in rows if len(row[1]) <= most]
        rows.sort(key=lambda row: len(row[1]))
        half = (len(rows) + 1) // 2
        parts = [part for part in (rows[:half], rows[half:]) if part]
        found = [one for part in parts for one in self._batch(part, temperature)]
        return sorted(found, key=lambda one: one.number)

    def text_of(self, answered: Answered) -> str:
        """The answer alone."""
        ids = answered.tokens[answered.prompt_tokens :].tolist()
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _tokens(self, prompt: CorpusPrompt) -> list[int]:
        chat = [
            {"role": ("user", "assistant")[turn % 2], "content": text}
            for turn, text in enumerate((*prompt.history, prompt.text))
        ]
        ids = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True)
        return list(ids["input_ids"] if hasattr(ids, "keys") else ids)

    def _batch(
        self, rows: list[tuple[CorpusPrompt, list[int]]], temperature: float
    ) -> list[Answered]:
        import torch

        width = max(len(tokens) for _, tokens in rows)
        pad = self.model.config.pad_token_id or 0
        ids = torch.tensor([[pad] * (width - len(t)) + t for _, t in rows])
        mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for _, t in rows])
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids.to(DEVICE),
                attention_mask=mask.to(DEVICE),
                do_sample=temperature > 0,
                **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}),
                max_new_tokens=ANSWER_TOKENS,
                eos_token_id=sorted(self.stop),
                pad_token_id=pad,
            )
        found = []
        for (prompt, tokens), row in zip(rows, out[:, width:].tolist(), strict=True):
            ends = [at for at, token in enumerate(row) if token in self.stop]
            answer = row[: ends[0] + 1] if ends else row
            whole = np.array(tokens + answer, np.uint16)
            found.append(
                Answered(
                    prompt.domain,
                    prompt.number,
                    whole,
                    len(tokens),
                    prompt.conversation,
                    temperature,
                )
            )
        return found


if __name__ == "__main__":
    main()
