"""The commands on the README's first screen do what they say."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_cli import ROOT, Server

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Code blocks of one language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def embedded() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop(signal.SIGKILL)


def here(text: str, server: Server) -> str:
    assert "http://127.0.0.1:8080" in text
    return text.replace("http://127.0.0.1:8080", server.url)


def test_the_two_commands_exist() -> None:
    scripts = [block.split() for block in blocks("sh")[:2]]
    assert [script[1] for script in scripts] == ["scripts/serve", "scripts/test"]
    assert all((ROOT / script[1]).is_file() for script in scripts)
    assert "scripts/test" in (ROOT / ".ci" / "run").read_text()


def test_curl_fills_in_the_middle(embedded: Server) -> None:
    command = here(blocks("sh")[2], embedded).replace("curl ", "curl -s ")
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    [choice] = json.loads(result.stdout)["choices"]
    assert choice["finish_reason"] == "stop"
    assert "values" in choice["text"]


def test_the_openai_example_prints_code(embedded: Server, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(here(blocks("python")[0], embedded))
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(" np")
