# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,assignment"
"""Each step of `steps` as a kernel of its own, for a CUDA graph.

With PDL (programmatic dependent launch, Hopper and later) a kernel starts while the one before it
still runs: it loads its weights, then waits for the other's results. Every kernel waits, so one
that has waited knows that all before it are complete.

All ask for the same amount of shared memory, needed or not: a multiprocessor may have to become
idle before it divides its memory otherwise, and then no kernel could start early.
"""

from __future__ import annotations

from albor_serve.kernels._triton import jit, tl
from albor_serve.kernels.core import (
    X_BYTES,
    across_warps,
    fetch_x,
    from_warp_0,
    load_tile,
    load_x,
    mma_tile,
    prefetch_lines,
    result_index,
    share,
    shared_base,
    staged_x,
    sum_columns,
    sum_rows,
    undo_16,
)
from albor_serve.kernels.steps import (
    attend_many,
    attend_new,
    attend_one,
    candidate,
    candidate_index,
    embed_at,
    inverse_rms,
    load_attention,
    load_bands,
    load_inputs,
    load_kv,
    load_rows,
    products,
    settle_inputs,
    silu,
)

__all__ = [
    "attention_kernel",
    "attention_one_kernel",
    "embed_kernel",
    "feed_forward_kernel",
    "gate_up_kernel",
    "head_kernel",
    "output_kernel",
    "qkv_kernel",
]


STAGED_TILES = tl.constexpr(X_BYTES // 256)
"""Tiles along K for which one token's activations have room in shared memory."""


@jit()
def _start(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@jit()
def _wait(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()


@jit()
def embed_kernel(w_ptr, g_ptr, keys_ptr, tokens_ptr, pos_ptr, out_ptr, cos_ptr, sin_ptr, h_ptr,
                 x_ptr, sums_ptr, inverse_ptr, rope_ptr, num_keys, eps, KT: tl.constexpr,
                 KB: tl.constexpr, NK: tl.constexpr, D: tl.constexpr, PB: tl.constexpr,
                 PBP: tl.constexpr, FEEDBACK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Write the embeddings of the next M tokens to h and x; program m handles token m.

    With FEEDBACK (M = 1) the token is the best of keys [NK, 8]; the program also appends it to
    out[pos + 1] and moves pos on by one. Without, tokens [M] are read and pos stays. Also writes
    sums, inverse and rope.
    """
    m = tl.program_id(0)
    k = tl.arange(0, KB)
    ok = k < KT * 128
    gain = tl.load(g_ptr + k, mask=ok, other=0.0)
    _wait(PDL)
    # Only now: an attention kernel of this step that started before the last step ended could
    # read keys and values ahead of their being written.
    _start(PDL)
    pos = tl.load(pos_ptr)
    if FEEDBACK:
        rows = tl.arange(0, NK)
        keys = tl.load(keys_ptr + rows * 8, mask=rows < num_keys, other=-(1 << 63))
        token = candidate_index(tl.max(keys, axis=0))
        pos += 1
        tl.store(out_ptr + pos, token)
        tl.store(pos_ptr, pos)
    else:
        token = tl.load(tokens_ptr + m)
    half: tl.constexpr = D // 2
    d2 = tl.arange(0, half)
    tl.store(rope_ptr + m * D + d2, tl.load(cos_ptr + (pos + m) * half + d2))
    tl.store(rope_ptr + m * D + half + d2, tl.load(sin_ptr + (pos + m) * half + d2))
    h = embed_at(w_ptr, token + k * 0, k, KT, ok)
    h = tl.where(ok, h, 0.0)
    total = tl.sum(h * h, axis=0)
    inverse = tl.rsqrt(total / (KT * 128) + eps)
    tl.store(h_ptr + m * KT * 128 + k, h, mask=ok)
    band = tl.arange(0, PBP)
    tl.store(x_ptr + m * KT * 128 + k, (h * gain * inverse).to(tl.float16), mask=ok)
    tl.store(sums_ptr + m * PB + band, tl.where(band == 0, total, 0.0), mask=band < PB)
    tl.store(inverse_ptr + m, inverse)


@jit()
def _scale(base, slot, inverse, last, inverse_ptr, row, token, ok, first, ASM: tl.constexpr,
           W: tl.constexpr):  # fmt: skip
    """What a product with x is to be multiplied with to be one with RMSNorm(h), for each element.

    The `first` program also stores the inverse for the next user.
    """
    new = from_warp_0(base, slot, inverse, result_index(0, token), ASM, W)
    tl.store(inverse_ptr + token, new, mask=ok & (row == 0) & first)
    return new / last


@jit()
def qkv_kernel(w_ptr, x_ptr, sums_ptr, last_ptr, inverse_ptr, qkv_ptr, next_ptr, eps,
               N: tl.constexpr, KT: tl.constexpr, PB: tl.constexpr, NEXT: tl.constexpr,
               M: tl.constexpr, MP: tl.constexpr, STREAM: tl.constexpr, PDL: tl.constexpr,
               ASM: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """Qkv = W · RMSNorm(h): one band of 16 outputs for each program."""
    _start(PDL)
    band = tl.program_id(0)
    e = tl.arange(0, W * 128)
    base = shared_base(ASM, True)
    tiles = load_bands(w_ptr, band, KT, 1, STREAM, e, W)
    prefetch_lines(next_ptr, NEXT, W * 32, ASM)
    _wait(PDL)
    STAGED: tl.constexpr = ASM and M == 1 and KT <= STAGED_TILES
    xs = load_inputs(x_ptr, e, KT, M, STAGED, W)
    c = tl.arange(0, W * 32)
    row = c // MP % 16
    token = c % MP
    ok = (c < 16 * MP) & (token < M)
    last = tl.load(last_ptr + token, mask=ok, other=1.0)
    inverse, zero = inverse_rms(sums_ptr, base, xs, e, eps, KT, PB, M, STAGED,
                                ASM, W)  # fmt: skip
    accs = products(tiles, xs, base, zero, e, 1, KT, M > 1, STAGED, ASM, W)
    share(base, 0, accs[0], e, ASM, W)
    share(base, 1, inverse, e, ASM, W)
    tl.debug_barrier()
    y = across_warps(base, accs, c * 0, result_index(row, token), ASM, W)
    scale = _scale(base, 1, inverse, last, inverse_ptr, row, token, ok, band == 0, ASM, W)
    y = y * tl.where(row < 8, scale, scale * 0.0625)
    tl.store(qkv_ptr + token * N + band * 16 + row, y, mask=ok)


@jit()
def attention_one_kernel(qkv_ptr, k_ptr, v_ptr, rope_ptr, qn_ptr, kn_ptr, att_ptr, lse_ptr,
                         pos_ptr, next_ptr, max_len, eps, H: tl.constexpr, HKV: tl.constexpr,
                         D: tl.constexpr, GP: tl.constexpr, QH: tl.constexpr, RL: tl.constexpr,
                         NR: tl.constexpr, S: tl.constexpr, QK_NORM: tl.constexpr,
                         NEXT: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
                         W: tl.constexpr):  # fmt: skip
    """Attention of one token: program (kv head, split); split S is the new token's own."""
    _start(PDL)
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    shared = shared_base(ASM, True)
    base = kv_head * max_len * D
    r = tl.arange(0, RL)[:, None, None]
    i = tl.arange(0, QH)[None, :, None]
    d2 = tl.arange(0, D // 2)[None, None, :]
    first = (split * (QH // GP) + i // GP) * (NR * RL)
    # Kernels of the same token may still run, but none that writes what this reads: the new
    # token's key and value do not come from the cache.
    limit = tl.where(split < S, max_len, 0)
    rows = load_rows(k_ptr + base, v_ptr + base, first, r, d2, limit, D, RL, NR)
    gains = ()
    if QK_NORM:
        at = d2 + r * 0 + i * 0
        gains = (tl.load(qn_ptr + at), tl.load(qn_ptr + D // 2 + at))
    prefetch_lines(next_ptr, NEXT, W * 32, ASM)
    _wait(PDL)
    if split < S:
        attend_one(rows, gains, first, qkv_ptr, k_ptr + base, v_ptr + base, rope_ptr, att_ptr,
                   lse_ptr, pos_ptr, kv_head, split, max_len, eps, shared, H, HKV, D, GP, QH, RL,
                   NR, S, QK_NORM, ASM, W)  # fmt: skip
    else:
        PARTS: tl.constexpr = 1 if ASM else QH // GP
        attend_new(qkv_ptr, k_ptr + base, v_ptr + base, rope_ptr, qn_ptr, kn_ptr, att_ptr, lse_ptr,
                   pos_ptr, kv_head, S * PARTS, eps, H, HKV, D, GP, QK_NORM)  # fmt: skip


@jit()
def attention_kernel(qkv_ptr, k_ptr, v_ptr, rope_ptr, qn_ptr, kn_ptr, att_ptr, lse_ptr,
                     pos_ptr, max_len, eps, M: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr,
                     D: tl.constexpr, GP: tl.constexpr, RP: tl.constexpr, P: tl.constexpr,
                     S: tl.constexpr, QK_NORM: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Attention of M tokens: program (kv head, split)."""
    _start(PDL)
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    base = kv_head * max_len * D
    # As in attention_one_kernel, nothing that still runs writes the cached positions.
    k_low, k_high, v = load_kv(k_ptr + base, v_ptr + base, split, max_len, P, D)
    _wait(PDL)
    pos = tl.load(pos_ptr)
    attend_many(k_low, k_high, v, qkv_ptr, k_ptr + base, v_ptr + base, rope_ptr, qn_ptr, kn_ptr,
                att_ptr, lse_ptr, pos, kv_head, split, max_len, eps, M, H, HKV, D, GP, RP, P, S,
                QK_NORM)  # fmt: skip


@jit()
def _load_residual(h_ptr, g_ptr, scale_ptr, band, N: tl.constexpr, M: tl.constexpr,
                   MP: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """What `_finish` needs of a band: h, gain and scale [T], rows before tokens."""
    c = tl.arange(0, W * 32)
    row = c // MP % 16
    token = c % MP
    ok = (c < 16 * MP) & (token < M)
    h = tl.load(h_ptr + token * N + band * 16 + row, mask=ok, other=0.0)
    gain = tl.load(g_ptr + band * 16 + row, mask=ok, other=0.0)
    return h, gain, tl.load(scale_ptr + token, mask=ok, other=0.0)


@jit()
def _finish(base, acc, residual, out_ptr, x_ptr, sums_ptr, band, N: tl.constexpr,
            PB: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, ASM: tl.constexpr,
            W: tl.constexpr):  # fmt: skip
    """Add up a band's shared results, add them to h; write it, its x and its sum of squares."""
    c = tl.arange(0, W * 32)
    row = c // MP % 16
    token = c % MP
    ok = (c < 16 * MP) & (token < M)
    y = across_warps(base, (acc,), c * 0, result_index(row, token), ASM, W)
    h = residual[0] + tl.where(row < 8, y, y * 0.0625)
    at = token * N + band * 16 + row
    tl.store(x_ptr + at, (h * residual[1] * residual[2]).to(tl.float16), mask=ok)
    tl.store(out_ptr + at, h, mask=ok)
    total = sum_rows(tl.where(ok, h * h, 0.0), MP, ASM)
    if MP == 1:
        tl.store(sums_ptr + band + c * 0, total, mask=c == 0)
    else:
        t = tl.arange(0, MP)
        tl.store(sums_ptr + t * PB + band, total, mask=t < M)


@jit()
def output_kernel(w_ptr, att_ptr, lse_ptr, h_ptr, out_ptr, g_ptr, scale_ptr, x_ptr, sums_ptr,
                  next_ptr, N: tl.constexpr, KT: tl.constexpr, PB: tl.constexpr,
                  NEXT: tl.constexpr, M: tl.constexpr,
                  MP: tl.constexpr, H: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
                  STREAM: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
                  W: tl.constexpr):  # fmt: skip
    """Out = h + W · attention output, the splits combined on the way."""
    _start(PDL)
    band = tl.program_id(0)
    e = tl.arange(0, W * 128)
    base = shared_base(ASM, True)
    tiles = load_bands(w_ptr, band, KT, 1, STREAM, e, W)
    prefetch_lines(next_ptr, NEXT, W * 32, ASM)
    _wait(PDL)
    residual = _load_residual(h_ptr, g_ptr, scale_ptr, band, N, M, MP, W)
    xs, zero = load_attention(att_ptr, lse_ptr, e, KT, M, MP, H, D, S, ASM, W)
    accs = products(tiles, xs, base, zero, e, 1, KT, True, False, ASM, W)
    acc = sum_columns(accs[0], MP, ASM, W)
    share(base, 0, acc, e, ASM, W)
    tl.debug_barrier()
    _finish(base, acc, residual, out_ptr, x_ptr, sums_ptr, band, N, PB, M, MP, ASM, W)


@jit()
def gate_up_kernel(w_ptr, x_ptr, sums_ptr, last_ptr, inverse_ptr, act_ptr, next_ptr, eps,
                   F: tl.constexpr, KT: tl.constexpr, NB: tl.constexpr, PB: tl.constexpr,
                   NEXT: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, STREAM: tl.constexpr,
                   PDL: tl.constexpr, ASM: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """Act = SiLU(gate) · up of RMSNorm(h): NB bands of 8 channels for each program.

    NB divides the number of bands, and NB · 8 · MP is at most the number of threads.
    """
    _start(PDL)
    band = tl.program_id(0) * NB
    e = tl.arange(0, W * 128)
    base = shared_base(ASM, True)
    tiles = load_bands(w_ptr, band, KT, NB, STREAM, e, W)
    prefetch_lines(next_ptr, NEXT, W * 32, ASM)
    _wait(PDL)
    STAGED: tl.constexpr = ASM and M == 1 and KT <= STAGED_TILES
    xs = load_inputs(x_ptr, e, KT, M, STAGED, W)
    c = tl.arange(0, W * 32)
    which = tl.minimum(c // (8 * MP), NB - 1)
    row = c // MP % 8
    token = c % MP
    ok = (c < NB * 8 * MP) & (token < M)
    last = tl.load(last_ptr + token, mask=ok, other=1.0)
    inverse, zero = inverse_rms(sums_ptr, base, xs, e, eps, KT, PB, M, STAGED,
                                ASM, W)  # fmt: skip
    accs = products(tiles, xs, base, zero, e, NB, KT, M > 1, STAGED, ASM, W)
    for b in tl.static_range(NB):
        share(base, b, accs[b], e, ASM, W)
    share(base, NB, inverse, e, ASM, W)
    tl.debug_barrier()
    gate = across_warps(base, accs, which, result_index(row, token), ASM, W)
    up = across_warps(base, accs, which, result_index(row + 8, token), ASM, W)
    scale = _scale(base, NB, inverse, last, inverse_ptr, row, token, ok, (band == 0) & (which == 0),
                   ASM, W)  # fmt: skip
    act = (silu(gate * scale) * (up * (scale * 0.0625))).to(tl.float16)
    tl.store(act_ptr + token * F + (band + which) * 8 + row, act, mask=ok)


@jit()
def feed_forward_kernel(w_ptr, act_ptr, h_ptr, out_ptr, g_ptr, scale_ptr, x_ptr, sums_ptr,
                        N: tl.constexpr, KT: tl.constexpr, PB: tl.constexpr,
                        M: tl.constexpr, MP: tl.constexpr, STREAM: tl.constexpr, PDL: tl.constexpr,
                        ASM: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """Out = h + W · act."""
    _start(PDL)
    band = tl.program_id(0)
    e = tl.arange(0, W * 128)
    base = shared_base(ASM, True)
    tiles = load_bands(w_ptr, band, KT, 1, STREAM, e, W)
    _wait(PDL)
    residual = _load_residual(h_ptr, g_ptr, scale_ptr, band, N, M, MP, W)
    STAGED: tl.constexpr = ASM and M == 1 and KT <= STAGED_TILES
    xs = load_inputs(act_ptr, e, KT, M, STAGED, W)
    zero = settle_inputs(base, xs, e, KT, STAGED, ASM, W)
    accs = products(tiles, xs, base, zero, e, 1, KT, M > 1, STAGED, ASM, W)
    share(base, 0, accs[0], e, ASM, W)
    tl.debug_barrier()
    _finish(base, accs[0], residual, out_ptr, x_ptr, sums_ptr, band, N, PB, M, MP, ASM, W)


@jit()
def head_kernel(w_ptr, x_ptr, sums_ptr, last_ptr, logits_ptr, keys_ptr, eps, num_bands,
                V: tl.constexpr, KT: tl.constexpr, PB: tl.constexpr, M: tl.constexpr,
                STORE: tl.constexpr, STREAM: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
                W: tl.constexpr):  # fmt: skip
    """Logits = W · RMSNorm(h) and each program's best: a band of 16 for each warp.

    Writes keys [programs, 8], one `candidate` for each token, and with STORE logits [M, V].
    """
    _start(PDL)
    e = tl.arange(0, W * 128)
    base = shared_base(ASM, True)
    band = tl.program_id(0) * W + e // 128
    on = band < num_bands
    row_of_tiles = tl.where(on, band, 0) * KT
    AHEAD: tl.constexpr = min(4, KT)
    tiles = ()
    for k in tl.static_range(AHEAD):
        tiles = tiles + load_tile(w_ptr, row_of_tiles + k, e, STREAM)
    _wait(PDL)
    STAGED: tl.constexpr = ASM and M == 1 and KT <= STAGED_TILES
    if STAGED:
        xs = fetch_x(x_ptr, e, KT, W)
    else:
        xs = load_x(x_ptr, 0, e, KT, M)
    token = e // 4 % 4 * 2 + e % 2
    if M == 1:
        last = tl.load(last_ptr)
    else:
        last = tl.load(last_ptr + tl.minimum(token, M - 1))
    inverse, zero = inverse_rms(sums_ptr, base, xs, e, eps, KT, PB, M, STAGED,
                                ASM, W)  # fmt: skip
    share(base, 0, inverse, e, ASM, W)
    acc = tl.zeros([W * 128], tl.float32)
    for k in tl.static_range(KT):
        if k + AHEAD < KT:
            tiles = tiles + load_tile(w_ptr, row_of_tiles + k + AHEAD, e, STREAM)
        if STAGED:
            x = staged_x(base, k + e * 0, e, zero)
        elif k > 0:
            x = load_x(x_ptr, k, e, KT, M)
        else:
            x = xs
        acc = mma_tile(tiles[3 * k], tiles[3 * k + 1], tiles[3 * k + 2], x, acc, zero, M > 1,
                       ASM, W)  # fmt: skip
    tl.debug_barrier()
    new = from_warp_0(base, 0, inverse, result_index(0, token), ASM, W)
    y = acc * (new / last) * undo_16(e)
    row = band * 16 + e // 16 % 8 + e // 2 % 2 * 8
    ok = on & (row < V)
    if STORE:
        tl.store(logits_ptr + token * V + row, y, mask=ok & (token < M))
    keys = candidate(tl.where(ok, y, -float("inf")), row)
    keys_at = keys_ptr + tl.program_id(0) * 8
    if M == 1:
        # Without MANY the columns of other tokens are zero, not copies.
        keys = tl.where(token == 0, keys, -(1 << 63))
        tl.store(keys_at, tl.max(keys, axis=0))
    else:
        keys = tl.reshape(keys, [W * 8, 4, 2, 2])
        keys = tl.reshape(tl.max(tl.max(keys, axis=2), axis=0), [8])
        tl.store(keys_at + tl.arange(0, 8), keys)
