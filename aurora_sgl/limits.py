"""How much a group keeps in the store and in files. The limits lie in the store, one set a group,
so that no machine's settings cut what the others wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from aurora_sgl.errors import AuroraError

#: What each limit means, for people; the names are those of ``Limits``.
MEANING = {
    "trace_bytes": "bytes of trace files, the oldest go first",
    "event_days": "days of acceptance events (one row a verify step)",
    "request_days": "days of requests and of their traces",
    "minute_days": "days of roll-ups by minute; older ones are summed to hours",
    "hour_days": "days of roll-ups by hour",
    "versions": "newest versions whose weights are kept beside those in use",
    "refused_days": "days of refused records beside the spool",
}
_LEAST = {"trace_bytes": 0, "versions": 0}  # 1 for the others
_MOST = {"trace_bytes": 1 << 60}  # a hundred years, or as many versions, for the others
_DEFAULT_MOST = 36_500


@dataclass(frozen=True)
class Limits:
    """``trace_bytes`` is ``None`` where nobody has said it yet: then no trace is deleted for it."""

    trace_bytes: int | None = None
    event_days: int = 30
    request_days: int = 180
    minute_days: int = 30
    hour_days: int = 730
    versions: int = 10
    refused_days: int = 30

    def refuse_nonsense(self) -> None:
        """Raises ``AuroraError`` with what is wrong and what to do."""
        for name, value in self.as_rows().items():
            least, most = _LEAST.get(name, 1), _MOST.get(name, _DEFAULT_MOST)
            if not least <= value <= most:
                raise AuroraError(f"{name} is {value:,}; it can be from {least:,} to {most:,}")
        if self.request_days < self.event_days:
            raise AuroraError(
                f"request_days ({self.request_days}) can't be less than event_days "
                f"({self.event_days}): events belong to requests"
            )
        if self.hour_days < self.minute_days:
            raise AuroraError(
                f"hour_days ({self.hour_days}) can't be less than minute_days "
                f"({self.minute_days}): hours are made of minutes"
            )

    def as_rows(self) -> dict[str, int]:
        """The limits that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def changed(self, values: Mapping[str, int]) -> Limits:
        """These limits with other values. Raises ``AuroraError`` for an unknown name, or where
        they make no sense together."""
        for name in values:
            if name not in NAMES:
                raise AuroraError(f"there is no limit {name!r}; there is: {', '.join(NAMES)}")
        limits = Limits(**{**asdict(self), **values})
        limits.refuse_nonsense()
        return limits


NAMES = tuple(field.name for field in fields(Limits))
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def read(pairs: list[str]) -> dict[str, int]:
    """``trace_bytes=20GiB``, ``event_days=14``. Raises ``AuroraError`` for anything else."""
    values = {}
    for pair in pairs:
        name, separator, text = (part.strip() for part in pair.partition("="))
        digits, unit = text, ""
        if name == "trace_bytes":
            digits = text.upper().removesuffix("B").removesuffix("I").strip()
            unit = digits[-1:] if digits[-1:] in _UNITS else ""
            digits = digits.removesuffix(unit).strip()
        if not separator or not (digits.isascii() and digits.isdecimal()) or len(digits) > 18:
            raise AuroraError(
                f"{pair!r} is not NAME=NUMBER, such as event_days=14 or trace_bytes=20GiB"
            )
        values[name] = int(digits) * _UNITS[unit]
    return values
