# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,assignment,misc,no-redef"
"""Device functions that every phase shares: weight tiles, activations, the matrix product, sums.

All tensors that meet the tensor core are one-dimensional, 4 elements for each thread of the
program: element e belongs to thread e // 4, so to warp e // 128, lane e // 4 % 32. The inline
assembly relies on that; `aot` checks it in the compiled code.

Activations are float16 in memory, read as int32 words of two. The token columns of the B operand
are lane // 4, the result's are 2·(lane % 4) + {0, 1}.

Without inline assembly (`ASM` false, for the interpreter) the same values come from plain Triton.
"""

from __future__ import annotations

from albor_serve.kernels._triton import jit, tl

__all__ = [
    "SUM_BYTES",
    "X_BYTES",
    "across_warps",
    "add_lanes",
    "add_weighted",
    "column_of",
    "fetch_x",
    "from_warp_0",
    "load_partials",
    "load_tile",
    "load_x",
    "mma_tile",
    "prefetch_lines",
    "put_one",
    "put_shared",
    "result_index",
    "settle",
    "share",
    "shared_base",
    "shared_float",
    "stage_x",
    "staged_x",
    "sum_columns",
    "sum_partials",
    "sum_rows",
    "undo_16",
]

_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"


def _mma_asm(*, one_token: bool) -> str:
    """PTX of one 16 x 128 tile: eight products, each group's result scaled in float32.

    Operands: 4 outputs; 8 weight words; 4 scale pairs; 16 words of x; 4 accumulators; 4
    times zero (`settle`).
    The low nibbles become 1024 + q in fp16, the high ones 1024 + 16 q, both exact; taking away
    1032 or 1152 leaves q - 8 and 16 (q - 8). The 16 is taken out of the sum in the end. With
    `one_token` the columns of other tokens are left alone.
    """
    lines = [
        "{",
        ".reg .b32 a0, a1, a2, a3, t, k0, k1, m0, m1, mg;",
        ".reg .b16 h0, h1;",
        ".reg .f32 s0, s1, r0, r1, r2, r3, z;",
        ".reg .f32 c0, c1, c2, c3;",
        "mov.b32 k0, 0x64086408; mov.b32 k1, 0x64806480;",
        "mov.b32 m0, 0x000f000f; mov.b32 m1, 0x00f000f0; mov.b32 mg, 0x64006400;",
        "mov.f32 z, $36;",
        *(f"mov.f32 r{i}, ${32 + i};" for i in range(4)),
    ]
    for step in range(8):
        word, x0, x1 = 4 + step, 16 + 2 * step, 17 + 2 * step
        lines += [
            f"lop3.b32 a0, ${word}, m0, mg, 0xea;",
            f"lop3.b32 a1, ${word}, m1, mg, 0xea;",
            f"shr.u32 t, ${word}, 8;",
            "lop3.b32 a2, t, m0, mg, 0xea;",
            "lop3.b32 a3, t, m1, mg, 0xea;",
            "sub.rn.f16x2 a0, a0, k0; sub.rn.f16x2 a1, a1, k1;",
            "sub.rn.f16x2 a2, a2, k0; sub.rn.f16x2 a3, a3, k1;",
        ]
        start = "{z, z, z, z}" if step % 2 == 0 else "{c0, c1, c2, c3}"
        lines.append(f"{_MMA} {{c0, c1, c2, c3}}, {{a0, a1, a2, a3}}, {{${x0}, ${x1}}}, {start};")
        if step % 2:
            lines += [
                f"mov.b32 {{h0, h1}}, ${12 + step // 2};",
                "cvt.f32.f16 s0, h0; cvt.f32.f16 s1, h1;",
                "fma.rn.f32 r0, c0, s0, r0; fma.rn.f32 r2, c2, s1, r2;",
            ]
            if not one_token:
                lines.append("fma.rn.f32 r1, c1, s0, r1; fma.rn.f32 r3, c3, s1, r3;")
    lines += [f"mov.f32 ${i}, r{i};" for i in range(4)] + ["}"]
    return "\n".join(lines)


SUM_BYTES = 24576
"""Shared memory that `across_warps` has: (bands + 1) · warps · 512 bytes must fit."""
X_BYTES = 16384
"""Shared memory for one token's activations, behind that for sums."""

_BASE = f"{{ .shared .align 16 .b8 sums[{SUM_BYTES}]; mov.b32 $0, sums; }}"
_STAGING_BASE = f"{{ .shared .align 16 .b8 sums[{SUM_BYTES + X_BYTES}]; mov.b32 $0, sums; }}"

_SETTLE = "{ .reg .pred p; setp.ne.u32 p, 0, 0; bar.red.popc.u32 $0, 0, p; }"

_SHARE_SOME = (
    "{ .reg .pred p; setp.ne.u32 p, $12, 0; @p st.shared.v4.f32 [$8], {$4, $5, $6, $7};"
    " mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }"
)

_PREFETCH = "{ .reg .pred p; setp.lt.s32 p, $2, $3; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }"

_SHARE = "st.shared.v4.f32 [$8], {$4, $5, $6, $7}; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0;"
_SHARE += " mov.b32 $3, 0;"


def _across_asm(num_warps: int) -> str:
    """PTX that adds up one shared float32 of each warp, 512 bytes apart."""
    values = [f"v{w}" for w in range(num_warps)]
    lines = ["{", f".reg .f32 {', '.join(values)};"]
    lines += [f"ld.shared.f32 v{w}, [$1+{512 * w}];" for w in range(num_warps)]
    while len(values) > 1:
        for a, b in zip(values[::2], values[1::2], strict=True):
            lines.append(f"add.f32 {a}, {a}, {b};")
        values = values[::2]
    return "\n".join([*lines, f"mov.f32 $0, {values[0]};", "}"])


def _lanes_asm(operation: str, distances: list[int], *, width: int = 4, fold: bool = False) -> str:
    """PTX that combines `width` values of each lane with those of other lanes, by butterflies.

    With `fold`, values 0 and 1 are combined first, and 2 and 3.
    """
    names = "abcd"[:width]
    lines = ["{", f".reg .f32 {', '.join(names)}, t;"]
    lines += [f"mov.f32 {n}, ${width + i};" for i, n in enumerate(names)]
    if fold:
        lines += [f"{operation} a, a, b; {operation} c, c, d;"]
        names = "ac"
    for distance in distances:
        for n in names:
            lines += [f"shfl.sync.bfly.b32 t, {n}, {distance}, 31, -1; {operation} {n}, {n}, t;"]
    out = "aacc" if fold else "abcd"
    return "\n".join([*lines, *(f"mov.f32 ${i}, {out[i]};" for i in range(width)), "}"])


def _total_asm() -> str:
    """PTX that adds up the 128 values of a warp; every element gets the sum."""
    lines = ["{", ".reg .f32 a, b, t;", "add.f32 a, $4, $5; add.f32 b, $6, $7; add.f32 a, a, b;"]
    lines += [f"shfl.sync.bfly.b32 t, a, {d}, 31, -1; add.f32 a, a, t;" for d in (16, 8, 4, 2, 1)]
    return "\n".join([*lines, *(f"mov.f32 ${i}, a;" for i in range(4)), "}"])


_WEIGHT = (
    "{ .reg .b32 w; cvt.rn.f16x2.f32 w, $8, $8; "
    + " ".join(f"mul.rn.f16x2 ${i}, ${4 + i}, w;" for i in range(4))
    + " }"
)
_WEIGHT_ADD = (
    "{ .reg .b32 w; cvt.rn.f16x2.f32 w, $8, $8; "
    + " ".join(f"fma.rn.f16x2 ${i}, ${4 + i}, w, ${12 + i};" for i in range(4))
    + " }"
)

if hasattr(tl, "dot"):
    MMA_ONE = tl.constexpr(_mma_asm(one_token=True))
    MMA_MANY = tl.constexpr(_mma_asm(one_token=False))
    MMA_CONSTRAINTS = tl.constexpr(",".join(["=f"] * 4 + ["r"] * 28 + ["f"] * 8))
    SETTLE = tl.constexpr(_SETTLE)
    PREFETCH = tl.constexpr(_PREFETCH)
    SHARE_SOME = tl.constexpr(_SHARE_SOME)
    X_AT = tl.constexpr(SUM_BYTES)
    SHARE_SOME_CONSTRAINTS = tl.constexpr("=r,=r,=r,=r,f,f,f,f,r,r,r,r,r,r,r,r")
    BASE = tl.constexpr(_BASE)
    STAGING_BASE = tl.constexpr(_STAGING_BASE)
    SHARE = tl.constexpr(_SHARE)
    SHARE_CONSTRAINTS = tl.constexpr("=r,=r,=r,=r,f,f,f,f,r,r,r,r")
    ACROSS_4 = tl.constexpr(_across_asm(4))
    ACROSS_8 = tl.constexpr(_across_asm(8))
    ACROSS_16 = tl.constexpr(_across_asm(16))
    TOTAL = tl.constexpr(_total_asm())
    ROWS_MANY = tl.constexpr(_lanes_asm("add.f32", [4, 8, 16]))
    ROWS_16 = tl.constexpr(_lanes_asm("add.f32", [8, 4, 2, 1], width=1))
    COLUMNS_1 = tl.constexpr(_lanes_asm("add.f32", [1, 2], fold=True))
    COLUMNS_2 = tl.constexpr(_lanes_asm("add.f32", [1, 2]))
    COLUMNS_4 = tl.constexpr(_lanes_asm("add.f32", [2]))
    MAX_1 = tl.constexpr(_lanes_asm("max.f32", [4, 8, 16]))
    MAX_2 = tl.constexpr(_lanes_asm("max.f32", [8, 16]))
    MAX_4 = tl.constexpr(_lanes_asm("max.f32", [16]))
    ADD_1 = tl.constexpr(_lanes_asm("add.f32", [4, 8, 16]))
    ADD_2 = tl.constexpr(_lanes_asm("add.f32", [8, 16]))
    ADD_4 = tl.constexpr(_lanes_asm("add.f32", [16]))
    FOUR_F = tl.constexpr("=f,=f,=f,=f,f,f,f,f")
    WEIGHT = tl.constexpr(_WEIGHT)
    WEIGHT_ADD = tl.constexpr(_WEIGHT_ADD)
    WEIGHT_CONSTRAINTS = tl.constexpr("=r,=r,=r,=r,r,r,r,r,f,f,f,f")
    WEIGHT_ADD_CONSTRAINTS = tl.constexpr("=r,=r,=r,=r,r,r,r,r,f,f,f,f,r,r,r,r")


@jit()
def settle(ASM: tl.constexpr):
    """A float32 zero that is known only when all loads before have been issued.

    The assembler puts loads off to save registers, so that one latency follows the other. It may
    not move them behind a barrier, nor what depends on the barrier's result before it.
    """
    if ASM:
        bits = tl.inline_asm_elementwise(SETTLE, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        zero = bits.to(tl.float32, bitcast=True)
    else:
        zero = 0.0
    return zero


@jit()
def prefetch_lines(ptr, LINES: tl.constexpr, THREADS: tl.constexpr, ASM: tl.constexpr):
    """Ask for LINES lines of 128 bytes from `ptr` to be brought to the L2 cache.

    All programs of a grid of one or two axes, with THREADS threads each, take their share.
    """
    if ASM and LINES > 0:
        programs = tl.num_programs(0) * tl.num_programs(1)
        program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        line = program * THREADS + tl.arange(0, THREADS)
        address = ptr.to(tl.int64) + line.to(tl.int64) * 128
        for _ in range((LINES + programs * THREADS - 1) // (programs * THREADS)):
            tl.inline_asm_elementwise(
                PREFETCH, "=r,l,r,r", [address, line, line * 0 + LINES], dtype=tl.int32,
                is_pure=False, pack=1,
            )  # fmt: skip
            line += programs * THREADS
            address += programs.to(tl.int64) * (THREADS * 128)


@jit()
def column_of(e):
    """Column of the B operand (0 to 7) that element e of an activation tensor belongs to."""
    return (e // 16) % 8


@jit()
def load_tile(w_ptr, tile, e, STREAM: tl.constexpr):
    """Words and scales of one tile for each warp.

    Args:
        w_ptr: int32 tiles. tile: [4 T] tile number, equal within a warp. STREAM: the weights do
        not stay in the cache, so make way for others.

    Returns:
        three int32 [4 T]: words of instructions 0 to 3, of 4 to 7, scale pairs of the 4 groups.
    """
    base = w_ptr + tile * 288
    if STREAM:
        w0 = tl.load(base + e % 128, eviction_policy="evict_first")
        w1 = tl.load(base + 128 + e % 128, eviction_policy="evict_first")
    else:
        w0 = tl.load(base + e % 128)
        w1 = tl.load(base + 128 + e % 128)
    s = tl.load(base + 256 + (e // 16) % 8 * 4 + e % 4)
    return w0, w1, s


@jit()
def load_x(x_ptr, kt, e, KT: tl.constexpr, M: tl.constexpr):
    """Activations of columns 128·kt to 128·kt + 127 as the B operand: four int32 [4 T].

    x_ptr: int32 view of float16 [M, KT · 128]. Columns beyond the last token repeat it.
    """
    if M == 1:
        row = 0
    else:
        row = tl.minimum(column_of(e), M - 1) * (KT * 64)
    base = x_ptr + row + kt * 64 + e // 4 % 4 * 4 + e % 4
    return tl.load(base), tl.load(base + 16), tl.load(base + 32), tl.load(base + 48)


@jit()
def fetch_x(x_ptr, e, KT: tl.constexpr, W: tl.constexpr):
    """One token's activations, each word once: a tuple of int32 [4 T] for `stage_x`."""
    words = ()
    for k in tl.static_range((KT * 64 + W * 128 - 1) // (W * 128)):
        at = e + k * (W * 128)
        words = words + (tl.load(x_ptr + at, mask=at < KT * 64, other=0),)  # noqa: RUF005
    return words


@jit()
def stage_x(base, words, e, KT: tl.constexpr, W: tl.constexpr):
    """Leave `fetch_x`'s words in shared memory; a barrier (`settle`) must follow. Assembly only."""
    for k in tl.static_range((KT * 64 + W * 128 - 1) // (W * 128)):
        at = e + k * (W * 128)
        put_shared(base + X_AT, at, words[k].to(tl.float32, bitcast=True), at < KT * 64)


@jit()
def staged_x(base, kt, e, zero):
    """What `load_x` gives, from shared memory behind the barrier that `zero` comes from.

    Only that number keeps it behind the barrier: so the compiler may read in the layout that the
    product wants.
    """
    at = base + X_AT + zero.to(tl.int32) + (kt * 64 + e // 4 % 4 * 4) * 4
    return _four_words(at), _four_words(at + 64), _four_words(at + 128), _four_words(at + 192)


@jit()
def _four_words(address):
    return tl.inline_asm_elementwise(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r,r,r,r", [address],
        dtype=tl.int32, is_pure=True, pack=4,
    )  # fmt: skip


@jit()
def halves(words):
    """The two float16 of each int32 word, as float32: low, high."""
    low = (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    high = ((words >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@jit()
def to_words(low, high):
    """The inverse of `halves`, rounding to float16."""
    a = low.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    b = high.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    return a | (b << 16)


@jit()
def add_weighted(words, weight, total, FIRST: tl.constexpr, ASM: tl.constexpr):
    """Total + weight · words for [4 T] words of two float16; a thread's 4 weights are equal."""
    if ASM:
        if FIRST:
            return tl.inline_asm_elementwise(
                WEIGHT, WEIGHT_CONSTRAINTS, [words, weight], dtype=tl.int32, is_pure=True, pack=4
            )
        return tl.inline_asm_elementwise(
            WEIGHT_ADD,
            WEIGHT_ADD_CONSTRAINTS,
            [words, weight, total],
            dtype=tl.int32,
            is_pure=True,
            pack=4,
        )
    low, high = halves(words)
    if FIRST:
        return to_words(low * weight, high * weight)
    total_low, total_high = halves(total)
    return to_words(low * weight + total_low, high * weight + total_high)


@jit()
def _nibbles(word, SHIFT: tl.constexpr):
    return ((word >> SHIFT) & 15).to(tl.float32) - 8.0


@jit()
def _pick(x4, INDEX: tl.constexpr):
    """Element INDEX of the last axis (4 long), by a masked sum."""
    lane = tl.arange(0, 4)
    lane = tl.reshape(lane, [1] * (len(x4.shape) - 1) + [4])
    return tl.sum(tl.where(lane == INDEX, x4, tl.zeros_like(x4)), axis=len(x4.shape) - 1)


@jit()
def _mma_twin(w0, w1, s, xs, acc, W: tl.constexpr):
    """What the assembly computes, written out: for the interpreter."""
    low = tl.zeros([W, 8, 8], tl.float32)
    high = tl.zeros([W, 8, 8], tl.float32)
    pairs = tl.reshape(s, [W, 8, 4, 4])
    first = tl.reshape(w0, [W, 8, 4, 4])
    second = tl.reshape(w1, [W, 8, 4, 4])
    for step in tl.static_range(8):
        if step < 4:
            word = _pick(first, step)
        else:
            word = _pick(second, step - 4)
        x4 = tl.reshape(xs[step // 2], [W, 8, 4, 4])  # W, token, lane, word
        scale = _pick(tl.reshape(pairs, [W, 32, 4]), step // 2)  # same in all 4 lanes of a row
        scale = tl.reshape(scale, [W, 8, 4])
        scale_low, scale_high = halves(scale)
        for column in tl.static_range(4):
            x_even, x_odd = halves(_pick(x4, step % 2 * 2 + column // 2))  # W, token, lane
            if column % 2:
                x = x_odd
            else:
                x = x_even
            a = _nibbles(word, (column // 2) * 8 + (column % 2) * 16) * scale_low  # W, row, lane
            b = _nibbles(word, (column // 2) * 8 + (column % 2) * 16 + 4) * scale_high
            low += tl.sum(a[:, :, None, :] * x[:, None, :, :], axis=3)
            high += tl.sum(b[:, :, None, :] * x[:, None, :, :], axis=3) * 16.0
    both = tl.join(tl.reshape(low, [W, 8, 4, 2]), tl.reshape(high, [W, 8, 4, 2]))
    both = tl.permute(both, (0, 1, 2, 4, 3))
    return acc + tl.reshape(both, [W * 128])


@jit()
def mma_tile(w0, w1, s, xs, acc, zero, MANY: tl.constexpr, ASM: tl.constexpr, W: tl.constexpr):
    """Add tile times activations to `acc`, float32 [4 T]: element 4·lane + 2·half + i of a warp is
    row lane // 4 + 8·half, token 2·(lane % 4) + i. Rows 8 to 15 come out 16 times too large
    (`undo_16` has the remedy), and without MANY only token 0 is computed.

    `xs` is the tuple of four int32 [4 T] that `load_x` gives, `zero` what `settle` gives.
    """
    if ASM:
        if MANY:
            return tl.inline_asm_elementwise(
                MMA_MANY,
                MMA_CONSTRAINTS,
                [w0, w1, s, xs[0], xs[1], xs[2], xs[3], acc, zero + tl.zeros_like(acc)],
                dtype=tl.float32,
                is_pure=True,
                pack=4,
            )
        return tl.inline_asm_elementwise(
            MMA_ONE,
            MMA_CONSTRAINTS,
            [w0, w1, s, xs[0], xs[1], xs[2], xs[3], acc, zero + tl.zeros_like(acc)],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    return _mma_twin(w0, w1, s, xs, acc, W)


@jit()
def undo_16(e):
    """Factor of element e of a [4 T] result that undoes what `mma_tile` does to rows 8 to 15."""
    return tl.where(e // 2 % 2 == 1, 0.0625, 1.0)


# Sums across lanes and warps


@jit()
def sum_columns(acc, MP: tl.constexpr, ASM: tl.constexpr, W: tl.constexpr):
    """Add up a [4 T] result's columns n of each token n % MP; every such column gets the sum."""
    if MP == 8:
        return acc
    if ASM:
        code: tl.constexpr = COLUMNS_1 if MP == 1 else COLUMNS_2 if MP == 2 else COLUMNS_4
        return tl.inline_asm_elementwise(
            code, FOUR_F, [acc], dtype=tl.float32, is_pure=True, pack=4
        )
    parts = tl.reshape(acc, [W * 8, 4, 2, 2])  # row, lane, half, i
    parts = tl.reshape(tl.permute(parts, (0, 2, 1, 3)), [W * 16, 8 // MP, MP])
    total = tl.broadcast_to(tl.sum(parts, axis=1)[:, None, :], [W * 16, 8 // MP, MP])
    total = tl.permute(tl.reshape(total, [W * 8, 2, 4, 2]), (0, 2, 1, 3))
    return tl.reshape(total, [W * 128])


@jit()
def add_lanes(x, MAX: tl.constexpr, MP: tl.constexpr, ASM: tl.constexpr, W: tl.constexpr):
    """Sum or largest of an activation-shaped [4 T] over the columns of each token n % MP."""
    if MP == 8:
        return x
    if ASM:
        if MAX:
            code: tl.constexpr = MAX_1 if MP == 1 else MAX_2 if MP == 2 else MAX_4
        else:
            code: tl.constexpr = ADD_1 if MP == 1 else ADD_2 if MP == 2 else ADD_4
        return tl.inline_asm_elementwise(code, FOUR_F, [x], dtype=tl.float32, is_pure=True, pack=4)
    parts = tl.reshape(x, [W, 8 // MP, MP, 16])
    if MAX:
        best = tl.max(parts, axis=1)
    else:
        best = tl.sum(parts, axis=1)
    return tl.reshape(tl.broadcast_to(best[:, None, :, :], [W, 8 // MP, MP, 16]), [W * 128])


@jit()
def load_partials(p_ptr, e, PB: tl.constexpr, M: tl.constexpr, W: tl.constexpr):
    """Each thread's part of p [8, PB], for `sum_partials`: float32 [4 T], zero but in warp 0.

    One warp only: all programs read these few lines at once, and the cache serves a line to one
    reader after the other.
    """
    x = tl.zeros([W * 128], tl.float32)
    if M == 1:
        for k in tl.static_range((PB + 127) // 128):
            at = e % 128 + k * 128
            x += tl.load(p_ptr + at, mask=(at < PB) & (e < 128), other=0.0)
    else:
        token = tl.minimum(e // 4 % 4 * 2 + e % 2, M - 1)
        for k in tl.static_range((PB + 7) // 8):
            at = e // 16 % 8 + k * 8
            x += tl.load(p_ptr + token * PB + at, mask=(at < PB) & (e < 128), other=0.0)
    return x


@jit()
def sum_partials(x, M: tl.constexpr, ASM: tl.constexpr, W: tl.constexpr):
    """Sum over the last axis of `load_partials`' table, for the token of each result column.

    Right in warp 0 only.
    """
    if ASM:
        code: tl.constexpr = TOTAL if M == 1 else ROWS_MANY
        out = tl.inline_asm_elementwise(code, FOUR_F, [x], dtype=tl.float32, is_pure=True, pack=4)
    elif M == 1:
        out = tl.sum(tl.reshape(x, [W, 128]), axis=1)
        out = tl.reshape(tl.broadcast_to(out[:, None], [W, 128]), [W * 128])
    else:
        out = tl.sum(tl.reshape(x, [W, 8, 16]), axis=1)
        out = tl.reshape(tl.broadcast_to(out[:, None, :], [W, 8, 16]), [W * 128])
    return out


@jit()
def sum_rows(x, MP: tl.constexpr, ASM: tl.constexpr):
    """Sum over the rows of x [T], whose element row · MP + token counts for row < 16: [T / ...].

    For MP = 1: [T], right in element 0. Else [MP].
    """
    if MP == 1:
        if ASM:
            out = tl.inline_asm_elementwise(
                ROWS_16, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            out = tl.zeros_like(x) + tl.sum(x, axis=0)
    else:
        out = tl.sum(tl.reshape(x, [x.shape[0] // MP, MP]), axis=0)
    return out


@jit()
def shared_base(ASM: tl.constexpr, STAGED: tl.constexpr = False):
    """Address of the program's shared memory for `share`, and with STAGED for `stage_x`.

    Call it once in a kernel.
    """
    if ASM:
        code: tl.constexpr = STAGING_BASE if STAGED else BASE
        return tl.inline_asm_elementwise(code, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    return 0


@jit()
def share(base, band, acc, e, ASM: tl.constexpr, W: tl.constexpr):
    """Leave a band's result of each warp in shared memory; `tl.debug_barrier` must follow."""
    if ASM:
        tl.inline_asm_elementwise(
            SHARE,
            SHARE_CONSTRAINTS,
            [acc, base + band * (W * 512) + e // 4 * 16],
            dtype=tl.int32,
            is_pure=False,
            pack=4,
        )


@jit()
def put_shared(base, index, value, ok):
    """Leave float32 values, four of a thread side by side, in shared memory. With assembly only."""
    tl.inline_asm_elementwise(
        SHARE_SOME, SHARE_SOME_CONSTRAINTS, [value, base + index * 4, ok.to(tl.int32)],
        dtype=tl.int32, is_pure=False, pack=4,
    )  # fmt: skip


@jit()
def put_one(base, index, value):
    """Leave float32 values in shared memory. With assembly only."""
    tl.inline_asm_elementwise(
        "st.shared.f32 [$2], $1; mov.b32 $0, 0;", "=r,f,r", [value, base + index * 4],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@jit()
def shared_float(base, index):
    """Float32 number `index` of shared memory."""
    return tl.inline_asm_elementwise(
        "ld.shared.f32 $0, [$1];", "=f,r", [base + index * 4],
        dtype=tl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@jit()
def from_warp_0(base, slot, x, index, ASM: tl.constexpr, W: tl.constexpr):
    """Element `index` of what `share` was given as band `slot`, of warp 0 alone."""
    if ASM:
        out = tl.inline_asm_elementwise(
            "ld.shared.f32 $0, [$1];",
            "=f,r",
            [base + slot * (W * 512) + index * 4],
            dtype=tl.float32,
            is_pure=False,
            pack=1,
        )
    else:
        out = tl.gather(x, index, 0)
    return out


@jit()
def result_index(row, token):
    """Element of a warp's [128] result that holds a row (0 to 15) of a token (0 to 7)."""
    return (row % 8 * 4 + token // 2) * 4 + row // 8 * 2 + token % 2


@jit()
def across_warps(base, accs, band, index, ASM: tl.constexpr, W: tl.constexpr):
    """Sum over the warps of element `index` of band `band` (tensors of one shape): float32.

    accs: the tuple of [4 T] that `share` has been given, band by band.
    """
    if ASM:
        code: tl.constexpr = ACROSS_4 if W == 4 else ACROSS_8 if W == 8 else ACROSS_16
        return tl.inline_asm_elementwise(
            code,
            "=f,r",
            [base + band * (W * 512) + index * 4],
            dtype=tl.float32,
            is_pure=False,
            pack=1,
        )
    out = tl.zeros(index.shape, tl.float32)
    for b in tl.static_range(len(accs)):
        total = tl.sum(tl.reshape(accs[b], [W, 128]), axis=0)
        out = tl.where(band == b, tl.gather(total, index, 0), out)
    return out
