"""A GPU backend without a GPU: `CudaBackend`'s rules about errors over another backend's numbers.

What is raised where is up to the test (`Faults`); everything from there on, the guard that names
errors, the engine and the server, is the real thing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from albor_serve.backends import cuda
from albor_serve.backends.base import Backend, ExtendStep, LogitRows
from albor_serve.checkpoint import GgufCheckpoint
from albor_serve.config import DevicePlan
from albor_serve.loader import open_backend

ILLEGAL = "CUDA error: an illegal memory access was encountered\nmore lines"
LAUNCH = "Triton Error [CUDA]: too many resources requested for launch"
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"


@dataclass
class Faults:
    """What goes wrong next."""

    where: str = "nowhere"
    """"start", "extend" or "decode"."""
    kind: str = "lost"
    """"lost", "launch" or "memory"."""
    after: int = 0
    """Calls (tokens, for "decode") that work before."""
    s_per_token: float = 0.0
    is_lost: bool = False
    num_raised: int = 0
    backends: list[FakeGpu] = field(default_factory=list)

    def arm(self, where: str, kind: str, after: int = 0) -> None:
        self.where, self.kind, self.after = where, kind, after

    def pass_through(self, where: str) -> None:
        if where != self.where:
            return
        if self.after:
            self.after -= 1
            return
        self.where = "nowhere"
        self.num_raised += 1
        if self.kind == "memory":
            raise torch.cuda.OutOfMemoryError(FULL)
        self.is_lost = self.kind == "lost"
        raise RuntimeError(ILLEGAL if self.is_lost else LAUNCH)

    def probe(self) -> None:
        if self.is_lost:
            raise RuntimeError(ILLEGAL)


class FakeGpu(cuda.CudaBackend):
    """Computes with `inner`; greedy, whatever a plan's temperature."""

    def __init__(self, inner: Backend, faults: Faults, on_close: Callable[[], None] | None) -> None:
        self._device = torch.device("cpu")
        self._failure = None
        self._build = None
        self._prefill = None
        self._is_closed = False
        self._on_close = on_close
        self._model = object()  # type: ignore[assignment]
        self._slots = []
        self._abort = inner.abort  # type: ignore[assignment]
        self._info = replace(inner.info, name="cuda", device="a fake GPU")
        self.inner, self.faults = inner, faults
        faults.backends.append(self)
        with self._guard():
            faults.pass_through("start")

    def _probe(self) -> None:
        self.faults.probe()

    def extend(self, steps: Sequence[ExtendStep]) -> list[LogitRows]:
        self._open()
        with self._guard():
            self.faults.probe()
            self.faults.pass_through("extend")
            return self.inner.extend(steps)

    def decode(
        self, slot: int, token: int, plan: DevicePlan, on_token: Callable[[int], bool]
    ) -> list[int]:
        self._open()
        new: list[int] = []
        with self._guard():
            while len(new) < plan.max_new_tokens:
                self.faults.probe()
                time.sleep(self.faults.s_per_token)
                rows = self.inner.extend([ExtendStep(slot, [token])])[0]
                self.faults.pass_through("decode")
                token = int(rows[0].argmax())
                new.append(token)
                if not on_token(token) or token in plan.stop_token_ids:
                    break
        return new

    def rewind(self, slot: int, length: int) -> None:
        self._open()
        self.inner.rewind(slot, length)

    def fork(self, src: int, dst: int, length: int) -> None:
        self._open()
        self.inner.fork(src, dst, length)

    def length(self, slot: int) -> int:
        self._open()
        return self.inner.length(slot)

    def close(self) -> None:
        super().close()
        self.inner.close()


def install(monkeypatch: pytest.MonkeyPatch) -> Faults:
    """Make --backend cuda mean a `FakeGpu`."""
    faults = Faults()

    def from_gguf(
        checkpoint: GgufCheckpoint,
        num_slots: int,
        max_seq_len: int,
        progress: Callable[[float], None] | None = None,
        *,
        on_close: Callable[[], None] | None = None,
    ) -> FakeGpu:
        inner = open_backend(checkpoint, num_slots, max_seq_len, progress=progress).backend
        try:
            return FakeGpu(inner, faults, on_close)
        except BaseException:
            inner.close()
            raise

    monkeypatch.setattr(cuda, "unsupported", lambda checkpoint: None)
    monkeypatch.setattr(cuda.CudaBackend, "from_gguf", from_gguf)
    return faults
