#!/usr/bin/env python3
"""A language server that says what a test has written down, for what the real one can't be made
to do on demand: stay silent, die, refuse.

Reads the JSON file that the environment variable SCRIPT names, anew at each question:
`suggestions` (list of texts; each is offered when it starts with the text of the line before the
cursor), `die_on` (a method at which the process ends), `status` (sent after the handshake).
Each message that it gets is appended to the file that LOG names, one JSON object a line.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

texts: dict[str, list[str]] = {}


def send(message: dict[str, Any]) -> None:
    data = json.dumps({"jsonrpc": "2.0"} | message).encode()
    sys.stdout.buffer.write(b"Content-Length: %d\r\n\r\n" % len(data) + data)
    sys.stdout.buffer.flush()


def receive() -> dict[str, Any] | None:
    size = 0
    while line := sys.stdin.buffer.readline().strip():
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            size = int(value)
    if not size:
        return None
    message: dict[str, Any] = json.loads(sys.stdin.buffer.read(size))
    return message


def complete(params: dict[str, Any], script: dict[str, Any]) -> list[dict[str, Any]]:
    at = params["position"]
    lines = texts.get(params["textDocument"]["uri"], [""])
    typed = lines[at["line"]][: at["character"]]
    if not typed.strip():
        return []
    return [
        {
            "insertText": text,
            "range": {"start": {"line": at["line"], "character": 0}, "end": at},
            "command": {"title": "", "command": "scripted.accepted", "arguments": [text]},
        }
        for text in script.get("suggestions", [])
        if text.startswith(typed) and text != typed
    ]


def answer(method: str, params: Any, script: dict[str, Any]) -> Any:
    if method == "initialize":
        return {
            "capabilities": {
                "textDocumentSync": 1,
                "inlineCompletionProvider": {},
                "executeCommandProvider": {
                    "commands": ["scripted.accepted", "albor.explain", "albor.stats"]
                },
            }
        }
    if method == "textDocument/inlineCompletion":
        return {"items": complete(params, script)}
    if method == "workspace/executeCommand":
        return f"# {params['command']}\n"
    return None


def main() -> None:
    script_path, log_path = Path(os.environ["SCRIPT"]), Path(os.environ["LOG"])
    while (message := receive()) is not None:
        script = json.loads(script_path.read_text())
        method, params = message.get("method", ""), message.get("params")
        noted = {"method": method, "params": params, "result": message.get("result")}
        with log_path.open("a") as log:
            log.write(json.dumps({"pid": os.getpid()} | noted) + "\n")
        if method == "exit":
            return
        if method == script.get("die_on"):
            sys.exit(1)
        if method == "textDocument/didOpen":
            texts[params["textDocument"]["uri"]] = params["textDocument"]["text"].split("\n")
        elif method == "textDocument/didChange":
            texts[params["textDocument"]["uri"]] = params["contentChanges"][-1]["text"].split("\n")
        elif method == "initialized" and "status" in script:
            send({"method": "albor/status", "params": script["status"]})
        if method in ("initialized", "workspace/didChangeConfiguration"):
            items = {"items": [{"section": "albor"}]}
            send({"id": "settings", "method": "workspace/configuration", "params": items})
        if "id" in message and method:
            send({"id": message["id"], "result": answer(method, params, script)})


if __name__ == "__main__":
    main()
