"""albor-bench replay end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from albor_serve.bench.cli import main


@pytest.fixture(autouse=True)
def _small_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("albor_serve.bench.machine.DRAM_BYTES", 1 << 26)


def test_a_tiny_live_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["replay", "--client", "albor-eager", "--scenes", "1", "--fast", "--threads", "1"]
    assert main([*arguments, "--json", str(out), "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert "keystrokes saved" in printed
    assert "idle pauses skipped" in printed
    figures = json.loads(out.read_text())
    [client] = figures["clients"]
    assert client["num_requests"] > 0
    assert client["num_keys"] > 0
    assert client["server_cpu_s"] > 0
    assert client["cancel_to_idle_ms"] is not None
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--client", "nobody"], "no such client: nobody"),
        (["--client", "albor-plain", "--scenes", "0"], "--scenes must be at least 1"),
        (["--variant", "x=1", "--lsp", "true"], "write NAME={...}"),
        (["--data", "/no/such/file", "--client", "albor-plain"], "rebuild them"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
