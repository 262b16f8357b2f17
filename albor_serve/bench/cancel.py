"""How soon a slot is free once its client has gone away, as other clients see it.

A request is sent over a socket of its own to a live albor-serve, the socket is closed at a random
moment of its prefill or of its decoding, and /slots is asked until the slot is free. So the
figures hold the time for a question as well.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from albor_serve.errors import BackendError

__all__ = ["CancelTimes", "Phase", "measure_cancels"]

Phase = Literal["prefill", "decode"]

PATIENCE_S = 20.0


@dataclass(frozen=True, slots=True)
class CancelTimes:
    """Times of one phase, in milliseconds."""

    phase: Phase
    free_ms: tuple[float, ...]
    """From the closed socket to the first answer of /slots that shows the slot free."""
    ask_ms: float
    """Median time for one question to /slots."""

    def quantile(self, part: float) -> float:
        """The value below which `part` of the times lie (nearest rank)."""
        ordered = sorted(self.free_ms)
        return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def measure_cancels(
    address: str, phase: Phase, num_rounds: int, *, prompt_len: int, seed: int = 0
) -> CancelTimes:
    """Cancel `num_rounds` requests by disconnecting.

    Args:
        address: host:port of an albor-serve with nothing else to do.
        phase: when to go away.
        num_rounds: how often.
        prompt_len: tokens of each prompt; none has a common start with another.
        seed: of prompts and moments.

    Raises:
        BackendError: the server went away, or a slot was not free after 20 s.
    """
    rng = random.Random(seed)
    slots = _Slots(address)
    free_ms, ask_ms = [], []
    try:
        vocab_size = slots.vocab_size()
        for _ in range(num_rounds):
            tokens = [rng.randrange(vocab_size // 2) for _ in range(prompt_len)]
            is_prefill = phase == "prefill"
            with _request(address, tokens if is_prefill else tokens[:16], 256) as sock:
                slots.wait(busy=True)
                if is_prefill:
                    time.sleep(rng.uniform(0.01, 0.15))
                else:
                    for _ in range(rng.randrange(2, 8)):
                        if not sock.recv(4096):
                            raise BackendError("the server closed an answer too early")
                began = time.perf_counter()
            ask_ms += slots.wait(busy=False)
            free_ms.append((time.perf_counter() - began) * 1000)
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        raise BackendError(f"the server at {address} did not answer ({error})") from error
    finally:
        slots.close()
    return CancelTimes(phase, tuple(free_ms), statistics.median(ask_ms))


def _request(address: str, tokens: Sequence[int], num_new: int) -> socket.socket:
    """A streamed completion under way."""
    host, _, port = address.rpartition(":")
    body = json.dumps(
        {
            "prompt": list(tokens),
            "max_tokens": num_new,
            "ignore_eos": True,
            "stream": True,
            "temperature": 1,
            "seed": 1,
        }
    )
    sock = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    sock.sendall(f"{head}\r\n{body}".encode())
    return sock


class _Slots:
    """Questions to /slots over one connection."""

    def __init__(self, address: str) -> None:
        self._connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)

    def vocab_size(self) -> int:
        """Of the server's first model."""
        size = self._ask("/v1/models")["data"][0]["meta"]["vocab_size"]
        return int(size)

    def wait(self, *, busy: bool) -> list[float]:
        """Ask until a slot is busy, or none is; returns the time of each question in ms."""
        times = []
        end = time.perf_counter() + PATIENCE_S
        while time.perf_counter() < end:
            began = time.perf_counter()
            states = self._ask("/slots")
            times.append((time.perf_counter() - began) * 1000)
            if any(state["is_processing"] for state in states) == busy:
                return times
            time.sleep(0.0005)
        raise BackendError(f"no slot got {'busy' if busy else 'free'} within {PATIENCE_S:g} s")

    def _ask(self, path: str) -> Any:
        self._connection.request("GET", path)
        return json.loads(self._connection.getresponse().read())

    def close(self) -> None:
        self._connection.close()
