"""albor-lsp as a command: over a socket, and what was counted."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from albor_lsp.cli import main
from albor_lsp.statistics import statistics_path

from tests.lsp.fakes import LSP_FOLDER

START = "import sys; from albor_lsp.cli import main; sys.exit(main())"


class _Client:
    """A client of one connection."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self._file = self._socket.makefile("rb")

    def send(self, **message: Any) -> None:
        data = json.dumps({"jsonrpc": "2.0"} | message).encode()
        self._socket.sendall(b"Content-Length: %d\r\n\r\n%b" % (len(data), data))

    def send_raw(self, data: bytes) -> None:
        self._socket.sendall(data)

    def ask(self, number: int, method: str, params: Any = None) -> Any:
        self.send(id=number, method=method, params=params)
        while (answer := self._read()).get("id") != number or "method" in answer:
            pass
        return answer["result"]

    def is_over(self) -> bool:
        """Whether the other side has closed; waits for it."""
        while data := self._file.read(4096):
            assert data
        return True

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def _read(self) -> dict[str, Any]:
        size = int(self._file.readline().split(b":")[1])
        self._file.readline()
        message: dict[str, Any] = json.loads(self._file.read(size))
        return message


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """Where an albor-lsp listens."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("ALBOR", "XDG"))
    } | {
        "PYTHONPATH": os.pathsep.join([str(LSP_FOLDER), os.environ.get("PYTHONPATH", "")]),
        "XDG_CONFIG_HOME": str(tmp_path),
        "XDG_STATE_HOME": str(tmp_path),
        "XDG_RUNTIME_DIR": str(tmp_path),
        "ALBOR_SERVER_URL": "http://127.0.0.1:9",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", START, "--tcp", "0"], env=environment, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        told = re.search(rb"listening on 127\.0\.0\.1:(\d+)", process.stderr.readline())
        assert told
        yield int(told[1])
    finally:
        process.terminate()
        process.wait(10)
        process.stderr.close()


def test_clients_are_served_one_after_the_other(port: int) -> None:
    first, second = _Client(port), _Client(port)
    hello = {"processId": None, "rootUri": None, "capabilities": {}}
    assert "capabilities" in first.ask(1, "initialize", hello)
    second.send(id=1, method="initialize", params=hello)
    first.ask(2, "shutdown")
    first.send(method="exit")
    assert first.is_over()
    first.close()
    assert second.ask(2, "shutdown") is None  # its turn has come
    second.close()
    third = _Client(port)
    assert "capabilities" in third.ask(1, "initialize", hello)
    third.close()


def test_a_client_that_speaks_something_else_is_sent_away_and_the_next_is_served(port: int) -> None:
    browser = _Client(port)
    browser.send_raw(b"GET / HTTP/1.1\r\n\r\n")
    assert browser.is_over()
    browser.close()
    editor = _Client(port)
    hello = {"processId": None, "rootUri": None, "capabilities": {}}
    assert "capabilities" in editor.ask(1, "initialize", hello)
    editor.close()


@pytest.mark.parametrize("where", ["x", "127.0.0.1", "host:70000", ":"])
def test_an_address_that_is_none_is_refused(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tcp", where]) != 0
    error = capsys.readouterr().err
    assert f"--tcp {where}: write [HOST:]PORT" in error
    assert error.count("\n") == 1


def test_what_was_counted_is_printed_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert main(["stats"]) == 0
    assert capsys.readouterr().out == "No suggestions counted yet.\n"
    days = {"2026-01-02": {"python": {"shown": 10, "accepted": 4, "chars": 90}}}
    path = statistics_path()
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(days))
    assert main(["stats", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told) == ["2026-01-02"]
    assert main(["stats"]) == 0
    assert "2026-01-02" in capsys.readouterr().out
    plot = tmp_path / "saved.svg"
    assert main(["stats", "--plot", str(plot)]) == 0
    assert capsys.readouterr().out == f"wrote {plot}\n"
    assert plot.read_text().startswith("<svg")
    assert not plot.with_name("saved.svg.part").exists()
