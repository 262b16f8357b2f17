"""The processes that train together: one for each GPU, or several on CPUs.

torchrun starts them and sets RANK, WORLD_SIZE and LOCAL_RANK. Gradients are summed by hand once
for each step, so each process may take a different share of the batch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from albor_train.errors import TrainingError

__all__ = ["World", "open_world", "proportional_shares"]


@dataclass(frozen=True, slots=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each contiguous tensor by its sum over all processes."""
        if self.size == 1:
            return
        for tensor in tensors:
            dist.all_reduce(tensor)

    def over_rows(self, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """`function(rows)`, each process doing its share and all getting the whole, equal bits.

        Args:
            function: treats each row by itself and keeps the shape; rows of zeros are added
                where they don't come out even.
            rows: [K, ...], the same on every process.
        """
        if self.size == 1:
            return function(rows)
        share = -(-len(rows) // self.size)
        spare = rows.new_zeros(share * self.size - len(rows), *rows.shape[1:])
        first = self.rank * share
        mine = function(torch.cat([rows, spare])[first : first + share]).contiguous()
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine)
        return torch.cat(every)[: len(rows)]

    def gather(self, value: float) -> list[float]:
        """A number of each process, by rank."""
        if self.size == 1:
            return [value]
        mine = torch.tensor([value], dtype=torch.float64, device=self.device)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine)
        return [float(item) for item in every]

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            self.gather(0.0)


@contextlib.contextmanager
def open_world(device: str = "auto") -> Iterator[World]:
    """Join the other processes, if torchrun started any, and leave them at the end.

    Args:
        device: "cpu", "cuda", or "auto" for a GPU if there is one.

    Raises:
        TrainingError: the device does not exist.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise TrainingError(
                f"process {local_rank} of this machine has no GPU: torch sees "
                f"{torch.cuda.device_count()}; start fewer processes or use --device cpu"
            )
        target = torch.device("cuda", local_rank)
        torch.cuda.set_device(target)
    elif device == "cpu":
        target = torch.device("cpu")
    else:
        raise TrainingError(f"device is {device!r}: it must be auto, cpu or cuda")
    if size > 1:
        backend = "nccl" if target.type == "cuda" else "gloo"
        dist.init_process_group(backend)
    try:
        yield World(rank, size, target)
    finally:
        if size > 1:
            dist.destroy_process_group()


def proportional_shares(total: int, speeds: Sequence[float]) -> list[int]:
    """Split `total` micro-batches by measured speed, at least one for each process.

    Largest remainders; the same on every process for the same speeds.

    Raises:
        TrainingError: there are fewer micro-batches than processes.
    """
    if total < len(speeds):
        raise TrainingError(
            f"a step has {total} micro-batches for {len(speeds)} processes: lower "
            f"train.micro_batch_rows or start fewer processes"
        )
    whole = sum(speeds)
    if not all(speed > 0 for speed in speeds):
        speeds, whole = [1.0] * len(speeds), float(len(speeds))
    spare = total - len(speeds)
    exact = [spare * speed / whole for speed in speeds]
    shares = [1 + int(value) for value in exact]
    by_remainder = sorted(range(len(speeds)), key=lambda i: (int(exact[i]) - exact[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares
