# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,assignment,misc,no-redef"
# mypy: disable-error-code="var-annotated"
"""The steps of one decoder layer as device functions; `phases` makes kernels of them.

Buffers: h [M, d] float32, the residual stream; x [M, d] float16, h times the next norm's gain
times 1 / (the last norm's root mean square), so that it has about the size of the normalised h;
sums [8, PB] float32, what each band of 16 adds to a token's sum of squares; inverse [8] float32,
1 / (root mean square). A product with x then only needs the factor (new inverse) / (last inverse),
and no program has to see the whole of h before it can multiply. qkv [M, (H + 2 H_kv) D] float32;
att [S, M, H D] float16, each split's normalised attention output, with lse [S, M, H, 4] float32,
log2 of its weight, four times; act [M, F] float16. Keys and values: float16 [H_kv, max_seq_len, D]
of one layer. rope [8, 2, D / 2] float32: cosines and sines of each token's position.

M tokens are computed at once, at most 8; MP is M rounded up to a power of two. W is the number of
warps. KT counts tiles along K; warp w takes tiles w, w + W, w + 2 W, ...; KPW = KT / W, rounded up.
"""

from __future__ import annotations

from albor_serve.kernels._triton import jit, tl
from albor_serve.kernels.core import (
    add_lanes,
    add_weighted,
    column_of,
    fetch_x,
    load_partials,
    load_tile,
    load_x,
    mma_tile,
    put_one,
    put_shared,
    settle,
    shared_float,
    stage_x,
    staged_x,
    sum_partials,
)


@jit()
def load_bands(w_ptr, band, KT: tl.constexpr, NB: tl.constexpr, STREAM: tl.constexpr, e,
               W: tl.constexpr):  # fmt: skip
    """Weights of bands band to band + NB - 1: a tuple of 3 · NB · KPW int32 [4 T].

    A warp beyond the last tile repeats it; `load_zeroed` takes care that it counts for nothing.
    """
    tiles = ()
    KPW: tl.constexpr = (KT + W - 1) // W
    for b in tl.static_range(NB):
        for q in tl.static_range(KPW):
            kt = tl.minimum(e // 128 + q * W, KT - 1)
            w0, w1, s = load_tile(w_ptr, (band + b) * KT + kt, e, STREAM)
            if KT % W:
                s = tl.where(e // 128 + q * W < KT, s, 0)
            tiles = tiles + (w0, w1, s)  # noqa: RUF005 - Triton has no unpacking
    return tiles


@jit()
def load_inputs(x_ptr, e, KT: tl.constexpr, M: tl.constexpr, STAGED: tl.constexpr,
                W: tl.constexpr):  # fmt: skip
    """The activations that a warp's tiles meet, for `products`: int32 [4 T], 4 · KPW of them.

    With STAGED (one token, assembly) they are what `stage_x` takes.
    """
    xs = ()
    if STAGED:
        xs = fetch_x(x_ptr, e, KT, W)
    else:
        KPW: tl.constexpr = (KT + W - 1) // W
        for q in tl.static_range(KPW):
            kt = tl.minimum(e // 128 + q * W, KT - 1)
            a, b, c, d = load_x(x_ptr, kt, e, KT, M)
            xs = xs + (a, b, c, d)  # noqa: RUF005
    return xs


@jit()
def product(tiles, xs, zero, BAND: tl.constexpr, KPW: tl.constexpr, MANY: tl.constexpr,
            ASM: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """Accumulators of one band, [4 T]: band BAND of `tiles` times `xs`, 4 · KPW of them."""
    acc = tl.zeros([W * 128], tl.float32)
    for q in tl.static_range(KPW):
        acc = mma_tile(
            tiles[3 * (BAND * KPW + q)],
            tiles[3 * (BAND * KPW + q) + 1],
            tiles[3 * (BAND * KPW + q) + 2],
            (xs[4 * q], xs[4 * q + 1], xs[4 * q + 2], xs[4 * q + 3]),
            acc,
            zero,
            MANY,
            ASM,
            W,
        )
    return acc


@jit()
def settle_inputs(base, xs, e, KT: tl.constexpr, STAGED: tl.constexpr, ASM: tl.constexpr,
                  W: tl.constexpr):  # fmt: skip
    """`settle`, with what is STAGED in shared memory afterwards."""
    if STAGED:
        stage_x(base, xs, e, KT, W)
    return settle(ASM)


@jit()
def products(tiles, xs, base, zero, e, NB: tl.constexpr, KT: tl.constexpr, MANY: tl.constexpr,
             STAGED: tl.constexpr, ASM: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """Accumulators of NB bands of `tiles` (`load_bands`) times the inputs: a tuple of [4 T]."""
    KPW: tl.constexpr = (KT + W - 1) // W
    accs = ()
    for _ in tl.static_range(NB):
        accs = accs + (tl.zeros([W * 128], tl.float32),)  # noqa: RUF005
    for q in tl.static_range(KPW):
        if STAGED:
            x = staged_x(base, tl.minimum(e // 128 + q * W, KT - 1), e, zero)
        else:
            x = (xs[4 * q], xs[4 * q + 1], xs[4 * q + 2], xs[4 * q + 3])
        sums = ()
        for b in tl.static_range(NB):
            acc = mma_tile(
                tiles[3 * (b * KPW + q)],
                tiles[3 * (b * KPW + q) + 1],
                tiles[3 * (b * KPW + q) + 2],
                x,
                accs[b],
                zero,
                MANY,
                ASM,
                W,
            )
            sums = sums + (acc,)  # noqa: RUF005
        accs = sums
    return accs


@jit()
def inverse_rms(sums_ptr, base, xs, e, eps, KT: tl.constexpr, PB: tl.constexpr, M: tl.constexpr,
                STAGED: tl.constexpr, ASM: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """1 / (root mean square of h) for the token of each result column: [4 T], right in warp 0.

    RMSNorm: Zhang and Sennrich 2019. Also `settle_inputs`, for which the loads before count.
    """
    x = load_partials(sums_ptr, e, PB, M, W)
    zero = settle_inputs(base, xs, e, KT, STAGED, ASM, W)
    return tl.rsqrt(sum_partials(x, M, ASM, W) / (KT * 128) + eps), zero


@jit()
def silu(gate):
    """The SiLU function (Hendrycks and Gimpel 2016)."""
    return gate / (1.0 + tl.exp(-gate))


# Embedding and argmax


@jit()
def embed_at(w_ptr, token, k, KT: tl.constexpr, ok):
    """Dequantised weights (token, k) of a tiled matrix, float32 of k's shape."""
    kk = k % 128
    step = kk // 32 * 2 + kk % 8 // 4
    lane = token % 8 * 4 + kk % 32 // 8
    base = w_ptr + (token // 16 * KT + k // 128) * 288
    nibble = token % 16 // 8 + kk % 4 // 2 * 2 + kk % 2 * 4
    word = tl.load(base + step // 4 * 128 + lane * 4 + step % 4, mask=ok, other=0)
    pair = tl.load(base + 256 + token % 8 * 4 + kk // 32, mask=ok, other=0)
    bits = (pair >> (token % 16 // 8 * 16)) & 0xFFFF
    scale = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return (((word >> (4 * nibble)) & 15).to(tl.float32) - 8.0) * scale


@jit()
def candidate(value, index):
    """A sortable int64: the larger logit wins, of equals the smaller index."""
    bits = value.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    low = 0xFFFFFF - index
    return (ordered.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)


@jit()
def candidate_index(key):
    """The index inside a `candidate`."""
    return 0xFFFFFF - (key & 0xFFFFFF).to(tl.int32)


# Attention


@jit()
def rotate(low, high, cos, sin):
    """Rotary embedding (Su et al. 2021) of the two halves of a head."""
    return low * cos - high * sin, high * cos + low * sin


@jit()
def head_norm(low, high, g_low, g_high, eps, D: tl.constexpr):
    """RMSNorm over one head given as two halves; the channel is the last axis."""
    last: tl.constexpr = len(low.shape) - 1
    mean = (tl.sum(low * low, axis=last) + tl.sum(high * high, axis=last)) / D
    inverse = tl.expand_dims(tl.rsqrt(mean + eps), last)
    return low * inverse * g_low, high * inverse * g_high


@jit()
def load_rows(k_ptr, v_ptr, first, r, d2, limit, D: tl.constexpr, RL: tl.constexpr,
              NR: tl.constexpr):  # fmt: skip
    """Keys and values of NR times RL positions from `first` [1, QH, 1]: a tuple of 4 · NR float16
    [RL, QH, D / 2]: key halves, value halves."""
    rows = ()
    for k in tl.static_range(NR):
        at = first + k * RL + r
        where = at * D + d2
        ok = (at < limit) & (d2 >= 0)
        rows = rows + (  # noqa: RUF005
            tl.load(k_ptr + where, mask=ok, other=0.0),
            tl.load(k_ptr + where + D // 2, mask=ok, other=0.0),
            tl.load(v_ptr + where, mask=ok, other=0.0),
            tl.load(v_ptr + where + D // 2, mask=ok, other=0.0),
        )
    return rows


@jit()
def attend_rows(rows, first, r, limit, q_low, q_high, top, weight, o_low, o_high,
                RL: tl.constexpr, NR: tl.constexpr):  # fmt: skip
    """Take `load_rows`' positions below `limit` into the running softmax (Milakov and
    Gimelshein 2018).

    top, weight [RL, QH] and o_low, o_high [RL, QH, D / 2] belong to one row of positions each.
    """
    scores = ()
    new_top = top
    for k in tl.static_range(NR):
        s = tl.sum(rows[4 * k].to(tl.float32) * q_low + rows[4 * k + 1].to(tl.float32) * q_high,
                   axis=2)  # fmt: skip
        at = tl.sum(first + k * RL + r, axis=2)
        s = tl.where(at < limit, s, -1.0e30)
        new_top = tl.maximum(new_top, s)
        scores = scores + (s,)  # noqa: RUF005
    shrink = tl.exp2(top - new_top)
    weight = weight * shrink
    o_low = o_low * shrink[:, :, None]
    o_high = o_high * shrink[:, :, None]
    for k in tl.static_range(NR):
        at = tl.sum(first + k * RL + r, axis=2)
        p = tl.where(at < limit, tl.exp2(scores[k] - new_top), 0.0)
        weight += p
        o_low += p[:, :, None] * rows[4 * k + 2].to(tl.float32)
        o_high += p[:, :, None] * rows[4 * k + 3].to(tl.float32)
    return new_top, weight, o_low, o_high


@jit()
def attend_new(qkv_ptr, k_ptr, v_ptr, rope_ptr, qn_ptr, kn_ptr, att_ptr, lse_ptr, pos_ptr, kv_head,
               part, eps, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, GP: tl.constexpr,
               QK_NORM: tl.constexpr):  # fmt: skip
    """What the new token sees of itself, as part `part` of att and lse; and its key and value for
    the cache."""
    half: tl.constexpr = D // 2
    G: tl.constexpr = H // HKV
    g = tl.arange(0, GP)[:, None]
    d2 = tl.arange(0, half)[None, :]
    head = kv_head * G + tl.minimum(g, G - 1)
    pos = tl.load(pos_ptr)
    cos = tl.load(rope_ptr + d2)
    sin = tl.load(rope_ptr + half + d2)
    q_low = tl.load(qkv_ptr + head * D + d2)
    q_high = tl.load(qkv_ptr + head * D + half + d2)
    kp = qkv_ptr + (H + kv_head) * D + d2
    k_low = tl.load(kp)
    k_high = tl.load(kp + half)
    v_low = tl.load(kp + HKV * D).to(tl.float16)
    v_high = tl.load(kp + HKV * D + half).to(tl.float16)
    if QK_NORM:
        q_low, q_high = head_norm(q_low, q_high, tl.load(qn_ptr + d2), tl.load(qn_ptr + half + d2),
                                  eps, D)  # fmt: skip
        k_low, k_high = head_norm(k_low, k_high, tl.load(kn_ptr + d2), tl.load(kn_ptr + half + d2),
                                  eps, D)  # fmt: skip
    q_low, q_high = rotate(q_low, q_high, cos, sin)
    k_low, k_high = rotate(k_low, k_high, cos, sin)
    k_low = k_low.to(tl.float16)
    k_high = k_high.to(tl.float16)
    to = pos * D + d2
    tl.store(k_ptr + to, k_low)
    tl.store(k_ptr + to + half, k_high)
    tl.store(v_ptr + to, v_low)
    tl.store(v_ptr + to + half, v_high)
    scale = 1.4426950408889634 / tl.sqrt(tl.full([1], D, tl.float32))
    score = tl.sum(k_low.to(tl.float32) * q_low + k_high.to(tl.float32) * q_high, axis=1) * scale
    at = part * H + kv_head * G + g
    ok = (g < G) & (d2 >= 0)
    whole: tl.constexpr = [GP, half]
    tl.store(att_ptr + at * D + d2, tl.broadcast_to(v_low, whole), mask=ok)
    tl.store(att_ptr + at * D + half + d2, tl.broadcast_to(v_high, whole), mask=ok)
    tl.store(lse_ptr + at * 4 + d2, tl.broadcast_to(score[:, None], whole), mask=ok & (d2 < 4))


@jit()
def attend_one(rows, gains, first, qkv_ptr, k_ptr, v_ptr, rope_ptr, att_ptr, lse_ptr, pos_ptr,
               kv_head, split, limit, eps, base, H: tl.constexpr, HKV: tl.constexpr,
               D: tl.constexpr, GP: tl.constexpr, QH: tl.constexpr, RL: tl.constexpr,
               NR: tl.constexpr, S: tl.constexpr, QK_NORM: tl.constexpr, ASM: tl.constexpr,
               W: tl.constexpr):  # fmt: skip
    """Attention of one new token over one split of the cached positions, for one key-value head.

    Row i of QH is query head i % GP of the group and part i // GP of the split's positions; the
    parts of a program become one part of att and lse, but without ASM each counts for itself.
    rows: `load_rows` of the first positions; gains: the query's norm's, two halves, if QK_NORM;
    base: shared memory.
    """
    half: tl.constexpr = D // 2
    G: tl.constexpr = H // HKV
    PARTS: tl.constexpr = QH // GP
    # This order of the axes puts rows of positions into lanes and heads into warps.
    r = tl.arange(0, RL)[:, None, None]
    i = tl.arange(0, QH)[None, :, None]
    d2 = tl.arange(0, half)[None, None, :]
    head = kv_head * G + tl.minimum(i % GP, G - 1)
    zero = r * 0 + i * 0

    pos = tl.load(pos_ptr)
    cos = tl.load(rope_ptr + d2 + zero)
    sin = tl.load(rope_ptr + half + d2 + zero)
    q_low = tl.load(qkv_ptr + head * D + d2 + zero)
    q_high = tl.load(qkv_ptr + head * D + half + d2 + zero)
    zero_f = settle(ASM)
    q_low += zero_f
    q_high += zero_f
    if QK_NORM:
        q_low, q_high = head_norm(q_low, q_high, gains[0], gains[1], eps, D)
    q_low, q_high = rotate(q_low, q_high, cos, sin)
    scale = 1.4426950408889634 / tl.sqrt(tl.full([1, 1, 1], D, tl.float32))
    q_low = q_low * scale
    q_high = q_high * scale

    top = tl.full([RL, QH], -1.0e30, tl.float32)
    weight = tl.zeros([RL, QH], tl.float32)
    o_low = tl.zeros([RL, QH, half], tl.float32)
    o_high = tl.zeros([RL, QH, half], tl.float32)
    top, weight, o_low, o_high = attend_rows(rows, first, r, pos, q_low, q_high, top, weight,
                                             o_low, o_high, RL, NR)  # fmt: skip
    step: tl.constexpr = S * PARTS * NR * RL
    tile = split * (PARTS * NR * RL) + step
    while tile < pos:
        first += step
        rows = load_rows(k_ptr, v_ptr, first, r, d2, limit, D, RL, NR)
        top, weight, o_low, o_high = attend_rows(rows, first, r, pos, q_low, q_high, top, weight,
                                                 o_low, o_high, RL, NR)  # fmt: skip
        tile += step

    best = tl.max(top, axis=0)
    shrink = tl.exp2(top - best[None, :])
    total = tl.sum(weight * shrink, axis=0)
    o_low = tl.sum(o_low * shrink[:, :, None], axis=0)
    o_high = tl.sum(o_high * shrink[:, :, None], axis=0)
    whole: tl.constexpr = [RL, QH, half]
    if ASM and PARTS > 1:
        ROW: tl.constexpr = D + 8
        once = (r == 0) & (d2 >= 0) & (i >= 0)
        mine = i * ROW + d2 + r * 0
        put_shared(base, mine, tl.broadcast_to(o_low[None, :, :], whole), once)
        put_shared(base, mine + half, tl.broadcast_to(o_high[None, :, :], whole), once)
        q = tl.arange(0, QH)
        put_one(base, q * ROW + D, best)
        put_one(base, q * ROW + D + 1, total)
        tl.debug_barrier()
        # From here on a thread has one channel of one head, and adds up the parts.
        for k in tl.static_range((GP * D + W * 32 - 1) // (W * 32)):
            n = tl.arange(0, W * 32) + k * (W * 32)
            g = n // D
            here = tl.minimum(g, GP - 1) * ROW
            best = shared_float(base, here + D)
            for part in tl.static_range(1, PARTS):
                best = tl.maximum(best, shared_float(base, here + part * (GP * ROW) + D))
            out = tl.zeros([W * 32], tl.float32)
            total = tl.zeros([W * 32], tl.float32)
            for part in tl.static_range(PARTS):
                there = here + part * (GP * ROW)
                factor = tl.exp2(shared_float(base, there + D) - best)
                total += factor * shared_float(base, there + D + 1)
                out += factor * shared_float(base, there + n % D)
            some = total > 0.0
            safe = tl.where(some, total, 1.0)
            lse = tl.where(some, best + tl.log2(safe), -1.0e30)
            to = split * H + kv_head * G + g
            tl.store(att_ptr + to * D + n % D, (out / safe).to(tl.float16), mask=g < G)
            tl.store(lse_ptr + to * 4 + n % D, lse, mask=(g < G) & (n % D < 4))
    else:
        some = total > 0.0
        safe = tl.where(some, total, 1.0)
        inverse = (1.0 / safe)[None, :][:, :, None]
        lse = tl.where(some, best + tl.log2(safe), -1.0e30)
        # Results go back to three axes, of which one row is stored: no change of layout.
        at = (split * PARTS + i // GP) * H + kv_head * G + i % GP
        once = (i % GP < G) & (r == 0) & (d2 >= 0)
        low = tl.broadcast_to(o_low[None, :, :] * inverse, whole).to(tl.float16)
        high = tl.broadcast_to(o_high[None, :, :] * inverse, whole).to(tl.float16)
        tl.store(att_ptr + at * D + d2 + zero, low, mask=once)
        tl.store(att_ptr + at * D + half + d2 + zero, high, mask=once)
        tl.store(lse_ptr + at * 4 + d2 + zero, tl.broadcast_to(lse[None, :][:, :, None], whole),
                 mask=once & (d2 < 4))  # fmt: skip


@jit()
def load_kv(k_ptr, v_ptr, tile, limit, P: tl.constexpr, D: tl.constexpr):
    """Keys (two halves, transposed [D/2, P]) and values [P, D] of a tile of positions < limit.

    What lies beyond the cached positions must be finite: it is masked only in the scores.
    """
    half: tl.constexpr = D // 2
    at = tile * P + tl.arange(0, P)
    d2 = tl.arange(0, half)
    kp = k_ptr + at[None, :] * D + d2[:, None]
    ok = at < limit
    k_low = tl.load(kp, mask=ok[None, :], other=0.0)
    k_high = tl.load(kp + half, mask=ok[None, :], other=0.0)
    v = tl.load(v_ptr + at[:, None] * D + tl.arange(0, D)[None, :], mask=ok[:, None], other=0.0)
    return k_low, k_high, v


@jit()
def attend_tile(k_low, k_high, v, seen, q_low, q_high, top, weight, out):
    """Take a tile of positions into the running softmax; seen [RP, P] says who sees what."""
    scores = tl.dot(q_low, k_low) + tl.dot(q_high, k_high)
    scores = tl.where(seen, scores, -1.0e30)
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    p = tl.where(seen, tl.exp2(scores - new_top[:, None]), 0.0)
    shrink = tl.exp2(top - new_top)
    weight = weight * shrink + tl.sum(p, axis=1)
    out = out * shrink[:, None] + tl.dot(p.to(tl.float16), v)
    return new_top, weight, out


@jit()
def attend_many(k_low, k_high, v, qkv_ptr, k_ptr, v_ptr, rope_ptr, qn_ptr, kn_ptr, att_ptr,
                lse_ptr, pos, kv_head, split, limit, eps, M: tl.constexpr, H: tl.constexpr,
                HKV: tl.constexpr, D: tl.constexpr, GP: tl.constexpr, RP: tl.constexpr,
                P: tl.constexpr, S: tl.constexpr, QK_NORM: tl.constexpr):  # fmt: skip
    """Causal attention of M new tokens over one split of the positions, for one key-value head.

    Split s owns the tiles s, s + S, ... of P positions each; split 0 also takes in the new
    positions and writes their keys and values. Query row m · GP + g is token m, head g of the
    group. k_low, k_high, v: `load_kv` of tile `split`.
    """
    half: tl.constexpr = D // 2
    G: tl.constexpr = H // HKV
    ldq: tl.constexpr = (H + 2 * HKV) * D
    NEW: tl.constexpr = 16
    d2 = tl.arange(0, half)
    dd = tl.arange(0, D)
    rows = tl.arange(0, RP)
    m = rows // GP
    g = rows % GP
    row_ok = (m < M) & (g < G)
    head = kv_head * G + g

    qp = qkv_ptr + m[:, None] * ldq + head[:, None] * D + d2[None, :]
    q_ok = row_ok[:, None] & (d2 >= 0)[None, :]
    cos = tl.load(rope_ptr + m[:, None] * D + d2[None, :], mask=q_ok, other=0.0)
    sin = tl.load(rope_ptr + m[:, None] * D + half + d2[None, :], mask=q_ok, other=0.0)
    q_low = tl.load(qp, mask=q_ok, other=0.0)
    q_high = tl.load(qp + half, mask=q_ok, other=0.0)
    if QK_NORM:
        q_low, q_high = head_norm(q_low, q_high, tl.load(qn_ptr + d2)[None, :],
                                  tl.load(qn_ptr + half + d2)[None, :], eps, D)  # fmt: skip
    q_low, q_high = rotate(q_low, q_high, cos, sin)
    scale = 1.4426950408889634 / tl.sqrt(tl.full([1, 1], D, tl.float32))
    q_low = (q_low * scale).to(tl.float16)
    q_high = (q_high * scale).to(tl.float16)

    top = tl.full([RP], -1.0e30, tl.float32)
    weight = tl.zeros([RP], tl.float32)
    out = tl.zeros([RP, D], tl.float32)
    if split == 0:
        j = tl.arange(0, NEW)
        j_ok = (j < M)[:, None]
        np = qkv_ptr + j[:, None] * ldq + (H + kv_head) * D
        n_low = tl.load(np + d2[None, :], mask=j_ok, other=0.0)
        n_high = tl.load(np + half + d2[None, :], mask=j_ok, other=0.0)
        n_v = tl.load(np + HKV * D + dd[None, :], mask=j_ok, other=0.0).to(tl.float16)
        n_cos = tl.load(rope_ptr + j[:, None] * D + d2[None, :], mask=j_ok, other=0.0)
        n_sin = tl.load(rope_ptr + j[:, None] * D + half + d2[None, :], mask=j_ok, other=0.0)
        if QK_NORM:
            n_low, n_high = head_norm(n_low, n_high, tl.load(kn_ptr + d2)[None, :],
                                      tl.load(kn_ptr + half + d2)[None, :], eps, D)  # fmt: skip
        n_low, n_high = rotate(n_low, n_high, n_cos, n_sin)
        n_low = n_low.to(tl.float16)
        n_high = n_high.to(tl.float16)
        new_at = (pos + j)[:, None] * D
        tl.store(k_ptr + new_at + d2[None, :], n_low, mask=j_ok)
        tl.store(k_ptr + new_at + half + d2[None, :], n_high, mask=j_ok)
        tl.store(v_ptr + new_at + dd[None, :], n_v, mask=j_ok)
        seen = (j[None, :] <= m[:, None]) & row_ok[:, None]
        top, weight, out = attend_tile(tl.trans(n_low), tl.trans(n_high), n_v, seen, q_low, q_high,
                                       top, weight, out)  # fmt: skip

    tile = split
    while tile * P < pos:
        at = tile * P + tl.arange(0, P)
        next_low, next_high, next_v = load_kv(k_ptr, v_ptr, tile + S, limit, P, D)
        seen = (at < pos)[None, :] & row_ok[:, None]
        top, weight, out = attend_tile(k_low, k_high, v, seen, q_low, q_high, top, weight, out)
        k_low, k_high, v = next_low, next_high, next_v
        tile += S

    some = weight > 0.0
    out = out / tl.where(some, weight, 1.0)[:, None]
    lse = tl.where(some, top + tl.log2(tl.where(some, weight, 1.0)), -1.0e30)
    at_row = (split * M + m) * H + head
    four = tl.arange(0, 4)
    tl.store(lse_ptr + at_row[:, None] * 4 + four[None, :],
             tl.broadcast_to(lse[:, None], [RP, 4]),
             mask=row_ok[:, None] & (four >= 0)[None, :])  # fmt: skip
    tl.store(att_ptr + at_row[:, None] * D + dd[None, :], out.to(tl.float16),
             mask=row_ok[:, None] & (dd >= 0)[None, :])  # fmt: skip


@jit()
def load_attention(att_ptr, lse_ptr, e, KT: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
                   H: tl.constexpr, D: tl.constexpr, S: tl.constexpr, ASM: tl.constexpr,
                   W: tl.constexpr):  # fmt: skip
    """The splits' outputs, weighted, as the B operand: a tuple of 4 · KPW int32 [4 T], and a
    zero from `settle`.

    att_ptr: int32 view of att. Column n holds token n % MP and the splits n // MP,
    n // MP + 8 / MP, ... summed, so the product's columns of one token must be added up
    (`sum_columns`).
    """
    per_set: tl.constexpr = 8 // MP
    num_sets: tl.constexpr = (S + per_set - 1) // per_set
    heads_per_tile: tl.constexpr = 128 // D
    words: tl.constexpr = D // 32
    KPW: tl.constexpr = (KT + W - 1) // W
    n = column_of(e)
    token = tl.minimum(n % MP, M - 1)
    logs = ()
    values = ()
    for q in tl.static_range(KPW):
        kt = tl.minimum(e // 128 + q * W, KT - 1)
        for part in tl.static_range(heads_per_tile):
            head = kt * heads_per_tile + part
            for a in tl.static_range(num_sets):
                split = a * per_set + n // MP
                at = (tl.minimum(split, S - 1) * M + token) * H + head
                lse = tl.load(lse_ptr + at * 4 + e % 4)
                logs = logs + (tl.where(split < S, lse, -1.0e30),)  # noqa: RUF005
                for i in tl.static_range(words):
                    value = tl.load(att_ptr + at * (D // 2) + i * 16 + e // 4 % 4 * 4 + e % 4)
                    values = values + (value,)  # noqa: RUF005
    zero = settle(ASM)
    xs = ()
    for part in tl.static_range(KPW * heads_per_tile):
        top = logs[part * num_sets] + zero
        for a in tl.static_range(1, num_sets):
            top = tl.maximum(top, logs[part * num_sets + a])
        top = add_lanes(top, True, MP, ASM, W)
        weights = ()
        total = tl.zeros_like(top)
        for a in tl.static_range(num_sets):
            weight = tl.exp2(logs[part * num_sets + a] - top)
            total += weight
            weights = weights + (weight,)  # noqa: RUF005
        inverse = 1.0 / add_lanes(total, False, MP, ASM, W)
        for i in tl.static_range(words):
            x = values[part * num_sets * words + i]
            x = add_weighted(x, weights[0] * inverse, x, True, ASM)
            for a in tl.static_range(1, num_sets):
                value = values[(part * num_sets + a) * words + i]
                x = add_weighted(value, weights[a] * inverse, x, False, ASM)
            xs = xs + (x,)  # noqa: RUF005
    return xs, zero
