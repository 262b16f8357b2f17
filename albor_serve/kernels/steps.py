# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,assignment,misc,no-redef"
"""The steps of one decoder layer as device functions, each split where it must wait.

Before the wait: what does not depend on the step before (weights, cached keys and values). After
it: everything else. `phases` wraps each step in a kernel; `persistent` chains them in one kernel.

Buffers, all float32: h [M, d] residual stream; qkv [M, (H + 2 H_kv) D]; att [S, M, H D], each
split's normalised attention output, with lse [S, M, H, 4], log2 of its weight, four times;
act [M, F]. Keys and values: float16 [H_kv, max_seq_len, D] of one layer.

M tokens are computed at once, at most 8; MP is M rounded up to a power of two. W is the number of
warps. KT counts tiles along K, KPW = ceil(KT / W) those of one warp.
"""

from __future__ import annotations

from albor_serve.kernels._triton import jit, tl
from albor_serve.kernels.core import (
    column_of,
    k_of,
    load_tile,
    mma_tile,
    read_any,
    read_words,
    sum_by_token,
    tagged,
)


@jit()
def load_bands(w_ptr, band, KT: tl.constexpr, NB: tl.constexpr, STREAM: tl.constexpr, e, on,
               W: tl.constexpr):  # fmt: skip
    """Weights of bands band to band + NB - 1: a tuple of 3 · NB · KPW int32 [4 T]."""
    tiles = ()
    KPW: tl.constexpr = (KT + W - 1) // W
    for b in tl.static_range(NB):
        for q in tl.static_range(KPW):
            kt = e // 128 + q * W
            w0, w1, s = load_tile(w_ptr, (band + b) * KT + kt, on & (kt < KT), e, STREAM)
            tiles = tiles + (w0, w1, s)  # noqa: RUF005 - Triton has no unpacking
    return tiles


@jit()
def load_gain(g_ptr, KT: tl.constexpr, e, W: tl.constexpr):
    """RMSNorm gains in the order of the activations: a tuple of 8 · KPW float32 [4 T]."""
    gains = ()
    KPW: tl.constexpr = (KT + W - 1) // W
    for q in tl.static_range(KPW):
        kt = e // 128 + q * W
        for step in tl.static_range(8):
            gains = gains + (tl.load(g_ptr + kt * 128 + k_of(e, step), mask=kt < KT, other=0.0),)  # noqa: RUF005
    return gains


@jit()
def read_x(x_ptr, anchor, tag, KT: tl.constexpr, M: tl.constexpr, e, FLOW: tl.constexpr,
           W: tl.constexpr):  # fmt: skip
    """Activations [M, KT · 128] as the B operand: a tuple of 8 · KPW float32 [4 T]."""
    xs = ()
    KPW: tl.constexpr = (KT + W - 1) // W
    n = column_of(e)
    for q in tl.static_range(KPW):
        kt = e // 128 + q * W
        ok = (kt < KT) & (n < M)
        base = x_ptr + n * (KT * 128) + kt * 128
        for step in tl.static_range(8):
            xs = xs + (read_words(base + k_of(e, step), ok, anchor, tag, FLOW),)  # noqa: RUF005
    return xs


@jit()
def normalise(xs, gains, eps, K: tl.constexpr, M: tl.constexpr, W: tl.constexpr):
    """RMSNorm (Zhang and Sennrich 2019) of `read_x`'s tuple: float16."""
    squares = xs[0] * xs[0]
    for i in tl.static_range(1, len(xs)):
        squares += xs[i] * xs[i]
    inverse = tl.rsqrt(sum_by_token(squares, M, W) / K + eps)
    out = ()
    for i in tl.static_range(len(xs)):
        out = out + ((xs[i] * inverse * gains[i]).to(tl.float16),)  # noqa: RUF005
    return out


@jit()
def to_half(xs):
    """Round a tuple of float32 tensors to float16."""
    out = ()
    for i in tl.static_range(len(xs)):
        out = out + (xs[i].to(tl.float16),)  # noqa: RUF005
    return out


@jit()
def product(tiles, xs, BAND: tl.constexpr, KPW: tl.constexpr, MANY: tl.constexpr,
            ASM: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """Accumulators of one band, [4 T]: band BAND of `tiles` times `xs` (float16)."""
    acc = tl.zeros([W * 128], tl.float32)
    for q in tl.static_range(KPW):
        eight = ()
        for step in tl.static_range(8):
            eight = eight + (xs[8 * q + step],)  # noqa: RUF005
        acc = mma_tile(
            tiles[3 * (BAND * KPW + q)],
            tiles[3 * (BAND * KPW + q) + 1],
            tiles[3 * (BAND * KPW + q) + 2],
            eight,
            acc,
            MANY,
            ASM,
            W,
        )
    return acc


@jit()
def result_row(c):
    """Row within its band of element c of a [128] result."""
    return c // 16 + (c // 2) % 2 * 8


@jit()
def result_token(c):
    """Token of element c of a [128] result."""
    return (c // 4) % 4 * 2 + c % 2


@jit()
def store_rows(out_ptr, y, band, ld, tag, M: tl.constexpr, on, FLOW: tl.constexpr):
    """Write a band's [128] result to out [M, ld], tagged if FLOW."""
    c = tl.arange(0, 128)
    token = result_token(c)
    row = band * 16 + result_row(c)
    tl.store(out_ptr + token * ld + row, tagged(y, tag, FLOW), mask=on & (token < M))


@jit()
def load_rows(h_ptr, band, ld, M: tl.constexpr, on):
    """Read a band's rows of h [M, ld] in the order of a [128] result."""
    c = tl.arange(0, 128)
    token = result_token(c)
    return tl.load(h_ptr + token * ld + band * 16 + result_row(c), mask=on & (token < M), other=0.0)


@jit()
def gated(y):
    """SwiGLU (Shazeer 2020) of a [128] result whose rows r are gate and r + 8 up.

    Returns [64]: element 8·r + 2·j + i is channel r of the band, token 2·j + i.
    """
    parts = tl.permute(tl.reshape(y, [32, 2, 2]), (0, 2, 1))
    gate, up = tl.split(parts)
    gate = tl.reshape(gate, [64])
    return gate / (1.0 + tl.exp(-gate)) * tl.reshape(up, [64])


@jit()
def store_gated(act_ptr, a, band, ld, tag, M: tl.constexpr, on, FLOW: tl.constexpr):
    """Write `gated`'s [64] to act [M, ld]."""
    c = tl.arange(0, 64)
    token = c % 8
    tl.store(act_ptr + token * ld + band * 8 + c // 8, tagged(a, tag, FLOW),
             mask=on & (token < M))  # fmt: skip


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
def candidate(value, index, tag):
    """A sortable int64: the larger logit wins, of equals the smaller index; low byte is `tag`."""
    bits = value.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    low = ((0xFFFFFF - index) << 8) | tag
    return (ordered.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)


@jit()
def candidate_index(key):
    """The index inside a `candidate`."""
    return 0xFFFFFF - ((key >> 8) & 0xFFFFFF).to(tl.int32)


# Attention


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
def attend(qkv_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, qn_ptr, kn_ptr, att_ptr, lse_ptr,
           pos, kv_head, split, k_low, k_high, v, tag, eps,
           M: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
           GP: tl.constexpr, RP: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
           QK_NORM: tl.constexpr, FLOW: tl.constexpr):  # fmt: skip
    """Causal attention of M new tokens over one split of the positions, for one key-value head.

    Split s owns the tiles s, s + S, ... of P positions each: it reads their cached keys and
    values and adds the new tokens' where they fall into them. Query row m · GP + g is token m,
    head g of the group. k_low, k_high, v: `load_kv` of tile `split`.
    """
    half: tl.constexpr = D // 2
    G: tl.constexpr = H // HKV
    ldq: tl.constexpr = (H + 2 * HKV) * D
    d2 = tl.arange(0, half)
    dd = tl.arange(0, D)
    rows = tl.arange(0, RP)
    m = rows // GP
    g = rows % GP
    row_ok = (m < M) & (g < G)
    head = kv_head * G + g

    qp = qkv_ptr + m[:, None] * ldq + head[:, None] * D + d2[None, :]
    q_ok = row_ok[:, None] & (d2 >= 0)[None, :]
    cos = tl.load(cos_ptr + (pos + m)[:, None] * half + d2[None, :], mask=q_ok, other=0.0)
    sin = tl.load(sin_ptr + (pos + m)[:, None] * half + d2[None, :], mask=q_ok, other=0.0)
    q_low = read_any(qp, q_ok, tag, FLOW)
    q_high = read_any(qp + half, q_ok, tag, FLOW)
    if QK_NORM:
        q_low, q_high = head_norm(q_low, q_high, tl.load(qn_ptr + d2)[None, :],
                                  tl.load(qn_ptr + half + d2)[None, :], eps, D)  # fmt: skip
    q_low, q_high = rotate(q_low, q_high, cos, sin)
    to_log2: tl.constexpr = 1.4426950408889634
    scale = to_log2 / tl.sqrt(tl.full([1, 1], D, tl.float32))
    q_low = (q_low * scale).to(tl.float16)
    q_high = (q_high * scale).to(tl.float16)

    new = ()
    for i in tl.static_range(M):
        kp = qkv_ptr + i * ldq + (H + kv_head) * D
        n_low = read_any(kp + d2, d2 >= 0, tag, FLOW)
        n_high = read_any(kp + half + d2, d2 >= 0, tag, FLOW)
        n_v = read_any(kp + HKV * D + dd, dd >= 0, tag, FLOW)
        if QK_NORM:
            n_low, n_high = head_norm(n_low, n_high, tl.load(kn_ptr + d2),
                                      tl.load(kn_ptr + half + d2), eps, D)  # fmt: skip
        n_low, n_high = rotate(n_low, n_high, tl.load(cos_ptr + (pos + i) * half + d2),
                               tl.load(sin_ptr + (pos + i) * half + d2))  # fmt: skip
        n_low = n_low.to(tl.float16)
        n_high = n_high.to(tl.float16)
        n_v = n_v.to(tl.float16)
        mine = (pos + i) // P % S == split
        new_at = (pos + i) * D
        tl.store(k_ptr + new_at + d2, n_low, mask=mine & (d2 >= 0))
        tl.store(k_ptr + new_at + half + d2, n_high, mask=mine & (d2 >= 0))
        tl.store(v_ptr + new_at + dd, n_v, mask=mine & (dd >= 0))
        new = new + (n_low, n_high, n_v)  # noqa: RUF005

    top = tl.full([RP], -1.0e30, tl.float32)
    weight = tl.zeros([RP], tl.float32)
    out = tl.zeros([RP, D], tl.float32)
    num_tiles = (pos + M + P - 1) // P
    tile = split
    while tile < num_tiles:
        at = tile * P + tl.arange(0, P)
        next_low, next_high, next_v = load_kv(k_ptr, v_ptr, tile + S, pos, P, D)
        for i in tl.static_range(M):
            here = at == pos + i
            k_low = tl.where(here[None, :], new[3 * i][:, None], k_low)
            k_high = tl.where(here[None, :], new[3 * i + 1][:, None], k_high)
            v = tl.where(here[:, None], new[3 * i + 2][None, :], v)
        scores = tl.dot(q_low, k_low) + tl.dot(q_high, k_high)
        seen = (at[None, :] <= pos + m[:, None]) & row_ok[:, None]
        scores = tl.where(seen, scores, -1.0e30)
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        p = tl.where(seen, tl.exp2(scores - new_top[:, None]), 0.0)
        shrink = tl.exp2(top - new_top)
        weight = weight * shrink + tl.sum(p, axis=1)
        out = out * shrink[:, None] + tl.dot(p.to(tl.float16), v)
        top = new_top
        k_low, k_high, v = next_low, next_high, next_v
        tile += S

    some = weight > 0.0
    out = out / tl.where(some, weight, 1.0)[:, None]
    lse = tl.where(some, top + tl.log2(tl.where(some, weight, 1.0)), -1.0e30)
    at_row = (split * M + m) * H + head
    four = tl.arange(0, 4)
    tl.store(lse_ptr + at_row[:, None] * 4 + four[None, :],
             tagged(tl.broadcast_to(lse[:, None], [RP, 4]), tag, FLOW),
             mask=row_ok[:, None] & (four >= 0)[None, :])  # fmt: skip
    tl.store(att_ptr + at_row[:, None] * D + dd[None, :], tagged(out, tag, FLOW),
             mask=row_ok[:, None] & (dd >= 0)[None, :])  # fmt: skip


_BUTTERFLY = """
{{
.reg .f32 a, b;
mov.f32 a, $4;
{lines}
mov.f32 $0, a; mov.f32 $1, a; mov.f32 $2, a; mov.f32 $3, a;
}}
"""


def _butterfly(operation: str, tokens: int) -> str:
    """PTX that combines a value over the columns of one token: lanes 4 · tokens, ..., 16 apart."""
    lines = []
    distance = 4 * tokens
    while distance < 32:
        lines.append(f"shfl.sync.bfly.b32 b, a, {distance}, 31, 0xffffffff; {operation} a, a, b;")
        distance *= 2
    return _BUTTERFLY.format(lines="\n".join(lines))


if hasattr(tl, "dot"):
    MAX_1 = tl.constexpr(_butterfly("max.f32", 1))
    MAX_2 = tl.constexpr(_butterfly("max.f32", 2))
    MAX_4 = tl.constexpr(_butterfly("max.f32", 4))
    MAX_8 = tl.constexpr(_butterfly("max.f32", 8))
    SUM_1 = tl.constexpr(_butterfly("add.f32", 1))
    SUM_2 = tl.constexpr(_butterfly("add.f32", 2))
    SUM_4 = tl.constexpr(_butterfly("add.f32", 4))
    SUM_8 = tl.constexpr(_butterfly("add.f32", 8))
    BUTTERFLY_CONSTRAINTS = tl.constexpr("=f,=f,=f,=f,f,f,f,f")


@jit()
def over_splits(x, MAX: tl.constexpr, MP: tl.constexpr, ASM: tl.constexpr, W: tl.constexpr):
    """Largest value or sum over the columns of each token, spread to all of them: [4 T]."""
    if ASM:
        if MAX:
            code: tl.constexpr = (
                MAX_1 if MP == 1 else MAX_2 if MP == 2 else MAX_4 if MP == 4 else MAX_8
            )
        else:
            code: tl.constexpr = (
                SUM_1 if MP == 1 else SUM_2 if MP == 2 else SUM_4 if MP == 4 else SUM_8
            )
        return tl.inline_asm_elementwise(
            code, BUTTERFLY_CONSTRAINTS, [x], dtype=tl.float32, is_pure=True, pack=4
        )
    parts = tl.reshape(x, [W, 8 // MP, MP, 16])
    if MAX:
        best = tl.max(parts, axis=1)
    else:
        best = tl.sum(parts, axis=1)
    return tl.reshape(tl.broadcast_to(best[:, None, :, :], [W, 8 // MP, MP, 16]), [W * 128])


@jit()
def read_attention(att_ptr, lse_ptr, anchor, tag, KT: tl.constexpr, M: tl.constexpr,
                   MP: tl.constexpr, H: tl.constexpr, D: tl.constexpr, S: tl.constexpr, e,
                   FLOW: tl.constexpr, ASM: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """The splits' outputs, weighted, as the B operand: a tuple of 8 · KPW float16 [4 T].

    Column n holds token n % MP and the splits n // MP, n // MP + 8 / MP, ... summed, so the
    product's columns of one token must be added up (`sum_columns`).
    """
    per_set: tl.constexpr = 8 // MP
    num_sets: tl.constexpr = (S + per_set - 1) // per_set
    heads_per_tile: tl.constexpr = 128 // D
    KPW: tl.constexpr = (KT + W - 1) // W
    n = column_of(e)
    token = n % MP
    xs = ()
    for q in tl.static_range(KPW):
        kt = e // 128 + q * W
        for part in tl.static_range(heads_per_tile):
            head = kt * heads_per_tile + part
            logs = ()
            sums = ()
            for a in tl.static_range(num_sets):
                split = a * per_set + n // MP
                ok = (kt < KT) & (token < M) & (split < S)
                at = (split * M + token) * H + head
                lse = read_words(lse_ptr + at * 4 + e % 4, ok, anchor, tag, FLOW)
                logs = logs + (tl.where(ok, lse, -1.0e30),)  # noqa: RUF005
            for a in tl.static_range(num_sets):
                split = a * per_set + n // MP
                ok = (kt < KT) & (token < M) & (split < S)
                at = (split * M + token) * H + head
                for i in tl.static_range(D // 16):
                    k = k_of(e, part * (D // 16) + i) - part * D
                    value = read_words(att_ptr + at * D + k, ok, anchor, tag, FLOW)
                    sums = sums + (value,)  # noqa: RUF005
            top = logs[0]
            for a in tl.static_range(1, num_sets):
                top = tl.maximum(top, logs[a])
            top = over_splits(top, True, MP, ASM, W)
            weights = ()
            total = tl.zeros_like(top)
            for a in tl.static_range(num_sets):
                weight = tl.exp2(logs[a] - top)
                total += weight
                weights = weights + (weight,)  # noqa: RUF005
            inverse = 1.0 / over_splits(total, False, MP, ASM, W)
            for i in tl.static_range(D // 16):
                x = sums[i] * weights[0]
                for a in tl.static_range(1, num_sets):
                    x += sums[a * (D // 16) + i] * weights[a]
                xs = xs + ((x * inverse).to(tl.float16),)  # noqa: RUF005
    return xs


@jit()
def sum_columns(y, MP: tl.constexpr):
    """Add up a [128] result's columns of each token; every column then holds its token's sum."""
    if MP == 1:
        parts = tl.reshape(y, [8, 4, 2, 2])
        total = tl.sum(tl.sum(parts, axis=3), axis=1)
        return tl.reshape(tl.broadcast_to(total[:, None, :, None], [8, 4, 2, 2]), [128])
    if MP == 2:
        total = tl.sum(tl.reshape(y, [8, 4, 4]), axis=1)
        return tl.reshape(tl.broadcast_to(total[:, None, :], [8, 4, 4]), [128])
    if MP == 4:
        total = tl.sum(tl.reshape(y, [8, 2, 8]), axis=1)
        return tl.reshape(tl.broadcast_to(total[:, None, :], [8, 2, 8]), [128])
    return y
