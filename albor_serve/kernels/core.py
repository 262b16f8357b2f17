# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,assignment,misc,no-redef"
"""Device functions that every phase shares: weight tiles, activations, the matrix product.

All tensors that meet the tensor core are one-dimensional, 4 elements for each thread of the
program: element e belongs to thread e // 4, so to warp e // 128, lane e // 4 % 32. The inline
assembly relies on that; `aot` checks it in the compiled code.

Warps share out the columns of a band of 16 rows: warp w takes the tiles w, w + W, w + 2·W, ...
The token columns of the B operand are lane // 4, the result's are 2·(lane % 4) + {0, 1}.

Without inline assembly (`ASM` false, for the interpreter) the same values come from plain Triton.
"""

from __future__ import annotations

from albor_serve.kernels._triton import jit, tl

__all__ = [
    "column_of",
    "k_of",
    "load_tile",
    "mma_tile",
    "read_words",
    "row_sums",
    "sum_by_token",
    "tagged",
]

_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"


def _mma_asm(*, one_token: bool) -> str:
    """PTX of one 16 x 128 tile: eight products, each group's result scaled in float32.

    Operands: 4 outputs; 8 weight words; 4 scale pairs; 16 registers of x; 4 accumulators.
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
        "mov.f32 z, 0f00000000;",
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


_MMA_CONSTRAINTS = ",".join(["=f"] * 4 + ["r"] * 28 + ["f"] * 4)

_POLL = """
{
.reg .pred p, q;
.reg .b32 v0, v1, v2, v3, t, u, n;
setp.eq.s32 q, $8, 0;
mov.b32 v0, 0; mov.b32 v1, 0; mov.b32 v2, 0; mov.b32 v3, 0; mov.b32 n, 0;
@q bra DONE;
AGAIN:
ld.relaxed.gpu.global.v4.b32 {v0, v1, v2, v3}, [$4];
xor.b32 t, v0, $16; xor.b32 u, v1, $16; or.b32 t, t, u;
xor.b32 u, v2, $16; or.b32 t, t, u; xor.b32 u, v3, $16; or.b32 t, t, u;
and.b32 t, t, 15;
setp.eq.s32 q, t, 0;
@q bra DONE;
add.u32 n, n, 1;
setp.gt.u32 p, n, 2000000;
@p trap;
bra AGAIN;
DONE:
and.b32 $0, v0, 0xfffffff0; and.b32 $1, v1, 0xfffffff0;
and.b32 $2, v2, 0xfffffff0; and.b32 $3, v3, 0xfffffff0;
}
"""
"""Wait for four tagged words that one thread reads at once. Operands: 4 outputs; 4 addresses; 4
masks; 4 anchors (unused: they carry the layout); 4 tags. A wait of seconds means a lost peer: the
trap makes it an error rather than a hang."""

_POLL_CONSTRAINTS = ",".join(["=r"] * 4 + ["l"] * 4 + ["r"] * 12)

_POLL_ONE = """
{
.reg .pred p, q;
.reg .b32 v, t, n;
setp.eq.s32 q, $2, 0;
mov.b32 v, 0; mov.b32 n, 0;
@q bra DONE;
AGAIN:
ld.relaxed.gpu.global.b32 v, [$1];
xor.b32 t, v, $3;
and.b32 t, t, 15;
setp.eq.s32 q, t, 0;
@q bra DONE;
add.u32 n, n, 1;
setp.gt.u32 p, n, 2000000;
@p trap;
bra AGAIN;
DONE:
and.b32 $0, v, 0xfffffff0;
}
"""
"""The same for one word, whatever the layout."""

if hasattr(tl, "dot"):
    MMA_ONE = tl.constexpr(_mma_asm(one_token=True))
    MMA_MANY = tl.constexpr(_mma_asm(one_token=False))
    MMA_CONSTRAINTS = tl.constexpr(_MMA_CONSTRAINTS)
    POLL = tl.constexpr(_POLL)
    POLL_CONSTRAINTS = tl.constexpr(_POLL_CONSTRAINTS)
    POLL_ONE = tl.constexpr(_POLL_ONE)


@jit()
def k_of(e, STEP: tl.constexpr):
    """First-tile column of element e of an activation tensor, for instruction STEP of eight."""
    return (e // 4) % 4 * 8 + e % 4 + (STEP // 2) * 32 + (STEP % 2) * 4


@jit()
def column_of(e):
    """Column of the B operand (0 to 7) that element e of an activation tensor belongs to."""
    return (e // 16) % 8


@jit()
def load_tile(w_ptr, tile, ok, e, STREAM: tl.constexpr):
    """Words and scales of one tile for each warp.

    Args:
        w_ptr: int32 tiles. tile: [4 T] tile number, equal within a warp. ok: [4 T] whether this
        warp has a tile. STREAM: the weights do not stay in the cache, so make way for others.

    Returns:
        three int32 [4 T]: words of instructions 0 to 3, of 4 to 7, scale pairs of the 4 groups.
    """
    base = w_ptr + tile * 288
    if STREAM:
        w0 = tl.load(base + e % 128, mask=ok, other=0, eviction_policy="evict_first")
        w1 = tl.load(base + 128 + e % 128, mask=ok, other=0, eviction_policy="evict_first")
    else:
        w0 = tl.load(base + e % 128, mask=ok, other=0)
        w1 = tl.load(base + 128 + e % 128, mask=ok, other=0)
    s = tl.load(base + 256 + (e // 16) % 8 * 4 + e % 4, mask=ok, other=0)
    return w0, w1, s


@jit()
def read_words(ptrs, ok, anchor, tag, FLOW: tl.constexpr):
    """Read float32 activations that another program wrote: [4 T], 4 neighbours for each thread.

    With FLOW, wait until each of the four words bears `tag`, and clear it; `anchor` is any loaded
    [4 T] tensor of 32-bit words, which pins the layout.
    """
    if FLOW:
        bits = tl.inline_asm_elementwise(
            POLL,
            POLL_CONSTRAINTS,
            [ptrs, ok.to(tl.int32), anchor, tl.full(ptrs.shape, 0, tl.int32) + tag],
            dtype=tl.int32,
            is_pure=False,
            pack=4,
        )
        return bits.to(tl.float32, bitcast=True)
    return tl.load(ptrs, mask=ok, other=0.0)


@jit()
def read_any(ptrs, ok, tag, FLOW: tl.constexpr):
    """`read_words` for a tensor of any shape, one word at a time."""
    if FLOW:
        bits = tl.inline_asm_elementwise(
            POLL_ONE,
            "=r,l,r,r",
            [ptrs, ok.to(tl.int32), tl.full(ptrs.shape, 0, tl.int32) + tag],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        return bits.to(tl.float32, bitcast=True)
    return tl.load(ptrs, mask=ok, other=0.0)


@jit()
def tagged(values, tag, FLOW: tl.constexpr):
    """With FLOW, round float32 to 20 significant bits and put `tag` (0 to 15) below them."""
    if FLOW:
        bits = values.to(tl.int32, bitcast=True)
        return (((bits + 8) & -16) | tag).to(tl.float32, bitcast=True)
    return values


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
        x4 = tl.reshape(xs[step], [W, 8, 4, 4]).to(tl.float32)  # W, token, lane, column
        scale = _pick(tl.reshape(pairs, [W, 32, 4]), step // 2)  # same in all 4 lanes of a row
        scale = tl.reshape(scale, [W, 8, 4])
        scale_low = (scale & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        scale_high = (scale >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        for column in tl.static_range(4):
            x = _pick(x4, column)  # W, token, lane
            a = _nibbles(word, (column // 2) * 8 + (column % 2) * 16) * scale_low  # W, row, lane
            b = _nibbles(word, (column // 2) * 8 + (column % 2) * 16 + 4) * scale_high
            low += tl.sum(a[:, :, None, :] * x[:, None, :, :], axis=3)
            high += tl.sum(b[:, :, None, :] * x[:, None, :, :], axis=3)
    both = tl.join(tl.reshape(low, [W, 8, 4, 2]), tl.reshape(high, [W, 8, 4, 2]))
    both = tl.permute(both, (0, 1, 2, 4, 3))
    return acc + tl.reshape(both, [W * 128])


@jit()
def mma_tile(w0, w1, s, xs, acc, MANY: tl.constexpr, ASM: tl.constexpr, W: tl.constexpr):
    """Add tile times activations to `acc`, float32 [4 T]: element 4·lane + 2·half + i of a warp is
    row lane // 4 + 8·half, token 2·(lane % 4) + i. With ASM, rows 8 to 15 come out 16 times too
    large (`row_sums` undoes it), and without MANY only token 0 is computed.

    `xs` is a tuple of eight float16 [4 T], one for each instruction.
    """
    if ASM:
        if MANY:
            return tl.inline_asm_elementwise(
                MMA_MANY,
                MMA_CONSTRAINTS,
                [w0, w1, s, xs[0], xs[1], xs[2], xs[3], xs[4], xs[5], xs[6], xs[7], acc],
                dtype=tl.float32,
                is_pure=True,
                pack=4,
            )
        return tl.inline_asm_elementwise(
            MMA_ONE,
            MMA_CONSTRAINTS,
            [w0, w1, s, xs[0], xs[1], xs[2], xs[3], xs[4], xs[5], xs[6], xs[7], acc],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    return _mma_twin(w0, w1, s, xs, acc, W)


@jit()
def row_sums(acc, ASM: tl.constexpr, W: tl.constexpr):
    """Sum accumulators over the warps: [4 T] to float32 [128], element 4·lane + 2·half + i."""
    total = tl.sum(tl.reshape(acc, [W, 128]), axis=0)
    if ASM:
        half = tl.arange(0, 128) // 2 % 2
        total = tl.where(half == 1, total * 0.0625, total)
    return total


@jit()
def sum_by_token(x, M: tl.constexpr, W: tl.constexpr):
    """Sum activation-shaped [4 T] over everything but the token column, and spread it again."""
    if M == 1:
        return tl.sum(x, axis=0) + tl.zeros_like(x)
    total = tl.sum(tl.sum(tl.reshape(x, [W, 8, 16]), axis=2), axis=0)
    spread = tl.broadcast_to(total[None, :, None], [W, 8, 16])
    return tl.reshape(spread, [W * 128])
