"""Prompts in pieces of fixed sizes, so that a piece can be one CUDA graph.

Computing a prompt with torch costs 7 ms of launches on an H100, whatever its length. Here
everything that differs from one piece to the next (tokens, slot, position, the row whose logits are
wanted) is read from one device buffer, and shapes depend only on the piece's size and on how much
of the cache it looks at. So the launches of a piece can be recorded once and replayed for every
slot.

A piece that is not full is padded: the rows beyond its last token write their keys and values
beyond the sequence, where nobody looks, and their results are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from albor_serve.errors import ConfigError
from albor_serve.model import Decoder

__all__ = ["PIECE_SIZES", "Prefill"]

PIECE_SIZES: Final = (64, 128, 256, 512, 1024)
"""Tokens of a piece. The next larger one costs at most twice what would be needed."""
LEAST_EXTENT: Final = 1024
_HEAD: Final = 3
"""Words before the tokens in the input: slot, first position, row whose logits are wanted."""
_UPLOADS: Final = 4
"""Pieces whose inputs may be on their way to the device at once."""


class Prefill:
    """Computes pieces of prompts into the caches of all slots. Owns its buffers and graphs.

    Not safe for several threads.
    """

    def __init__(
        self, model: Decoder, keys: Tensor, values: Tensor, sizes: Sequence[int] = PIECE_SIZES
    ) -> None:
        """Allocate buffers; nothing is computed.

        Args:
            model: in the caches' dtype, on their device.
            keys, values: [slots, layers, H_kv, room, D]. What lies at room - 1 is overwritten, so
                sequences must end before it.
            sizes: tokens of a piece, ascending.

        Raises:
            ConfigError: the sizes are not ascending.
        """
        if list(sizes) != sorted(set(sizes)) or not sizes or sizes[0] < 1:
            raise ConfigError(f"piece sizes are {list(sizes)}: they must be above 0 and ascend")
        self._model = model
        self._keys, self._values = keys, values
        self._room = keys.shape[3]
        self._sizes = [size for size in sizes if size < self._room] or [self._room - 1]
        self._extents = _extents(self._room)
        device = keys.device
        self._is_on_gpu = device.type == "cuda"
        words = _HEAD + self._sizes[-1]
        self._input = torch.zeros(words, dtype=torch.int64, device=device)
        self._uploads = [_Upload(words, self._is_on_gpu) for _ in range(_UPLOADS)]
        self._next_upload = 0
        like = torch.empty(0, dtype=keys.dtype, device=device)
        cos, sin = model.rotations(torch.arange(self._room), like)
        self._cos, self._sin = cos.contiguous(), sin.contiguous()
        self._offsets = torch.arange(self._sizes[-1], device=device)
        self._places = torch.arange(self._room, device=device)
        self._heads = torch.arange(keys.shape[2], device=device)[:, None]
        self.logits = torch.zeros(1, model.config.vocab_size, dtype=torch.float32, device=device)
        """float32 [1, V]: of the last piece's last token."""
        self._graphs: dict[tuple[int, int], Any] = {}

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of a piece, ascending."""
        return tuple(self._sizes)

    @property
    def num_graphs(self) -> int:
        """Pieces that are recorded."""
        return len(self._graphs)

    def capture(self, progress: Callable[[float], None] | None = None) -> None:
        """Record all pieces as CUDA graphs, the largest first, so that they share memory.

        The caches are left as they were but for slot 0's first positions and each slot's last one.
        Without it, or where it fails halfway, pieces run launch by launch.

        Raises:
            What torch raises where memory is short.
        """
        kinds = [(size, extent) for size in self._sizes for extent in self._extents]
        kinds.sort(reverse=True)
        pool = torch.cuda.graph_pool_handle()
        self._input.zero_()
        stream = torch.cuda.Stream()
        for done, (size, extent) in enumerate(kinds):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._compute(size, extent)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._compute(size, extent)
            self._graphs[size, extent] = graph
            if progress is not None:
                progress((done + 1) / len(kinds))
        # What the first runs took; the graphs have memory of their own.
        torch.cuda.empty_cache()

    def piece_len(self, num_tokens: int) -> int:
        """How many of the next `num_tokens` tokens the next piece takes."""
        return min(num_tokens, self._sizes[-1])

    def run(self, slot: int, tokens: Sequence[int], length: int) -> None:
        """Append one piece to a slot's cache and set `logits` for its last token.

        Returns before the device is done.

        Args:
            slot: index into the caches.
            tokens: 1 to the largest size.
            length: tokens that the slot holds before.

        Raises:
            ConfigError: more tokens than a piece takes or than the slot has room for.
        """
        if not 0 < len(tokens) <= self._sizes[-1] or length + len(tokens) >= self._room:
            raise ConfigError(
                f"a piece of {len(tokens)} tokens after {length}: it must have 1 to "
                f"{self._sizes[-1]} and end before {self._room}"
            )
        size = next(size for size in self._sizes if size >= len(tokens))
        extent = next(extent for extent in self._extents if extent >= length + len(tokens))
        upload = self._uploads[self._next_upload]
        self._next_upload = (self._next_upload + 1) % _UPLOADS
        padded = [slot, length, len(tokens) - 1, *tokens, *([tokens[-1]] * (size - len(tokens)))]
        upload.send(padded, self._input)
        graph = self._graphs.get((size, extent))
        if graph is None:
            self._compute(size, extent)
        else:
            graph.replay()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _compute(self, size: int, extent: int) -> None:
        """One piece of `size` tokens that looks at the cache's first `extent` positions.

        Only device tensors say which tokens, which slot and where.
        """
        slot, start, last = self._input[0:1], self._input[1:2], self._input[2:3]
        tokens = self._input[_HEAD : _HEAD + size]
        # Padded rows beyond the cache all write to its last place, which no sequence reaches.
        places = (start + self._offsets[:size]).clamp(max=self._room - 1)
        rotations = (self._cos.index_select(2, places), self._sin.index_select(2, places))
        seen = self._places[None, :extent] <= places[:, None]
        mask = torch.zeros(seen.shape, dtype=self._keys.dtype, device=seen.device)
        mask = mask.masked_fill(~seen, -torch.inf)[None, None]
        layers = count()
        group = self._model.config.num_heads // self._model.config.num_kv_heads

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            layer = next(layers)
            whole: list[Tensor] = []
            for cache, new in ((self._keys, k), (self._values, v)):
                of_layer = cache[:, layer]
                of_layer[slot[:, None], self._heads, places[None, :]] = new[0]
                held = of_layer[:, :, :extent].index_select(0, slot)
                # Kernels for masked attention want as many key heads as query heads.
                whole.append(held.repeat_interleave(group, dim=1) if group > 1 else held)
            return functional.scaled_dot_product_attention(q, whole[0], whole[1], attn_mask=mask)

        hidden = self._model.hidden(
            tokens[None], positions=places, attend=attend, rotations=rotations
        )
        self.logits.copy_(self._model.logits(hidden[0].index_select(0, last)))


class _Upload:
    """Words on their way to the device: host memory that must not change meanwhile."""

    def __init__(self, size: int, is_on_gpu: bool) -> None:
        self._words = torch.zeros(size, dtype=torch.int64, pin_memory=is_on_gpu)
        self._is_over = torch.cuda.Event() if is_on_gpu else None

    def send(self, words: Sequence[int], to: Tensor) -> None:
        """Copy into the first places of `to`, after what the device has to do already."""
        if self._is_over is not None:
            self._is_over.synchronize()
        self._words[: len(words)] = torch.tensor(words, dtype=torch.int64)
        to[: len(words)].copy_(self._words[: len(words)], non_blocking=True)
        if self._is_over is not None:
            self._is_over.record()


def _extents(room: int) -> list[int]:
    """Powers of two and the whole cache: a piece looks at less than twice what it needs to."""
    extents = []
    extent = LEAST_EXTENT
    while extent < room:
        extents.append(extent)
        extent *= 2
    # Masked attention is fast only where its rows begin at multiples of 16 bytes.
    return [*extents, room]
