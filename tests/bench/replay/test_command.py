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


def test_clients_take_turns_scene_by_scene(tmp_path: Path) -> None:
    path = tmp_path / "replay.json"
    clients = ["--client", "albor-plain", "--client", "albor-eager"]
    assert main(["replay", "--scenes", "2", "--interleave", *clients, "--json", str(path)]) == 0
    results = json.loads(path.read_text())["clients"]
    assert [client["client"] for client in results] == ["albor-plain", "albor-eager"]
    for client in results:
        assert client["num_keys"] > 0
        assert client["server_cpu_s"] > 0


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


def _measured(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[str]:
    """The names of the clients that would be replayed."""
    names: list[str] = []

    class Enough(Exception):  # noqa: N818 - no error
        """All are known."""

    def replay(group: list[str], *_: object) -> list[object]:
        names.extend(group)
        return []

    def stop(*_: object) -> None:
        raise Enough

    monkeypatch.setattr("albor_serve.bench.replay.run.replay_clients", replay)
    monkeypatch.setattr("albor_serve.bench.replay.report.print_replay", stop)
    with pytest.raises(Enough):
        main(["replay", "--scenes", "1", *arguments])
    return names


def test_all_clients_that_can_run_are_replayed_and_the_others_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = ["albor", "albor-eager", "albor-eager-nodrafts", "albor-plain"]
    monkeypatch.setattr("albor_serve.bench.peers.available_peers", lambda: ("llama-server",))
    assert _measured(monkeypatch, "--lsp", "true") == [*ours, "llama-vim", "llama-plain"]
    assert "left out" not in capsys.readouterr().err
    monkeypatch.setattr("albor_serve.bench.peers.available_peers", lambda: ())
    assert _measured(monkeypatch) == ours
    error = capsys.readouterr().err
    assert "left out: llama-vim; pip install" in error
    assert "left out: llama-plain" in error
    assert _measured(monkeypatch, "--llama-server", "/bin/true")[-1] == "llama-plain"
    chosen = ["--client", "albor-plain", "--client", "albor", "--client", "albor-plain"]
    assert _measured(monkeypatch, *chosen) == ["albor-plain", "albor"]
    variant = ["--client", "albor-plain", "--variant", 'quick={"debounceMs": 0}']
    assert _measured(monkeypatch, *variant) == ["albor-plain", "quick"]


def test_what_is_not_installed_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("albor_serve.bench.peers.available_peers", lambda: ())
    assert main(["replay", "--client", "llama-vim"]) == 2
    assert "the client llama-vim can't run: pip install" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert main(["replay", "--client", "albor"]) == 2
    assert "the client albor can't run: install albor with its" in capsys.readouterr().err
    assert main(["replay", "--variant", "x={}"]) == 2
    assert "--variant needs the language server" in capsys.readouterr().err
