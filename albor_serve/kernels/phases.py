# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return"
"""Each step of `steps` as a kernel of its own, for a CUDA graph.

With PDL (programmatic dependent launch, Hopper and later) a kernel starts while the one before it
still runs: it loads its weights, then waits for the other's results. Every kernel waits, so one
that has waited knows that all before it are complete.
"""

from __future__ import annotations

from albor_serve.kernels._triton import jit, tl
from albor_serve.kernels.core import row_sums
from albor_serve.kernels.steps import (
    attend,
    candidate,
    candidate_index,
    embed_at,
    gated,
    load_bands,
    load_gain,
    load_kv,
    load_rows,
    normalise,
    product,
    read_attention,
    read_x,
    result_row,
    store_gated,
    store_rows,
    sum_columns,
    to_half,
)

__all__ = [
    "attention_kernel",
    "embed_kernel",
    "feed_forward_kernel",
    "gate_up_kernel",
    "head_kernel",
    "output_kernel",
    "qkv_kernel",
]


@jit()
def _start(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@jit()
def _wait(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()


@jit()
def embed_kernel(w_ptr, keys_ptr, tokens_ptr, pos_ptr, out_ptr, h_ptr, num_keys,
                 KT: tl.constexpr, KB: tl.constexpr, NK: tl.constexpr,
                 FEEDBACK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Write the embeddings of the next M tokens to h; program m handles token m.

    With FEEDBACK (M = 1) the token is the best of keys [NK, 8]; the program also appends it to
    out[pos + 1] and moves pos on by one. Without, tokens [M] are read and pos stays.
    """
    _start(PDL)
    m = tl.program_id(0)
    _wait(PDL)
    if FEEDBACK:
        rows = tl.arange(0, NK)
        keys = tl.load(keys_ptr + rows * 8, mask=rows < num_keys, other=-(1 << 63))
        token = candidate_index(tl.max(keys, axis=0))
        pos = tl.load(pos_ptr) + 1
        tl.store(out_ptr + pos, token)
        tl.store(pos_ptr, pos)
    else:
        token = tl.load(tokens_ptr + m)
    k = tl.arange(0, KB)
    ok = k < KT * 128
    x = embed_at(w_ptr, token + k * 0, k, KT, ok)
    tl.store(h_ptr + m * KT * 128 + k, x, mask=ok)


@jit()
def qkv_kernel(w_ptr, g_ptr, h_ptr, qkv_ptr, eps, N: tl.constexpr, KT: tl.constexpr,
               M: tl.constexpr, STREAM: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
               W: tl.constexpr):  # fmt: skip
    """Qkv = W · RMSNorm(h): one band of 16 outputs for each program."""
    _start(PDL)
    band = tl.program_id(0)
    e = tl.arange(0, W * 128)
    KPW: tl.constexpr = (KT + W - 1) // W
    tiles = load_bands(w_ptr, band, KT, 1, STREAM, e, True, W)
    gains = load_gain(g_ptr, KT, e, W)
    _wait(PDL)
    xs = read_x(h_ptr, tiles[0], 0, KT, M, e, False, W)
    xs = normalise(xs, gains, eps, KT * 128, M, W)
    y = row_sums(product(tiles, xs, 0, KPW, M > 1, ASM, W), ASM, W)
    store_rows(qkv_ptr, y, band, N, 0, M, True, False)


@jit()
def attention_kernel(qkv_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, qn_ptr, kn_ptr, att_ptr, lse_ptr,
                     pos_ptr, max_len, eps, M: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr,
                     D: tl.constexpr, GP: tl.constexpr, RP: tl.constexpr, P: tl.constexpr,
                     S: tl.constexpr, QK_NORM: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Attention of M tokens: program (kv head, split)."""
    _start(PDL)
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    base = kv_head * max_len * D
    # Kernels of the same token may still run, but none that writes what this reads: the new
    # tokens' keys and values do not come from the cache.
    k_low, k_high, v = load_kv(k_ptr + base, v_ptr + base, split, max_len, P, D)
    _wait(PDL)
    pos = tl.load(pos_ptr)
    attend(qkv_ptr, k_ptr + base, v_ptr + base, cos_ptr, sin_ptr, qn_ptr, kn_ptr, att_ptr,
           lse_ptr, pos, kv_head, split, k_low, k_high, v, 0, eps, M, H, HKV, D, GP, RP, P, S,
           QK_NORM, False)  # fmt: skip


@jit()
def output_kernel(w_ptr, att_ptr, lse_ptr, h_ptr, out_ptr, N: tl.constexpr, KT: tl.constexpr,
                  M: tl.constexpr, MP: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
                  S: tl.constexpr, STREAM: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
                  W: tl.constexpr):  # fmt: skip
    """Out = h + W · attention output, the splits combined on the way."""
    _start(PDL)
    band = tl.program_id(0)
    e = tl.arange(0, W * 128)
    KPW: tl.constexpr = (KT + W - 1) // W
    tiles = load_bands(w_ptr, band, KT, 1, STREAM, e, True, W)
    _wait(PDL)
    h = load_rows(h_ptr, band, N, M, True)
    xs = read_attention(att_ptr, lse_ptr, tiles[0], 0, KT, M, MP, H, D, S, e, False, ASM, W)
    y = row_sums(product(tiles, xs, 0, KPW, True, ASM, W), ASM, W)
    store_rows(out_ptr, h + sum_columns(y, MP), band, N, 0, M, True, False)


@jit()
def gate_up_kernel(w_ptr, g_ptr, h_ptr, act_ptr, eps, F: tl.constexpr,
                   KT: tl.constexpr, NB: tl.constexpr, M: tl.constexpr, STREAM: tl.constexpr,
                   PDL: tl.constexpr, ASM: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """Act = SiLU(gate) · up of RMSNorm(h): NB bands of 8 channels for each program.

    NB divides the number of bands: nothing masks a band too many.
    """
    _start(PDL)
    band = tl.program_id(0) * NB
    e = tl.arange(0, W * 128)
    KPW: tl.constexpr = (KT + W - 1) // W
    tiles = load_bands(w_ptr, band, KT, NB, STREAM, e, True, W)
    gains = load_gain(g_ptr, KT, e, W)
    _wait(PDL)
    xs = read_x(h_ptr, tiles[0], 0, KT, M, e, False, W)
    xs = normalise(xs, gains, eps, KT * 128, M, W)
    for b in tl.static_range(NB):
        y = row_sums(product(tiles, xs, b, KPW, M > 1, ASM, W), ASM, W)
        store_gated(act_ptr, gated(y), band + b, F, 0, M, True, False)


@jit()
def feed_forward_kernel(w_ptr, act_ptr, h_ptr, out_ptr, N: tl.constexpr, KT: tl.constexpr,
                        M: tl.constexpr, STREAM: tl.constexpr, PDL: tl.constexpr,
                        ASM: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """Out = h + W · act."""
    _start(PDL)
    band = tl.program_id(0)
    e = tl.arange(0, W * 128)
    KPW: tl.constexpr = (KT + W - 1) // W
    tiles = load_bands(w_ptr, band, KT, 1, STREAM, e, True, W)
    _wait(PDL)
    h = load_rows(h_ptr, band, N, M, True)
    xs = to_half(read_x(act_ptr, tiles[0], 0, KT, M, e, False, W))
    y = row_sums(product(tiles, xs, 0, KPW, M > 1, ASM, W), ASM, W)
    store_rows(out_ptr, h + y, band, N, 0, M, True, False)


@jit()
def head_kernel(w_ptr, g_ptr, h_ptr, logits_ptr, keys_ptr, eps, num_bands, V: tl.constexpr,
                KT: tl.constexpr, NB: tl.constexpr, M: tl.constexpr, STORE: tl.constexpr,
                STREAM: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
                W: tl.constexpr):  # fmt: skip
    """Logits = W · RMSNorm(h) and each program's best: NB bands for each program.

    Writes keys [programs, 8], one `candidate` for each token, and with STORE logits [M, V].
    """
    _start(PDL)
    first = tl.program_id(0) * NB
    e = tl.arange(0, W * 128)
    c = tl.arange(0, 128)
    KPW: tl.constexpr = (KT + W - 1) // W
    tiles = load_bands(w_ptr, first, KT, 1, STREAM, e, first < num_bands, W)
    gains = load_gain(g_ptr, KT, e, W)
    _wait(PDL)
    xs = read_x(h_ptr, tiles[0], 0, KT, M, e, False, W)
    xs = normalise(xs, gains, eps, KT * 128, M, W)
    best = tl.full([128], -float("inf"), tl.float32)
    best_row = tl.zeros([128], tl.int32)
    for b in tl.static_range(NB):
        band = first + b
        if b + 1 < NB:
            ahead = load_bands(w_ptr, band + 1, KT, 1, STREAM, e, band + 1 < num_bands, W)
        y = row_sums(product(tiles, xs, 0, KPW, M > 1, ASM, W), ASM, W)
        row = band * 16 + result_row(c)
        if STORE:
            store_rows(logits_ptr, y, band, V, 0, M, band < num_bands, False)
        better = (y > best) & (row < V)
        best = tl.where(better, y, best)
        best_row = tl.where(better, row, best_row)
        if b + 1 < NB:
            tiles = ahead
    keys = candidate(best, best_row, 0)
    keys = tl.reshape(tl.max(tl.max(tl.reshape(keys, [8, 4, 2, 2]), axis=2), axis=0), [8])
    tl.store(keys_ptr + tl.program_id(0) * 8 + tl.arange(0, 8), keys)
