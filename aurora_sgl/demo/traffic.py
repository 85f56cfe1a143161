"""Sample traffic to the OpenAI endpoint, a few requests at a time."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass

import httpx

from aurora_sgl.demo.prompts import Prompt

STREAMS = 2
_TIMEOUT = httpx.Timeout(600.0, connect=10.0)


@dataclass(frozen=True, slots=True)
class Sent:
    """One request that was answered, or not."""

    prompt: Prompt
    rid: str
    tokens: int  # completion tokens
    error: str = ""


@dataclass(frozen=True, slots=True)
class TrafficSample:
    """Some requests and the wall-clock time that they took together."""

    sent: tuple[Sent, ...]
    seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """None where nothing was sent: then nothing was measured."""
        if not self.sent or not self.seconds:
            return None
        return sum(one.tokens for one in self.sent) / self.seconds

    @property
    def failed(self) -> int:
        return sum(1 for one in self.sent if one.error)


async def send(
    client: httpx.AsyncClient,
    prompt: Prompt,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    headers: dict[str, str] | None = None,
    salt: str = "",
) -> AsyncIterator[Sent]:
    """The chat completions of one prompt and its follow-ups; an error is returned, not raised, and
    ends the chat.

    ``temperature`` is for a prompt that has none of its own. Requests with one ``salt`` share no
    cached prefix with others. No header names the conversation, as most clients name none.
    """
    labels = {"x-aurora-domain": prompt.domain, **(headers or {})}
    messages = [{"role": "user", "content": prompt.prompt}]
    for follow_up in (*prompt.follow_ups, ""):
        rid = uuid.uuid4().hex
        body = {
            "model": "default",
            "messages": messages,
            "max_tokens": min(max_tokens, prompt.max_tokens),
            "temperature": temperature if prompt.temperature is None else prompt.temperature,
            "rid": rid,
            **({"cache_salt": salt} if salt else {}),
        }
        try:
            answer = await client.post("/v1/chat/completions", json=body, headers=labels)
        except httpx.HTTPError as error:
            yield Sent(prompt, rid, 0, f"{type(error).__name__}: {error}")
            return
        if answer.status_code != 200:
            yield Sent(prompt, rid, 0, f"HTTP {answer.status_code}: {answer.text[:200]}")
            return
        content = answer.json()
        yield Sent(prompt, rid, int(content["usage"]["completion_tokens"]))
        text = content["choices"][0]["message"]["content"] or ""
        messages += [
            {"role": "assistant", "content": text},
            {"role": "user", "content": follow_up},
        ]


async def send_all(
    url: str,
    prompts: Iterable[Prompt],
    done: Callable[[Sent], None],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    headers: dict[str, str] | None = None,
    salt: str = "",
    streams: int = STREAMS,
) -> TrafficSample:
    """Send prompts and their follow-ups over ``streams`` connections; ``done`` is called for each
    answer."""
    waiting: Iterator[Prompt] = iter(prompts)
    sent: list[Sent] = []
    begun = time.monotonic()

    async def stream(client: httpx.AsyncClient) -> None:
        for prompt in waiting:
            async for one in send(
                client, prompt, max_tokens=max_tokens, temperature=temperature, headers=headers,
                salt=salt,
            ):  # fmt: skip
                sent.append(one)
                done(one)
                if one.error:
                    await asyncio.sleep(0.2)

    async with (
        httpx.AsyncClient(base_url=url, timeout=_TIMEOUT) as client,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(streams):
            group.create_task(stream(client))
    return TrafficSample(tuple(sent), time.monotonic() - begun)


async def measure(
    url: str,
    prompts: Iterable[Prompt],
    done: Callable[[Sent], None],
    *,
    drafts: str,
    tokens: int,
    temperature: float = 0.0,
) -> TrafficSample:
    """Prompts that are not to be trained on.

    ``drafts`` is the header x-aurora-speculate: ``yes``, ``no``, or ``whole`` for the whole draft
    shape in every step; empty: as the server decides. Nothing is taken from the prefix cache: each
    measurement prefills its prompts anew, with the drafter that is live.
    """
    headers = {"x-aurora-train": "no", **({"x-aurora-speculate": drafts} if drafts else {})}
    return await send_all(
        url, prompts, done, max_tokens=tokens, temperature=temperature, headers=headers,
        salt=f"measure-{uuid.uuid4().hex}",
    )  # fmt: skip
