"""Limits of a connection, before any request is read."""

from __future__ import annotations

__all__ = ["HEADER_S", "MAX_CONNECTIONS", "MAX_HEADER_BYTES"]

MAX_HEADER_BYTES = 32 * 1024
MAX_CONNECTIONS = 512
"""More would come near the file descriptors that most systems grant a process (1024)."""
HEADER_S = 15.0
"""How long a connection may take to send a whole request head."""
