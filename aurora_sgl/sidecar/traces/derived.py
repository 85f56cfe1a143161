"""Conversations of requests whose client names none, kept with their traces.

What this server remembers of turns it reads from the store, where those of the others are too: a
chat whose turns go to two servers stays one conversation, and a restart forgets only turns whose
traces are gone, which nobody learns from or judges by any more. After a purge it is read anew.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy.orm import Session

from aurora_sgl.sidecar.traces.turns import ChatTurn, Ints, PrefixHash, TurnIndex
from aurora_sgl.store import queries
from aurora_sgl.store.salt import made_key

#: By how much clocks of servers may differ, and how long a transaction may take.
SLACK = timedelta(seconds=60)
#: Requests longer than this are conversations of their own.
MOST_TOKENS = 1 << 18


class DerivedConversations:
    """Used by the batcher's thread alone."""

    def __init__(self) -> None:
        self._index: TurnIndex | None = None
        self._read_to: datetime | None = None
        self._purges: tuple[int, int] = (0, 0)

    def place(self, s: Session, request_id: int, tokens: Ints, prompt_tokens: int) -> None:
        """Note the conversation of a request whose trace was just added, after :meth:`refresh`.
        That of a client stays; without tokens (of a spool from before) the request is one of its
        own."""
        assert self._index is not None
        own_key = queries.traces.unnamed_prompt(s, request_id)
        if not own_key or not 0 < prompt_tokens <= len(tokens) <= MOST_TOKENS:
            return
        turn = self._index.place(request_id, tokens, prompt_tokens, own_key)
        queries.traces.set_turn(
            s,
            request_id,
            prompt_key=turn.prompt_key,
            answer_key=turn.answer_key,
            answer_tokens=turn.answer_tokens,
            conversation=turn.conversation,
        )

    def refresh(self, s: Session) -> None:
        """Read what other servers added; everything at the start and after a purge."""
        purges = queries.traces.purges(s)
        if self._index is None:
            self._index = TurnIndex(PrefixHash(made_key(s.connection())))
        elif purges != self._purges:
            self._index.forget()
            self._read_to = None
        self._purges = purges
        since = self._read_to - SLACK if self._read_to is not None else None
        for row in queries.traces.turns(s, since=since, limit=self._index.most):
            self._read_to = max(row.created_at, self._read_to or row.created_at)
            self._index.put(
                ChatTurn(
                    row.request_id,
                    row.output_start,
                    row.prompt_key,
                    row.answer_tokens,
                    row.answer_key,
                    row.conversation_hash,
                )
            )
