"""Rows of packs to batches. The position is a function of the step, so a resume needs no more."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from albor_train.attention import document_ids
from albor_train.errors import DataError
from albor_train.loss import IGNORED
from albor_train.pack import Pack

__all__ = ["Batch", "RowStream", "targets_of"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one forward pass."""

    tokens: Tensor
    """int64 [B, T]."""
    targets: Tensor
    """int64 [B, T]: the next token of the same document, or IGNORED."""
    documents: Tensor
    """int32 [B, T], always on the CPU: number of each token's document within its row."""
    num_targets: int
    """Targets that count."""
    num_attended: int
    """Pairs of tokens that attend to each other, the causal half of each document's square."""

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        if device.type == "cpu":
            return self
        tokens = self.tokens.pin_memory().to(device, non_blocking=True)
        targets = self.targets.pin_memory().to(device, non_blocking=True)
        return Batch(tokens, targets, self.documents, self.num_targets, self.num_attended)


def targets_of(rows: npt.NDArray[np.int64], end_id: int, pad_id: int) -> npt.NDArray[np.int64]:
    """The next token where it belongs to the same document, else IGNORED. [B, T] to [B, T]."""
    targets = np.full_like(rows, IGNORED)
    targets[:, :-1] = rows[:, 1:]
    targets[:, :-1][(rows[:, :-1] == end_id) | (rows[:, 1:] == pad_id)] = IGNORED
    return targets


class RowStream:
    """The rows of several packs, one after the other; each is in random order already.

    More packs may be appended by another thread while rows are read.
    """

    def __init__(self, packs: Sequence[Pack], *, is_open: bool = False) -> None:
        """Join packs of equal row length.

        Args:
            is_open: more packs will come: reading beyond the last row waits until `finish`.

        Raises:
            DataError: there are none, or they don't fit together.
        """
        self._changed = threading.Condition()
        self._is_open = is_open
        self._error: BaseException | None = None
        if not packs:
            raise DataError("no packs to train on: make some first")
        first = packs[0]
        self.packs: tuple[Pack, ...] = ()
        self.sequence_len = int(first.rows.shape[1])
        self.end_id, self.pad_id = first.end_id, first.pad_id
        for pack in packs:
            self.append(pack)

    def append(self, pack: Pack) -> None:
        """Add a pack's rows at the end.

        Raises:
            DataError: its rows have another length, or other ids for end and padding.
        """
        if (pack.rows.shape[1], pack.end_id, pack.pad_id) != (
            self.sequence_len,
            self.end_id,
            self.pad_id,
        ):
            raise DataError(f"{pack.folder} was made for another row length or tokenizer")
        with self._changed:
            self.packs = (*self.packs, pack)
            self._changed.notify_all()

    def finish(self, error: BaseException | None = None) -> None:
        """No more packs will come; whoever waits for rows gets `error`, or learns that they end."""
        with self._changed:
            self._is_open = False
            self._error = error
            self._changed.notify_all()

    def __len__(self) -> int:
        return sum(len(pack.rows) for pack in self.packs)

    def keys(self, num_rows: int) -> list[str]:
        """Hashes of the packs that the first `num_rows` rows lie in."""
        found, start = [], 0
        for pack in self.packs:
            if start < num_rows:
                found.append(pack.key)
            start += len(pack.rows)
        return found

    def batch(self, start: int, count: int) -> Batch:
        """Rows start to start + count.

        Raises:
            DataError: the stream ends before.
        """
        with self._changed:
            while start + count > len(self) and self._is_open:
                self._changed.wait()
            if self._error is not None and start + count > len(self):
                raise DataError(f"packing failed: {self._error}") from self._error
            packs = self.packs
        if not 0 <= start <= start + count <= len(self):
            raise DataError(
                f"rows {start} to {start + count} are wanted, but the packs hold {len(self)}: "
                f"make another epoch or lower train.steps"
            )
        parts = []
        first = 0
        for pack in packs:
            low, high = max(0, start - first), min(len(pack.rows), start + count - first)
            if low < high:
                parts.append(pack.rows[low:high])
            first += len(pack.rows)
        rows = np.concatenate(parts).astype(np.int64)
        targets = targets_of(rows, self.end_id, self.pad_id)
        tokens = torch.from_numpy(rows)
        return Batch(
            tokens,
            torch.from_numpy(targets),
            document_ids(tokens, self.end_id, self.pad_id),
            int((targets != IGNORED).sum()),
            _attended(rows, self.end_id),
        )


def _attended(rows: npt.NDArray[np.int64], end_id: int) -> int:
    total = 0
    for row in rows:
        ends = np.flatnonzero(row == end_id) + 1
        lengths = np.diff(np.concatenate([[0], ends, [len(row)]]))
        total += int((lengths * (lengths + 1) // 2).sum())
    return total
