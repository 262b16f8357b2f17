"""Which replica a session belongs to.

Rendezvous hashing (Thaler and Ravishankar, 1998): every (session, replica) pair has a fixed
score and the session goes to the replica with the highest. When a replica dies only its own
sessions move, when one is added only those that it takes over, and routers agree without
talking to each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

__all__ = ["ranked"]


def ranked(session: str, replicas: Iterable[str]) -> list[str]:
    """The replicas' names, the session's own first, then where it goes if that one is gone."""
    return sorted(replicas, key=lambda replica: (_score(session, replica), replica), reverse=True)


def _score(session: str, replica: str) -> bytes:
    # The length keeps ("a", "bc") and ("ab", "c") apart.
    data = f"{len(session)}:{session}{replica}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=16).digest()
