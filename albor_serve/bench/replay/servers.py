"""The servers behind the clients: started for one client, asked for their counters, stopped."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from albor_serve.bench.peers import (
    PRESET,
    AlborServer,
    LlamaServer,
    Peer,
    PeerOptions,
)
from albor_serve.bench.replay.clients.http import get_text

__all__ = ["ServedBy", "Totals", "open_server", "read_totals"]


@dataclass(frozen=True, slots=True)
class ServedBy:
    """A running server."""

    peer: Peer
    address: str


@dataclass(frozen=True, slots=True)
class Totals:
    """A server's counters; None where it doesn't tell."""

    num_new_prompt: float | None
    num_decoded: float | None


@contextlib.contextmanager
def open_server(
    kind: str, model: Path, options: PeerOptions, arguments: Sequence[str] = ()
) -> Iterator[ServedBy]:
    """Start "albor" or "llama-server"; the process ends with the block."""
    peer: AlborServer | LlamaServer
    if kind == "albor":
        peer = AlborServer(kind, model, options, arguments)
    else:
        peer = LlamaServer(PRESET, model, options)
    try:
        yield ServedBy(peer, peer.address)
    finally:
        peer.close()


async def read_totals(address: str) -> Totals:
    """What /metrics has counted so far, requests that were cancelled included."""
    text = await get_text(address, "/metrics")
    new = _counter(text, "llamacpp:prompt_tokens_total")
    if new is None:
        new = _counter(text, "albor_prompt_tokens_total", 'source="new"')
    decoded = _counter(text, "llamacpp:tokens_predicted_total")
    if decoded is None:
        decoded = _counter(text, "albor_generated_tokens_total")
    return Totals(new, decoded)


def _counter(text: str, name: str, label: str = "") -> float | None:
    """The sum of a counter over its labels, or over those that hold `label`."""
    labels = rf"\{{[^}}]*{re.escape(label)}[^}}]*\}}" + ("" if label else "|")
    values = re.findall(rf"^{re.escape(name)}(?:{labels}) (\S+)", text, re.MULTILINE)
    return sum(map(float, values)) if values else None
