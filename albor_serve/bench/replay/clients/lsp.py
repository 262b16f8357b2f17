"""A language server over its standard streams, asked as VS Code asks: ours, or any other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any, Final

from albor_serve.bench.peers import process_cpu_seconds
from albor_serve.bench.replay.clients.base import Client, EditorState, RequestRecord
from albor_serve.bench.replay.clock import Clock
from albor_serve.bench.replay.scenes import Source
from albor_serve.errors import BackendError, ConfigError

__all__ = ["LspClient"]

ROOT: Final = "file:///replay/"
AUTOMATIC: Final = 2
CLOSE_S: Final = 3.0
START_S: Final = 60.0


class LspClient(Client):
    """Each key is a `didChange` and an automatic `textDocument/inlineCompletion`, without delay.

    A newer request cancels the older one. Positions are UTF-16, as VS Code sends them.
    """

    def __init__(
        self,
        name: str,
        address: str,
        clock: Clock,
        command: Sequence[str],
        settings: Mapping[str, Any],
    ) -> None:
        super().__init__(name)
        self._address = address
        self._clock = clock
        self._command = command
        self._settings = dict(settings)
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._ids = count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._state: EditorState | None = None
        self._asking: tuple[int, asyncio.Task[None]] | None = None
        self._item_command: dict[str, Any] | None = None
        self._opened: list[str] = []
        self._last_timings: dict[str, Any] = {}

    def cpu_seconds(self) -> float:
        """Of the language server's process."""
        return process_cpu_seconds(self._process.pid) if self._process is not None else 0.0

    async def start(self) -> None:
        """Start the language server and shake hands.

        Raises:
            ConfigError: the program can't be run.
            BackendError: it ended or did not answer.
        """
        environment = os.environ | {"ALBOR_SERVER_URL": f"http://{self._address}"}
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                env=environment,
            )
        except OSError as error:
            raise ConfigError(f"cannot run {self._command[0]}: {error.strerror}") from error
        self._reader = asyncio.create_task(self._read())
        try:
            async with asyncio.timeout(START_S):
                await self._ask("initialize", _hello(self._settings))
        except TimeoutError:
            raise BackendError(f"{self._command[0]} did not answer in {START_S:.0f} s") from None
        self._notify("initialized", {})

    async def stop(self) -> None:
        """Shut the language server down; kills it if it doesn't end."""
        process = self._process
        if process is None:
            return
        with contextlib.suppress(TimeoutError, BackendError):
            async with asyncio.timeout(CLOSE_S):
                await self._ask("shutdown", None)
                self._notify("exit", None)
                await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        self._process = None

    async def open(self, state: EditorState, others: Sequence[Source]) -> None:
        """See `Client.open`."""
        self._state = state
        self._item_command = None
        texts = {other.path: other.text for other in others}
        texts[state.path] = state.before + state.after
        self._opened = list(texts)
        for path, text in texts.items():
            document = {"uri": ROOT + path, "languageId": "python", "version": 0, "text": text}
            self._notify("textDocument/didOpen", {"textDocument": document})

    def on_text(self, state: EditorState) -> None:
        """See `Client.on_text`."""
        old = self._state
        assert old is not None
        self._state = state
        at = position(old.before)
        change = {"range": {"start": at, "end": at}, "text": state.before[len(old.before) :]}
        document = {"uri": ROOT + state.path, "version": state.version}
        self._notify(
            "textDocument/didChange", {"textDocument": document, "contentChanges": [change]}
        )
        self._cancel()
        request_id = next(self._ids)
        self._asking = request_id, self.spawn(self._complete(request_id, state))

    def on_accept(self, state: EditorState) -> None:
        """See `Client.on_accept`; also runs the item's command, which tells the server."""
        if self._item_command is not None:
            told = {key: self._item_command.get(key) for key in ("command", "arguments")}
            self.spawn(self._tell(told))
        self.on_text(state)

    async def close_scene(self) -> None:
        """See `Client.close_scene`."""
        self._cancel()
        await super().close_scene()
        for path in self._opened:
            self._notify("textDocument/didClose", {"textDocument": {"uri": ROOT + path}})
        self._opened = []

    def _cancel(self) -> None:
        if self._asking is not None and not self._asking[1].done():
            self._notify("$/cancelRequest", {"id": self._asking[0]})
            self._asking[1].cancel()
            self.work.num_cancelled += 1
        self._asking = None

    async def _tell(self, command: dict[str, Any]) -> None:
        await self._ask("workspace/executeCommand", command)

    async def _complete(self, request_id: int, state: EditorState) -> None:
        self.work.num_requests += 1
        params = {
            "textDocument": {"uri": ROOT + state.path},
            "position": position(state.before),
            "context": {"triggerKind": AUTOMATIC},
        }
        with self._clock.working():
            result = await self._ask("textDocument/inlineCompletion", params, request_id)
        items = result.get("items", []) if isinstance(result, dict) else result or []
        if items:
            text = _inserted(items[0], state)
            self._item_command = items[0].get("command")
            self.offer(state.version, text)

    async def _ask(self, method: str, params: Any, request_id: int | None = None) -> Any:
        request_id = next(self._ids) if request_id is None else request_id
        answer = asyncio.get_running_loop().create_future()
        self._answers[request_id] = answer
        try:
            self._send({"id": request_id, "method": method, "params": params})
            return await answer
        finally:
            self._answers.pop(request_id, None)

    def _notify(self, method: str, params: Any) -> None:
        self._send({"method": method, "params": params})

    def _send(self, message: dict[str, Any]) -> None:
        if self._process is None or self._reader is None or self._reader.done():
            raise BackendError(f"{self._command[0]} ended: run it alone to see why")
        data = json.dumps({"jsonrpc": "2.0"} | message).encode()
        assert self._process.stdin is not None
        self._process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(data) + data)

    async def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        stream = self._process.stdout
        while head := await stream.readline():
            if not head.lower().startswith(b"content-length:"):
                continue
            size = int(head.split(b":")[1])
            while (await stream.readline()).strip():
                pass
            self._receive(json.loads(await stream.readexactly(size)))
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(
                    BackendError(f"{self._command[0]} ended: run it alone to see why")
                )

    def _receive(self, message: dict[str, Any]) -> None:
        if "method" in message:
            if "id" in message:
                self._send({"id": message["id"], "result": self._reply(message)})
            elif message["method"] == "albor/status":
                self._note_cost(message["params"])
            return
        answer = self._answers.get(message["id"])
        if answer is None or answer.done():
            return
        if "error" in message:
            answer.set_exception(BackendError(f"{self._command[0]}: {message['error']}"))
        else:
            answer.set_result(message.get("result"))

    def _note_cost(self, status: dict[str, Any]) -> None:
        """What albor-lsp tells after each suggestion; what was in its cache cost nothing."""
        timings = status.get("latency") or {}
        if status.get("source") in ("computed", "joined") and timings != self._last_timings:
            self._last_timings = timings
            prompt = int(timings.get("num_prompt_tokens", 0))
            new = prompt - int(timings.get("num_cached_tokens", 0))
            decoded = int(timings.get("num_new_tokens", 0))
            self.work.answers.append(RequestRecord(prompt, new, decoded, is_shown=True))

    def _reply(self, message: dict[str, Any]) -> Any:
        if message["method"] == "workspace/configuration":
            return [self._settings for _ in message["params"]["items"]]
        return None


def _hello(settings: dict[str, Any]) -> dict[str, Any]:
    """The part of VS Code's capabilities that decides how a server completes."""
    return {
        "processId": os.getpid(),
        "rootUri": ROOT,
        "workspaceFolders": None,
        "initializationOptions": settings,
        "capabilities": {
            "general": {"positionEncodings": ["utf-16"]},
            "textDocument": {
                "inlineCompletion": {"dynamicRegistration": True},
                "synchronization": {"dynamicRegistration": True},
            },
            "workspace": {"configuration": True, "executeCommand": {"dynamicRegistration": True}},
        },
    }


def position(before: str) -> dict[str, int]:
    """Of the end of a text, in lines and UTF-16 units."""
    line = before.rpartition("\n")[2]
    return {"line": before.count("\n"), "character": len(line.encode("utf-16-le")) // 2}


def _inserted(item: dict[str, Any], state: EditorState) -> str:
    """What an item puts after the cursor: its range may start before it."""
    text = item["insertText"]
    if isinstance(text, dict):
        text = text["value"]
    inserted: str = text
    if "range" in item and item["range"] is not None:
        line = state.before.rpartition("\n")[2].encode("utf-16-le")
        start = item["range"]["start"]["character"]
        typed = line[2 * start :].decode("utf-16-le")
        return inserted.removeprefix(typed) if inserted.startswith(typed) else ""
    return inserted
