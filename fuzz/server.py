"""A real albor-serve process over a tiny model, for the fuzzers of the HTTP surface."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.fixtures_tiny import save_gguf, tiny_model

__all__ = ["FuzzServer", "fuzz_server"]

MAX_SEQ_LEN = 64
"""The context caps every answer, so that one case takes milliseconds."""
START_S = 60.0


@dataclass(slots=True)
class FuzzServer:
    """A running server."""

    port: int
    process: subprocess.Popen[str]
    log: list[str]
    """Lines of stderr, as they come."""

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def rss_mib(self) -> float:
        """Resident memory of the process, in MiB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def get(self, path: str, timeout: float = 10.0) -> bytes:
        """Body of a GET; raises OSError for an error status or none in time."""
        with urllib.request.urlopen(self.url + path, timeout=timeout) as answer:  # noqa: S310
            return bytes(answer.read())

    def tracebacks(self) -> list[str]:
        """Lines of the log that speak of a bug."""
        return [line for line in self.log if "Traceback" in line or "Error:" in line]


@contextlib.contextmanager
def fuzz_server() -> Iterator[FuzzServer]:
    """Start a server on a free port of this machine; it is stopped at the end."""
    with tempfile.TemporaryDirectory() as folder:
        config, weights = tiny_model("qwen3", seed=3, max_seq_len=MAX_SEQ_LEN)
        model = save_gguf(Path(folder) / "albor-tiny.gguf", config, weights)
        start = "import sys; from albor_serve.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", start, str(model), "--port", "0"]
        process = subprocess.Popen(
            [*command, "--threads", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        log: list[str] = []
        reader = threading.Thread(target=_collect, args=(process, log), daemon=True)
        reader.start()
        try:
            yield FuzzServer(_port(process, log), process, log)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            reader.join(5)
            assert process.stdout is not None
            process.stdout.close()


def _collect(process: subprocess.Popen[str], log: list[str]) -> None:
    assert process.stdout is not None
    log.extend(iter(process.stdout.readline, ""))


def _port(process: subprocess.Popen[str], log: list[str]) -> int:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        for line in list(log):
            if match := re.search(r"listening on http://127\.0\.0\.1:(\d+)", line):
                return int(match[1])
        if process.poll() is not None:
            break
        time.sleep(0.02)
    raise RuntimeError(f"the server did not start: {''.join(log)[-2000:]}")
