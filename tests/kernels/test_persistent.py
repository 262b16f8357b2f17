"""The decode step in one kernel: in Triton's interpreter, part by part, against the torch model."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from albor_serve.config import ModelConfig
from albor_serve.errors import ConfigError
from albor_serve.kernels.persistent import persistent_plan
from albor_serve.kernels.synthetic import RandomModel
from tests.scripts import run_script

_SCRIPT = """
import sys
import torch
from albor_serve.config import ModelConfig
from albor_serve.kernels.decoder import GpuDecoder
from albor_serve.kernels.persistent import PersistentDecoder, persistent_plan
from albor_serve.kernels.synthetic import RandomModel
from albor_serve.model import load_decoder

layers, given = int(sys.argv[1]), int(sys.argv[2])
config = ModelConfig(
    "qwen3", 64, 128, 128, layers, 2, 1, 64, 64, qk_norm=layers > 1, tie_embeddings=True
)
model = RandomModel(config)
decoder = GpuDecoder(model.pack("cpu", 64), 64)
plan = persistent_plan(decoder.weights, num_programs=16, num_warps=4, num_parts=4)
persistent = PersistentDecoder(decoder, plan)
reference = load_decoder(config, model.read)

def logits(tokens):
    with torch.inference_mode():
        return reference(torch.tensor([tokens]))[0]

tokens = [3, 9][:given]
for at, token in enumerate(tokens):
    decoder.tokens[0] = token
    decoder.position.fill_(at)
    persistent.run()
    want = logits(tokens[: at + 1])[-1]
    error = (decoder.logits[0] - want).abs().max().item()
    assert error < 0.01, (at, error)  # fp16 activations; the logits reach 4
    best = 0xFFFFFF - (int(decoder.best[0, 0]) & 0xFFFFFF)
    assert best == int(decoder.logits[0].argmax()), at
persistent.run(given, feedback=True)
assert int(decoder.position) == 2 * given - 1
tokens += decoder.out_tokens[given : 2 * given].tolist()
want = logits(tokens)
assert tokens[given:] == want[given - 1 : -1].argmax(1).tolist()
assert (decoder.logits[0] - want[-1]).abs().max().item() < 0.01
"""


@pytest.mark.parametrize(("layers", "given"), [(1, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_tokens_given_and_fed_back_have_the_logits_of_the_reference(
    layers: int, given: int
) -> None:
    run_script(_SCRIPT, str(layers), str(given))


def _weights(**changes: int) -> object:
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_heads": 4, "num_kv_heads": 2}
    shape |= changes
    config = ModelConfig(
        "llama", 64, shape["hidden_size"], shape["intermediate_size"], 1, shape["num_heads"],
        shape["num_kv_heads"], 64, 64, tie_embeddings=True,
    )  # fmt: skip
    return RandomModel(config).pack("cpu", 64)


def test_bands_of_gate_and_up_are_shared_out_without_a_rest() -> None:
    weights = _weights(intermediate_size=24 * 128)
    for num_programs in (100, 127, 132, 200):
        plan = persistent_plan(weights, num_programs=num_programs)  # type: ignore[arg-type]
        assert (24 * 16) % plan.bands_gate_up == 0
        assert 24 * 16 // plan.bands_gate_up <= num_programs


@pytest.mark.parametrize(
    ("num_programs", "changes", "reason"),
    [
        (15, {}, "programs"),
        (132, {"hidden_size": 1152, "num_heads": 18, "num_kv_heads": 18}, "programs"),
        (132, {"hidden_size": 1152}, "does not divide"),
        (400, {"intermediate_size": 33 * 128}, "more than"),
        (100, {"intermediate_size": 32 * 128}, "bands a program"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_with_the_reason(
    num_programs: int, changes: dict[str, int], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        persistent_plan(_weights(**changes), num_programs=num_programs)  # type: ignore[arg-type]


def test_positions_are_cut_into_no_more_parts_than_one_reader_takes() -> None:
    with pytest.raises(ConfigError, match="15"):
        persistent_plan(_weights(), num_parts=64)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="splits of 2 heads"):
        persistent_plan(_weights(num_heads=2), num_programs=24, num_parts=96)  # type: ignore[arg-type]
