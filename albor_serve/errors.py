"""Every error that albor raises on purpose, in one tree.

    AlborError
    ├── ConfigError              a setting or a command-line value that cannot work
    ├── CheckpointError          a model file that cannot be used
    │   ├── CheckpointFormatError    damaged, truncated or hostile bytes
    │   └── UnsupportedModelError    sound, but not something albor runs
    ├── RequestError             the caller's request is at fault (HTTP 400)
    │   ├── PromptTooLongError       more tokens than the context holds
    │   └── UnknownModelError        a model name that is not served (HTTP 404)
    ├── EngineError              the request was sound; the engine could not finish it
    │   ├── QueueFullError           too many requests wait (HTTP 503)
    │   ├── QueueTimeoutError        it waited longer than allowed (HTTP 503)
    │   └── EngineClosedError        the engine is shutting down (HTTP 503)
    └── BackendError             the device or the native library failed (HTTP 500)
        ├── ModelLoadError           a model could not be loaded on demand (HTTP 503)
        └── DeviceError              a GPU failed at something (HTTP 503)
            ├── DeviceMemoryError        its memory is full; it goes on working
            └── DeviceLostError          this process can't use it any more

A message gives the value, the rule and the remedy, and fits on one line: the command line
prints it as it is and the server sends it to clients. It never repeats prompt text.
"""

from __future__ import annotations

__all__ = [
    "AlborError",
    "BackendError",
    "CheckpointError",
    "CheckpointFormatError",
    "ConfigError",
    "DeviceError",
    "DeviceLostError",
    "DeviceMemoryError",
    "EngineClosedError",
    "EngineError",
    "ModelLoadError",
    "PromptTooLongError",
    "QueueFullError",
    "QueueTimeoutError",
    "RequestError",
    "UnknownModelError",
    "UnsupportedModelError",
]


class AlborError(Exception):
    """Base of every error that albor raises on purpose."""


class ConfigError(AlborError):
    """A setting or a command-line value that cannot work."""


class CheckpointError(AlborError):
    """A model file that cannot be used."""


class CheckpointFormatError(CheckpointError):
    """A model file whose bytes are damaged, truncated or hostile."""


class UnsupportedModelError(CheckpointError):
    """A sound model file that albor does not run."""


class RequestError(AlborError):
    """A request that is at fault.

    Attributes:
        param: name of the field at fault, or None.
        code: short machine-readable reason, or None.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class PromptTooLongError(RequestError):
    """More prompt tokens than the context holds.

    Attributes:
        num_prompt_tokens: length of the prompt, in tokens.
        max_seq_len: tokens that one sequence may hold, answer included.
    """

    def __init__(self, num_prompt_tokens: int, max_seq_len: int) -> None:
        super().__init__(
            f"the prompt has {num_prompt_tokens} tokens, but this model's context holds "
            f"{max_seq_len} including the answer: shorten the prompt or start the server with "
            f"a larger --ctx",
            param="prompt",
            code="context_length_exceeded",
        )
        self.num_prompt_tokens = num_prompt_tokens
        self.max_seq_len = max_seq_len


class UnknownModelError(RequestError):
    """A model name that this server does not serve."""


class EngineError(AlborError):
    """The request was sound; the engine could not finish it."""


class QueueFullError(EngineError):
    """Too many requests are waiting already."""


class QueueTimeoutError(EngineError):
    """The request waited for a slot longer than allowed."""


class EngineClosedError(EngineError):
    """The engine is shutting down or has stopped."""


class BackendError(AlborError):
    """The device or the native library failed."""


class ModelLoadError(BackendError):
    """A model could not be loaded on demand. Other models are not affected."""


class DeviceError(BackendError):
    """A GPU failed at something that another backend could do."""


class DeviceMemoryError(DeviceError):
    """The GPU's memory is full. What was computed before is still there."""


class DeviceLostError(DeviceError):
    """This process can't use the GPU any more: CUDA keeps a fault until the process ends."""
