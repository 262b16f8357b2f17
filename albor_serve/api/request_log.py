"""Request ids, one log line for each request, and the two formats of log lines."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections import Counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["JsonFormatter", "RequestLog", "TextFormatter"]

logger = logging.getLogger("albor.request")

_OWN_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
MAX_PATH_CHARS = 128
MAX_LOGGED_BODY_BYTES = 64 * 1024


class RequestLog:
    """Middleware: gives each request an id, counts answers by status and logs them.

    The id is the client's X-Request-Id where that is a plain word, else a fresh one; the answer
    carries it. The line names method, path, status, duration and id; bodies only if asked.
    """

    def __init__(self, app: ASGIApp, num_answers: Counter[int], *, log_prompts: bool) -> None:
        """`num_answers` is added to: answers by HTTP status."""
        self._app = app
        self._num_answers = num_answers
        self._log_prompts = log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and log how it ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        offered = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = offered if _OWN_ID.fullmatch(offered) else secrets.token_hex(8).encode()
        status = 0
        body = bytearray()
        began = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {
                    **message,
                    "headers": [*message["headers"], (b"x-request-id", request_id)],
                }
            await send(message)

        async def receive_and_keep() -> Message:
            message = await receive()
            body.extend(message.get("body", b"")[: MAX_LOGGED_BODY_BYTES - len(body)])
            return message

        try:
            await self._app(scope, receive_and_keep if self._log_prompts else receive, send_with_id)
        except Exception:
            status = status or 500  # the framework answers it further out
            raise
        finally:
            self._num_answers[status] += 1
            fields: dict[str, object] = {
                "method": scope["method"][:16],
                "path": scope["path"][:MAX_PATH_CHARS],
                "status": status,
                "ms": round((time.perf_counter() - began) * 1000, 1),
                "request_id": request_id.decode(),
            }
            if self._log_prompts:
                fields["body"] = body.decode("utf-8", "replace")
            logger.info("request", extra={"fields": fields})


class TextFormatter(logging.Formatter):
    """One line a record; nothing that a client sent can begin another."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and a traceback below it where there is one."""
        fields = getattr(record, "fields", {})
        parts = [f"{key}={_as_word(value)}" for key, value in fields.items()]
        line = " ".join([record.levelname, _one_line(record.getMessage()), *parts])
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (Unix seconds), level, logger, message and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        entry: dict[str, object] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _as_word(value: object) -> str:
    text = str(value)
    return text if re.fullmatch(r"[\w./:-]+", text, re.ASCII) else json.dumps(text)


def _one_line(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)[1:-1]
