from __future__ import annotations

from pathlib import Path

import pytest

from albor_train.cli import main
from tests.train.fixtures_train import write_tiny_spec


def test_plan_prints_and_ends_with_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(write_tiny_spec(tmp_path))]) == 0
    assert "tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "missing.yaml"],
        ["report", "missing", "out.html"],
        ["export", "missing", "--out", "model"],
        ["train", "SPEC", "--tokens", "missing", "--out", "run", "--device", "cpu"],
        ["train", "SPEC", "--tokens", ".", "--out", "run", "--device", "cpu"],
    ],
)
def test_errors_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
) -> None:
    spec = write_tiny_spec(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main([str(spec) if a == "SPEC" else a for a in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("albor-train: ")
    assert error.count("\n") == 1


def test_the_whole_path_of_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = str(write_tiny_spec(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["data", spec, "--jobs", "1"]) == 0
    tokens = capsys.readouterr().out.split()[-1]
    train = ["train", spec, "--tokens", tokens, "--out", "run", "--device", "cpu", "--jobs", "1"]
    assert main([*train, "--stop-after", "7"]) == 0
    assert main(train) == 0
    assert main(["report", "run", "report.html"]) == 0
    last = "run/checkpoints/step-000020"
    assert main(["export", "run/checkpoints/step-000010", last, "--out", "albor-x"]) == 0
    assert main(["export", last, "--out", "albor-y", "--quant", "q4_0"]) == 0
    assert (tmp_path / "albor-y/albor-y-q4_0.gguf").stat().st_size > 10_000
    assert (tmp_path / "albor-x/model.safetensors").exists()
    assert main(["export", last, "--out", "albor-x"]) == 1


def test_an_exported_model_is_known_as_suffix_first(tmp_path: Path) -> None:
    from albor_serve.checkpoint import open_gguf_header

    spec = str(write_tiny_spec(tmp_path))
    work = str(tmp_path / "work")
    assert main(["data", spec, "--jobs", "1", "--work", work]) == 0
    tokens = str(next((tmp_path / "work").glob("tokens-*")))
    run, out = str(tmp_path / "run"), tmp_path / "model"
    arguments = ["--tokens", tokens, "--out", run, "--device", "cpu", "--work", work]
    assert main(["train", spec, *arguments, "--stop-after", "1", "--jobs", "1"]) == 0
    checkpoint = f"{run}/checkpoints/step-000001"
    assert main(["export", checkpoint, "--out", str(out), "--quant", "f16"]) == 0
    header = open_gguf_header(out / "model-f16.gguf")
    assert header.metadata["albor.fim.layout"] == "spm"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_reproduce_tiny(tmp_path: Path) -> None:
    spec = Path(__file__).parents[2] / "specs/stdlib.yaml"
    assert main(["reproduce", str(spec), "--tiny", "--work", str(tmp_path), "--jobs", "2"]) == 0
