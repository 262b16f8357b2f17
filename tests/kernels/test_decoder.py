"""Decode steps, in Triton's interpreter, against the plain torch model in fp32."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from albor_serve.config import ModelConfig
from albor_serve.errors import ConfigError
from albor_serve.kernels.decoder import GpuDecoder, plan_for
from albor_serve.kernels.synthetic import RandomModel
from tests.scripts import run_script

_SCRIPT = """
import torch
from albor_serve.config import ModelConfig
from albor_serve.kernels.decoder import GpuDecoder, plan_for
from albor_serve.kernels.synthetic import RandomModel
from albor_serve.model import load_decoder

config = ModelConfig("qwen3", 64, 128, 128, 2, 2, 1, 64, 64, qk_norm=True, tie_embeddings=True)
model = RandomModel(config)
decoder = GpuDecoder(model.pack("cpu", 64), 64)
tokens = [3, 9, 60, 1]
with torch.inference_mode():
    want = load_decoder(config, model.read)(torch.tensor([tokens]))[0]
at = 0
for rows in (1, 3):  # one token, then three verified at once
    plan = plan_for(decoder.weights, num_tokens=rows, num_parts=2)
    decoder.tokens[:rows] = torch.tensor(tokens[at : at + rows])
    decoder.position.fill_(at)
    decoder.step(plan)
    error = (decoder.logits[:rows] - want[at : at + rows]).abs().max().item()
    assert error < 0.01, (rows, error)  # fp16 activations; the logits reach 4
    at += rows
"""


def test_logits_of_one_and_of_three_tokens_are_those_of_the_reference() -> None:
    run_script(_SCRIPT)


def test_gate_and_up_bands_are_shared_out_without_a_rest() -> None:
    config = ModelConfig("llama", 64, 128, 24 * 8 * 128, 1, 2, 1, 64, 64, tie_embeddings=True)
    weights = RandomModel(config).pack("cpu", 64)
    for num_programs in (3, 24, 100, 127):
        plan = plan_for(weights, num_programs=num_programs)
        assert (24 * 128) % plan.bands_gate_up == 0


def test_a_plan_that_cuts_positions_into_too_many_parts_is_refused() -> None:
    config = ModelConfig("llama", 64, 128, 128, 1, 2, 1, 64, 64, tie_embeddings=True)
    decoder = GpuDecoder(RandomModel(config).pack("cpu", 64), 64)
    with pytest.raises(ConfigError, match="parts"):
        list(decoder.launches(plan_for(decoder.weights, num_parts=128)))
