"""Start albor-serve on a model and talk to it over HTTP, as an editor would."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

from albor_train.errors import EvaluationError

__all__ = ["open_post", "post", "running_server", "serves"]

_START: Final = "import sys; from albor_serve.cli import main; sys.exit(main())"


@contextlib.contextmanager
def running_server(model: Path, *, max_seconds: float = 120.0) -> Iterator[str]:
    """albor-serve on a free port for as long as the context lasts; gives its base address.

    Raises:
        EvaluationError: it does not start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", _START, str(model), "--port", str(port)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(  # noqa: S603 - this interpreter and a path
            command, stdout=subprocess.DEVNULL, stderr=log
        )
        try:
            base = f"http://127.0.0.1:{port}"
            _wait(f"{base}/health", process, log, max_seconds)
            yield base
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def serves(model: Path, *, max_seconds: float = 120.0) -> str:
    """Text that the server puts between two pieces of code; it may be blank.

    Raises:
        EvaluationError: the server does not start, or does not answer as it should.
    """
    body = {
        "prompt": "def add(a, b):\n    return ",
        "suffix": "\n\n\nprint(add(1, 2))\n",
        "max_tokens": 8,
        "temperature": 0,
    }
    with running_server(model, max_seconds=max_seconds) as base:
        try:
            choice = post(f"{base}/v1/completions", body)["choices"][0]
            if choice["finish_reason"] not in ("stop", "length"):
                reason = choice["finish_reason"]
                raise EvaluationError(f"the server ended its answer with {reason!r}")
            return str(choice["text"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise EvaluationError(f"the server did not answer: {error!r}") from error


def _wait(url: str, process: subprocess.Popen[bytes], log: IO[str], max_seconds: float) -> None:
    end = time.monotonic() + max_seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            log.seek(0)
            lines = log.read().strip().splitlines() or ["no message"]
            raise EvaluationError(f"albor-serve ended at once: {lines[-1]}")
        with (
            contextlib.suppress(urllib.error.URLError, OSError),
            urllib.request.urlopen(url, timeout=5) as reply,  # noqa: S310 - loopback
        ):
            if reply.status == 200:
                return
        time.sleep(0.2)
    raise EvaluationError(f"albor-serve was not ready after {max_seconds:g} s")


def post(url: str, body: object) -> dict[str, Any]:
    """The JSON object that a server on this machine answers with.

    Raises:
        EvaluationError: it refuses, or does not answer.
    """
    with open_post(url, body) as reply:
        return dict(json.load(reply))


def open_post(url: str, body: object) -> http.client.HTTPResponse:
    """The answer to a JSON body, still to be read (streams come line by line).

    Raises:
        EvaluationError: the server refuses, or does not answer.
    """
    request = urllib.request.Request(  # noqa: S310 - loopback
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        reply: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=300)  # noqa: S310
    except urllib.error.HTTPError as error:
        with error:
            text = " ".join(error.read(2000).decode("utf-8", "replace").split())
        raise EvaluationError(f"the server refused with {error.code}: {text}") from error
    except OSError as error:
        raise EvaluationError(f"the server did not answer: {error}") from error
    return reply
