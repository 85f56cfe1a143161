"""One swap at a time: stage, command, answer; what failed waits before it is tried again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from aurora_sgl import wire
from aurora_sgl.errors import AuroraError
from aurora_sgl.processes.priority import when_idle
from aurora_sgl.sidecar.swap.staging import StagedFile, Stager, Wanted

#: Seconds that the engine has to answer a Stage command, and steps for each byte of the file: it
#: takes at least some 1.5 MB a step, twice.
DEADLINE_SECONDS = 60.0
STEPS_PER_BYTE = 2 / 1.5e6
STEP_SECONDS = 0.1  # at least; else twice what the engine's last steps took
BACKOFF_SECONDS = (5.0, 300.0)

log = logging.getLogger(__name__)


def patience_for(size: int, hello: wire.Hello) -> float:
    """Seconds that an engine has for a drafter of so many bytes: its steps carry the pieces, and
    those of a large target on a busy machine take long."""
    step = max(STEP_SECONDS, 2 * hello.counters.get("step_ms", 0.0) / 1000)
    return DEADLINE_SECONDS + STEPS_PER_BYTE * size * step


class Swaps:
    """What was staged and sent to one boot of the engine."""

    def __init__(self, stager: Stager, send: Callable[[wire.Command], bool]) -> None:
        self._stager = stager
        self._send = send
        self._pending: StagedFile | None = None
        self._boot_id = 0
        self._deadline = 0.0
        self._failed: tuple[int, int] = (0, 0)  # version and generation that failed
        self._failures = 0
        self._retry_at = 0.0
        self.applied = 0
        self.refused = 0
        self.last_apply_ms = 0.0
        self.last_staged_ms = 0.0

    @property
    def busy(self) -> bool:
        return self._pending is not None

    def begin(self, wanted: Wanted, generation: int, hello: wire.Hello) -> str:
        """Stage and send. The reason when that failed; empty when it was sent or has to wait."""
        key = (wanted.version_id, generation)
        if key != self._failed:
            self._failed, self._failures, self._retry_at = key, 0, 0.0
        if self.busy or time.monotonic() < self._retry_at:
            return ""
        try:
            staged = when_idle(lambda: self._stager.stage(wanted, hello))
        except AuroraError as error:
            return self._fail(str(error))
        patience = patience_for(staged.size, hello)
        deadline = wire.now_us() + int(patience * 1e6)
        command = wire.Stage(wanted.version_id, str(staged.path), wanted.weights_sha256, deadline)
        if not self._send(command):
            self._stager.discard(staged)
            return self._fail("the engine does not take commands")
        self._pending, self._boot_id = staged, hello.boot_id
        self._deadline = time.monotonic() + patience
        log.info("version %d is staged for the swap", wanted.version_id)
        return ""

    def copied(self, record: wire.LiveCopied) -> None:
        """The engine has written the live weights into the file: tell it their hash."""
        sha256, pending = "", self._pending
        if pending is not None and pending.wanted.version_id == record.version_id:
            try:
                sha256 = when_idle(lambda: self._stager.live_sha256(pending))
            except (AuroraError, OSError) as error:
                log.error("what the engine read back can't be hashed: %s", error)
        self._send(wire.LiveHash(record.version_id, sha256))

    def answered(self, done: wire.SwapDone) -> str:
        """Take the engine's answer. The reason when the swap failed; empty when it is live."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._stager.discard(pending)
        self.last_apply_ms, self.last_staged_ms = done.apply_ms, done.staged_ms
        if not done.ok:
            self.refused += 1
            return self._fail(f"the engine refused version {done.version_id}: {done.reason}")
        self.applied += 1
        if pending is not None and done.live_sha256 != pending.wanted.weights_sha256:
            return self._fail(
                f"the hash read back from the model ({done.live_sha256[:16]}) is not that of "
                f"version {done.version_id} ({pending.wanted.weights_sha256[:16]})"
            )
        self._failed, self._failures = (0, 0), 0
        log.info("version %d is live (%.1f ms in the step)", done.version_id, done.apply_ms)
        return ""

    def expire(self, boot_id: int) -> str:
        """Give up on an answer that is too late or whose engine is gone. The reason, if so."""
        if self._pending is None:
            return ""
        if boot_id == self._boot_id and time.monotonic() < self._deadline:
            return ""
        self._stager.discard(self._pending)
        version_id = self._pending.wanted.version_id
        self._pending = None
        if boot_id != self._boot_id:
            self._failures, self._retry_at = 0, 0.0
            return ""
        return self._fail(f"the engine did not answer to version {version_id} in time")

    def _fail(self, reason: str) -> str:
        pause = min(BACKOFF_SECONDS[0] * 2**self._failures, BACKOFF_SECONDS[1])
        self._failures += 1
        self._retry_at = time.monotonic() + pause
        log.error("%s; next try in %.0f s", reason, pause)
        return reason

    def close(self) -> None:
        if self._pending is not None:
            self._stager.discard(self._pending)
