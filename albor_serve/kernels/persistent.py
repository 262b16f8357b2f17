# ruff: noqa: SIM102 - a compile-time condition and one of the program are not one condition
# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,assignment,misc"
"""A whole decode step in one kernel: every program stays, and passes words on (`exchange`).

One program on each multiprocessor. What a program does in each part of a layer is fixed: program b
owns band b of the residual stream h (16 channels, in its own memory, float32), so only float16
copies of it travel, a sixteenth as large as h so that they stay in range. Readers apply the norm's
gain themselves and find the mean square from what they read.

    part        programs           reads                     writes
    embed       d / 16             keys of the last token    h, x
    qkv         query rows / 16    x                         qkv
    attention   H_kv · S           qkv, cache                att, lse, cache
    output      d / 16             att, lse, h               h, x (of the feed-forward part)
    gate_up     F / 8 / NB         x                         act
    down        d / 16             act, h                    h, x
    head        all                x                         keys, logits

Before a program waits for words it loads the weights that it will multiply them with; and it asks
for the same weights of the next layer to come to the L2 cache, so memory is read all the time.

The backend does not use it yet: it wins only where tokens are fed back inside the kernel
(docs/lab/gpu-decode.md, version D).

`PHASE` restricts a launch to one part of one layer: for the interpreter, whose programs cannot wait
for each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from albor_serve.config import ModelConfig
from albor_serve.errors import BackendError, ConfigError
from albor_serve.kernels._triton import INTERPRET, jit, require_triton, tl
from albor_serve.kernels.core import (
    across_warps,
    add_lanes,
    add_weighted,
    column_of,
    load_tile,
    mma_tile,
    share,
    shared_base,
    sum_columns,
    undo_16,
)
from albor_serve.kernels.decoder import GpuDecoder
from albor_serve.kernels.exchange import (
    attention_asm,
    fence,
    four_shared,
    lanes_of,
    load_gains,
    poll_attention,
    poll_inputs,
    poll_keys,
    poll_to_shared,
    prefetch,
    put_float,
    put_halves,
    put_key,
    put_pairs,
    put_shared,
    rows_of,
    share_inputs,
    share_rows,
    share_sum,
    shared_float,
    shared_inputs,
    tags_base,
)
from albor_serve.kernels.layout import TILE_COLS, TILE_ROWS
from albor_serve.kernels.steps import (
    attend_rows,
    candidate,
    candidate_index,
    embed_at,
    head_norm,
    load_bands,
    load_rows,
    product,
    rotate,
    silu,
)
from albor_serve.kernels.weights import DecodeWeights

__all__ = ["PersistentDecoder", "PersistentPlan", "persistent_plan", "step_kernel"]

_ALL: Final = -1
_EMBED: Final = 0
_QKV: Final = 1
_ATTENTION: Final = 2
_OUTPUT: Final = 3
_GATE_UP: Final = 4
_DOWN: Final = 5
_HEAD: Final = 6
_END: Final = 7


@jit()
def _put_x(x_ptr, h, band, c, tag, WORDS: tl.constexpr, COPIES: tl.constexpr, ASM: tl.constexpr):
    """Publish a band of h [T], rows first, as float16 sixteenths; the copies lie WORDS apart."""
    value = tl.minimum(tl.maximum(h * 0.0625, -65504.0), 65504.0)
    at = x_ptr + band * 8 + c % 16 // 2
    for n in tl.static_range(COPIES):
        put_halves(at + n * WORDS, value, tag, c < 16, ASM)


@jit()
def _embed(pid, w_ptr, keys_ptr, tokens_ptr, out_ptr, h_ptr, x_ptr, pos, tag, feedback,
           P: tl.constexpr, KT: tl.constexpr, NK: tl.constexpr, COPIES: tl.constexpr,
           ASM: tl.constexpr, W: tl.constexpr):  # fmt: skip
    c = tl.arange(0, W * 32)
    token = tl.load(tokens_ptr)
    if feedback:
        which = tl.minimum(tl.arange(0, NK), P - 1)
        token = candidate_index(tl.max(poll_keys(keys_ptr, which, tag - 1, ASM), axis=0))
        if pid == 0:
            tl.store(out_ptr + pos, token)
    row = c % 16
    h = embed_at(w_ptr, token + c * 0, pid * 16 + row, KT, c >= 0)
    tl.store(h_ptr + pid * 16 + row, h, mask=c < 16)
    _put_x(x_ptr, h, pid, c, tag, KT * 64, COPIES, ASM)


@jit()
def _qkv(pid, w_ptr, x_ptr, g_ptr, qkv_ptr, tag, eps, base, buffer, lanes, KT: tl.constexpr,
         STREAM: tl.constexpr, ASM: tl.constexpr, W: tl.constexpr):  # fmt: skip
    e = tl.arange(0, W * 128)
    KPW: tl.constexpr = (KT + W - 1) // W
    tiles = load_bands(w_ptr, pid, KT, 1, STREAM, e, W)
    gains = load_gains(g_ptr, e, KT, W)
    xs, squares = poll_inputs(x_ptr, g_ptr, gains, tag, buffer, lanes, KT, True, ASM, W)
    acc = product(tiles, xs, 0.0, 0, KPW, False, ASM, W)
    share_rows(base, 0, acc, lanes, ASM, W)
    share_sum(base, 1, squares, lanes, ASM, W)
    tl.debug_barrier()
    c = tl.arange(0, W * 32)
    low, high, total = rows_of(base, (acc,), squares, c * 0, c % 8, 1, 16, ASM, W)
    inverse = tl.rsqrt(total / (KT * 128) + eps / 256.0)
    y = tl.where(c % 16 < 8, low, high * 0.0625) * inverse
    put_float(qkv_ptr + pid * 16 + c % 16, y, tag, c < 16, ASM)


@jit()
def _share_group(kv_head, qkv_ptr, tag, shared, H: tl.constexpr, HKV: tl.constexpr,
                 D: tl.constexpr, ASM: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """A group's queries, its key and its value, side by side in shared memory."""
    G: tl.constexpr = H // HKV
    COUNT: tl.constexpr = (G + 2) * D
    c = tl.arange(0, W * 32)
    for n in tl.static_range((COUNT // 2 + W * 32 - 1) // (W * 32)):
        u = tl.minimum(c * 2 + n * (W * 64), COUNT - 2)
        source = tl.where(u < G * D, kv_head * G * D + u,
                          tl.where(u < (G + 1) * D, (H + kv_head) * D + u - G * D,
                                   (H + HKV + kv_head) * D + u - (G + 1) * D))  # fmt: skip
        poll_to_shared(qkv_ptr + source, shared + u * 4, tag, ASM)
    tl.debug_barrier()


@jit()
def _query(q_ptr, shared, at, cos, sin, gain_low, gain_high, eps, D: tl.constexpr,
           QK_NORM: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """Queries, rotated, times log2(e) / sqrt(D): two halves."""
    half: tl.constexpr = D // 2
    low = shared_float(shared, at, q_ptr + at, ASM)
    high = shared_float(shared, at + half, q_ptr + at + half, ASM)
    if QK_NORM:
        low, high = head_norm(low, high, gain_low, gain_high, eps, D)
    low, high = rotate(low, high, cos, sin)
    scale = 1.4426950408889634 / tl.sqrt(tl.full([1, 1, 1], D, tl.float32))
    return low * scale, high * scale


@jit()
def _attend_new(kv_head, qkv_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, qn_ptr, kn_ptr, zeros_ptr,
                att_ptr, lse_ptr, pos, tag, eps, shared, H: tl.constexpr, HKV: tl.constexpr,
                D: tl.constexpr, GP: tl.constexpr, RL: tl.constexpr, QH: tl.constexpr,
                QK_NORM: tl.constexpr, ASM: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """What the new token sees of itself, as part 0; and its key and value for the cache."""
    half: tl.constexpr = D // 2
    G: tl.constexpr = H // HKV
    r = tl.arange(0, RL)[:, None, None]
    i = tl.arange(0, QH)[None, :, None]
    d2 = tl.arange(0, half)[None, None, :]
    zero = r * 0 + i * 0
    at = d2 + zero
    cos = tl.load(cos_ptr + pos * half + at)
    sin = tl.load(sin_ptr + pos * half + at)
    q_gain_low = tl.load(qn_ptr + at)
    q_gain_high = tl.load(qn_ptr + half + at)
    k_gain_low = tl.load(kn_ptr + at)
    k_gain_high = tl.load(kn_ptr + half + at)
    _share_group(kv_head, qkv_ptr, tag, shared, H, HKV, D, ASM, W)
    plain = at
    at += tl.load(zeros_ptr + at)
    q_low, q_high = _query(qkv_ptr + kv_head * G * D, shared, tl.minimum(i % GP, G - 1) * D + at,
                           cos, sin, q_gain_low, q_gain_high, eps, D, QK_NORM, ASM)  # fmt: skip
    new_k = qkv_ptr + (H + kv_head) * D + at
    new_v = qkv_ptr + (H + HKV + kv_head) * D + at
    k_low = shared_float(shared, G * D + at, new_k, ASM)
    k_high = shared_float(shared, G * D + half + at, new_k + half, ASM)
    v_low = shared_float(shared, (G + 1) * D + at, new_v, ASM)
    v_high = shared_float(shared, (G + 1) * D + half + at, new_v + half, ASM)
    if QK_NORM:
        k_low, k_high = head_norm(k_low, k_high, k_gain_low, k_gain_high, eps, D)
    k_low, k_high = rotate(k_low, k_high, cos, sin)
    k_low = k_low.to(tl.float16)
    k_high = k_high.to(tl.float16)
    s = tl.sum(k_low.to(tl.float32) * q_low + k_high.to(tl.float32) * q_high, axis=2)
    s = tl.broadcast_to(s[:, :, None], [RL, QH, half])
    to = kv_head * G + i % GP
    once = (i < G) & (r == 0) & (d2 >= 0)
    word = to * half + d2 // 2 + zero
    put_pairs(att_ptr + word, v_low, tag, once, plain, ASM)
    put_pairs(att_ptr + word + half // 2, v_high, tag, once, plain, ASM)
    put_float(lse_ptr + to + plain * 0, s, tag, once & (d2 == 0), ASM)
    once = (i == 0) & (r == 0) & (d2 >= 0)
    tl.store(k_ptr + pos * D + plain, k_low, mask=once)
    tl.store(k_ptr + pos * D + half + plain, k_high, mask=once)
    tl.store(v_ptr + pos * D + plain, v_low.to(tl.float16), mask=once)
    tl.store(v_ptr + pos * D + half + plain, v_high.to(tl.float16), mask=once)


@jit()
def _attention(kv_head, split, qkv_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, qn_ptr, zeros_ptr,
               att_ptr, lse_ptr, pos, tag, limit, eps, shared, H: tl.constexpr, HKV: tl.constexpr,
               D: tl.constexpr, GP: tl.constexpr, QH: tl.constexpr, RL: tl.constexpr,
               NR: tl.constexpr, S: tl.constexpr, QK_NORM: tl.constexpr, ASM: tl.constexpr,
               W: tl.constexpr):  # fmt: skip
    """As `steps.attend_one` without the new token, with words for qkv, att and lse."""
    half: tl.constexpr = D // 2
    G: tl.constexpr = H // HKV
    PARTS: tl.constexpr = QH // GP
    r = tl.arange(0, RL)[:, None, None]
    i = tl.arange(0, QH)[None, :, None]
    d2 = tl.arange(0, half)[None, None, :]
    zero = r * 0 + i * 0
    first = (split * PARTS + i // GP) * (NR * RL)
    rows = load_rows(k_ptr, v_ptr, first, r, d2, limit, D, RL, NR)
    at = d2 + zero
    cos = tl.load(cos_ptr + pos * half + at)
    sin = tl.load(sin_ptr + pos * half + at)
    q_gain_low = tl.load(qn_ptr + at)
    q_gain_high = tl.load(qn_ptr + half + at)

    COUNT: tl.constexpr = (G + 2) * D
    _share_group(kv_head, qkv_ptr, tag, shared, H, HKV, D, ASM, W)
    # As in `lanes_of`: the layout of the cache's loads.
    at += tl.load(zeros_ptr + at)
    q_low, q_high = _query(qkv_ptr + kv_head * G * D, shared, tl.minimum(i % GP, G - 1) * D + at,
                           cos, sin, q_gain_low, q_gain_high, eps, D, QK_NORM, ASM)  # fmt: skip
    top = tl.full([RL, QH], -1.0e30, tl.float32)
    weight = tl.zeros([RL, QH], tl.float32)
    o_low = tl.zeros([RL, QH, half], tl.float32)
    o_high = tl.zeros([RL, QH, half], tl.float32)
    top, weight, o_low, o_high = attend_rows(rows, first, r, pos, q_low, q_high, top, weight,
                                             o_low, o_high, RL, NR)  # fmt: skip
    step: tl.constexpr = S * PARTS * NR * RL
    tile = split * (PARTS * NR * RL) + step
    ahead = step
    while tile < pos:
        rows = load_rows(k_ptr, v_ptr, first + ahead, r, d2, limit, D, RL, NR)
        top, weight, o_low, o_high = attend_rows(rows, first + ahead, r, pos, q_low, q_high, top,
                                                 weight, o_low, o_high, RL, NR)  # fmt: skip
        tile += step
        ahead += step

    best = tl.max(top, axis=0)
    shrink = tl.exp2(top - best[None, :])
    total = tl.sum(weight * shrink, axis=0)
    whole: tl.constexpr = [RL, QH, half]
    shrink3 = shrink[:, :, None]
    o_low = tl.broadcast_to(tl.sum(o_low * shrink3, axis=0)[None, :, :], whole)
    o_high = tl.broadcast_to(tl.sum(o_high * shrink3, axis=0)[None, :, :], whole)
    best = tl.broadcast_to(best[None, :][:, :, None], whole)
    total = tl.broadcast_to(total[None, :][:, :, None], whole)
    if ASM and PARTS > 1:
        # The parts of this program become one.
        merge = shared + COUNT * 4
        ROW: tl.constexpr = D + 8
        mine = i * ROW + at
        once = (r == 0) & (d2 >= 0) & (i >= 0)
        put_shared(merge, mine, o_low, once, ASM)
        put_shared(merge, mine + half, o_high, once, ASM)
        put_shared(merge, i * ROW + D + at * 0, tl.where(at % 4 == 0, best, total),
                   once & (d2 < 4), ASM)  # fmt: skip
        tl.debug_barrier()
        top3 = tl.full(whole, -1.0e30, tl.float32)
        for part in tl.static_range(PARTS):
            row = (i % GP + part * GP) * ROW + D + at * 0
            top3 = tl.maximum(top3, shared_float(merge, row, merge, ASM))
        o_low = tl.zeros(whole, tl.float32)
        o_high = tl.zeros(whole, tl.float32)
        total = tl.zeros(whole, tl.float32)
        for part in tl.static_range(PARTS):
            row = (i % GP + part * GP) * ROW + at * 0
            factor = tl.exp2(shared_float(merge, row + D, merge, ASM) - top3)
            total += factor * shared_float(merge, row + D + 1, merge, ASM)
            o_low += factor * four_shared(merge, row + at)
            o_high += factor * four_shared(merge, row + at + half)
        best = top3
    some = total > 0.0
    safe = tl.where(some, total, 1.0)
    inverse = tl.where(some, 1.0 / safe, 0.0)
    lse = tl.where(some, best + tl.log2(safe), -1.0e30)
    if ASM:
        to = (1 + split) * H + kv_head * G + i % GP
        once = (i < G) & (r == 0) & (d2 >= 0)
    else:
        to = (1 + split * PARTS + i // GP) * H + kv_head * G + i % GP
        once = (i % GP < G) & (r == 0) & (d2 >= 0)
    word = to * half + d2 // 2 + zero
    put_pairs(att_ptr + word, o_low * inverse, tag, once, d2 + zero, ASM)
    put_pairs(att_ptr + word + half // 2, o_high * inverse, tag, once, d2 + zero, ASM)
    put_float(lse_ptr + to + d2 * 0 + zero, lse, tag, once & (d2 == 0), ASM)


@jit()
def _add_band(base, acc, h_ptr, h, x_ptr, pid, tag, WORDS: tl.constexpr, COPIES: tl.constexpr,
              ASM: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """Add a band's shared results to h; keep it and publish its x."""
    c = tl.arange(0, W * 32)
    low, high, _total = rows_of(base, (acc,), acc, c * 0, c % 8, 1, 16, ASM, W)
    h = h + tl.where(c % 16 < 8, low, high * 0.0625)
    _put_x(x_ptr, h, pid, c, tag, WORDS, COPIES, ASM)
    tl.store(h_ptr + pid * 16 + c % 16, h, mask=c < 16)


@jit()
def _output(pid, w_ptr, att_ptr, lse_ptr, h_ptr, x_ptr, tag, base, lanes, KT: tl.constexpr,
            H: tl.constexpr, D: tl.constexpr, NP: tl.constexpr, CODE: tl.constexpr,
            CONSTRAINTS: tl.constexpr, DM: tl.constexpr, COPIES: tl.constexpr, STREAM: tl.constexpr,
            ASM: tl.constexpr, W: tl.constexpr):  # fmt: skip
    e = tl.arange(0, W * 128)
    c = tl.arange(0, W * 32)
    KPW: tl.constexpr = (KT + W - 1) // W
    SETS: tl.constexpr = (NP + 7) // 8
    HEADS: tl.constexpr = 128 // D
    WORDS: tl.constexpr = D // 32
    tiles = load_bands(w_ptr, pid, KT, 1, STREAM, e, W)
    h = tl.load(h_ptr + pid * 16 + c % 16)
    n = column_of(lanes)
    acc = tl.zeros([W * 128], tl.float32)
    for q in tl.static_range(KPW):
        first_head = tl.minimum(lanes // 128 + q * W, KT - 1) * HEADS
        values, logs = poll_attention(att_ptr, lse_ptr, tag, n, lanes, first_head, NP, H, D,
                                      SETS, CODE, CONSTRAINTS, ASM)  # fmt: skip
        xs = ()
        for part in tl.static_range(HEADS):
            top = logs[part * SETS]
            for a in tl.static_range(1, SETS):
                top = tl.maximum(top, logs[part * SETS + a])
            top = add_lanes(top, True, 1, ASM, W)
            weights = ()
            total = tl.zeros_like(top)
            for a in tl.static_range(SETS):
                weight = tl.exp2(logs[part * SETS + a] - top)
                total += weight
                weights = weights + (weight,)  # noqa: RUF005
            inverse = 1.0 / add_lanes(total, False, 1, ASM, W)
            for i in tl.static_range(WORDS):
                x = values[part * SETS * WORDS + i]
                x = add_weighted(x, weights[0] * inverse, x, True, ASM)
                for a in tl.static_range(1, SETS):
                    value = values[(part * SETS + a) * WORDS + i]
                    x = add_weighted(value, weights[a] * inverse, x, False, ASM)
                xs = xs + (x,)  # noqa: RUF005
        acc = mma_tile(tiles[3 * q], tiles[3 * q + 1], tiles[3 * q + 2],
                       (xs[0], xs[1], xs[2], xs[3]), acc, 0.0, True, ASM, W)  # fmt: skip
    acc = sum_columns(acc, 1, ASM, W)
    share_rows(base, 0, acc, lanes, ASM, W)
    tl.debug_barrier()
    _add_band(base, acc, h_ptr, h, x_ptr, pid, tag, DM // 2, COPIES, ASM, W)


@jit()
def _gate_up(pid, w_ptr, x_ptr, g_ptr, act_ptr, tag, eps, base, buffer, lanes, KT: tl.constexpr,
             NB: tl.constexpr, STREAM: tl.constexpr, ASM: tl.constexpr,
             W: tl.constexpr):  # fmt: skip
    e = tl.arange(0, W * 128)
    KPW: tl.constexpr = (KT + W - 1) // W
    tiles = load_bands(w_ptr, pid * NB, KT, NB, STREAM, e, W)
    gains = load_gains(g_ptr, e, KT, W)
    xs, squares = poll_inputs(x_ptr, g_ptr, gains, tag, buffer, lanes, KT, True, ASM, W)
    accs = ()
    for b in tl.static_range(NB):
        acc = product(tiles, xs, 0.0, b, KPW, False, ASM, W)
        share_rows(base, b, acc, lanes, ASM, W)
        accs = accs + (acc,)  # noqa: RUF005
    share_sum(base, NB, squares, lanes, ASM, W)
    tl.debug_barrier()
    c = tl.arange(0, W * 32)
    which = tl.minimum(c // 8, NB - 1)
    row = c % 8
    gate, up, total = rows_of(base, accs, squares, which, row, NB, NB * 8, ASM, W)
    inverse = tl.rsqrt(total / (KT * 128) + eps / 256.0)
    act = silu(gate * inverse) * (up * (inverse * 0.0625))
    act = tl.minimum(tl.maximum(act, -65504.0), 65504.0)
    put_halves(act_ptr + (pid * NB + which) * 4 + row // 2, act, tag, c < NB * 8, ASM)


@jit()
def _down(pid, w_ptr, act_ptr, h_ptr, x_ptr, tag, next_tag, base, buffer, lanes, KT: tl.constexpr,
          DM: tl.constexpr, COPIES: tl.constexpr, STREAM: tl.constexpr, ASM: tl.constexpr,
          W: tl.constexpr):  # fmt: skip
    e = tl.arange(0, W * 128)
    c = tl.arange(0, W * 32)
    KPW: tl.constexpr = (KT + W - 1) // W
    tiles = load_bands(w_ptr, pid, KT, 1, STREAM, e, W)
    h = tl.load(h_ptr + pid * 16 + c % 16)
    xs, _squares = poll_inputs(act_ptr, act_ptr, (), tag, buffer, lanes, KT, False, ASM, W)
    acc = product(tiles, xs, 0.0, 0, KPW, False, ASM, W)
    share_rows(base, 0, acc, lanes, ASM, W)
    tl.debug_barrier()
    _add_band(base, acc, h_ptr, h, x_ptr, pid, next_tag, DM // 2, COPIES, ASM, W)


@jit()
def _head(pid, w_ptr, x_ptr, g_ptr, logits_ptr, keys_ptr, tag, eps, base, buffer, lanes,
          P: tl.constexpr, V: tl.constexpr, KT: tl.constexpr, STORE: tl.constexpr,
          STREAM: tl.constexpr, ASM: tl.constexpr, W: tl.constexpr):  # fmt: skip
    e = tl.arange(0, W * 128)
    BANDS: tl.constexpr = (V + 15) // 16
    ROUNDS: tl.constexpr = (BANDS + P * W - 1) // (P * W)
    # Warp w of all programs, then warp w + 1: bands of one program lie W apart, so that a round
    # that is not full is shared by all.
    band = e // 128 * P + pid
    # Tile n KT + k is the k-th of round n; this many are on their way at a time.
    AHEAD: tl.constexpr = min(6, KT)
    tiles = ()
    for k in tl.static_range(AHEAD):
        tiles = tiles + load_tile(w_ptr, tl.minimum(band, BANDS - 1) * KT + k, e, STREAM)
    gains = load_gains(g_ptr, e, KT, W)
    # Keys and values that this program stored are there before any token after this one begins.
    fence(ASM)
    squares = share_inputs(x_ptr, g_ptr, gains, tag, buffer, lanes, KT, ASM, W)
    share(base, 0, squares, e, ASM, W)
    tl.debug_barrier()
    total = across_warps(base, (squares,), e * 0, e * 0, ASM, W)
    inverse = tl.rsqrt(total / (KT * 128) + eps / 256.0)
    best = tl.full([W * 128], -(1 << 63), tl.int64)
    for n in tl.static_range(ROUNDS):
        here = band + n * (P * W)
        acc = tl.zeros([W * 128], tl.float32)
        for k in tl.static_range(KT):
            xs = shared_inputs(x_ptr, g_ptr, buffer, k, lanes, ASM)
            acc = mma_tile(tiles[0], tiles[1], tiles[2], xs, acc, 0.0, False, ASM, W)
            tiles = tiles[3:]
            if n * KT + k + AHEAD < ROUNDS * KT:
                source = tl.minimum(band + (n * KT + k + AHEAD) // KT * (P * W), BANDS - 1)
                tiles = tiles + load_tile(w_ptr, source * KT + (k + AHEAD) % KT, e, STREAM)
        y = acc * inverse * undo_16(e)
        row = here * 16 + e // 16 % 8 + e // 2 % 2 * 8
        ok = (here < BANDS) & (row < V) & (e // 4 % 4 == 0) & (e % 2 == 0)
        if STORE:
            tl.store(logits_ptr + row, y, mask=ok)
        key = candidate(y, row)
        best = tl.maximum(best, tl.where(ok, key, -(1 << 63)))
    c = tl.arange(0, W * 32)
    put_key(keys_ptr + pid * 2, tl.max(best, axis=0), tag, c, ASM)


@jit(do_not_specialize=["layer", "num_steps", "feedback"])
def step_kernel(embedding_ptr, qkv_w_ptr, output_w_ptr, gate_up_w_ptr, down_w_ptr, head_w_ptr,
                attention_gain_ptr, feed_forward_gain_ptr, final_gain_ptr, query_gain_ptr,
                key_gain_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, tokens_ptr, pos_ptr, out_ptr,
                logits_ptr, best_ptr, key_ptr, epoch_ptr, h_ptr, x_ptr, x_ff_ptr, qkv_ptr, att_ptr,
                lse_ptr, act_ptr, zeros_ptr, max_len, eps, layer, num_steps, feedback,
                PHASE: tl.constexpr, P: tl.constexpr, L: tl.constexpr, V: tl.constexpr,
                KT: tl.constexpr, KT_O: tl.constexpr, KT_FF: tl.constexpr, H: tl.constexpr,
                HKV: tl.constexpr,
                D: tl.constexpr, GP: tl.constexpr, QH: tl.constexpr, RL: tl.constexpr,
                NR: tl.constexpr, S: tl.constexpr, NB: tl.constexpr, NK: tl.constexpr,
                QK_NORM: tl.constexpr, STORE: tl.constexpr, STREAM: tl.constexpr,
                BULK: tl.constexpr, COPIES: tl.constexpr, CODE: tl.constexpr,
                CONSTRAINTS: tl.constexpr, ASM: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """`num_steps` tokens, each chosen greedily from the last one's logits.

    The first token is tokens[0], or with `feedback` the best of the last launch, and then its
    position is one more than *pos. Afterwards *pos is the last token's position.
    """
    pid = tl.program_id(0)
    c = tl.arange(0, W * 32)
    base = shared_base(ASM)
    buffer = tags_base(ASM)
    lanes = lanes_of(zeros_ptr, W * 128)
    # Results of neighbouring parts lie in different shared memory: a warp may be ahead of another
    # by less than one part.
    other: tl.constexpr = 12288
    BANDS: tl.constexpr = KT * 8
    QKV_BANDS: tl.constexpr = (H + 2 * HKV) * D // 16
    GATE_PROGRAMS: tl.constexpr = KT_FF * 16 // NB
    # Without assembly a program's parts stay apart.
    PIECES: tl.constexpr = 1 + (S if ASM else S * (QH // GP))
    QKV_WORDS: tl.constexpr = QKV_BANDS * KT * 288
    OUTPUT_WORDS: tl.constexpr = BANDS * KT_O * 288
    GATE_WORDS: tl.constexpr = KT_FF * 16 * KT * 288
    DOWN_WORDS: tl.constexpr = BANDS * KT_FF * 288
    # Copies spread the readers of a line, which the cache serves one after the other.
    x_own = x_ptr + pid % COPIES * (KT * 64)
    x_ff_own = x_ff_ptr + pid % COPIES * (KT * 64)
    start = tl.load(epoch_ptr)
    pos = tl.load(pos_ptr)
    step = 0
    while step < num_steps:
        tag = (start + step) * (L + 1)
        fed = (step > 0) | (feedback != 0)
        if fed:
            pos += 1
        fence(ASM)
        if PHASE == -1 or PHASE == 0:
            if pid < BANDS:
                _embed(pid, embedding_ptr, best_ptr, tokens_ptr, out_ptr, h_ptr, x_ptr, pos, tag,
                       fed, P, KT, NK, COPIES, ASM, W)  # fmt: skip
        first = 0
        last = L
        if PHASE != -1:
            first = layer
            last = layer + 1
        i = first
        while i < last:
            after = tl.minimum(i + 1, L - 1)
            here = tag + i
            more = i + 1 < L
            if PHASE == -1 or PHASE == 1:
                if pid < QKV_BANDS:
                    _qkv(pid, qkv_w_ptr + i * QKV_WORDS, x_own, attention_gain_ptr + i * (KT * 64),
                         qkv_ptr, here, eps, base, buffer, lanes, KT, STREAM, ASM, W)  # fmt: skip
                    prefetch(qkv_w_ptr, after * QKV_WORDS + pid * (KT * 288), KT * 1152, more, c,
                             BULK)  # fmt: skip
            if PHASE == -1 or PHASE == 2:
                # The last programs: the first have a band of h, and wait for what comes next.
                number = P - 1 - pid
                kv_head = number % HKV
                cache = (i * HKV + kv_head) * max_len * D
                if number < HKV:
                    _attend_new(kv_head, qkv_ptr, keys_ptr + cache, values_ptr + cache, cos_ptr,
                                sin_ptr, query_gain_ptr + i * D, key_gain_ptr + i * D, zeros_ptr,
                                att_ptr, lse_ptr, pos, here, eps, buffer, H, HKV, D, GP, RL, QH,
                                QK_NORM, ASM, W)  # fmt: skip
                elif number < HKV * (S + 1):
                    _attention(kv_head, number // HKV - 1, qkv_ptr, keys_ptr + cache,
                               values_ptr + cache, cos_ptr, sin_ptr, query_gain_ptr + i * D,
                               zeros_ptr, att_ptr, lse_ptr, pos, here, max_len, eps, buffer, H,
                               HKV, D, GP, QH, RL, NR, S, QK_NORM, ASM, W)  # fmt: skip
            if PHASE == -1 or PHASE == 3:
                if pid < BANDS:
                    _output(pid, output_w_ptr + i * OUTPUT_WORDS, att_ptr, lse_ptr, h_ptr,
                            x_ff_ptr, here, base + other, lanes, KT_O, H, D, PIECES, CODE,
                            CONSTRAINTS, KT * 128, COPIES, STREAM, ASM, W)  # fmt: skip
                    prefetch(output_w_ptr, after * OUTPUT_WORDS + pid * (KT_O * 288), KT_O * 1152,
                             more, c, BULK)  # fmt: skip
            if PHASE == -1 or PHASE == 4:
                if pid < GATE_PROGRAMS:
                    _gate_up(pid, gate_up_w_ptr + i * GATE_WORDS, x_ff_own,
                             feed_forward_gain_ptr + i * (KT * 64), act_ptr, here, eps, base,
                             buffer, lanes, KT, NB, STREAM, ASM, W)  # fmt: skip
                    prefetch(gate_up_w_ptr, after * GATE_WORDS + pid * (NB * KT * 288),
                             NB * KT * 1152, more, c, BULK)  # fmt: skip
            if PHASE == -1 or PHASE == 5:
                if pid < BANDS:
                    _down(pid, down_w_ptr + i * DOWN_WORDS, act_ptr, h_ptr, x_ptr, here, here + 1,
                          base + other, buffer, lanes, KT_FF, KT * 128,
                          COPIES, STREAM, ASM, W)  # fmt: skip
                    prefetch(down_w_ptr, after * DOWN_WORDS + pid * (KT_FF * 288), KT_FF * 1152,
                             more, c, BULK)  # fmt: skip
            i += 1
        if PHASE == -1 or PHASE == 6:
            _head(pid, head_w_ptr, x_own, final_gain_ptr, logits_ptr, best_ptr, tag + L, eps,
                  base, buffer + 8192, lanes, P, V, KT, STORE, STREAM, ASM, W)  # fmt: skip
        step += 1
    if PHASE == -1 or PHASE == 7:
        if pid == 0:
            # Once all programs have chosen, all have read where this launch began.
            which = tl.minimum(tl.arange(0, NK), P - 1)
            tag = (start + num_steps - 1) * (L + 1) + L
            key = tl.max(poll_keys(best_ptr, which, tag, ASM), axis=0)
            tl.store(key_ptr, key)
            tl.store(pos_ptr, pos)
            tl.store(epoch_ptr, start + num_steps)


@dataclass(frozen=True, slots=True)
class PersistentPlan:
    """Numbers that the kernel is compiled for."""

    num_programs: int
    """P: one for each multiprocessor."""
    num_warps: int
    num_splits: int
    """S: programs that share one key-value head's positions."""
    rows_per_lane: int
    bands_gate_up: int
    num_copies: int
    """Copies of x, each for a part of the programs."""
    stream: bool
    bulk: bool
    """Whether the GPU has bulk prefetches (compute capability 9.0)."""
    asm: bool


def persistent_plan(
    weights: DecodeWeights,
    *,
    num_programs: int = 132,
    num_warps: int = 8,
    num_parts: int = 16,
    num_copies: int = 2,
    bulk: bool = False,
    cache_bytes: int = 40 << 20,
) -> PersistentPlan:
    """A plan for a GPU with `num_programs` multiprocessors.

    Raises:
        ConfigError: the model is too wide for one band a program: decode with separate kernels.
    """
    c = weights.config
    gate_bands = c.intermediate_size // 8
    least = -(-gate_bands // num_programs)
    bands = next(n for n in range(least, gate_bands + 1) if gate_bands % n == 0)
    group = 1 << (c.num_heads // c.num_kv_heads - 1).bit_length()
    parts_each = max(1, num_warps // group)
    plan = PersistentPlan(
        num_programs=num_programs,
        num_warps=num_warps,
        num_splits=max(1, num_parts // parts_each),
        rows_per_lane=4,
        bands_gate_up=bands,
        num_copies=num_copies,
        stream=weights.bytes_per_token > cache_bytes,
        bulk=bulk,
        asm=not INTERPRET,
    )
    reason = _misfit(c, plan)
    if reason:
        raise ConfigError(f"the persistent kernel can't run this model: {reason}")
    return plan


def _misfit(c: ModelConfig, plan: PersistentPlan) -> str | None:
    width, warps = plan.num_programs, plan.num_warps
    tiles = c.hidden_size // TILE_COLS
    tiles_ff = c.intermediate_size // TILE_COLS
    rows = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    if max(c.hidden_size, rows) // TILE_ROWS > width:
        return f"it needs {max(c.hidden_size, rows) // TILE_ROWS} programs, there are {width}"
    if tiles > warps and tiles != 2 * warps:
        return f"hidden_size {c.hidden_size} does not divide over {warps} warps"
    if tiles_ff > 4 * warps:
        return f"intermediate_size {c.intermediate_size} is more than {4 * warps * TILE_COLS}"
    if plan.bands_gate_up > 4:
        return f"intermediate_size {c.intermediate_size} takes {plan.bands_gate_up} bands a program"
    if plan.num_splits > 15:
        return f"{plan.num_splits} splits are more than the 15 that are read at once"
    if (plan.num_splits + 1) * c.num_kv_heads > width:
        return f"{plan.num_splits} splits of {c.num_kv_heads} heads are more than {width} programs"
    return None


class PersistentDecoder:
    """Decoding of one sequence by `step_kernel`: another way to do `GpuDecoder.step`.

    Shares the decoder's KV cache, `tokens`, `position`, `out_tokens` and `logits`, and leaves the
    best token of the last step in its `best[0, 0]`. Not safe for several threads.
    """

    def __init__(self, decoder: GpuDecoder, plan: PersistentPlan) -> None:
        require_triton()
        weights = decoder.weights
        self._decoder = decoder
        self._weights, self.plan = weights, plan
        c, device = weights.config, weights.head.device
        group = 1 << (c.num_heads // c.num_kv_heads - 1).bit_length()
        self._query_rows = max(group, plan.num_warps)
        parts = 1 + plan.num_splits * (1 if plan.asm else self._query_rows // group)
        q_rows = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim

        def words(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self._epoch = torch.ones(1, dtype=torch.int32, device=device)
        self._best = words(plan.num_programs, 2)
        self._h = torch.zeros(c.hidden_size, dtype=torch.float32, device=device)
        self._x = words(plan.num_copies, c.hidden_size // 2)
        self._x_ff = words(plan.num_copies, c.hidden_size // 2)
        self._qkv = words(q_rows)
        self._attention = words(parts, c.num_heads, c.head_dim // 2)
        self._lse = words(parts, c.num_heads)
        self._act = words(c.intermediate_size // 2)
        self._zeros = torch.zeros(1 << 13, dtype=torch.int32, device=device)
        self._gains = tuple(
            g.to(torch.float16).contiguous().view(torch.int32)
            for g in (weights.attention_gain, weights.feed_forward_gain, weights.final_gain)
        )
        code, constraints = attention_asm(c.head_dim, c.num_heads, parts)
        self._constants: dict[str, Any] = {
            "P": plan.num_programs,
            "L": c.num_layers,
            "V": c.vocab_size,
            "KT": c.hidden_size // TILE_COLS,
            "KT_O": c.num_heads * c.head_dim // TILE_COLS,
            "KT_FF": c.intermediate_size // TILE_COLS,
            "H": c.num_heads,
            "HKV": c.num_kv_heads,
            "D": c.head_dim,
            "GP": group,
            "QH": self._query_rows,
            "RL": 512 // c.head_dim,
            "NR": plan.rows_per_lane,
            "S": plan.num_splits,
            "NB": plan.bands_gate_up,
            "NK": 1 << (plan.num_programs - 1).bit_length(),
            "QK_NORM": c.qk_norm,
            "STREAM": plan.stream,
            "BULK": plan.bulk,
            "COPIES": plan.num_copies,
            "CODE": code,
            "CONSTRAINTS": constraints,
            "ASM": plan.asm,
            "W": plan.num_warps,
        }

    def run(self, num_steps: int = 1, *, feedback: bool = False, store_logits: bool = True) -> None:
        """Queue `num_steps` tokens; see `step_kernel`.

        Raises:
            BackendError: the kernel could not be compiled or launched.
        """
        try:
            if INTERPRET:
                for step in range(num_steps):
                    self._interpret(feedback or step > 0, store_logits)
            else:
                self._launch(_ALL, 0, num_steps, feedback, store_logits)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise BackendError(f"a GPU kernel failed: {reason}") from error

    def _interpret(self, feedback: bool, store_logits: bool) -> None:
        """One token, each part of each layer as a launch of its own."""
        self._launch(_EMBED, 0, 1, feedback, store_logits)
        for layer in range(self._weights.config.num_layers):
            for phase in (_QKV, _ATTENTION, _OUTPUT, _GATE_UP, _DOWN):
                self._launch(phase, layer, 1, feedback, store_logits)
        self._launch(_HEAD, 0, 1, feedback, store_logits)
        self._launch(_END, 0, 1, feedback, store_logits)

    def _launch(self, phase: int, layer: int, steps: int, feedback: bool, store: bool) -> None:
        w, plan, d = self._weights, self.plan, self._decoder
        attention_gain, feed_forward_gain, final_gain = self._gains
        options: dict[str, Any] = {"num_warps": plan.num_warps, "num_stages": 1}
        if not INTERPRET:
            options["launch_cooperative_grid"] = True
        step_kernel[(plan.num_programs,)](
            w.embedding, w.qkv, w.output, w.gate_up, w.down, w.head, attention_gain,
            feed_forward_gain, final_gain, w.query_gain, w.key_gain, w.cos, w.sin, d.keys, d.values,
            d.tokens, d.position, d.out_tokens, d.logits, self._best, d.best, self._epoch, self._h,
            self._x, self._x_ff, self._qkv, self._attention, self._lse, self._act, self._zeros,
            d.max_seq_len,
            w.config.rms_norm_eps, layer, steps, int(feedback), PHASE=phase, STORE=store,
            **self._constants, **options,
        )  # fmt: skip
