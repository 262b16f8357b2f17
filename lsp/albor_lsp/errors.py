"""What can go wrong while a suggestion is asked for."""

from __future__ import annotations

__all__ = ["LspError", "ServerDownError", "ServerRefusedError", "SettingsError"]


class LspError(Exception):
    """Base of this package's errors; the message is one line for a person."""


class SettingsError(LspError):
    """A command line or setting that can't be carried out."""


class ServerDownError(LspError):
    """The completion server can't be reached, broke off or did not answer in time."""


class ServerRefusedError(LspError):
    """The completion server answered with an error.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
