"""What makes Triton's interpreter quick enough for the default tests; import it before a kernel.

Imported by programs that run with TRITON_INTERPRET=1 (`tests.scripts`), not by tests.
"""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import numpy.typing as npt
from triton.runtime import interpreter

from albor_serve.kernels import core
from albor_serve.kernels._triton import jit, tl

TRITON_TWIN = core._mma_twin
"""The product of one tile as the kernels write it out; `mma_product` takes its place below."""


@jit()
def twin_kernel(w0_ptr, w1_ptr, s_ptr, x_ptr, out_ptr, W: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Add `TRITON_TWIN` of one tile for each warp to out [128 W]."""
    e = tl.arange(0, W * 128)
    xs = (
        tl.load(x_ptr + e),
        tl.load(x_ptr + W * 128 + e),
        tl.load(x_ptr + 2 * W * 128 + e),
        tl.load(x_ptr + 3 * W * 128 + e),
    )
    w0, w1, s = tl.load(w0_ptr + e), tl.load(w1_ptr + e), tl.load(s_ptr + e)
    tl.store(out_ptr + e, TRITON_TWIN(w0, w1, s, xs, tl.load(out_ptr + e), W))


Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.int32]


def mma_product(w0: Words, w1: Words, s: Words, xs: list[Words], num_warps: int) -> Floats:
    """What a tile times activations gives, by numpy: float32 [128 · num_warps]."""
    tile = (num_warps, 8, 4)  # warp, row, lane
    words = np.concatenate([w0.reshape(*tile, 4), w1.reshape(*tile, 4)], axis=-1)
    shifts = np.array([0, 16, 8, 24])
    nibbles = words[..., None].view(np.uint32) >> shifts.astype(np.uint32)
    pairs = s.reshape(*tile, 4).view(np.float16).astype(np.float32).reshape(*tile, 4, 2)
    scales = np.repeat(pairs, 2, axis=3)  # one for two steps of four columns
    # Of token, lane and pair of steps: eight float16 side by side.
    x = np.stack([each.reshape(num_warps, 8, 4, 4).view(np.float16) for each in xs], axis=3)
    x = x.astype(np.float32).reshape(num_warps, 8, 4, 8, 4)

    def times_x(values: npt.NDArray[Any], scale: Floats) -> Floats:
        weights = (values.astype(np.float32) - 8) * scale[..., None]
        return np.einsum("wrlsc,wtlsc->wrt", weights, x).reshape(num_warps, 8, 4, 2)

    low = times_x(nibbles & 15, scales[..., 0])
    high = times_x(nibbles >> 4 & 15, scales[..., 1]) * 16
    return np.stack([low, high], axis=3).reshape(-1).astype(np.float32)


def _twin(w0: Any, w1: Any, s: Any, xs: Any, acc: Any, W: int) -> Any:  # noqa: N803
    data = mma_product(*(t.handle.data for t in (w0, w1, s)), [x.handle.data for x in xs], int(W))
    handle = interpreter.TensorHandle(acc.handle.data + data, acc.dtype.scalar)
    return tl.core.tensor(handle, acc.type)


# The interpreter patches the language anew for each call of a device function. Once is enough.
interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
interpreter._patch_lang = lambda _function: interpreter._LangPatchScope()
core._mma_twin = _twin
