"""How Q4_0 weights lie in device memory.

A matrix [N, K] (N outputs, K inputs) is cut into tiles of 16 rows by 128 columns. A tile is 288
int32 words, 1152 bytes, 4.5 bits a weight as in GGUF:

    words   0 to 255   [2 halves][32 lanes][4 words]   8 weights each
    words 256 to 287   [8 rows][4 groups]              fp16 scale of row r (low half), r + 8 (high)

Tiles of one row band follow each other: word offset of tile (m, k) = (m · K/128 + k) · 288.

Lane l = 4·r + j of a warp and word i of half h hold what the tensor core's m16n8k16 instruction
wants of this lane as its A operand, for instruction s = 4·h + i of the eight that cover the 128
columns: rows r and r + 8, columns c to c + 3 with c = 32·(s // 2) + 8·j + 4·(s % 2). (The
instruction numbers columns otherwise; any order does, so long as the B operand uses the same.)
Nibbles from low to high bits: (r, c) (r+8, c) (r, c+2) (r+8, c+2) (r, c+1) (r+8, c+1) (r, c+3)
(r+8, c+3). So two masks and one shift give four register pairs: nibbles 0 and 4 are the pair
(c, c+1) of row r, and nibbles 1 and 5 that of row r + 8, four bits higher.

The code q stands for (q - 8) · scale, as in GGUF.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from albor_serve.errors import CheckpointFormatError, UnsupportedModelError

__all__ = [
    "GROUP_SIZE",
    "TILE_COLS",
    "TILE_ROWS",
    "TILE_WORDS",
    "dequantize_tiles",
    "interleave_rows",
    "repack_q4_0",
]

TILE_ROWS: Final = 16
TILE_COLS: Final = 128
TILE_WORDS: Final = 288
GROUP_SIZE: Final = 32
_GROUP_BYTES: Final = 18


def repack_q4_0(packed: Tensor, num_cols: int) -> Tensor:
    """GGUF Q4_0 rows to tiles.

    Args:
        packed: uint8 [N, K / 32 * 18]; N a multiple of 16.
        num_cols: K, a multiple of 128.

    Returns:
        int32 [N / 16 * K / 128 * 288], on the same device; a new tensor.

    Raises:
        CheckpointFormatError: the bytes do not fit the shape. UnsupportedModelError: a size that
        tiles cannot cover.
    """
    num_rows = packed.shape[0]
    if packed.dtype != torch.uint8 or packed.shape[1] * GROUP_SIZE != num_cols * _GROUP_BYTES:
        raise CheckpointFormatError(
            f"a Q4_0 row of {num_cols} weights needs {num_cols // GROUP_SIZE * _GROUP_BYTES} "
            f"bytes, not {packed.shape[1]} of type {packed.dtype}"
        )
    if num_rows % TILE_ROWS or num_cols % TILE_COLS:
        raise UnsupportedModelError(
            f"a matrix of {num_rows} x {num_cols} cannot be cut into tiles of {TILE_ROWS} x "
            f"{TILE_COLS}: the GPU backend needs multiples of these"
        )
    groups = packed.reshape(num_rows, num_cols // GROUP_SIZE, _GROUP_BYTES)
    scales = groups[:, :, :2].contiguous().view(torch.int16).squeeze(2)  # fp16 bits [N, K / 32]
    codes = torch.cat([groups[:, :, 2:] & 15, groups[:, :, 2:] >> 4], dim=2)  # [N, K / 32, 32]
    tiles_m, tiles_k = num_rows // TILE_ROWS, num_cols // TILE_COLS

    # Axes: tile m, row half, row r, tile k, group, lane j, instruction of the group, column pair,
    # column of the pair.
    codes = codes.reshape(tiles_m, 2, 8, tiles_k, 4, 4, 2, 2, 2).to(torch.int32)
    # Nibble number = row half + 2 * column pair + 4 * column of the pair.
    shift = (
        4 * torch.arange(2, device=packed.device).reshape(1, 2, 1, 1, 1, 1, 1, 1, 1)
        + 8 * torch.arange(2, device=packed.device).reshape(1, 1, 1, 1, 1, 1, 1, 2, 1)
        + 16 * torch.arange(2, device=packed.device).reshape(1, 1, 1, 1, 1, 1, 1, 1, 2)
    ).to(torch.int32)
    # Codes use disjoint bits, so the sum is their union; int32 wraps like the bits do.
    words = (codes << shift).sum(dim=(1, 7, 8), dtype=torch.int32)
    # Now tile m, row r, tile k, group, lane j, instruction; half = group // 2.
    words = words.reshape(tiles_m, 8, tiles_k, 2, 2, 4, 2).permute(0, 2, 3, 1, 5, 4, 6)

    bits = scales.to(torch.int32) & 0xFFFF
    bits = bits.reshape(tiles_m, 2, 8, tiles_k, 4)
    pairs = bits[:, 0] | (bits[:, 1] << 16)  # tile m, row r, tile k, group
    pairs = pairs.permute(0, 2, 1, 3)
    return torch.cat(
        [words.reshape(tiles_m, tiles_k, 256), pairs.reshape(tiles_m, tiles_k, 32)], dim=2
    ).reshape(-1)


def dequantize_tiles(words: Tensor, num_rows: int, num_cols: int) -> Tensor:
    """Weights of a repacked matrix: int32 tiles to float32 [N, K], the inverse of repacking."""
    tiles_m, tiles_k = num_rows // TILE_ROWS, num_cols // TILE_COLS
    tiles = words.reshape(tiles_m, tiles_k, TILE_WORDS)
    nibble = torch.arange(8, device=words.device, dtype=torch.int32) * 4
    codes = (tiles[:, :, :256].unsqueeze(3) >> nibble) & 15
    # tile m, tile k, group pair, row r, lane j, group of the pair, instruction,
    # column of the pair, column pair, row half
    codes = codes.reshape(tiles_m, tiles_k, 2, 8, 4, 2, 2, 2, 2, 2)
    codes = codes.permute(0, 9, 3, 1, 2, 5, 4, 6, 8, 7).reshape(num_rows, num_cols)
    pairs = tiles[:, :, 256:].reshape(tiles_m, tiles_k, 8, 4)
    bits = torch.stack([pairs & 0xFFFF, (pairs >> 16) & 0xFFFF], dim=1)
    # tile m, row half, tile k, row r, group
    scales = bits.to(torch.int16).view(torch.float16).permute(0, 1, 3, 2, 4)
    scales = scales.reshape(num_rows, num_cols // GROUP_SIZE).to(torch.float32)
    return (codes.to(torch.float32) - 8.0) * scales.repeat_interleave(GROUP_SIZE, dim=1)


def interleave_rows(matrices: Sequence[Tensor]) -> Tensor:
    """Put gate and up rows side by side: rows 8i of gate, then 8i of up, in each tile.

    A thread of the fused kernel then holds gate and up of the same channel. Takes two tensors
    [N, ...] of one shape, N a multiple of 8, and returns [2 N, ...].
    """
    gate, up = matrices
    both = torch.stack([gate.unflatten(0, (-1, 8)), up.unflatten(0, (-1, 8))], dim=1)
    return both.flatten(0, 2)
