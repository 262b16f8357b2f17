"""Stand-ins whose answers are known: a backend that hashes its cache, a byte tokenizer."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from albor_serve.backends.base import Aborted, BackendInfo, ExtendStep, LogitRows
from albor_serve.errors import BackendError

SPECIALS = ("<|endoftext|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>")
PIECES = (b"    ", b"  ", b"def", b"de", b"return", b"re", b"self", b"\n\n", "é".encode())


class ByteTokenizer:
    """Ids 0-255 are bytes, then a few longer pieces, then control tokens. Longest match wins."""

    def __init__(self) -> None:
        self._pieces = [bytes([i]) for i in range(256)] + list(PIECES) + [b""] * len(SPECIALS)
        self._first_special = 256 + len(PIECES)

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    @property
    def bos_token_id(self) -> int | None:
        return None

    @property
    def adds_bos(self) -> bool:
        return False

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return frozenset({self._first_special})

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        data = text.encode("utf-8", errors="replace")
        by_length = sorted(range(256, self._first_special), key=lambda i: -len(self._pieces[i]))
        ids: list[int] = []
        at = 0
        while at < len(data):
            if parse_special:
                for offset, spelling in enumerate(SPECIALS):
                    if data.startswith(spelling.encode(), at):
                        ids.append(self._first_special + offset)
                        at += len(spelling)
                        break
                else:
                    spelling = ""
                if spelling:
                    continue
            for token_id in by_length:
                if data.startswith(self._pieces[token_id], at):
                    break
            else:
                token_id = data[at]
            ids.append(token_id)
            at += len(self._pieces[token_id])
        return ids

    def decode(self, ids: Sequence[int]) -> bytes:
        return b"".join(self._pieces[i] for i in ids)

    def token_bytes(self, token_id: int) -> bytes:
        return self._pieces[token_id]

    def special_id(self, spelling: str) -> int | None:
        return self._first_special + SPECIALS.index(spelling) if spelling in SPECIALS else None


class Flag:
    """An abort flag that counts how often it was set."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.num_set = 0

    def set(self) -> None:
        self.num_set += 1
        self._event.set()

    def clear(self) -> None:
        self._event.clear()

    def is_set(self) -> bool:
        return self._event.is_set()


class HashBackend:
    """Logits are a hash of every token in the slot's cache.

    So a cache that differs by one token from what it should be gives different text, and the
    right text can be computed without any engine (`answer`).
    """

    def __init__(
        self,
        vocab_size: int,
        num_slots: int = 2,
        max_seq_len: int = 256,
        ms_per_token: float = 0.0,
        period: int = 0,
    ) -> None:
        """`period` > 0 makes greedy text repeat after so many tokens, so that drafts are right."""
        self._info = BackendInfo(
            "fake", "cpu", vocab_size, num_slots, max_seq_len, max_seq_len, 1, 1
        )
        self.caches: list[list[int]] = [[] for _ in range(num_slots)]
        self.flag = Flag()
        self.ms_per_token = ms_per_token
        self.period = period
        self.calls: list[tuple[ExtendStep, ...]] = []
        self.fail_on: Callable[[Sequence[ExtendStep]], bool] = lambda steps: False
        self.fail_rewind = False
        self.can_rewind = True
        self.num_closed = 0
        self._busy = threading.Lock()

    @property
    def info(self) -> BackendInfo:
        return self._info

    @property
    def abort(self) -> Flag:
        return self.flag

    def row(self, tokens: Sequence[int]) -> LogitRows:
        if self.period:
            tokens = (len(tokens) % self.period,)
        digest = hashlib.blake2b(np.asarray(tokens, dtype=np.int32).tobytes(), digest_size=8)
        rng = np.random.default_rng(int.from_bytes(digest.digest(), "little"))
        return rng.standard_normal(self._info.vocab_size).astype(np.float32)

    def answer(
        self, prompt: Sequence[int], num: int, ends: frozenset[int] = frozenset()
    ) -> list[int]:
        """The greedy continuation, computed without caches."""
        tokens = list(prompt)
        for _ in range(num):
            token_id = int(self.row(tokens).argmax())
            if token_id in ends:
                break
            tokens.append(token_id)
        return tokens[len(prompt) :]

    def extend(self, steps: Sequence[ExtendStep]) -> list[LogitRows]:
        assert self._busy.acquire(blocking=False), "two threads in the backend"
        try:
            self.calls.append(tuple(steps))
            assert len({step.slot for step in steps}) == len(steps)
            assert sum(len(step.tokens) for step in steps) <= self._info.max_batch_len
            if self.fail_on(steps):
                raise BackendError("the fake device failed")
            out = []
            for step in steps:
                cache = self.caches[step.slot]
                rows = []
                for token in step.tokens:
                    if self.ms_per_token:
                        time.sleep(self.ms_per_token / 1000)
                    if self.flag.is_set():
                        raise Aborted
                    if len(cache) >= self._info.max_seq_len:
                        raise BackendError("the slot is full")
                    cache.append(token)
                    if step.logits_for != "none":
                        rows.append(self.row(cache))
                if step.logits_for == "last":
                    rows = rows[-1:]
                out.append(np.array(rows, dtype=np.float32).reshape(-1, self._info.vocab_size))
            return out
        finally:
            self._busy.release()

    def rewind(self, slot: int, length: int) -> None:
        if self.fail_rewind:
            raise BackendError("the fake device is gone")
        if length < len(self.caches[slot]) and not self.can_rewind:
            length = 0
        del self.caches[slot][length:]

    def fork(self, src: int, dst: int, length: int) -> None:
        can_share = self.can_rewind or length == len(self.caches[src])
        self.caches[dst] = self.caches[src][:length] if can_share else []

    def length(self, slot: int) -> int:
        return len(self.caches[slot])

    def close(self) -> None:
        self.num_closed += 1


class LinearCosts:
    """Row costs of ms = fixed + rows · each."""

    def __init__(self, fixed: float = 1.0, each: float = 0.0, prefill: float = 0.0) -> None:
        self.fixed, self.each, self._prefill = fixed, each, prefill

    @property
    def prefill_ms_per_token(self) -> float:
        return self._prefill

    def ms(self, rows: int) -> float:
        return self.fixed + self.each * rows
