"""The log of a process of ours: a record is a line, whatever text of others stands in it."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def begin(as_json: bool = False) -> None:
    """Log to stderr from now on, for people or for machines."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if as_json else OneLine(FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class OneLine(logging.Formatter):
    """Line ends, and what a terminal would obey, are written as Python writes them. A traceback
    still takes its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = one_line(record.message)
        return super().formatMessage(record)


class JsonLines(logging.Formatter):
    """One object a record: ``time`` (UTC), ``level``, ``logger``, ``message``, ``process``, and of
    a failure its traceback in ``exception``."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "process": record.process,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def as_record(line: str) -> str:
    """Why a process ends, as a record for machines."""
    return JsonLines().format(
        logging.LogRecord("aurora_sgl", logging.ERROR, "", 0, line, None, None)
    )


def one_line(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
