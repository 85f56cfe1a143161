"""Sends notifications to their receivers: at least once each, in order, until they are taken.

A receiver that does not answer, or has trouble of its own, is left alone for a while that doubles;
what waits for it is in the store and goes out afterwards, also from the next scheduler. The webhook
is signed as standardwebhooks.com says, so that receivers verify it with a library of theirs.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx

from aurora_sgl import __version__
from aurora_sgl.clock import utc_now
from aurora_sgl.config import NotifySettings
from aurora_sgl.errors import AuroraError, printable
from aurora_sgl.scheduler.notifications import INFO, SLACK, WEBHOOK, targets
from aurora_sgl.store import queries
from aurora_sgl.store.link import StoreLink
from aurora_sgl.store.models import Notification

#: Seconds before the second try; each further pause is twice as long, up to the longest.
PAUSES = (5.0, 900.0)
#: Notifications that are sent in one round.
ROUND = 20
#: Answers that mean: later. Any other 4xx is about this one notification.
LATER = (408, 425, 429)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Letter:
    """What a receiver gets of one notification. ``uid`` stays the same at each try."""

    uid: str
    group: str
    kind: str
    severity: str
    title: str
    text: str
    happened_at: datetime
    details: Mapping[str, Any]


@dataclass(frozen=True)
class SendingAttempt:
    """How one try ended. ``later``: the receiver as a whole has trouble, try it again after
    ``seconds`` (0: as long as our own pause says)."""

    delivered: bool
    error: str = ""
    later: bool = False
    seconds: float = 0.0


class Receivers:
    """The HTTP side: a letter to a receiver, once. Addresses and secrets never leave it."""

    def __init__(self, settings: NotifySettings, *, now: Callable[[], datetime] = utc_now) -> None:
        """Raises ``AuroraError`` for a secret that is not base64 behind ``whsec_``."""
        self._settings, self._now = settings, now
        self._secret = _key(settings.secret.get_secret_value())
        self._client = httpx.Client(timeout=settings.seconds, follow_redirects=False)

    def close(self) -> None:
        self._client.close()

    def send(self, target: str, letter: Letter) -> SendingAttempt:
        """Never raises."""
        address = {WEBHOOK: self._settings.webhook, SLACK: self._settings.slack}[target]
        try:
            body, headers = self._envelope(target, letter)
            answer = self._client.post(address.get_secret_value(), content=body, headers=headers)
        except httpx.TimeoutException:
            return SendingAttempt(
                False, f"no answer within {self._settings.seconds:g} s", later=True
            )
        except Exception as error:  # its text may hold the address
            return SendingAttempt(False, f"no answer ({type(error).__name__})", later=True)
        if answer.is_success:
            return SendingAttempt(True)
        code = answer.status_code
        later = code in LATER or code >= 500 or answer.is_redirect
        return SendingAttempt(False, f"it answered {code}", later, _retry_after(answer))

    def _envelope(self, target: str, letter: Letter) -> tuple[bytes, dict[str, str]]:
        headers = {
            "content-type": "application/json",
            "user-agent": f"aurora-sgl/{__version__}",
        }
        link = self._settings.link
        if target == SLACK:
            return json.dumps({"text": slack_text(letter, link)}).encode(), headers
        body = json.dumps(payload(letter, link), allow_nan=False).encode()
        second = str(int(self._now().timestamp()))
        headers |= {"webhook-id": letter.uid, "webhook-timestamp": second}
        if self._secret:
            signed = f"{letter.uid}.{second}.".encode() + body
            digest = hmac.new(self._secret, signed, hashlib.sha256).digest()
            headers["webhook-signature"] = f"v1,{base64.b64encode(digest).decode()}"
        return body, headers


def payload(letter: Letter, link: str = "") -> dict[str, Any]:
    """What the webhook gets; documented in docs/notifications.md."""
    return {
        "type": letter.kind,
        "timestamp": letter.happened_at.astimezone(UTC).isoformat(),
        "data": {
            "id": letter.uid,
            "group": letter.group,
            "severity": letter.severity,
            "title": letter.title,
            "text": letter.text,
            "link": link,
            **({"details": dict(letter.details)} if letter.details else {}),
        },
    }


def slack_text(letter: Letter, link: str = "") -> str:
    """One message in Slack's format; what clients sent can't mention anybody in it."""
    head = f"*[{letter.severity}] {_slack(letter.title)}* (group {_slack(letter.group)})"
    lines = [head, _slack(letter.text)]
    if link:
        lines.append(f"<{_slack(link)}|Open the dashboard>")
    return "\n".join(lines)


def _slack(text: str) -> str:
    shown = printable(" ".join(text.split()))
    for character, name in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        shown = shown.replace(character, name)
    return shown.replace("*", "\u2217").replace("`", "\u02cb")


def _key(secret: str) -> bytes:
    if not secret.startswith("whsec_"):
        return secret.encode()
    try:
        return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except (binascii.Error, ValueError):
        raise AuroraError(
            "AURORA_NOTIFY_SECRET begins with whsec_, and what follows is no base64"
        ) from None


def _retry_after(answer: httpx.Response) -> float:
    """Seconds that a receiver asks for, at most an hour."""
    text = answer.headers.get("retry-after", "")
    return min(3600.0, float(text)) if text.isdigit() else 0.0


class Courier:
    """Takes what is due from the store to the receivers. All calls from one thread."""

    def __init__(
        self,
        link: StoreLink,
        group: str,
        settings: NotifySettings,
        *,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._link, self._group, self._settings, self._now = link, group, settings, now
        self._receivers = Receivers(settings, now=now)
        self._targets = targets(settings)
        self._failures = dict.fromkeys(self._targets, 0)
        self._closed_until: dict[str, datetime] = {}

    def close(self) -> None:
        self._receivers.close()

    def round(self, group_id: int) -> int:
        """Send what is due; how many were delivered. Raises ``StoreAway``: then an event may be
        sent again, with the same id."""
        delivered, closed, now = 0, set[str](), self._now()
        open_ = [one for one in self._targets if self._closed_until.get(one, now) <= now]
        if not open_:
            return 0
        with self._link.session(write=False) as s:
            due = queries.notifications.due_deliveries(s, group_id, open_, self._now(), limit=ROUND)
            letters = [(one.target, one.attempts, row.id, self._letter(row)) for one, row in due]
        for target, attempts, row_id, letter in letters:
            if target in closed:
                continue
            outcome = self._receivers.send(target, letter)
            if outcome.later:
                closed.add(target)
            self._note(row_id, target, attempts, letter, outcome)
            delivered += outcome.delivered
        return delivered

    def _letter(self, row: Notification) -> Letter:
        return Letter(
            row.uid, self._group, row.kind, row.severity, row.title, row.text, row.happened_at,
            dict(row.details),
        )  # fmt: skip

    def _note(
        self, row_id: int, target: str, attempts: int, letter: Letter, outcome: SendingAttempt
    ) -> None:
        now = self._now()
        failures = self._failures[target]
        pause = outcome.seconds or min(
            PAUSES[1], PAUSES[0] * 2 ** min(failures if outcome.later else attempts, 30)
        )
        state = "delivered" if outcome.delivered else "waiting"
        if outcome.delivered:
            if failures:
                log.info("notifications reach %s again", target)
            self._failures[target] = 0
        else:
            if outcome.later:
                self._failures[target] = failures + 1
                self._closed_until[target] = now + timedelta(seconds=pause)
            if not failures:
                log.warning("a notification does not reach %s: %s; trying again", target,
                            outcome.error)  # fmt: skip
            if now - letter.happened_at >= timedelta(hours=self._settings.give_up_hours):
                state = "given_up"
                log.error("notification %r is given up: %s", letter.title, outcome.error)
        with self._link.session() as s:
            queries.notifications.end_attempt(
                s,
                row_id,
                target,
                state=state,
                next_try_at=now + timedelta(seconds=0 if outcome.later else pause),
                error=outcome.error,
            )


def try_receivers(settings: NotifySettings, *, group: str, actor: str) -> dict[str, SendingAttempt]:
    """Send a test to each receiver now. Raises ``AuroraError`` where there is none."""
    names = targets(settings)
    if not names:
        raise AuroraError(
            "no receiver is set; name one with AURORA_NOTIFY_WEBHOOK or AURORA_NOTIFY_SLACK"
        )
    title = "Notifications of Aurora-SGL arrive here"
    letter = Letter(
        uuid.uuid4().hex, group, "test", INFO, title, f"{actor} tried it.", utc_now(), {}
    )
    receivers = Receivers(settings)
    try:
        return {target: receivers.send(target, letter) for target in names}
    finally:
        receivers.close()
