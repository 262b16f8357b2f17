"""calibration.py: the moments are those of the inputs, and quantization gains by them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from albor_serve.calibration import folder_moments, input_moments
from albor_serve.checkpoint import open_checkpoint
from albor_serve.checkpoint.writer import write_gguf
from albor_serve.errors import CheckpointError, ConfigError
from tests.fixtures_checkpoint import save_tiny_model

torch = pytest.importorskip("torch")


def test_moments_are_those_of_the_inputs(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, "qwen3")
    windows = [[5, 9, 300, 2], [], [7, 7, 11]]
    steps: list[tuple[int, int]] = []
    moments = input_moments(model, windows, lambda *step: steps.append(step))
    assert steps[-1] == (3, 3)
    states = []
    with torch.no_grad():
        for window in windows:
            if window:
                output = model.model(torch.tensor([window]))
                states.append(output.last_hidden_state[0])
    final = torch.cat(states).double().numpy()
    expected = final.T @ final / len(final)
    head = moments["model.embed_tokens.weight"]  # the tied head, under the embedding's name
    np.testing.assert_allclose(head, expected, rtol=1e-4, atol=1e-5)
    prefix = "model.layers.1"
    assert (
        moments[f"{prefix}.self_attn.q_proj.weight"] is moments[f"{prefix}.self_attn.v_proj.weight"]
    )
    assert moments[f"{prefix}.mlp.down_proj.weight"].shape == (96, 96)
    assert not model._forward_pre_hooks
    assert all(not module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ConfigError):
        input_moments(model, [[], []])


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])  # untied and tied head
def test_albors_own_decoder_gives_the_same_moments(architecture: str, tmp_path: Path) -> None:
    from albor_serve.model import load_decoder

    theirs = input_moments(save_tiny_model(tmp_path, architecture), [[5, 9, 300, 2], [7, 7, 11]])
    checkpoint = open_checkpoint(tmp_path)
    decoder = load_decoder(checkpoint.config, checkpoint.read)
    ours = input_moments(decoder, [[5, 9, 300, 2], [7, 7, 11]])
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        np.testing.assert_allclose(ours[name], expected, rtol=1e-3, atol=1e-4)


def test_a_folder_is_calibrated_on_the_beginnings_of_texts(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, "qwen2")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = ["def main(argv):\n" * 200, "class Node:\n    pass\n", "never reached"]
    windows = [tokenizer.encode(text).ids[:512] for text in texts[:2]]
    expected = input_moments(model, windows)
    found = folder_moments(tmp_path, texts, max_tokens=513)
    name = "model.layers.0.mlp.down_proj.weight"
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-4)
    with pytest.raises(ConfigError):
        folder_moments(tmp_path, [])
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer"):
        folder_moments(tmp_path, texts)


def test_calibrated_files_are_closer_to_the_model(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, "llama")
    rng = np.random.default_rng(0)
    windows = [rng.integers(0, 416, 128).tolist() for _ in range(8)]
    moments = input_moments(model, windows)
    fresh = torch.tensor([rng.integers(0, 416, 128).tolist()])
    source = open_checkpoint(tmp_path)

    def distance(importance: dict[str, np.ndarray] | None) -> float:
        out = tmp_path / "out.gguf"
        write_gguf(source, tmp_path / "tokenizer.json", out, "q4_0", importance=importance)
        copy = open_checkpoint(out)
        state = {name: torch.from_numpy(copy.read(name)) for name in copy.tensor_names}
        with torch.no_grad():
            before = model(fresh).logits
            saved = {name: value.clone() for name, value in model.state_dict().items()}
            model.load_state_dict(state)
            after = model(fresh).logits
            model.load_state_dict(saved)
        return float(((after - before) ** 2).mean())

    # Random weights see nearly uncorrelated inputs, so little is to be gained here.
    assert distance(moments) < distance(None)
