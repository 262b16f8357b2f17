"""Triton kernels of training. Their meaning, shapes and checks stand with the operators that launch
them, in swiglu.py and turn.py; only those import this, and only for tensors on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["swiglu_backward", "swiglu_forward", "turn_backward", "turn_forward"]


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def swiglu_forward(gate_up, out, width, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes silu(gate) * up of one row: gate_up [N, 2 width] to out [N, width]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    at = gate_up + row * 2 * width + columns
    gate = tl.load(at, inside).to(tl.float32)
    up = tl.load(at + width, inside).to(tl.float32)
    # Rounded where torch rounds: the activation is a tensor of its own there.
    act = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + columns, (act * up).to(out.dtype.element_ty), inside)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def swiglu_backward(  # type: ignore[no-untyped-def]
    gate_up, gradient, out, width, block: tl.constexpr
):
    """Writes the gradient of one row of gate_up [N, 2 width] from that of its output."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    at = row * 2 * width + columns
    gate = tl.load(gate_up + at, inside).to(tl.float32)
    up = tl.load(gate_up + at + width, inside).to(tl.float32)
    wanted = tl.load(gradient + row * width + columns, inside).to(tl.float32)
    share = tl.sigmoid(gate)
    act = gate * share
    for_gate = wanted * up * (share + act * (1 - share))
    tl.store(out + at, for_gate.to(out.dtype.element_ty), inside)
    tl.store(out + at + width, (wanted * act).to(out.dtype.element_ty), inside)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def turn_forward(  # type: ignore[no-untyped-def]
    qkv, q_weight, k_weight, cos, sin, q, k, v, num_tokens, row_len, eps,
    heads: tl.constexpr, kv_heads: tl.constexpr, half: tl.constexpr,
    block: tl.constexpr, padded: tl.constexpr, padded_kv: tl.constexpr,
):  # fmt: skip
    """Writes q, k and v of `block` tokens of qkv; constants as `_sizes` in turn.py gives them."""
    size: tl.constexpr = 2 * half
    turned: tl.constexpr = heads + kv_heads
    all_heads: tl.constexpr = turned + kv_heads
    token = (tl.program_id(0) * block + tl.arange(0, block)).to(tl.int64)
    head = tl.arange(0, padded)
    column = tl.arange(0, half)
    there = token < num_tokens
    inside = there[:, None, None] & (head < turned)[None, :, None]
    at = token[:, None, None] * (all_heads * size) + (
        head[None, :, None] * size + column[None, None, :]
    )
    first = tl.load(qkv + at, inside, 0.0).to(tl.float32)
    second = tl.load(qkv + at + half, inside, 0.0).to(tl.float32)
    mean = (tl.sum(first * first, 2) + tl.sum(second * second, 2)) / size
    scale = tl.rsqrt(mean + eps)[:, :, None]
    is_query = (head < heads)[:, None]
    first_weight = tl.where(
        is_query, tl.load(q_weight + column)[None, :], tl.load(k_weight + column)[None, :]
    ).to(tl.float32)
    second_weight = tl.where(
        is_query,
        tl.load(q_weight + half + column)[None, :],
        tl.load(k_weight + half + column)[None, :],
    ).to(tl.float32)
    first = first * scale * first_weight[None, :, :]
    second = second * scale * second_weight[None, :, :]
    place = (token % row_len)[:, None, None] * half + column[None, None, :]
    c = tl.load(cos + place, there[:, None, None], 0.0).to(tl.float32)
    s = tl.load(sin + place, there[:, None, None], 0.0).to(tl.float32)
    low = (first * c - second * s).to(q.dtype.element_ty)
    high = (second * c + first * s).to(q.dtype.element_ty)
    to_q = token[:, None, None] * (heads * size) + (
        head[None, :, None] * size + column[None, None, :]
    )
    for_q = inside & (head < heads)[None, :, None]
    tl.store(q + to_q, low, for_q)
    tl.store(q + to_q + half, high, for_q)
    to_k = token[:, None, None] * (kv_heads * size) + (
        (head - heads)[None, :, None] * size + column[None, None, :]
    )
    for_k = inside & (head >= heads)[None, :, None]
    tl.store(k + to_k, low, for_k)
    tl.store(k + to_k + half, high, for_k)
    kv_head = tl.arange(0, padded_kv)
    both = tl.arange(0, size)
    kept = there[:, None, None] & (kv_head < kv_heads)[None, :, None]
    here = kv_head[None, :, None] * size + both[None, None, :]
    value = tl.load(qkv + token[:, None, None] * (all_heads * size) + turned * size + here, kept)
    tl.store(v + token[:, None, None] * (kv_heads * size) + here, value, kept)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def turn_backward(  # type: ignore[no-untyped-def]
    qkv, q_weight, k_weight, cos, sin, for_q, for_k, for_v, out, weights_out,
    num_tokens, row_len, eps, rounds: tl.constexpr,
    heads: tl.constexpr, kv_heads: tl.constexpr, half: tl.constexpr,
    block: tl.constexpr, padded: tl.constexpr, padded_kv: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of qkv for `rounds` blocks of tokens, and this program's sums for the
    norms' weights, float32 [2, D], into weights_out."""
    size: tl.constexpr = 2 * half
    turned: tl.constexpr = heads + kv_heads
    all_heads: tl.constexpr = turned + kv_heads
    head = tl.arange(0, padded)
    column = tl.arange(0, half)
    is_query = (head < heads)[:, None]
    first_weight = tl.where(
        is_query, tl.load(q_weight + column)[None, :], tl.load(k_weight + column)[None, :]
    ).to(tl.float32)
    second_weight = tl.where(
        is_query,
        tl.load(q_weight + half + column)[None, :],
        tl.load(k_weight + half + column)[None, :],
    ).to(tl.float32)
    first_sum = tl.zeros((padded, half), tl.float32)
    second_sum = tl.zeros((padded, half), tl.float32)
    kv_head = tl.arange(0, padded_kv)
    both = tl.arange(0, size)
    here = kv_head[None, :, None] * size + both[None, None, :]
    for number in range(rounds):
        start = (number * tl.num_programs(0) + tl.program_id(0)) * block
        token = (start + tl.arange(0, block)).to(tl.int64)
        there = token < num_tokens
        inside = there[:, None, None] & (head < turned)[None, :, None]
        in_q = inside & (head < heads)[None, :, None]
        in_k = inside & (head >= heads)[None, :, None]
        from_q = token[:, None, None] * (heads * size) + (
            head[None, :, None] * size + column[None, None, :]
        )
        from_k = token[:, None, None] * (kv_heads * size) + (
            (head - heads)[None, :, None] * size + column[None, None, :]
        )
        low = tl.load(for_q + from_q, in_q, 0.0).to(tl.float32)
        low += tl.load(for_k + from_k, in_k, 0.0).to(tl.float32)
        high = tl.load(for_q + from_q + half, in_q, 0.0).to(tl.float32)
        high += tl.load(for_k + from_k + half, in_k, 0.0).to(tl.float32)
        place = (token % row_len)[:, None, None] * half + column[None, None, :]
        c = tl.load(cos + place, there[:, None, None], 0.0).to(tl.float32)
        s = tl.load(sin + place, there[:, None, None], 0.0).to(tl.float32)
        for_first = low * c + high * s
        for_second = high * c - low * s
        at = token[:, None, None] * (all_heads * size) + (
            head[None, :, None] * size + column[None, None, :]
        )
        first = tl.load(qkv + at, inside, 0.0).to(tl.float32)
        second = tl.load(qkv + at + half, inside, 0.0).to(tl.float32)
        mean = (tl.sum(first * first, 2) + tl.sum(second * second, 2)) / size
        scale = tl.rsqrt(mean + eps)[:, :, None]
        first, second = first * scale, second * scale
        first_sum += tl.sum(for_first * first, 0)
        second_sum += tl.sum(for_second * second, 0)
        for_first *= first_weight[None, :, :]
        for_second *= second_weight[None, :, :]
        along = (tl.sum(for_first * first, 2) + tl.sum(for_second * second, 2)) / size
        for_first = scale * (for_first - first * along[:, :, None])
        for_second = scale * (for_second - second * along[:, :, None])
        tl.store(out + at, for_first.to(out.dtype.element_ty), inside)
        tl.store(out + at + half, for_second.to(out.dtype.element_ty), inside)
        kept = there[:, None, None] & (kv_head < kv_heads)[None, :, None]
        value = tl.load(for_v + token[:, None, None] * (kv_heads * size) + here, kept)
        to_v = out + token[:, None, None] * (all_heads * size) + turned * size + here
        tl.store(to_v, value, kept)
    # Sums of this program: queries' weights, then keys', each [D].
    mine = weights_out + tl.program_id(0) * (2 * size) + column
    zeros = tl.zeros((padded, half), tl.float32)
    tl.store(mine, tl.sum(tl.where(is_query, first_sum, zeros), 0))
    tl.store(mine + half, tl.sum(tl.where(is_query, second_sum, zeros), 0))
    tl.store(mine + size, tl.sum(tl.where(is_query, zeros, first_sum), 0))
    tl.store(mine + size + half, tl.sum(tl.where(is_query, zeros, second_sum), 0))
