"""`albor doctor`: looks at everything between a key and a suggestion, and says what to do."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO, Any, Final, Literal

from albor_lsp.errors import LspError
from albor_lsp.http import Address, HttpClient, parse_address
from albor_lsp.launcher import DEFAULT_PORT, server_program
from albor_lsp.settings import Settings, read_settings_file, settings_path, updated
from albor_lsp.setup import find_editors, plan

__all__ = ["Finding", "examine"]

LOOK_S: Final = 2.0
PROGRAM_S: Final = 10.0
TRY_S: Final = 90.0
"""A first start may have to convert a model."""
END_S: Final = 5.0
OLDEST_NEOVIM: Final = (0, 10)
CODE: Final = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return "

Verdict = Literal["ok", "note", "bad"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        verdict: ok; note: works without it; bad: no suggestions until it is mended.
        what: what was found.
        remedy: what to do; empty where nothing must be done.
    """

    verdict: Verdict
    what: str
    remedy: str = ""


def examine(*, attempt: bool = True) -> Iterator[Finding]:
    """Look at everything, one finding after the other.

    Args:
        attempt: ask a language server for a suggestion too, as an editor does. It may start the
            completion server, which ends some seconds later.
    """
    settings, findings = _settings()
    yield from findings
    yield from _programs(settings)
    yield _model()
    yield from _server(settings)
    yield from _editors()
    yield _gpu()
    if attempt:
        yield _attempt()


def _settings() -> tuple[Settings, list[Finding]]:
    path = settings_path()
    values, complaints = read_settings_file(path)
    settings, more = updated(Settings(), values)
    findings = [
        Finding("bad", f"settings: {line}", f"mend {path}") for line in [*complaints, *more]
    ]
    if not findings:
        text = str(path) if values is not None else "the defaults"
        findings = [Finding("ok", f"settings: {text}")]
    if not settings.enabled:
        findings.append(Finding("bad", "settings: enabled is false", f"set it to true in {path}"))
    return settings, findings


def _programs(settings: Settings) -> Iterator[Finding]:
    path = shutil.which("albor-lsp")
    if path is None:
        folder = Path(sys.executable).parent
        is_beside = (folder / "albor-lsp").exists()
        yield Finding(
            "bad",
            "language server: albor-lsp is not on the PATH",
            f"add {folder} to the PATH" if is_beside else "pipx install albor",
        )
    else:
        yield Finding("ok", f"language server: {path}")
    try:
        yield Finding("ok", f"completion server: {server_program(settings.server_command)[0]}")
    except LspError as error:
        has_other = bool(settings.server_url or os.environ.get("ALBOR_SERVER_URL"))
        yield Finding("note" if has_other else "bad", f"completion server: {error}", "see docs")


def _model() -> Finding:
    try:
        files = [
            each
            for each in resources.files("albor_models").iterdir()
            if each.name.endswith(".gguf")
        ]
    except ModuleNotFoundError:
        files = []
    if not files:
        return Finding(
            "note",
            "model: none came with this installation",
            'name one in serverCommand: ["albor-serve", "model.gguf"]',
        )
    with resources.as_file(files[0]) as path:
        with path.open("rb") as file:
            is_whole = file.read(4) == b"GGUF"
        megabytes = path.stat().st_size / 1e6
    if not is_whole:
        return Finding("bad", f"model: {files[0].name} is damaged", "install albor again")
    return Finding("ok", f"model: {files[0].name}, {megabytes:.0f} MB")


def _server(settings: Settings) -> Iterator[Finding]:
    url = settings.server_url or os.environ.get("ALBOR_SERVER_URL", "")
    try:
        address = parse_address(url) if url else Address(port=DEFAULT_PORT)
    except LspError as error:
        yield Finding("bad", f"server: {error}", "mend serverUrl or ALBOR_SERVER_URL")
        return
    key = settings.api_key or os.environ.get("ALBOR_API_KEY", "")
    try:
        models = asyncio.run(_models(address, key))
    except LspError as error:
        if url:
            yield Finding("bad", f"server: {url}: {error}", "start it, or clear serverUrl")
        else:
            how = "editors start one" if settings.start_server else "startServer is off"
            verdict: Verdict = "ok" if settings.start_server else "bad"
            remedy = "" if settings.start_server else "start albor-serve"
            yield Finding(verdict, f"server: none on port {DEFAULT_PORT}: {how}", remedy)
        return
    names = ", ".join(str(each.get("id")) for each in models) or "no model"
    owner = models[0].get("owned_by") if models else None
    if not url and owner != "albor":
        yield Finding(
            "note",
            f"server: port {DEFAULT_PORT} belongs to another program ({names})",
            "editors start their own; set serverUrl to use that one",
        )
        return
    yield Finding("ok", f"server: {address} has {names}")


async def _models(address: Address, key: str) -> list[dict[str, Any]]:
    client = HttpClient(address, key)
    try:
        answer = await client.get("/v1/models", timeout_s=LOOK_S)
    finally:
        await client.close()
    models = answer.get("data") if isinstance(answer, dict) else None
    return [each for each in models or [] if isinstance(each, dict)]


def _editors() -> Iterator[Finding]:
    editors = find_editors()
    if not editors:
        yield Finding("note", "editors: none found on the PATH", "docs/editors.md has others")
    for editor in editors:
        version = _version(editor.program)
        text = f"editor: {editor.name} {version or '(version unknown)'}"
        numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
        if editor.name == "Neovim" and numbers and numbers < OLDEST_NEOVIM:
            yield Finding("bad", text, "install Neovim 0.10 or newer")
            continue
        try:
            todo, by_hand = plan([editor])
        except LspError as error:
            yield Finding("bad", f"{text}: {error}", "see albor setup")
            continue
        if todo:
            yield Finding("note", f"{text}, not set up", "albor setup")
        elif by_hand:
            yield Finding("note", text, by_hand[0])
        else:
            yield Finding("ok", f"{text}, set up")


def _version(program: str) -> str:
    try:
        result = subprocess.run(  # noqa: S603 - an editor that the PATH names
            [program, "--version"], capture_output=True, text=True, timeout=PROGRAM_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"\d+\.\d+(\.\d+)?", result.stdout)
    return found[0] if found else ""


def _gpu() -> Finding:
    program = shutil.which("nvidia-smi")
    if program is None:
        return Finding("ok", "GPU: none found; the CPU is used")
    try:
        result = subprocess.run(  # noqa: S603 - the driver's own program
            [program, "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=PROGRAM_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return Finding("note", "GPU: the driver does not answer", "run nvidia-smi")
    name = result.stdout.strip().partition("\n")[0]
    if result.returncode or not name:
        return Finding("note", "GPU: the driver sees none", "run nvidia-smi")
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("triton") is None:
        return Finding("note", f"GPU: {name}, not used", "pip install albor[gpu]")
    return Finding("ok", f"GPU: {name}; albor-serve --backend cuda uses it")


def _attempt() -> Finding:
    """Start a language server and ask it for a suggestion, as an editor does."""
    # -P: nothing is imported from the folder that the person stands in.
    code = "import sys; from albor_lsp.cli import main; sys.exit(main())"
    command = [sys.executable, "-P", "-c", code]
    process = subprocess.Popen(  # noqa: S603 - this Python
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdin is not None
    assert process.stdout is not None
    talk = _Talk(process.stdin, process.stdout)
    is_late = threading.Event()

    def give_up() -> None:
        is_late.set()
        process.kill()  # what reads from it then comes to an end

    timer = threading.Timer(TRY_S, give_up)
    timer.start()
    try:
        return talk.suggestion()
    except (OSError, ValueError) as error:
        if is_late.is_set():
            late = f"a suggestion: none within {TRY_S:g} s"
            return Finding("bad", late, "run albor-lsp --log-level debug in the editor")
        return Finding("bad", f"a suggestion: the language server ended: {error}", "run albor-lsp")
    finally:
        timer.cancel()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S if talk.is_over else 0)
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


class _Talk:
    """The few messages that a suggestion takes."""

    def __init__(self, to: IO[bytes], out: IO[bytes]) -> None:
        self._to = to
        self._out = out
        self.is_over = False

    def suggestion(self) -> Finding:
        uri = "file:///albor-doctor.py"
        about = {
            "capabilities": {"textDocument": {"inlineCompletion": {}}},
            "initializationOptions": {"statistics": False},
        }
        self._send({"id": 1, "method": "initialize", "params": about})
        self._until(lambda message: message.get("id") == 1)
        self._send({"method": "initialized", "params": {}})
        document = {"uri": uri, "languageId": "python", "version": 1, "text": CODE}
        self._send({"method": "textDocument/didOpen", "params": {"textDocument": document}})
        ends = ("ready", "offline", "error")
        status = self._until(
            lambda message: (
                message.get("method") == "albor/status" and message["params"]["state"] in ends
            )
        )["params"]
        if status["state"] != "ready":
            return Finding("bad", f"a suggestion: {status['state']}", status["message"])
        lines = CODE.split("\n")
        position = {"line": len(lines) - 1, "character": len(lines[-1])}
        question = {
            "textDocument": {"uri": uri},
            "position": position,
            "context": {"triggerKind": 1},
        }
        start = time.perf_counter()
        self._send({"id": 2, "method": "textDocument/inlineCompletion", "params": question})
        answer = self._until(lambda message: message.get("id") == 2)
        elapsed_ms = (time.perf_counter() - start) * 1000
        items = (answer.get("result") or {}).get("items") or []
        with contextlib.suppress(OSError):
            self._send({"id": 3, "method": "shutdown"})
            self._send({"method": "exit"})
            self.is_over = True
        if not items:
            return Finding(
                "bad", f"a suggestion: {status['model']} gave none", "try a larger model"
            )
        text = items[0]["insertText"].partition("\n")[0]
        where = f"{status['model']}, {elapsed_ms:.0f} ms"
        return Finding("ok", f"a suggestion: `return ` is continued by {text!r} ({where})")

    def _send(self, message: dict[str, Any]) -> None:
        body = json.dumps({"jsonrpc": "2.0"} | message).encode()
        self._to.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        self._to.flush()

    def _until(self, wanted: Any) -> dict[str, Any]:
        while True:
            length = 0
            while (line := self._out.readline()) not in (b"\r\n", b""):
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            if not line:
                raise ValueError("it closed the connection")
            message: dict[str, Any] = json.loads(self._out.read(length))
            if wanted(message):
                return message
