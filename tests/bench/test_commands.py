"""albor-bench cancel, load and infill as they are typed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from albor_serve.bench import cli
from albor_serve.bench.cli import main
from albor_serve.bench.shapes import shape_gguf
from albor_serve.config import ModelConfig
from tests.api.live import serving_tiny, tiny_gguf


@pytest.fixture(autouse=True)
def _small_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("albor_serve.bench.machine.DRAM_BYTES", 1 << 26)


def test_cancel_times_both_phases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig("llama", 512, 64, 128, 2, 4, 2, 16, 1024, tie_embeddings=True)
    model = shape_gguf("tiny", config, tmp_path)
    arguments = ["cancel", str(model), "--rounds", "2", "--prompt-len", "300", "--threads", "1"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    rows = [line.split("│") for line in printed.splitlines() if line.startswith("│")]
    assert [row[1].strip() for row in rows] == ["prefill", "decode"]
    for _, _, rounds, p50, p99, most, *_ in rows:
        assert int(rounds) == 2
        assert 0 <= float(p50) <= float(p99) <= float(most) < 5000
    assert "one decode step of this model here takes" in printed


def test_load_counts_what_each_server_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    with serving_tiny(tmp_path, num_slots=2) as live:
        arguments = ["load", f"albor={live.url}#{os.getpid()}", f"other={live.url}"]
        arguments += ["--clients", "2", "--seconds", "0.5", "--rounds", "1", "--new", "4"]
        assert main([*arguments, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "2 clients" in printed
    figures = json.loads(out.read_text())
    assert set(figures["servers"]) == {"albor", "other"}
    assert figures["settings"]["num_clients"] == 2
    assert figures["command"].startswith("albor-bench load 'albor=")
    for tally in figures["servers"].values():
        assert tally["first_token_ms"]
        assert tally["num_tokens"] > 0
        assert tally["num_lost"] == 0
    assert figures["servers"]["albor"]["rss_mib"][0] > 10
    assert figures["servers"]["other"]["rss_mib"] == []


@pytest.mark.parametrize("server", ["albor", "albor=ftp://x", "http://x:1", "a=http://x:1#me"])
def test_servers_are_named_with_their_address(
    server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["load", server]) == 2
    error = capsys.readouterr().err
    assert f"{server} is not NAME=URL" in error
    assert error.count("\n") == 1


def test_infill_puts_another_file_before_the_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "def f(x):\n", "suffix": "\n", "canonical_solution": "    return x\n"}
    data, extra = tmp_path / "data.jsonl", tmp_path / "other.py"
    data.write_text(json.dumps(row))
    extra.write_text("def g(x):\n    return x\n")
    arguments = ["infill", str(tiny_gguf(tmp_path)), "--data", str(data), "--path", "a.py"]
    assert main([*arguments, "--extra", str(extra)]) == 0
    assert "exact match" in capsys.readouterr().out
    for broken, reason in ((tmp_path / "none.py", "FileNotFoundError"), (tmp_path, "IsADirectory")):
        assert main([*arguments, "--extra", str(broken)]) == 2
        error = capsys.readouterr().err
        assert f"can't be read as text ({reason}" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--prompt-len", "8"]])
def test_cancel_refuses_what_it_cannot_time(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cancel", *arguments]) == 2
    assert "--rounds must be at least 1 and --prompt-len at least 16" in capsys.readouterr().err


def test_ctrl_c_ends_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_cancel", interrupt)
    assert main(["cancel"]) == 130
    assert capsys.readouterr().err == ""


def test_without_a_model_the_embedded_one_and_two_shapes_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[str] = []

    def shape(name: str) -> Path:
        made.append(name)
        return tmp_path / name

    measured: list[tuple[str, str]] = []

    class Enough(Exception):  # noqa: N818 - no error
        """What was to be measured is known."""

    def measure(path: Path, name: str, *_: object) -> None:
        measured.append((name, path.name))
        if len(measured) == 3:
            raise Enough

    monkeypatch.setattr("albor_serve.bench.shapes.shape_gguf", shape)
    monkeypatch.setattr("albor_serve.bench.decode.measure_model", measure)
    with pytest.raises(Enough):
        main(["decode", "--peers", "none"])
    assert measured == [
        ("albor-33m", "albor-33m-q4_0.gguf"),
        ("125m", "125m"),
        ("350m", "350m"),
    ]
