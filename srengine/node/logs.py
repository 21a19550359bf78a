"""Diagnostics as one JSON object a line on stderr: time, level, logger, event, and the facts."""

from __future__ import annotations

import datetime as dt
import json
import logging
import sys
from typing import Final

_STANDARD: Final = frozenset(logging.LogRecord("", 0, "", 0, "", None, None).__dict__) | {
    "message",
    "asctime",
    "taskName",
}


class JsonFormatter(logging.Formatter):
    """Renders a record; what was given as ``extra`` becomes fields of their own."""

    def __init__(self, node: str) -> None:
        super().__init__()
        self._node = node

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        line: dict[str, object] = {
            "time": dt.datetime.fromtimestamp(record.created, dt.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "node": self._node,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update({name: value for name, value in record.__dict__.items() if name not in _STANDARD})
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr(node: str, level: int = logging.INFO) -> None:
    """Send everything of srengine to stderr as JSON lines; a second call replaces the first."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(node))
    logger = logging.getLogger("srengine")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
