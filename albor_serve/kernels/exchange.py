# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,assignment"
"""How programs of one running kernel hand each other results: words that carry their own tag.

A word is 8 bytes: 32 bits of data (two float16, or one float32) and a 32-bit tag that says which
layer of which token wrote it. A reader asks for the data until the tag is the one it waits for, so
there is no barrier, no fence and no second trip to the cache: data and the news that it is there
come together. (The protocol is what NCCL calls LL.) 8-byte stores and loads are single accesses.

Tags never come twice in a row, and a word is written again only after all its readers have written
what they made of it. Where the wait does not end, the kernel traps: an error, never a wrong number.

Without inline assembly (`ASM` false, for the interpreter, which runs program after program) the
readers take the data as it lies there.
"""

from __future__ import annotations

from albor_serve.kernels._triton import jit, tl
from albor_serve.kernels.core import halves, to_words

__all__ = [
    "HALF",
    "attention_asm",
    "fence",
    "load_gains",
    "poll_attention",
    "poll_inputs",
    "poll_keys",
    "poll_to_shared",
    "prefetch",
    "put_float",
    "put_halves",
    "put_key",
    "put_pairs",
    "shared_float",
    "shared_inputs",
    "tags_base",
]

_PATIENCE = 1 << 19
"""Polls before a kernel traps: about a fifth of a second."""

HALF = 65504.0
"""The largest float16."""

BUFFER_BYTES = 16384
"""Shared memory of `tags_base`."""


def _poll(loads: list[str], tags: list[str], tag: str) -> list[str]:
    """PTX that repeats the loads until all tags are right."""
    lines = [".reg .pred p;", ".reg .u32 n;", "mov.u32 n, 0;", "again:", *loads]
    lines.append(f"setp.ne.b32 p, {tags[0]}, {tag};")
    lines += [f"setp.ne.or.b32 p, {t}, {tag}, p;" for t in tags[1:]]
    lines += [
        "@!p bra done;",
        "add.u32 n, n, 1;",
        f"setp.lt.u32 p, n, {_PATIENCE};",
        "@p bra again;",
        "trap;",
        "done:",
        "bar.warp.sync -1;",
    ]
    return lines


def _two(number: int, address: str) -> list[str]:
    """PTX: two words from an address, as a{n}, b{n} with tags s{n}, t{n}."""
    return [
        f"ld.relaxed.gpu.global.v2.b64 {{u{number}, v{number}}}, [{address}];",
        f"mov.b64 {{a{number}, s{number}}}, u{number};",
        f"mov.b64 {{b{number}, t{number}}}, v{number};",
    ]


def _registers(count: int) -> list[str]:
    """PTX declarations for `_two` of 0 to count - 1."""
    return [
        f".reg .b64 u<{count}>, v<{count}>;",
        f".reg .b32 a<{count}>, b<{count}>, s<{count}>, t<{count}>;",
    ]


def _inputs_asm(num_tiles: int, *, gain: bool, keep: bool) -> str:
    """PTX of `poll_inputs`: lane l gets words 2 l and 2 l + 1 of each tile, and they change hands.

    Operands: outputs, 16 for each tile unless `keep` is off, 4 sums of squares if `gain`; then the
    address of each tile (4 each), 4 tags, 4 shared addresses to write to, 4 to read from, and if
    `gain` 4 gain words of each tile.
    """
    num_out = (16 * num_tiles if keep else 4) + (4 if gain else 0)
    address = num_out
    tag = address + 4 * num_tiles
    to, source = tag + 4, tag + 8
    gains = tag + 12
    lines = ["{", *_registers(num_tiles), ".reg .f32 q, f; .reg .b16 x, y;"]
    loads = [line for k in range(num_tiles) for line in _two(k, f"${address + 4 * k}")]
    lines += _poll(loads, [f"{c}{k}" for k in range(num_tiles) for c in "st"], f"${tag}")
    if gain:
        lines.append("mov.f32 q, 0f00000000;")
        for k in range(num_tiles):
            for c in "ab":
                lines.append(f"mov.b32 {{x, y}}, {c}{k};")
                lines += [f"cvt.f32.f16 f, {h}; fma.rn.f32 q, f, f, q;" for h in "xy"]
            lines.append(f"mul.rn.f16x2 a{k}, a{k}, ${gains + 4 * k};")
            lines.append(f"mul.rn.f16x2 b{k}, b{k}, ${gains + 4 * k + 1};")
    lines += [f"st.shared.v2.b32 [${to}+{256 * k}], {{a{k}, b{k}}};" for k in range(num_tiles)]
    if gain:
        for distance in (16, 8, 4, 2, 1):
            lines += [f"shfl.sync.bfly.b32 f, q, {distance}, 31, -1;", "add.f32 q, q, f;"]
        first = num_out - 4
        lines += [f"mov.f32 ${first + i}, q;" for i in range(4)]
    if keep:
        lines.append("bar.warp.sync -1;")
        for k in range(num_tiles):
            for i in range(4):
                out = [f"${(4 * k + i) * 4 + c}" for c in range(4)]
                at = f"${source}+{256 * k + 64 * i}"
                lines.append(f"ld.shared.v4.b32 {{{', '.join(out)}}}, [{at}];")
    else:
        lines += [f"mov.b32 ${i}, 0;" for i in range(4)]
    return "\n".join([*lines, "}"])


def _inputs_constraints(num_tiles: int, *, gain: bool, keep: bool) -> str:
    parts = ["=r"] * (16 * num_tiles if keep else 4) + ["=f"] * (4 if gain else 0)
    parts += ["l"] * (4 * num_tiles) + ["r"] * 12 + ["r"] * (4 * num_tiles if gain else 0)
    return ",".join(parts)


def attention_asm(head_dim: int, num_heads: int, num_sets: int) -> tuple[str, str]:
    """PTX and constraints of `poll_attention` for one tile of 128 columns.

    Operands: for each head of the tile and each set of eight splits 4 · head_dim / 32 words of
    values, then for each the split's weight 4 times; then the address of the lane's first value (4),
    of its first weight (4), and 4 tags.
    """
    heads, words = 128 // head_dim, head_dim // 32
    pieces = [(h, a) for h in range(heads) for a in range(num_sets)]
    values = len(pieces) * words * 4
    weights = len(pieces) * 4
    address = values + weights
    count = len(pieces) * words * 2
    lines = ["{", *_registers(count), f".reg .b64 w<{len(pieces)}>;"]
    lines.append(f".reg .b32 l<{len(pieces)}>, m<{len(pieces)}>;")
    loads, tags = [], []
    for number, (head, a) in enumerate(pieces):
        row = a * 8 * num_heads + head
        loads.append(f"ld.relaxed.gpu.global.b64 w{number}, [${address + 4}+{row * 8}];")
        loads.append(f"mov.b64 {{l{number}, m{number}}}, w{number};")
        tags.append(f"m{number}")
        for i in range(words):
            for half in range(2):
                k = (number * words + i) * 2 + half
                loads += _two(k, f"${address}+{row * head_dim * 4 + i * 128 + half * 16}")
                tags += [f"s{k}", f"t{k}"]
    # All loads before the first look at a result.
    asks = [x for x in loads if x.startswith("ld")]
    lines += _poll(asks + [x for x in loads if not x.startswith("ld")], tags, f"${address + 8}")
    for number in range(len(pieces)):
        for i in range(words):
            for c in range(4):
                k = (number * words + i) * 2 + c // 2
                out = (number * words + i) * 4 + c
                lines.append(f"mov.b32 ${out}, {'ab'[c % 2]}{k};")
        lines += [f"mov.b32 ${values + 4 * number + c}, l{number};" for c in range(4)]
    constraints = ["=r"] * values + ["=f"] * weights + ["l"] * 8 + ["r"] * 4
    return "\n".join([*lines, "}"]), ",".join(constraints)


_SHARED_ASM = "\n".join(
    [
        "{",
        *_registers(1),
        *_poll(_two(0, "$1"), ["s0", "t0"], "$2"),
        "st.shared.v2.b32 [$3], {a0, b0};",
        "mov.b32 $0, 0;",
        "}",
    ]
)
_KEYS_ASM = "\n".join(
    ["{", *_registers(1), *_poll(_two(0, "$2"), ["s0", "t0"], "$3")]
    + ["mov.b32 $0, a0;", "mov.b32 $1, b0;", "}"]
)
_PUT_FLOAT = (
    "{ .reg .pred p; .reg .b64 w; setp.ne.u32 p, $4, 0; mov.b64 w, {$2, $3};"
    " @p st.relaxed.gpu.global.b64 [$1], w; mov.b32 $0, 0; }"
)
_PUT_HALVES = (
    "{ .reg .pred p; .reg .b64 w; .reg .b32 h; .reg .f32 o; setp.ne.u32 p, $4, 0;"
    " shfl.sync.bfly.b32 o, $2, 1, 31, -1; cvt.rn.f16x2.f32 h, o, $2; mov.b64 w, {h, $3};"
    " @p st.relaxed.gpu.global.b64 [$1], w; mov.b32 $0, 0; }"
)
_PUT_PAIRS = (
    "{ .reg .pred p; .reg .b64 w, x; .reg .b32 h, i; setp.ne.u32 p, $16, 0;"
    " cvt.rn.f16x2.f32 h, $9, $8; cvt.rn.f16x2.f32 i, $11, $10;"
    " mov.b64 w, {h, $12}; mov.b64 x, {i, $12};"
    " @p st.relaxed.gpu.global.v2.b64 [$4], {w, x};"
    " mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }"
)
_PREFETCH = (
    "{ .reg .pred p; setp.ne.u32 p, $3, 0;"
    " @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }"
)
_TAGS_BASE = f"{{ .shared .align 16 .b8 tags[{BUFFER_BYTES}]; mov.b32 $0, tags; }}"

if hasattr(tl, "dot"):
    X_1 = tl.constexpr(_inputs_asm(1, gain=True, keep=True))
    X_1_CONSTRAINTS = tl.constexpr(_inputs_constraints(1, gain=True, keep=True))
    X_2 = tl.constexpr(_inputs_asm(2, gain=True, keep=True))
    X_2_CONSTRAINTS = tl.constexpr(_inputs_constraints(2, gain=True, keep=True))
    X_SHARE = tl.constexpr(_inputs_asm(1, gain=True, keep=False))
    X_SHARE_CONSTRAINTS = tl.constexpr(_inputs_constraints(1, gain=True, keep=False))
    A_1 = tl.constexpr(_inputs_asm(1, gain=False, keep=True))
    A_1_CONSTRAINTS = tl.constexpr(_inputs_constraints(1, gain=False, keep=True))
    A_2 = tl.constexpr(_inputs_asm(2, gain=False, keep=True))
    A_2_CONSTRAINTS = tl.constexpr(_inputs_constraints(2, gain=False, keep=True))
    A_3 = tl.constexpr(_inputs_asm(3, gain=False, keep=True))
    A_3_CONSTRAINTS = tl.constexpr(_inputs_constraints(3, gain=False, keep=True))
    A_4 = tl.constexpr(_inputs_asm(4, gain=False, keep=True))
    A_4_CONSTRAINTS = tl.constexpr(_inputs_constraints(4, gain=False, keep=True))
    SHARED = tl.constexpr(_SHARED_ASM)
    KEYS = tl.constexpr(_KEYS_ASM)
    PUT_FLOAT = tl.constexpr(_PUT_FLOAT)
    PUT_HALVES = tl.constexpr(_PUT_HALVES)
    PUT_PAIRS = tl.constexpr(_PUT_PAIRS)
    PUT_PAIRS_CONSTRAINTS = tl.constexpr("=r,=r,=r,=r,l,l,l,l,f,f,f,f,r,r,r,r,r,r,r,r")
    PREFETCH = tl.constexpr(_PREFETCH)
    TAGS_BASE = tl.constexpr(_TAGS_BASE)


@jit()
def tags_base(ASM: tl.constexpr):
    """Address of the shared memory through which lanes exchange words. Call it once."""
    if ASM:
        return tl.inline_asm_elementwise(TAGS_BASE, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    return 0


@jit()
def fence(ASM: tl.constexpr):
    """Make other programs' plain stores visible from here on, and ours to them."""
    if ASM:
        tl.inline_asm_elementwise(
            "fence.acq_rel.gpu; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@jit()
def prefetch(ptr, offset, NUM_BYTES: tl.constexpr, on, c, BULK: tl.constexpr):
    """Ask for NUM_BYTES from ptr + offset (int32 words) into the L2 cache, once a program.

    c: one element a thread. Needs compute capability 9.0.
    """
    if BULK:
        tl.inline_asm_elementwise(
            PREFETCH,
            "=r,l,r,r",
            [ptr + offset + c * 0, c * 0 + NUM_BYTES, ((c == 0) & on).to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@jit()
def _data(ptr, mask):
    return (tl.load(ptr, mask=mask, other=0) & 0xFFFFFFFF).to(tl.int32)


@jit()
def _word(data, tag):
    return (data.to(tl.int64) & 0xFFFFFFFF) | (tag.to(tl.int64) << 32)


@jit()
def load_gains(g_ptr, e, KT: tl.constexpr, W: tl.constexpr):
    """What `poll_inputs` multiplies with, loaded beforehand: int32 [4 T] for each tile of a warp.

    g_ptr: int32 view of float16 [KT · 128].
    """
    gains = ()
    KPW: tl.constexpr = (KT + W - 1) // W
    for q in tl.static_range(KPW):
        kt = tl.minimum(e // 128 + q * W, KT - 1)
        gains = gains + (tl.load(g_ptr + kt * 64 + e % 128 // 4 * 2 + e % 2),)  # noqa: RUF005
    return gains


@jit()
def _twin_inputs(x_ptr, g_ptr, e, KT: tl.constexpr, GAIN: tl.constexpr, W: tl.constexpr):
    """`poll_inputs` written out: for the interpreter."""
    xs = ()
    KPW: tl.constexpr = (KT + W - 1) // W
    squares = tl.zeros([W * 128], tl.float32)
    for q in tl.static_range(KPW):
        kt = tl.minimum(e // 128 + q * W, KT - 1)
        at = kt * 64 + e // 4 % 4 * 4 + e % 4
        for i in tl.static_range(4):
            word = _data(x_ptr + at + 16 * i, e >= 0)
            if GAIN:
                low, high = halves(word)
                g_low, g_high = halves(tl.load(g_ptr + at + 16 * i))
                once = (e % 128 < 16) & (e // 128 + q * W < KT)
                squares += tl.where(once, low * low + high * high, 0.0)
                word = to_words(low * g_low, high * g_high)
            xs = xs + (word,)  # noqa: RUF005
    total = tl.sum(tl.reshape(squares, [W, 128]), axis=1)
    return xs, tl.reshape(tl.broadcast_to(total[:, None], [W, 128]), [W * 128])


@jit()
def _address(ptr, e, q, KT: tl.constexpr, W: tl.constexpr):
    return ptr + tl.minimum(e // 128 + q * W, KT - 1) * 64 + e % 128 // 4 * 2


@jit()
def poll_inputs(x_ptr, g_ptr, gains, tag, buffer, e, KT: tl.constexpr, GAIN: tl.constexpr,
                ASM: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """Each warp's columns of x, as soon as they are there.

    Args:
        x_ptr: words [KT · 64]. g_ptr, gains: the gains and what `load_gains` made of them, used
        with GAIN. buffer: `tags_base` and what is free of it. KT: tiles; at most 4 for each warp, 2
        with GAIN.

    Returns:
        a tuple of 4 · KPW int32 [4 T], as `mma_tile` wants them; the sum of squares of the warp's
        columns without gain, float32 [4 T] (0 without GAIN).
    """
    if not ASM:
        return _twin_inputs(x_ptr, g_ptr, e, KT, GAIN, W)
    KPW: tl.constexpr = (KT + W - 1) // W
    to = buffer + e // 128 * (256 * KPW) + e % 128 // 4 * 8
    source = buffer + e // 128 * (256 * KPW) + e // 4 % 4 * 16
    tags = tag + e * 0
    i32: tl.constexpr = tl.int32
    f32: tl.constexpr = tl.float32
    a0 = _address(x_ptr, e, 0, KT, W)
    if GAIN:
        if KPW == 1:
            r = tl.inline_asm_elementwise(
                X_1, X_1_CONSTRAINTS, [a0, tags, to, source, gains[0]],
                dtype=(i32, i32, i32, i32, f32), is_pure=False, pack=4,
            )  # fmt: skip
            squares = tl.where(e // 128 < KT, r[4], 0.0)
            return (r[0], r[1], r[2], r[3]), squares
        tl.static_assert(KPW == 2 and KT % W == 0)
        a1 = _address(x_ptr, e, 1, KT, W)
        r = tl.inline_asm_elementwise(
            X_2, X_2_CONSTRAINTS, [a0, a1, tags, to, source, gains[0], gains[1]],
            dtype=(i32, i32, i32, i32, i32, i32, i32, i32, f32), is_pure=False, pack=4,
        )  # fmt: skip
        return (r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7]), r[8]
    zeros = tl.zeros([W * 128], tl.float32)
    if KPW == 1:
        r = tl.inline_asm_elementwise(
            A_1, A_1_CONSTRAINTS, [a0, tags, to, source],
            dtype=(i32, i32, i32, i32), is_pure=False, pack=4,
        )  # fmt: skip
        return (r[0], r[1], r[2], r[3]), zeros
    a1 = _address(x_ptr, e, 1, KT, W)
    if KPW == 2:
        r = tl.inline_asm_elementwise(
            A_2, A_2_CONSTRAINTS, [a0, a1, tags, to, source],
            dtype=(i32, i32, i32, i32, i32, i32, i32, i32), is_pure=False, pack=4,
        )  # fmt: skip
        return (r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7]), zeros
    a2 = _address(x_ptr, e, 2, KT, W)
    if KPW == 3:
        r = tl.inline_asm_elementwise(
            A_3, A_3_CONSTRAINTS, [a0, a1, a2, tags, to, source],
            dtype=(i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32),
            is_pure=False, pack=4,
        )  # fmt: skip
        return (r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8], r[9], r[10], r[11]), zeros
    tl.static_assert(KPW == 4)
    a3 = _address(x_ptr, e, 3, KT, W)
    r = tl.inline_asm_elementwise(
        A_4, A_4_CONSTRAINTS, [a0, a1, a2, a3, tags, to, source],
        dtype=(i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32),
        is_pure=False, pack=4,
    )  # fmt: skip
    return (r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8], r[9], r[10], r[11], r[12],
            r[13], r[14], r[15]), zeros  # fmt: skip


@jit()
def share_inputs(x_ptr, g_ptr, gains, tag, buffer, e, KT: tl.constexpr, ASM: tl.constexpr,
                 W: tl.constexpr):  # fmt: skip
    """Leave all of x in shared memory for `shared_inputs`; `tl.debug_barrier` must follow.

    Returns the sum of squares of the warp's columns, float32 [4 T].
    """
    if not ASM:
        _, squares = _twin_inputs(x_ptr, g_ptr, e, KT, True, W)
        return squares
    squares = tl.zeros([W * 128], tl.float32)
    for q in tl.static_range((KT + W - 1) // W):
        kt = tl.minimum(e // 128 + q * W, KT - 1)
        to = buffer + kt * 256 + e % 128 // 4 * 8
        r = tl.inline_asm_elementwise(
            X_SHARE, X_SHARE_CONSTRAINTS,
            [_address(x_ptr, e, q, KT, W), tag + e * 0, to, to, gains[q]],
            dtype=(tl.int32, tl.float32), is_pure=False, pack=4,
        )  # fmt: skip
        squares += tl.where(e // 128 + q * W < KT, r[1], 0.0)
    return squares


@jit()
def shared_inputs(x_ptr, g_ptr, buffer, kt, e, ASM: tl.constexpr):
    """Columns 128·kt to 128·kt + 127 of what `share_inputs` left: four int32 [4 T]."""
    at = kt * 64 + e // 4 % 4 * 4 + e % 4
    xs = ()
    for i in tl.static_range(4):
        if ASM:
            x = tl.inline_asm_elementwise(
                "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
                "=r,=r,=r,=r,r,r,r,r",
                [buffer + (at + 16 * i) * 4],
                dtype=tl.int32,
                is_pure=False,
                pack=4,
            )
        else:
            low, high = halves(_data(x_ptr + at + 16 * i, e >= 0))
            g_low, g_high = halves(tl.load(g_ptr + at + 16 * i))
            x = to_words(low * g_low, high * g_high)
        xs = xs + (x,)  # noqa: RUF005
    return xs


@jit()
def poll_to_shared(ptr, to, tag, ASM: tl.constexpr):
    """Two words for each element of ptr, to two float32 of shared memory."""
    if ASM:
        tl.inline_asm_elementwise(
            SHARED, "=r,l,r,r", [ptr, tag + to * 0, to], dtype=tl.int32, is_pure=False, pack=1
        )


@jit()
def shared_float(base, index, word_ptr, ASM: tl.constexpr):
    """Float32 number `index` of shared memory; without ASM the one in the word at word_ptr."""
    if ASM:
        return tl.inline_asm_elementwise(
            "ld.shared.f32 $0, [$1];",
            "=f,r",
            [base + index * 4],
            dtype=tl.float32,
            is_pure=False,
            pack=1,
        )
    return _data(word_ptr, index >= 0).to(tl.float32, bitcast=True)


@jit()
def poll_attention(att_ptr, lse_ptr, tag, split, n, e, first_head, KT: tl.constexpr,
                   H: tl.constexpr, D: tl.constexpr, SETS: tl.constexpr, CODE: tl.constexpr,
                   CONSTRAINTS: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """One tile's attention outputs: for each of its heads and each set of eight splits D / 32
    int32 [4 T] of values and a float32 [4 T] weight, as two tuples.

    att_ptr: words [splits, H, D / 2]. lse_ptr: words [splits, H]. split, first_head: those of the
    lane's column and of the warp's tile.
    """
    row = split * H + first_head
    HEADS: tl.constexpr = 128 // D
    WORDS: tl.constexpr = D // 32
    i32: tl.constexpr = tl.int32
    f32: tl.constexpr = tl.float32
    if not ASM:
        values = ()
        logs = ()
        for h in tl.static_range(HEADS):
            for a in tl.static_range(SETS):
                at = row + a * 8 * H + h
                logs = logs + (  # noqa: RUF005
                    _data(lse_ptr + at, e >= 0).to(tl.float32, bitcast=True),
                )
                for i in tl.static_range(WORDS):
                    word = _data(att_ptr + at * (D // 2) + i * 16 + e // 4 % 4 * 4 + e % 4, e >= 0)
                    values = values + (word,)  # noqa: RUF005
        return values, logs
    address = att_ptr + row * (D // 2) + e // 4 % 4 * 4
    tl.static_assert(HEADS * SETS * WORDS <= 8)
    if HEADS * SETS == 2:
        r = tl.inline_asm_elementwise(
            CODE, CONSTRAINTS, [address, lse_ptr + row, tag + e * 0],
            dtype=(i32, i32, i32, i32, f32, f32) if WORDS == 2 else
            (i32, i32, i32, i32, i32, i32, i32, i32, f32, f32),
            is_pure=False, pack=4,
        )  # fmt: skip
        if WORDS == 2:
            return (r[0], r[1], r[2], r[3]), (r[4], r[5])
        return (r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7]), (r[8], r[9])
    if HEADS * SETS == 1:
        r = tl.inline_asm_elementwise(
            CODE, CONSTRAINTS, [address, lse_ptr + row, tag + e * 0],
            dtype=(i32, i32, i32, i32, f32), is_pure=False, pack=4,
        )  # fmt: skip
        return (r[0], r[1], r[2], r[3]), (r[4],)
    tl.static_assert(HEADS * SETS == 4 and WORDS == 2)
    r = tl.inline_asm_elementwise(
        CODE, CONSTRAINTS, [address, lse_ptr + row, tag + e * 0],
        dtype=(i32, i32, i32, i32, i32, i32, i32, i32, f32, f32, f32, f32),
        is_pure=False, pack=4,
    )  # fmt: skip
    return (r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7]), (r[8], r[9], r[10], r[11])


@jit()
def poll_keys(keys_ptr, which, tag, ASM: tl.constexpr):
    """The int64 keys of programs `which`. keys_ptr: words [programs, 2]."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            KEYS, "=r,=r,l,r", [keys_ptr + which * 2, tag + which * 0],
            dtype=(tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        low = _data(keys_ptr + which * 2, which >= 0)
        high = _data(keys_ptr + which * 2 + 1, which >= 0)
    return (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)


@jit()
def put_key(keys_ptr, key, tag, c, ASM: tl.constexpr):
    """Publish this program's key, a scalar int64. c: one element a thread."""
    low = (key & 0xFFFFFFFF).to(tl.int32) + c * 0
    high = (key >> 32).to(tl.int32) + c * 0
    data = tl.where(c % 2 == 0, low, high).to(tl.float32, bitcast=True)
    put_float(keys_ptr + c % 2, data, tag, c < 2, ASM)


@jit()
def put_float(ptr, value, tag, ok, ASM: tl.constexpr):
    """Publish float32 values; one element a thread."""
    if ASM:
        tl.inline_asm_elementwise(
            PUT_FLOAT, "=r,l,f,r,r", [ptr, value, tag + ok.to(tl.int32) * 0, ok.to(tl.int32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.store(ptr, _word(value.to(tl.int32, bitcast=True), tag), mask=ok)


@jit()
def put_halves(ptr, value, tag, ok, ASM: tl.constexpr):
    """Publish values [T] as float16, those of elements 2 i and 2 i + 1 in one word.

    ptr and ok count for the even elements; the odd ones' ok must be the same.
    """
    c = tl.arange(0, value.shape[0])
    ok = ok & (c % 2 == 0)
    if ASM:
        tl.inline_asm_elementwise(
            PUT_HALVES, "=r,l,f,r,r", [ptr, value, tag + c * 0, ok.to(tl.int32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        other = tl.gather(value, c ^ 1, 0)
        tl.store(ptr, _word(to_words(value, other), tag), mask=ok)


@jit()
def put_pairs(ptr, value, tag, ok, at, ASM: tl.constexpr):
    """Publish values whose last axis lies in one thread, four or more in a row, as float16.

    ptr: where the word of each element's pair begins. at: the last axis' index.
    """
    if ASM:
        tl.inline_asm_elementwise(
            PUT_PAIRS, PUT_PAIRS_CONSTRAINTS,
            [ptr, value, tag + ok.to(tl.int32) * 0, ok.to(tl.int32)],
            dtype=tl.int32, is_pure=False, pack=4,
        )  # fmt: skip
    else:
        shape: tl.constexpr = [value.shape[0], value.shape[1], value.shape[2] // 2, 2]
        low, high = tl.split(tl.reshape(value, shape))
        both = to_words(low, high)
        both = tl.reshape(tl.join(both, both), value.shape)
        tl.store(ptr, _word(both, tag), mask=ok & (at % 2 == 0))
