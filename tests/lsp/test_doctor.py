"""albor doctor names what is wrong, and what to do."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from albor_lsp import albor_cli, doctor
from albor_lsp.doctor import Finding, examine

from tests.lsp.test_setup import machine, program

__all__ = ["machine"]


class _Models(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"data": [{"id": "some-model", "owned_by": "someone"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def other_server() -> Iterator[int]:
    """A server of models that is not albor's; its port."""
    server = HTTPServer(("127.0.0.1", 0), _Models)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _nobody_else(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DEFAULT_PORT", 9)
    for name in ("ALBOR_SERVER_URL", "ALBOR_LSP_SETTINGS", "ALBOR_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def found(start: str) -> Finding:
    [finding] = [each for each in examine(attempt=False) if each.what.startswith(start)]
    return finding


def write_settings(machine: Path, text: str) -> None:
    path = machine / ".config" / "albor" / "lsp.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)


def test_a_missing_language_server_is_bad(machine: Path) -> None:
    finding = found("language server:")
    assert finding.verdict == "bad"
    assert finding.remedy
    program(machine.parent / "bin", "albor-lsp")
    assert found("language server:").verdict == "ok"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "can't be read"),
        ('{"maxTokens": "many"}', "must be a number"),
        ('{"x": 1}', "unknown"),
    ],
)
def test_wrong_settings_are_named(machine: Path, text: str, part: str) -> None:
    write_settings(machine, text)
    finding = found("settings:")
    assert finding.verdict == "bad"
    assert part in finding.what
    assert "lsp.json" in finding.remedy


def test_a_server_that_is_named_but_down_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALBOR_SERVER_URL", "http://127.0.0.1:9")
    assert found("server:").verdict == "bad"
    monkeypatch.setenv("ALBOR_SERVER_URL", "nonsense://x")
    assert found("server:").verdict == "bad"


def test_a_server_that_is_named_and_up_is_good(
    monkeypatch: pytest.MonkeyPatch, other_server: int
) -> None:
    monkeypatch.setenv("ALBOR_SERVER_URL", f"http://127.0.0.1:{other_server}")
    finding = found("server:")
    assert finding.verdict == "ok"
    assert "some-model" in finding.what


def test_a_usual_port_that_another_program_has_is_noted(
    monkeypatch: pytest.MonkeyPatch, other_server: int
) -> None:
    monkeypatch.setattr(doctor, "DEFAULT_PORT", other_server)
    finding = found("server:")
    assert finding.verdict == "note"
    assert "another program" in finding.what


def test_without_a_server_editors_start_one_unless_told_not_to(machine: Path) -> None:
    assert found("server:").verdict == "ok"
    write_settings(machine, '{"startServer": false}')
    assert found("server:") == Finding(
        "bad", "server: none on port 9: startServer is off", "start albor-serve"
    )


def test_editors_are_told_apart_by_what_they_lack(machine: Path) -> None:
    assert found("editor: Helix 25.07.1").remedy == "albor setup"
    assert albor_cli.main(["setup", "--yes"]) == 0
    assert found("editor: Helix 25.07.1, set up").verdict == "ok"
    program(machine.parent / "bin", "nvim", "NVIM v0.9.5")
    finding = found("editor: Neovim")
    assert finding.verdict == "bad"
    assert "0.10" in finding.remedy


def test_the_gpu_is_named(machine: Path) -> None:
    assert found("GPU:").verdict == "ok"
    program(machine.parent / "bin", "nvidia-smi", "Some GPU")
    assert "Some GPU" in found("GPU:").what


def test_the_command_fails_where_something_is_bad(
    machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert albor_cli.main(["doctor", "--quick"]) == 1
    assert "do: " in capsys.readouterr().out
    assert albor_cli.main(["doctor", "--quick", "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert {"verdict", "what", "remedy"} == set(findings[0])


def test_an_attempt_without_a_server_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALBOR_SERVER_URL", "http://127.0.0.1:9")
    *_, finding = examine()
    assert finding.verdict == "bad"
    assert finding.what == "a suggestion: offline"
    assert "127.0.0.1:9" in finding.remedy


def test_a_language_server_that_never_answers_does_not_hold_up_the_doctor(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = machine.parent / "bin" / "silent"
    silent.write_text("#!/bin/sh\nexec /bin/sleep 20\n")
    silent.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(silent))
    monkeypatch.setattr(doctor, "TRY_S", 0.5)
    start = time.perf_counter()
    *_, finding = examine()
    assert time.perf_counter() - start < 10
    assert finding.verdict == "bad"
    assert finding.what == "a suggestion: none within 0.5 s"


def test_the_folder_that_it_is_run_in_lends_it_no_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("numbers", "asyncio", "albor_lsp"):
        (tmp_path / f"{name}.py").write_text("open('was-run', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALBOR_SERVER_URL", "http://127.0.0.1:9")
    *_, finding = examine()
    assert finding.what == "a suggestion: offline"
    assert not (tmp_path / "was-run").exists()
