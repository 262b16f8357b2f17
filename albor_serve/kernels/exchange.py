# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,assignment"
"""How programs of one running kernel hand each other results: words that carry their own tag.

A word is 8 bytes: 32 bits of data (two float16, or one float32) and a 32-bit tag that says which
layer of which token wrote it. A reader asks for the data until the tag is the one it waits for, so
there is no barrier, no fence and no second trip to the cache: data and the news that it is there
come together. (The protocol is what NCCL calls LL.) 8-byte stores and loads are single accesses.

Tags never come twice in a row, and a word is written again only after all its readers have written
what they made of it. Where the wait does not end, the kernel traps: an error, never a wrong number.

`e` numbers elements, four of them a thread, as in `core`. Here it must come from `lanes_of`, which
nails it to that layout: what is computed from `tl.arange` alone the compiler lays out as it likes.

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
    "lanes_of",
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


def _poll(loads: list[str], tags: list[str], tag: str, name: str = "all") -> list[str]:
    """PTX that repeats the loads until all tags are right. `name` makes its labels unique."""
    lines = ["{", ".reg .pred p;", ".reg .u32 n;", "mov.u32 n, 0;", f"{name}_again:", *loads]
    lines.append(f"setp.ne.b32 p, {tags[0]}, {tag};")
    lines += [f"setp.ne.or.b32 p, {t}, {tag}, p;" for t in tags[1:]]
    lines += [
        f"@!p bra {name}_done;",
        "add.u32 n, n, 1;",
        f"setp.lt.u32 p, n, {_PATIENCE};",
        f"@p bra {name}_again;",
        "trap;",
        f"{name}_done:",
        "}",
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


def _inputs_asm(num_tiles: int, *, gain: bool) -> str:
    """PTX of `_poll_tiles`: lane l gets words 2 l and 2 l + 1 of each tile and leaves them, times
    the gain, in shared memory.

    Operands: 4 outputs, the warp's sum of squares before the gain; the address of each tile's words
    (4 each), 4 tags, 4 shared addresses, and if `gain` 4 gain words of each tile.
    """
    address, tag, to, gains = 4, 4 + 4 * num_tiles, 8 + 4 * num_tiles, 12 + 4 * num_tiles
    tiles = range(num_tiles)
    lines = ["{", *_registers(num_tiles), ".reg .f32 q, f; .reg .b16 x, y;"]
    asks = [_two(k, f"${address + 4 * k}") for k in tiles]
    loads = [ask[0] for ask in asks] + [line for ask in asks for line in ask[1:]]
    lines += _poll(loads, [f"{c}{k}" for k in tiles for c in "st"], f"${tag}")
    lines.append("mov.f32 q, 0f00000000;")
    if gain:
        for k in tiles:
            for c in "ab":
                lines.append(f"mov.b32 {{x, y}}, {c}{k};")
                lines += [f"cvt.f32.f16 f, {h}; fma.rn.f32 q, f, f, q;" for h in "xy"]
            lines.append(f"mul.rn.f16x2 a{k}, a{k}, ${gains + 4 * k};")
            lines.append(f"mul.rn.f16x2 b{k}, b{k}, ${gains + 4 * k + 1};")
    lines += [f"st.shared.v2.b32 [${to}+{256 * k}], {{a{k}, b{k}}};" for k in tiles]
    if gain:
        for distance in (16, 8, 4, 2, 1):
            lines += [f"shfl.sync.bfly.b32 f, q, {distance}, 31, -1;", "add.f32 q, q, f;"]
    lines += [f"mov.f32 ${i}, q;" for i in range(4)]
    return "\n".join([*lines, "bar.warp.sync -1;", "}"])


def _inputs_constraints(num_tiles: int, *, gain: bool) -> str:
    parts = ["=f"] * 4 + ["l"] * (4 * num_tiles) + ["r"] * 8
    return ",".join(parts + ["r"] * (4 * num_tiles if gain else 0))


def attention_asm(head_dim: int, num_heads: int, num_parts: int) -> tuple[str, str]:
    """PTX and constraints of `poll_attention` for one tile of 128 columns.

    Operands: for each head of the tile and each set of eight parts 4 · head_dim / 32 words of
    values, then for each the part's weight 4 times; then the address of the lane's first value (4),
    of its first weight (4), 4 tags and 4 times the lane's part in the first set.
    """
    heads, words, num_sets = 128 // head_dim, head_dim // 32, -(-num_parts // 8)
    pieces = [(h, a) for h in range(heads) for a in range(num_sets)]
    values = len(pieces) * words * 4
    weights = len(pieces) * 4
    address = values + weights
    count = len(pieces) * words * 2
    lines = ["{", *_registers(count), f".reg .b64 w<{len(pieces)}>; .reg .pred q<{num_sets}>;"]
    lines.append(f".reg .b32 l<{len(pieces)}>, m<{len(pieces)}>;")
    lines += [f"setp.lt.s32 q{a}, ${address + 12}, {num_parts - 8 * a};" for a in range(num_sets)]
    asks, unpacks, tags = [], [], []
    for number, (head, a) in enumerate(pieces):
        row = a * 8 * num_heads + head
        # A lane without a part here keeps zeros of no weight, with the right tag.
        lines.append(f"mov.b64 w{number}, {{{_NO_WEIGHT}, ${address + 8}}};")
        asks.append(f"@q{a} ld.relaxed.gpu.global.b64 w{number}, [${address + 4}+{row * 8}];")
        unpacks.append(f"mov.b64 {{l{number}, m{number}}}, w{number};")
        tags.append(f"m{number}")
        for i in range(words):
            for half in range(2):
                k = (number * words + i) * 2 + half
                ask, *unpack = _two(k, f"${address}+{row * head_dim * 4 + i * 128 + half * 16}")
                lines.append(f"mov.b64 u{k}, {{0, ${address + 8}}}; mov.b64 v{k}, u{k};")
                asks.append(f"@q{a} {ask}")
                unpacks += unpack
                tags += [f"s{k}", f"t{k}"]
    # One word until it is there, since many readers of many words would hold up the writers; then
    # all loads before the first look at a result.
    lines += _poll([asks[0], unpacks[0]], tags[:1], f"${address + 8}", "first")
    lines += _poll(asks + unpacks, tags, f"${address + 8}")
    for number in range(len(pieces)):
        for i in range(words):
            for c in range(4):
                k = (number * words + i) * 2 + c // 2
                out = (number * words + i) * 4 + c
                lines.append(f"mov.b32 ${out}, {'ab'[c % 2]}{k};")
        lines += [f"mov.b32 ${values + 4 * number + c}, l{number};" for c in range(4)]
    constraints = ["=r"] * values + ["=f"] * weights + ["l"] * 8 + ["r"] * 8
    return "\n".join([*lines, "}"]), ",".join(constraints)


_NO_WEIGHT = "0xf149f2ca"
"""-1e30, the logarithm of no weight, as a float32's bits."""


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
    [
        "{",
        *_registers(1),
        *_poll(_two(0, "$2"), ["s0", "t0"], "$3"),
        "mov.b32 $0, a0; mov.b32 $1, b0;",
        "}",
    ]
)


def _rows_asm(num_warps: int) -> str:
    """PTX that adds up the warps' row pairs and their sums of squares, for lanes that are asked.

    Operands: low, high, total; address of the pair in warp 0, of the first sum, whether asked.
    """
    warps = range(num_warps)
    lines = ["{", ".reg .pred p;", f".reg .f32 x<{num_warps}>, y<{num_warps}>, z<{num_warps}>;"]
    lines += ["setp.ne.u32 p, $5, 0;", "mov.f32 $0, 0f00000000;", "mov.f32 $1, 0f00000000;"]
    lines += ["mov.f32 $2, 0f00000000;", "@!p bra out;"]
    lines += [f"ld.shared.v2.f32 {{x{w}, y{w}}}, [$3+{64 * w}];" for w in warps]
    for w in range(0, num_warps, 4):
        four = ", ".join(f"z{w + i}" for i in range(4))
        lines.append(f"ld.shared.v4.f32 {{{four}}}, [$4+{4 * w}];")
    width = num_warps
    while width > 1:
        width //= 2
        lines += [f"add.f32 {c}{w}, {c}{w}, {c}{w + width};" for c in "xyz" for w in range(width)]
    lines += ["mov.f32 $0, x0;", "mov.f32 $1, y0;", "mov.f32 $2, z0;", "out:", "}"]
    return "\n".join([*lines, "bar.warp.sync -1;"])


_SHARE_ROWS = (
    "{ .reg .pred p; setp.ne.u32 p, $12, 0; @p st.shared.v2.f32 [$8], {$4, $6};"
    " mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }"
)
_SHARE_ONE = (
    "{ .reg .pred p; setp.ne.u32 p, $12, 0; @p st.shared.f32 [$8], $4;"
    " mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }"
)
_SHARE_FOUR = (
    "{ .reg .pred p; setp.ne.u32 p, $12, 0; @p st.shared.v4.f32 [$8], {$4, $5, $6, $7};"
    " mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }"
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
    GAINED_1 = tl.constexpr(_inputs_asm(1, gain=True))
    GAINED_1_CONSTRAINTS = tl.constexpr(_inputs_constraints(1, gain=True))
    GAINED_2 = tl.constexpr(_inputs_asm(2, gain=True))
    GAINED_2_CONSTRAINTS = tl.constexpr(_inputs_constraints(2, gain=True))
    PLAIN_1 = tl.constexpr(_inputs_asm(1, gain=False))
    PLAIN_1_CONSTRAINTS = tl.constexpr(_inputs_constraints(1, gain=False))
    PLAIN_2 = tl.constexpr(_inputs_asm(2, gain=False))
    PLAIN_2_CONSTRAINTS = tl.constexpr(_inputs_constraints(2, gain=False))
    PLAIN_3 = tl.constexpr(_inputs_asm(3, gain=False))
    PLAIN_3_CONSTRAINTS = tl.constexpr(_inputs_constraints(3, gain=False))
    PLAIN_4 = tl.constexpr(_inputs_asm(4, gain=False))
    PLAIN_4_CONSTRAINTS = tl.constexpr(_inputs_constraints(4, gain=False))
    ROWS_4 = tl.constexpr(_rows_asm(4))
    ROWS_8 = tl.constexpr(_rows_asm(8))
    ROWS_16 = tl.constexpr(_rows_asm(16))
    SHARE_ROWS = tl.constexpr(_SHARE_ROWS)
    SHARE_ONE = tl.constexpr(_SHARE_ONE)
    SHARE_FOUR = tl.constexpr(_SHARE_FOUR)
    SHARE_CONSTRAINTS = tl.constexpr("=r,=r,=r,=r,f,f,f,f,r,r,r,r,r,r,r,r")
    SHARED = tl.constexpr(_SHARED_ASM)
    KEYS = tl.constexpr(_KEYS_ASM)
    PUT_FLOAT = tl.constexpr(_PUT_FLOAT)
    PUT_HALVES = tl.constexpr(_PUT_HALVES)
    PUT_PAIRS = tl.constexpr(_PUT_PAIRS)
    PUT_PAIRS_CONSTRAINTS = tl.constexpr("=r,=r,=r,=r,l,l,l,l,f,f,f,f,r,r,r,r,r,r,r,r")
    PREFETCH = tl.constexpr(_PREFETCH)
    TAGS_BASE = tl.constexpr(_TAGS_BASE)


@jit()
def lanes_of(zeros_ptr, T: tl.constexpr):
    """0 to T - 1, four to a thread. zeros_ptr: int32 [T], all zero."""
    at = tl.arange(0, T)
    return at + tl.load(zeros_ptr + at)


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
            [(ptr + offset + c * 0).to(tl.int64), c * 0 + NUM_BYTES, ((c == 0) & on).to(tl.int32)],
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
    at = tl.minimum(e // 128 + q * W, KT - 1) * 64 + e % 128 // 4 * 2
    return (ptr + at).to(tl.int64)


@jit()
def _poll_tiles(ptr, gains, tag, to, e, KT: tl.constexpr, GAIN: tl.constexpr, W: tl.constexpr):
    """Leave each warp's KPW tiles in shared memory, 256 bytes apart; its sum of squares [4 T]."""
    KPW: tl.constexpr = (KT + W - 1) // W
    tags = tag + e * 0
    a0 = _address(ptr, e, 0, KT, W)
    if GAIN and KPW == 1:
        squares = tl.inline_asm_elementwise(
            GAINED_1, GAINED_1_CONSTRAINTS, [a0, tags, to, gains[0]],
            dtype=tl.float32, is_pure=False, pack=4,
        )  # fmt: skip
    elif GAIN:
        tl.static_assert(KPW == 2 and KT % W == 0)
        squares = tl.inline_asm_elementwise(
            GAINED_2, GAINED_2_CONSTRAINTS,
            [a0, _address(ptr, e, 1, KT, W), tags, to, gains[0], gains[1]],
            dtype=tl.float32, is_pure=False, pack=4,
        )  # fmt: skip
    elif KPW == 1:
        squares = tl.inline_asm_elementwise(
            PLAIN_1, PLAIN_1_CONSTRAINTS, [a0, tags, to],
            dtype=tl.float32, is_pure=False, pack=4,
        )  # fmt: skip
    elif KPW == 2:
        squares = tl.inline_asm_elementwise(
            PLAIN_2, PLAIN_2_CONSTRAINTS, [a0, _address(ptr, e, 1, KT, W), tags, to],
            dtype=tl.float32, is_pure=False, pack=4,
        )  # fmt: skip
    elif KPW == 3:
        squares = tl.inline_asm_elementwise(
            PLAIN_3, PLAIN_3_CONSTRAINTS,
            [a0, _address(ptr, e, 1, KT, W), _address(ptr, e, 2, KT, W), tags, to],
            dtype=tl.float32, is_pure=False, pack=4,
        )  # fmt: skip
    else:
        tl.static_assert(KPW == 4)
        squares = tl.inline_asm_elementwise(
            PLAIN_4, PLAIN_4_CONSTRAINTS,
            [a0, _address(ptr, e, 1, KT, W), _address(ptr, e, 2, KT, W),
             _address(ptr, e, 3, KT, W), tags, to],
            dtype=tl.float32, is_pure=False, pack=4,
        )  # fmt: skip
    return squares


@jit()
def _shared_tile(source):
    """Four int32 [4 T] of a tile in shared memory, as `mma_tile` wants them."""
    xs = ()
    for i in tl.static_range(4):
        x = tl.inline_asm_elementwise(
            "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r,r,r,r", [source + 64 * i],
            dtype=tl.int32, is_pure=False, pack=4,
        )  # fmt: skip
        xs = xs + (x,)  # noqa: RUF005
    return xs


@jit()
def poll_inputs(x_ptr, g_ptr, gains, tag, buffer, e, KT: tl.constexpr, GAIN: tl.constexpr,
                ASM: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """Each warp's columns of x, as soon as they are there.

    Args:
        x_ptr: words [KT · 64]. g_ptr, gains: the gains and what `load_gains` made of them, used
        with GAIN. buffer: what is free of `tags_base`. KT: tiles; at most 4 for each warp, 2 with
        GAIN.

    Returns:
        a tuple of 4 · KPW int32 [4 T], as `mma_tile` wants them; the sum of squares of the warp's
        columns without gain, float32 [4 T] (0 without GAIN).
    """
    KPW: tl.constexpr = (KT + W - 1) // W
    if ASM:
        to = buffer + e // 128 * (256 * KPW) + e % 128 // 4 * 8
        squares = _poll_tiles(x_ptr, gains, tag, to, e, KT, GAIN, W)
        squares = tl.where(e // 128 < KT, squares, 0.0)
        xs = ()
        for q in tl.static_range(KPW):
            source = buffer + e // 128 * (256 * KPW) + q * 256 + e // 4 % 4 * 16
            xs = xs + _shared_tile(source)
    else:
        xs, squares = _twin_inputs(x_ptr, g_ptr, e, KT, GAIN, W)
    return xs, squares


@jit()
def share_inputs(x_ptr, g_ptr, gains, tag, buffer, e, KT: tl.constexpr, ASM: tl.constexpr,
                 W: tl.constexpr):  # fmt: skip
    """Leave all of x in shared memory for `shared_inputs`; `tl.debug_barrier` must follow.

    Returns the sum of squares of the warp's columns, float32 [4 T].
    """
    if ASM:
        squares = tl.zeros([W * 128], tl.float32)
        for q in tl.static_range((KT + W - 1) // W):
            kt = tl.minimum(e // 128 + q * W, KT - 1)
            to = buffer + kt * 256 + e % 128 // 4 * 8
            part = tl.inline_asm_elementwise(
                GAINED_1, GAINED_1_CONSTRAINTS,
                [_address(x_ptr, e, q, KT, W), tag + e * 0, to, gains[q]],
                dtype=tl.float32, is_pure=False, pack=4,
            )  # fmt: skip
            squares += tl.where(e // 128 + q * W < KT, part, 0.0)
    else:
        _xs, squares = _twin_inputs(x_ptr, g_ptr, e, KT, True, W)
    return squares


@jit()
def shared_inputs(x_ptr, g_ptr, buffer, kt, e, ASM: tl.constexpr):
    """Columns 128·kt to 128·kt + 127 of what `share_inputs` left: four int32 [4 T]."""
    xs = ()
    if ASM:
        xs = _shared_tile(buffer + kt * 256 + e // 4 % 4 * 16)
    else:
        for i in tl.static_range(4):
            at = kt * 64 + e // 4 % 4 * 4 + e % 4 + 16 * i
            low, high = halves(_data(x_ptr + at, e >= 0))
            g_low, g_high = halves(tl.load(g_ptr + at))
            xs = xs + (to_words(low * g_low, high * g_high),)  # noqa: RUF005
    return xs


@jit()
def share_rows(base, band, acc, lanes, ASM: tl.constexpr, W: tl.constexpr):
    """Leave the 16 rows of token 0 of each warp's result in shared memory, as band `band`."""
    if ASM:
        to = base + band * (W * 64 + 64) + lanes // 128 * 64 + lanes // 16 % 8 * 8
        tl.inline_asm_elementwise(
            SHARE_ROWS, SHARE_CONSTRAINTS, [acc, to, (lanes // 4 % 4 == 0).to(tl.int32)],
            dtype=tl.int32, is_pure=False, pack=4,
        )  # fmt: skip


@jit()
def share_sum(base, BANDS: tl.constexpr, squares, lanes, ASM: tl.constexpr, W: tl.constexpr):
    """Leave each warp's sum of squares behind `BANDS` bands of rows."""
    if ASM:
        to = base + BANDS * (W * 64 + 64) + lanes // 128 * 4
        tl.inline_asm_elementwise(
            SHARE_ONE, SHARE_CONSTRAINTS, [squares, to, (lanes % 128 < 4).to(tl.int32)],
            dtype=tl.int32, is_pure=False, pack=4,
        )  # fmt: skip


@jit()
def rows_of(base, accs, squares, band, row, BANDS: tl.constexpr, COUNT: tl.constexpr,
            ASM: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """Sums over the warps for the first COUNT elements of band and row (0 to 7), [T] each.

    Returns row `row`, row `row + 8` and the sum of squares. `share_rows` and `share_sum` have been
    given accs and squares, and `tl.debug_barrier` came after.
    """
    if ASM:
        code: tl.constexpr = ROWS_4 if W == 4 else ROWS_8 if W == 8 else ROWS_16
        c = tl.arange(0, W * 32)
        low, high, total = tl.inline_asm_elementwise(
            code, "=f,=f,=f,r,r,r",
            [base + band * (W * 64 + 64) + row * 8, base + BANDS * (W * 64 + 64) + c * 0,
             (c < (COUNT + 31) // 32 * 32).to(tl.int32)],
            dtype=(tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        low = tl.zeros(row.shape, tl.float32)
        high = low
        for b in tl.static_range(len(accs)):
            both = tl.sum(tl.reshape(accs[b], [W, 128]), axis=0)
            low = tl.where(band == b, tl.gather(both, row * 16, 0), low)
            high = tl.where(band == b, tl.gather(both, row * 16 + 2, 0), high)
        total = tl.zeros_like(low) + tl.sum(squares, axis=0) / 128
    return low, high, total


@jit()
def put_shared(base, index, value, ok, ASM: tl.constexpr):
    """Leave float32 values, four of a thread side by side, in shared memory."""
    if ASM:
        tl.inline_asm_elementwise(
            SHARE_FOUR, SHARE_CONSTRAINTS, [value, base + index * 4, ok.to(tl.int32)],
            dtype=tl.int32, is_pure=False, pack=4,
        )  # fmt: skip


@jit()
def four_shared(base, index):
    """Float32 numbers `index`, `index` + 1, ... of shared memory, four of a thread side by side."""
    return tl.inline_asm_elementwise(
        "ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,r,r,r,r", [base + index * 4],
        dtype=tl.float32, is_pure=False, pack=4,
    )  # fmt: skip


@jit()
def poll_to_shared(ptr, to, tag, ASM: tl.constexpr):
    """Two words for each element of ptr, to two float32 of shared memory."""
    if ASM:
        tl.inline_asm_elementwise(
            SHARED,
            "=r,l,r,r",
            [ptr.to(tl.int64), tag + to * 0, to],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@jit()
def shared_float(base, index, word_ptr, ASM: tl.constexpr):
    """Float32 number `index` of shared memory; without ASM the one in the word at word_ptr."""
    if ASM:
        value = tl.inline_asm_elementwise(
            "ld.shared.f32 $0, [$1];", "=f,r", [base + index * 4],
            dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        value = _data(word_ptr, index >= 0).to(tl.float32, bitcast=True)
    return value


@jit()
def poll_attention(att_ptr, lse_ptr, tag, split, e, first_head, NP: tl.constexpr,
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
    values = ()
    logs = ()
    if not ASM:
        for h in tl.static_range(HEADS):
            for a in tl.static_range(SETS):
                at = row + a * 8 * H + h
                ok = split + a * 8 < NP
                log = _data(lse_ptr + at, ok).to(tl.float32, bitcast=True)
                log = tl.where(ok, log, -1.0e30)
                logs = logs + (log,)  # noqa: RUF005
                for i in tl.static_range(WORDS):
                    word = _data(att_ptr + at * (D // 2) + i * 16 + e // 4 % 4 * 4 + e % 4, ok)
                    values = values + (word,)  # noqa: RUF005
    else:
        address = (att_ptr + row * (D // 2) + e // 4 % 4 * 4).to(tl.int64)
        inputs = [address, (lse_ptr + row).to(tl.int64), tag + e * 0, split + e * 0]
        if HEADS * SETS == 1:
            tl.static_assert(WORDS == 4)
            r = tl.inline_asm_elementwise(
                CODE, CONSTRAINTS, inputs,
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.float32), is_pure=False, pack=4,
            )  # fmt: skip
            values = (r[0], r[1], r[2], r[3])
            logs = (r[4],)
        elif HEADS * SETS * WORDS == 4:
            r = tl.inline_asm_elementwise(
                CODE, CONSTRAINTS, inputs,
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.float32, tl.float32),
                is_pure=False, pack=4,
            )  # fmt: skip
            values = (r[0], r[1], r[2], r[3])
            logs = (r[4], r[5])
        elif HEADS * SETS == 2:
            tl.static_assert(WORDS == 4)
            r = tl.inline_asm_elementwise(
                CODE, CONSTRAINTS, inputs,
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32,
                       tl.int32, tl.float32, tl.float32),
                is_pure=False, pack=4,
            )  # fmt: skip
            values = (r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7])
            logs = (r[8], r[9])
        else:
            tl.static_assert(HEADS * SETS == 4 and WORDS == 2)
            r = tl.inline_asm_elementwise(
                CODE, CONSTRAINTS, inputs,
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32,
                       tl.int32, tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=False, pack=4,
            )  # fmt: skip
            values = (r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7])
            logs = (r[8], r[9], r[10], r[11])
    return values, logs


@jit()
def poll_keys(keys_ptr, which, tag, ASM: tl.constexpr):
    """The int64 keys of programs `which`. keys_ptr: words [programs, 2]."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            KEYS, "=r,=r,l,r", [(keys_ptr + which * 2).to(tl.int64), tag + which * 0],
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
            PUT_FLOAT, "=r,l,f,r,r",
            [ptr.to(tl.int64), value, tag + ok.to(tl.int32) * 0, ok.to(tl.int32)],
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
            PUT_HALVES, "=r,l,f,r,r", [ptr.to(tl.int64), value, tag + c * 0, ok.to(tl.int32)],
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
            [ptr.to(tl.int64), value, tag + ok.to(tl.int32) * 0, ok.to(tl.int32)],
            dtype=tl.int32, is_pure=False, pack=4,
        )  # fmt: skip
    else:
        shape: tl.constexpr = [value.shape[0], value.shape[1], value.shape[2] // 2, 2]
        low, high = tl.split(tl.reshape(value, shape))
        both = to_words(low, high)
        both = tl.reshape(tl.join(both, both), value.shape)
        tl.store(ptr, _word(both, tag), mask=ok & (at % 2 == 0))
