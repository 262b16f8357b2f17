"""quant.py: layouts against the gguf package, and the quality of Q4_0 scales."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from albor_serve import quant
from albor_serve.errors import AlborError, CheckpointFormatError, UnsupportedModelError

_KINDS = gguf.GGMLQuantizationType


def _errors(weights: np.ndarray, decoded: np.ndarray, h: np.ndarray | None = None) -> np.ndarray:
    """Weighted squared error of each group of 32, in float64."""
    square = (decoded.astype(np.float64) - weights) ** 2
    if h is not None:
        square = square * h
    return square.reshape(-1, 32).sum(axis=1)


def _optimal_error(group: np.ndarray) -> float:
    """Least squared error of one group over every real scale, by sweeping all breakpoints."""
    best = 0.0
    for sign in (1, -1):
        x = sign * group
        ratios = (np.arange(-8, 7) + 0.5)[:, None] / x[None, x != 0]
        edges = np.sort(ratios[ratios > 0])
        middles = np.concatenate([edges[:1] / 2, (edges[1:] + edges[:-1]) / 2, edges[-1:] * 1.1])
        codes = np.clip(np.rint(x[None] * middles[:, None]), -8, 7)
        square = (codes**2).sum(axis=1)
        gain = (codes * x).sum(axis=1) ** 2 / np.maximum(square, 1e-30)
        best = max(best, float(gain.max()))
    return float((group**2).sum() - best)


@pytest.mark.parametrize("name", sorted(quant.FORMATS))
def test_decodes_random_bytes_as_the_gguf_package_does(name: str) -> None:
    rng = np.random.default_rng(3)
    shape = (5, 1024)
    size = quant.num_bytes(name, shape)
    data = rng.integers(0, 256, (5, size // 5), dtype=np.uint8)
    with np.errstate(all="ignore"):
        ours = quant.dequantize(data, name, shape)
        theirs = quants.dequantize(data, _KINDS[name])
    assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def test_q4_0_golden_bytes() -> None:
    weights = (np.arange(32, dtype=np.float32) % 16 - 8) * 0.5
    weights = np.concatenate([weights, np.zeros(32, dtype=np.float32)])[None]
    packed = quant.quantize_q4_0(weights)
    nibbles = bytes(value | value << 4 for value in range(16))
    zeros = bytes([0, 0] + [0x88] * 16)
    assert packed.tobytes() == np.float16(0.5).tobytes() + nibbles + zeros


def test_q4_0_puts_low_nibbles_first() -> None:
    weights = np.zeros((1, 32), dtype=np.float32)
    weights[0, 0], weights[0, 16], weights[0, 31] = -8, 7, -3
    packed = quant.quantize_q4_0(weights)
    assert packed[0, :2].tobytes() == np.float16(1).tobytes()
    assert packed[0, 2] == 0x0 | 0xF << 4
    assert packed[0, 17] == 0x8 | 0x5 << 4


def test_q8_0_golden_bytes() -> None:
    weights = np.linspace(-127, 127, 32, dtype=np.float32)[None]
    packed = quant.quantize_q8_0(weights)
    assert packed[0, :2].tobytes() == np.float16(1).tobytes()
    assert packed[0, 2:].view(np.int8).tolist() == np.rint(weights[0]).astype(int).tolist()


@pytest.mark.parametrize("draw", ["normal", "laplace", "outlier", "onesided", "tiny", "huge"])
def test_q4_0_is_never_worse_than_the_reference_in_any_group(draw: str) -> None:
    rng = np.random.default_rng(11)
    weights = rng.normal(size=(64, 256)).astype(np.float32)
    if draw == "laplace":
        weights = rng.laplace(size=weights.shape).astype(np.float32)
    elif draw == "outlier":
        weights[:, ::32] *= 20
    elif draw == "onesided":
        weights = np.abs(weights)
    elif draw == "tiny":
        weights *= np.float32(3e-7)  # scales are subnormal in fp16
    elif draw == "huge":
        weights *= np.float32(1e4)
    theirs = quants.dequantize(quants.quantize(weights, _KINDS.Q4_0), _KINDS.Q4_0)
    ours = quant.dequantize_q4_0(quant.quantize_q4_0(weights))
    reference = _errors(weights, theirs)
    assert (_errors(weights, ours) <= reference * (1 + 1e-5)).all()
    assert _errors(weights, ours).sum() < reference.sum()


def test_q4_0_is_close_to_the_best_scale_there_is() -> None:
    rng = np.random.default_rng(5)
    weights = rng.normal(size=(1, 32 * 60)).astype(np.float32)
    ours = _errors(weights, quant.dequantize_q4_0(quant.quantize_q4_0(weights))).sum()
    best = sum(_optimal_error(group) for group in weights.astype(np.float64).reshape(-1, 32))
    assert ours <= best * 1.02


def test_importance_moves_the_error_to_where_it_matters_less() -> None:
    rng = np.random.default_rng(2)
    weights = rng.normal(size=(128, 128)).astype(np.float32)
    importance = rng.lognormal(sigma=1.5, size=128).astype(np.float32)
    plain = quant.dequantize_q4_0(quant.quantize_q4_0(weights))
    aware = quant.dequantize_q4_0(quant.quantize_q4_0(weights, importance))
    assert (
        _errors(weights, aware, importance).sum() < 0.9 * _errors(weights, plain, importance).sum()
    )
    theirs = quants.dequantize(quants.quantize(weights, _KINDS.Q4_0), _KINDS.Q4_0)
    assert (
        _errors(weights, aware, importance + 1e-3 * importance.mean())
        <= _errors(weights, theirs, importance + 1e-3 * importance.mean()) * (1 + 1e-5)
    ).all()


def test_calibration_lowers_the_error_of_the_outputs_on_new_inputs() -> None:
    rng = np.random.default_rng(9)
    weights = rng.normal(size=(300, 128)).astype(np.float32)
    mixing = (rng.normal(size=(128, 128)) / 4 + np.eye(128)) * rng.lognormal(size=128)
    seen, fresh = (rng.normal(size=(2000, 128)) @ mixing for _ in range(2))
    moments = seen.T @ seen / len(seen)

    def output_error(packed: np.ndarray) -> float:
        change = quant.dequantize_q4_0(packed) - weights
        return float(((fresh @ change.T) ** 2).mean())

    plain = output_error(quant.quantize_q4_0(weights))
    weighted = output_error(quant.quantize_q4_0(weights, np.diag(moments).astype(np.float32)))
    calibrated = output_error(quant.quantize_q4_0_calibrated(weights, moments))
    assert weighted < 0.95 * plain
    assert calibrated < 0.7 * weighted


def test_calibration_with_uncorrelated_inputs_changes_nothing() -> None:
    weights = np.random.default_rng(4).normal(size=(20, 96)).astype(np.float32)
    calibrated = quant.quantize_q4_0_calibrated(weights, np.eye(96))
    assert np.array_equal(calibrated, quant.quantize_q4_0(weights))


@pytest.mark.parametrize(
    "bad", [np.zeros((64, 64)), np.full((64, 64), np.nan), np.eye(32), -np.eye(64), np.ones(64)]
)
def test_refuses_bad_moments(bad: np.ndarray) -> None:
    with pytest.raises(AlborError):
        quant.quantize_q4_0_calibrated(np.ones((2, 64), dtype=np.float32), bad)


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.sampled_from([32, 64, 96])),
        elements=st.floats(-65504, 65504, width=32),
    )
)
def test_q4_0_round_trip_is_bounded_and_read_alike_by_gguf(weights: np.ndarray) -> None:
    packed = quant.quantize_q4_0(weights)
    decoded = quant.dequantize_q4_0(packed)
    assert np.array_equal(decoded, quants.dequantize(packed, _KINDS.Q4_0))
    norm = np.sqrt((weights.astype(np.float64) ** 2).reshape(-1, 32).sum(axis=1))
    assert (np.sqrt(_errors(weights, decoded)) <= norm * 0.5 + 1e-6).all()


def test_threads_and_dtype_do_not_change_the_bytes() -> None:
    weights = np.random.default_rng(1).normal(size=(300, 512)).astype(np.float16)
    once = quant.quantize_q4_0(weights, num_threads=1)
    assert np.array_equal(once, quant.quantize_q4_0(weights.astype(np.float64), num_threads=4))


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        (np.full((1, 32), np.nan, dtype=np.float32), CheckpointFormatError),
        (np.full((1, 32), np.inf, dtype=np.float32), CheckpointFormatError),
        (np.full((1, 32), 1e9, dtype=np.float32), CheckpointFormatError),
        (np.zeros((1, 33), dtype=np.float32), UnsupportedModelError),
        (np.zeros(32, dtype=np.float32), UnsupportedModelError),
        (np.zeros((1, 32), dtype=np.int32), UnsupportedModelError),
    ],
)
def test_refuses_what_cannot_be_quantized(weights: np.ndarray, error: type[AlborError]) -> None:
    for quantize in (quant.quantize_q4_0, quant.quantize_q8_0):
        with pytest.raises(error):
            quantize(weights)


@pytest.mark.parametrize("bad", [np.zeros(64), -np.ones(64), np.full(64, np.nan), np.ones(32)])
def test_refuses_bad_importance(bad: np.ndarray) -> None:
    with pytest.raises(AlborError):
        quant.quantize_q4_0(np.ones((2, 64), dtype=np.float32), bad.astype(np.float32))


def test_refuses_wrong_sizes_and_unknown_formats() -> None:
    with pytest.raises(CheckpointFormatError, match="needs 18 bytes"):
        quant.dequantize(np.zeros(17, dtype=np.uint8), "Q4_0", (1, 32))
    with pytest.raises(UnsupportedModelError, match="IQ1_S"):
        quant.dequantize(np.zeros(50, dtype=np.uint8), "IQ1_S", (1, 256))
    with pytest.raises(UnsupportedModelError, match="multiple of 256"):
        quant.num_bytes("Q4_K", (4, 32))
