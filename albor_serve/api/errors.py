"""From AlborError to HTTP: OpenAI's error object, never a word of the input."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from albor_serve.errors import (
    AlborError,
    BackendError,
    DeviceError,
    DeviceLostError,
    DeviceMemoryError,
    EngineClosedError,
    ModelLoadError,
    PromptTooLongError,
    QueueFullError,
    QueueTimeoutError,
    RequestError,
    UnknownModelError,
)

__all__ = [
    "BodyTimeoutError",
    "LoadingError",
    "PayloadTooLargeError",
    "SupersededError",
    "error_body",
    "error_response",
    "status_of",
]

RETRY_AFTER_S = 1


class PayloadTooLargeError(RequestError):
    """The request's body is larger than the server takes (HTTP 413)."""


class BodyTimeoutError(RequestError):
    """The request's body took too long to arrive (HTTP 408)."""


class SupersededError(AlborError):
    """The request was cancelled by a newer one of its session, or by shutdown (HTTP 409)."""


class LoadingError(AlborError):
    """The model is not there yet (HTTP 503)."""


def status_of(error: AlborError) -> int:
    """HTTP status of an error."""
    match error:
        case UnknownModelError():
            return 404
        case PayloadTooLargeError():
            return 413
        case BodyTimeoutError():
            return 408
        case RequestError():
            return 400
        case SupersededError():
            return 409
        case QueueFullError() | QueueTimeoutError() | EngineClosedError() | LoadingError():
            return 503
        case ModelLoadError() | DeviceError():
            return 503
        case _:
            return 500


def error_body(error: AlborError) -> dict[str, Any]:
    """OpenAI's error object."""
    status = status_of(error)
    param = error.param if isinstance(error, RequestError) else None
    code = error.code if isinstance(error, RequestError) else None
    if code is None:
        match error:
            case BodyTimeoutError():
                code = "body_timeout"
            case UnknownModelError():
                code = "model_not_found"
            case SupersededError():
                code = "superseded"
            case QueueFullError():
                code = "queue_full"
            case QueueTimeoutError():
                code = "queue_timeout"
            case EngineClosedError():
                code = "shutting_down"
            case LoadingError():
                code = "loading"
            case ModelLoadError():
                code = "model_load_failed"
            case DeviceLostError():
                code = "device_lost"
            case DeviceMemoryError():
                code = "device_out_of_memory"
            case DeviceError():
                code = "device_error"
            case BackendError():
                code = "backend_error"
    kind = "invalid_request_error" if status < 500 else "server_error"
    detail: dict[str, Any] = {"message": str(error), "type": kind, "param": param, "code": code}
    if isinstance(error, PromptTooLongError):
        detail["num_prompt_tokens"] = error.num_prompt_tokens
        detail["max_seq_len"] = error.max_seq_len
    return {"error": detail}


def error_response(error: AlborError, status: int | None = None) -> Response:
    """The HTTP response for an error."""
    status = status_of(error) if status is None else status
    headers = {"retry-after": str(RETRY_AFTER_S)} if status == 503 else None
    return Response(
        json.dumps(error_body(error)).encode(),
        status_code=status,
        media_type="application/json",
        headers=headers,
    )
