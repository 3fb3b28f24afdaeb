"""The log: times, names and numbers, and nothing that anybody asked, showed or was told."""

import json
import logging
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any


def start_log(*, as_json: bool) -> None:
    """Write the app's messages to stderr from now on, one line each, or `as_json` one object each."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if as_json else _Plain())
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("llava_app").setLevel(logging.INFO)


class _Plain(logging.Formatter):
    """Time, level, message, then name=value of what was counted."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        counted = [f"{name}={value}" for name, value in _counted(record).items()]
        return " ".join([super().formatMessage(record), *counted])


class _Json(logging.Formatter):
    """The same as an object: time (ISO 8601, UTC), level, from, message, trace, and what was counted."""

    def format(self, record: logging.LogRecord) -> str:
        told = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "from": record.name,
            "message": record.getMessage(),
        }
        trace = {"trace": self.formatException(record.exc_info)} if record.exc_info else {}
        return json.dumps(told | _counted(record) | trace, ensure_ascii=False, default=str)


def _counted(record: logging.LogRecord) -> dict[str, Any]:
    account = getattr(record, "account", None)  # see `chat.Account`
    return {name: value for name, value in asdict(account).items() if value is not None} if account else {}
