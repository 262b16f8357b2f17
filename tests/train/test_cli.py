from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

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
    capsys.readouterr()
    tokenizer = str(tmp_path / "albor-y" / "tokenizer.json")
    assert main(["tokenizers", spec, tokenizer, "--jobs", "1"]) == 0
    heading, _, row = capsys.readouterr().out.splitlines()
    assert heading == "| tokenizer | all | beta |"
    name, everything, beta = row.strip("| ").split(" | ")
    assert name == "albor-y"
    assert everything == beta
    assert 1.0 < float(beta) < 10.0
    arguments = ["--benchmarks", "--out", "results", "--jobs", "1"]
    few = yaml.safe_load(Path(spec).read_text())
    few["evaluate"] = {**few.get("evaluate", {}), "fim_examples": 4}
    Path(spec).write_text(yaml.safe_dump(few))
    assert main(["eval", spec, last, *arguments]) == 0
    assert "step-000020" in capsys.readouterr().out
    assert any((tmp_path / "results").rglob("*.json"))


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


def test_pinning_keeps_what_was_pinned_and_tells_what_was_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from albor_train import sources
    from albor_train.errors import DataError
    from albor_train.sources import Package, read_lock

    def pin(name: str, version: str, cache: Path) -> Package:
        if name == "copyleft":
            raise DataError("copyleft: licence 'GPL' is not known to be permissive")
        version = version or "2.0"
        return Package(name, version, f"{name}-{version}-py3-none-any.whl", "0" * 64, "MIT")

    monkeypatch.setattr(sources, "pin", pin)
    lock = tmp_path / "lock.yaml"
    pins = ["--lock", str(lock), "--work", str(tmp_path)]
    assert main(["pin", "demo==1.0", *pins]) == 0
    assert main(["pin", "copyleft", "other", *pins]) == 1
    assert "refused: copyleft: licence 'GPL'" in capsys.readouterr().err
    assert main(["pin", "demo", *pins]) == 0
    assert {p.name: p.version for p in read_lock(lock)} == {"demo": "2.0", "other": "2.0"}


def test_bench_writes_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec, out = str(write_tiny_spec(tmp_path)), tmp_path / "rows.json"
    arguments = ["bench", spec, "--device", "cpu", "--steps", "1", "--variants", "plain"]
    assert main([*arguments, "--json", str(out)]) == 0
    assert "plain" in capsys.readouterr().out
    saved = json.loads(out.read_text())
    assert saved["spec"] == "tiny"
    assert [row["variant"] for row in saved["rows"]] == ["plain"]
    assert main(["bench", spec, "--device", "cpu", "--profile", "plain"]) == 0
    assert "aten::" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["1e6", "a:b", "1e6:1e9:1e9:1"])
def test_a_target_that_is_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    path = tmp_path / "points.json"
    path.write_text('{"points": []}')
    assert main(["scaling", str(path), "--predict", target]) == 1
    error = capsys.readouterr().err
    assert error.startswith("albor-train: ")
    assert error.count("\n") == 1


def test_ctrl_c_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("albor_train.plan.plan_lines", interrupt)
    assert main(["plan", str(write_tiny_spec(tmp_path))]) == 130
    assert capsys.readouterr().err == "albor-train: stopped\n"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_reproduce_tiny(tmp_path: Path) -> None:
    spec = Path(__file__).parents[2] / "specs/stdlib.yaml"
    assert main(["reproduce", str(spec), "--tiny", "--work", str(tmp_path), "--jobs", "2"]) == 0
