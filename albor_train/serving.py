"""Start albor-serve on a model file and ask it for one completion."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Final

from albor_train.errors import EvaluationError

__all__ = ["serves"]

_START: Final = "import sys; from albor_serve.cli import main; sys.exit(main())"


def serves(model: Path, *, max_seconds: float = 120.0) -> str:
    """Text that the server puts between two pieces of code; it may be blank.

    Raises:
        EvaluationError: the server does not start, or does not answer as it should.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", _START, str(model), "--port", str(port)]
    process = subprocess.Popen(  # noqa: S603 - this interpreter and a path
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, max_seconds)
        body = {
            "prompt": "def add(a, b):\n    return ",
            "suffix": "\n\n\nprint(add(1, 2))\n",
            "max_tokens": 8,
            "temperature": 0,
        }
        answer = _post(f"http://127.0.0.1:{port}/v1/completions", body)
        choice = answer["choices"][0]
        if choice["finish_reason"] not in ("stop", "length"):
            raise EvaluationError(f"the server ended its answer with {choice['finish_reason']!r}")
        return str(choice["text"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise EvaluationError(f"the server did not answer: {error}") from error
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=20)
        if process.poll() is None:
            process.kill()
            process.communicate()


def _wait(url: str, process: subprocess.Popen[str], max_seconds: float) -> None:
    end = time.monotonic() + max_seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            lines = (process.communicate()[1] or "").strip().splitlines() or ["no message"]
            raise EvaluationError(f"albor-serve ended at once: {lines[-1]}")
        with (
            contextlib.suppress(urllib.error.URLError, OSError),
            urllib.request.urlopen(url, timeout=5) as reply,  # noqa: S310 - loopback
        ):
            if reply.status == 200:
                return
        time.sleep(0.2)
    raise EvaluationError(f"albor-serve was not ready after {max_seconds:g} s")


def _post(url: str, body: object) -> dict[str, Any]:
    request = urllib.request.Request(  # noqa: S310 - loopback
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310
        return dict(json.load(reply))
