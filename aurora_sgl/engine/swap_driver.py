"""A swap from the sidecar's command to the live weights, the same on every rank.

The leading rank turns the command into requests of its own that travel through the scheduler's
request path, so that all ranks of a tensor-parallel group see them at the same place: first stage,
then apply. Before they apply, the ranks agree: all go live at this step, or none does.

Staging, and reading the live weights back, are done in pieces between steps, all in the scheduler's
own thread: see ``swap``. The leading rank then asks the sidecar for the hash of what it wrote, and
answers with it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aurora_sgl import wire
from aurora_sgl.engine.draft_kv import LiveVersion
from aurora_sgl.engine.swap import Swapper
from aurora_sgl.engine.swap_live import StagedWeights

logger = logging.getLogger("aurora_sgl")

_RETRY_SECONDS = 0.1  # between two questions whether all ranks have staged
#: Of the time between two steps, and in seconds (from, to): how long a swap may work there.
BUSY_SHARE, BUSY_SECONDS = 0.02, (0.0005, 0.004)
BUSY_PIECES = 16  # and how many pieces of 256 KB it may move
IDLE_SECONDS = 0.010  # where no request is served: one that comes waits so long at most
#: Seconds that the sidecar's hash is waited for where the command named no deadline.
_HASH_SECONDS = 60.0
_FAILED, _BUSY, _READY = 0, 1, 2  # what a rank says of its staging; the smallest decides


@dataclass(frozen=True, slots=True)
class StageSwap:
    """To every rank: stage these weights."""

    version_id: int
    path: str
    weights_sha256: str


@dataclass(frozen=True, slots=True)
class ApplySwap:
    """To every rank: if all have staged the version, copy it in, all at this step."""

    version_id: int


COMMANDS = (StageSwap, ApplySwap)


def abstain(command: StageSwap | ApplySwap) -> None:
    """On a rank that takes no part in swaps: say so where the others wait for its word."""
    if isinstance(command, ApplySwap):
        from sglang.srt.distributed.parallel_state import get_tp_group

        _worst_of_all_ranks(_FAILED, get_tp_group().world_size)


def _worst_of_all_ranks(mine: int, tp_size: int) -> int:
    if tp_size == 1:
        return mine
    from sglang.srt.distributed.parallel_state import get_tp_group

    agreed = torch.tensor([mine])
    torch.distributed.all_reduce(
        agreed, op=torch.distributed.ReduceOp.MIN, group=get_tp_group().cpu_group
    )
    return int(agreed[0])


class SwapDriver:
    """One per scheduler process. ``report`` takes what the sidecar is told; only the leading rank
    has it."""

    def __init__(
        self,
        swapper: Swapper,
        live: LiveVersion,
        boot_id: int,
        *,
        tp_size: int,
        report: Callable[[wire.Record], None] | None,
    ) -> None:
        self._swapper, self._live, self._boot_id = swapper, live, boot_id
        self._tp_size, self._report = tp_size, report
        self.forward_stream: Any = None  # where SGLang's steps run on a GPU
        self._asked: StageSwap | None = None
        self._staging = 0  # version that the ranks were told to stage; 0: none
        self._deadline_us = 0
        self._apply_after = 0.0
        self._worked_at = time.monotonic()
        self._answer: _Answer | None = None  # that the sidecar waits for

    @property
    def _whole(self) -> bool:
        return self._tp_size == 1

    def ask(self, command: wire.Stage) -> None:
        """On the leading rank: the sidecar wants a version live."""
        if self._answer is not None and self._answer.copied:
            self._say_live("")  # whoever should have told the hash asks for something else
        if self._asked is not None or self._staging or self._answer is not None:
            self._refuse(command.version_id, "another swap is being staged")
            return
        self._asked = StageSwap(command.version_id, command.path, command.weights_sha256)
        self._deadline_us = command.deadline_us
        self._apply_after = 0.0

    def work(self, *, idle: bool = False) -> None:
        """On every rank, between two steps and while there are none: a little of what is to do."""
        step = time.monotonic() - self._worked_at
        if self._swapper.busy and idle:
            self._swapper.work(IDLE_SECONDS, 1 << 20)
        elif self._swapper.busy:
            shortest, longest = BUSY_SECONDS
            self._swapper.work(min(max(shortest, BUSY_SHARE * step), longest), BUSY_PIECES)
        self._worked_at = time.monotonic()
        if self._answer is not None and not self._swapper.busy:
            self._go_on_answering(self._answer)

    def next_command(self) -> StageSwap | ApplySwap | None:
        """On the leading rank: what to put among the received requests now."""
        if self._asked is not None:
            asked, self._asked = self._asked, None
            self._staging = asked.version_id
            return asked
        if not self._staging or time.monotonic() < self._apply_after:
            return None
        if self._swapper.busy and not self._late:
            return None
        self._apply_after = time.monotonic() + _RETRY_SECONDS
        return ApplySwap(self._staging)

    @property
    def _late(self) -> bool:
        return 0 < self._deadline_us < wire.now_us()

    def obey(self, command: StageSwap | ApplySwap) -> None:
        """On every rank, at the same place in the request stream."""
        if isinstance(command, StageSwap):
            self._stage(command)
            return
        # Whatever goes wrong on this rank, the others wait for its word, here and once more.
        mine, reason = self._word(command)
        worst = _worst_of_all_ranks(mine, self._tp_size)
        if worst == _BUSY:
            return  # the leading rank asks again
        self._staging = 0
        staged = self._swapper.staged
        if worst == _FAILED or staged is None:
            self._swapper.drop()
            self._refuse(command.version_id, reason or "another rank could not stage the weights")
            return
        error = self._go_live(staged)
        worst = _worst_of_all_ranks(_READY if error is None else _FAILED, self._tp_size)
        if worst == _READY:
            self._is_live(staged)
            return
        if error is None:
            self._swapper.undo(staged)
        self._swapper.drop()
        if error is None:
            self._refuse(staged.version_id, "another rank could not copy the weights")
            return
        self._refuse(staged.version_id, f"copying failed: {type(error).__name__}: {error}")
        raise error

    def _word(self, command: ApplySwap) -> tuple[int, str]:
        """What this rank says of its staging, and why where that failed. Never raises."""
        try:
            if self._late:
                return _FAILED, "staging took longer than the sidecar waits"
            stands = self._stands(command)
            failure = self._swapper.failure if stands == _FAILED else None
        except Exception as error:
            return _FAILED, f"{type(error).__name__}: {error}"
        return stands, failure[1] if failure else ""

    def _go_live(self, staged: StagedWeights) -> Exception | None:
        """What went wrong; None: nothing. Never raises."""
        try:
            staged.apply_ms = self._swapper.apply(staged, self.forward_stream)
        except Exception as error:
            return error
        return None

    def _stage(self, command: StageSwap) -> None:
        try:
            path = Path(command.path)
            self._swapper.begin_staging(
                command.version_id, path, command.weights_sha256, consume=self._whole
            )
        except Exception as error:  # told where the ranks agree
            self._swapper.drop()
            self._swapper.failure = (command.version_id, f"{type(error).__name__}: {error}")

    def _stands(self, command: ApplySwap) -> int:
        """How far this rank is with the version."""
        staged = self._swapper.staged
        if staged is not None and staged.version_id == command.version_id:
            return _READY
        return _BUSY if self._swapper.busy else _FAILED

    def _refuse(self, version_id: int, reason: str) -> None:
        if self._report is not None:
            self._report(
                wire.SwapDone(self._boot_id, wire.now_us(), version_id, False, reason, "", 0.0, 0.0)
            )

    def _is_live(self, staged: StagedWeights) -> None:
        self._swapper.staged = None
        self._live.swapped(staged.version_id)
        logger.info(
            "aurora: drafter version %d is live (%.1f ms)", staged.version_id, staged.apply_ms
        )
        self._swapper.begin_read_back(staged, whole=self._whole, leads=self._report is not None)
        if self._report is not None:
            deadline_us = self._deadline_us or wire.now_us() + int(_HASH_SECONDS * 1e6)
            self._answer = _Answer(staged, wire.now_us(), deadline_us)

    # -- the answer, on the leading rank -------------------------------------------------------

    def _go_on_answering(self, answer: _Answer) -> None:
        """The live weights have been read back, or could not be."""
        if self._swapper.unread:
            self._say_live("", f"reading the live weights back failed: {self._swapper.unread}")
        elif not self._whole:  # its shards are those of the file
            self._say_live(answer.staged.weights_sha256)
        elif not answer.copied:
            answer.copied = True
            assert self._report is not None
            version_id = answer.staged.version_id
            self._report(wire.LiveCopied(self._boot_id, wire.now_us(), version_id))
        elif wire.now_us() > answer.deadline_us:
            logger.warning("aurora: the sidecar did not hash the live weights in time")
            self._say_live("")

    def hashed(self, command: wire.LiveHash) -> None:
        """The sidecar has hashed what was written from the live parameters."""
        answer = self._answer
        if answer is None or not answer.copied:
            return
        if answer.staged.version_id == command.version_id:
            self._say_live(command.live_sha256)

    def _say_live(self, live_sha256: str, reason: str = "") -> None:
        answer, self._answer = self._answer, None
        if answer is not None and self._report is not None:
            staged = answer.staged
            self._report(
                wire.SwapDone(
                    self._boot_id,
                    answer.at_us,
                    staged.version_id,
                    not reason,
                    reason,
                    live_sha256,
                    staged.staged_ms,
                    staged.apply_ms,
                )
            )

    def read_back_at_start(self, drafter: Path) -> str:
        """The live hash of the drafter that the server was started with."""
        return self._swapper.read_back_at_start(drafter, whole=self._whole)


@dataclass(slots=True)
class _Answer:
    """What the sidecar will be told of a version that went live at ``at_us``."""

    staged: StagedWeights
    at_us: int
    deadline_us: int
    copied: bool = False  # the sidecar knows that it can hash
