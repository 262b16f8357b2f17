"""LSP around the assistant: capabilities, documents, questions, commands."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from albor_lsp import __version__
from albor_lsp.assistant import Assistant, Explained, Selected, Suggestion
from albor_lsp.document import Document, Encoding, Point, Position, to_changes
from albor_lsp.errors import LspError
from albor_lsp.launcher import Launcher
from albor_lsp.rpc import Peer, RpcError
from albor_lsp.service import Health, Service
from albor_lsp.settings import Settings, read_settings_file, settings_path, updated
from albor_lsp.statistics import Statistics, as_text, statistics_path

__all__ = ["COMMANDS", "LanguageServer"]

NOT_INITIALIZED: Final = -32002
INVALID_REQUEST: Final = -32600
INVALID_PARAMS: Final = -32602
INVOKED: Final = 1
FLUSH_S: Final = 60.0
ENCODINGS: Final = ("utf-8", "utf-16", "utf-32")
TRIGGERS: Final = [".", "(", "[", "{", ",", "=", ":", " "]
"""Characters after which a client of textDocument/completion asks."""
LABEL_CHARS: Final = 60

COMMANDS: Final = {
    "albor.accepted": "A suggestion was taken over; its argument is in the suggestion.",
    "albor.explain": "How the last suggestion came to be: prompt, times, probabilities.",
    "albor.pause": "Stop or go on suggesting; with true or false as its argument, exactly that.",
    "albor.restart": "Look for the completion server anew.",
    "albor.showLog": "The latest lines of the log.",
    "albor.stats": "Suggestions shown and accepted, characters saved.",
}
"""What workspace/executeCommand knows."""

_log = logging.getLogger("albor_lsp")


@dataclass(slots=True)
class _Client:
    """What the client said it can do."""

    encoding: Encoding = "utf-16"
    has_inline: bool = False
    registers_inline: bool = False
    has_markdown: bool = False
    """Its menu shows Markdown beside an entry."""
    has_configuration: bool = False
    registers_configuration: bool = False
    folders: list[Path] = field(default_factory=list)


class LanguageServer:
    """One client's session, from initialize to exit.

    Attributes:
        exit_code: None until the client said exit; then 0, or 1 without a shutdown before.
        done: set at exit.
    """

    def __init__(self, peer: Peer, log_lines: Callable[[], list[str]] = list) -> None:
        self.exit_code: int | None = None
        self.done = asyncio.Event()
        self._peer = peer
        self._log_lines = log_lines
        self._client = _Client()
        self._state = "new"
        self._settings = Settings()
        self._complained: set[str] = set()
        self._assistant: Assistant | None = None
        self._service: Service | None = None
        self._launcher: Launcher | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._latency: dict[str, float] = {}
        self._source = ""
        self._statistics = Statistics(statistics_path())
        peer.gate = self._gate
        peer.handlers |= {
            "initialize": self._initialize,
            "initialized": self._initialized,
            "shutdown": self._shutdown,
            "exit": self._exit,
            "textDocument/didOpen": self._did_open,
            "textDocument/didChange": self._did_change,
            "textDocument/didSave": self._did_save,
            "textDocument/didClose": self._did_close,
            "textDocument/inlineCompletion": self._inline_completion,
            "textDocument/completion": self._completion,
            "workspace/executeCommand": self._execute,
            "workspace/didChangeConfiguration": self._configuration_changed,
            "workspace/didChangeWorkspaceFolders": self._folders_changed,
        }

    async def close(self) -> None:
        """Release everything; called once, whatever ended the session."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._peer.close()
        if self._assistant is not None:
            await self._assistant.close()
        if self._service is not None:
            await self._service.close()
        if self._launcher is not None:
            self._launcher.close()
        self._statistics.flush()

    # --- life ---

    def _gate(self, method: str, is_request: bool) -> None:
        if method == "exit":
            return
        if self._state == "new" and method != "initialize":
            raise RpcError(NOT_INITIALIZED, "the first message must be initialize")
        if self._state == "shut" and is_request:
            raise RpcError(INVALID_REQUEST, "the server was shut down")
        if self._state != "new" and method == "initialize":
            raise RpcError(INVALID_REQUEST, "initialize was sent twice")

    def _initialize(self, params: dict[str, Any]) -> dict[str, Any]:
        self._client = _read_client(params)
        values, complaints = read_settings_file(settings_path())
        self._take(values, complaints)
        self._take(_section(params.get("initializationOptions")))
        self._launcher = Launcher()
        self._service = Service(
            self._find,
            api_key=self._settings.api_key,
            model=self._settings.model,
            timeout_s=self._settings.timeout_ms / 1000,
            on_health=self._tell,
        )
        self._assistant = Assistant(
            self._service,
            self._settings,
            self._client.folders,
            on_answer=self._answered,
            on_accept=self._accepted,
        )
        self._state = "running"
        info = {"name": "albor", "version": __version__}
        return {"capabilities": _capabilities(self._client), "serverInfo": info}

    def _initialized(self, _params: Any) -> Coroutine[Any, Any, None]:
        self._status()
        return self._begin()

    async def _begin(self) -> None:
        registrations: list[tuple[str, dict[str, Any]]] = []
        if self._client.registers_inline:
            registrations.append(("textDocument/inlineCompletion", {"documentSelector": None}))
        if self._client.registers_configuration:
            registrations.append(("workspace/didChangeConfiguration", {"section": "albor"}))
        if registrations:
            items = [
                {"id": f"albor-{method}", "method": method, "registerOptions": options}
                for method, options in registrations
            ]
            self._spawn(self._ask_client("client/registerCapability", {"registrations": items}))
        if self._client.has_configuration:
            await self._read_configuration()
        if self._service is not None:
            self._service.start()
        while True:
            await asyncio.sleep(FLUSH_S)
            await asyncio.to_thread(self._statistics.flush)

    def _shutdown(self, _params: Any) -> None:
        self._state = "shut"

    def _exit(self, _params: Any) -> None:
        self.exit_code = 0 if self._state == "shut" else 1
        self.done.set()

    async def _find(self) -> Any:
        assert self._launcher is not None
        return await self._launcher.find(self._settings, self._tell_start)

    # --- settings ---

    def _take(self, values: object, complaints: list[str] | None = None) -> None:
        self._settings, more = updated(self._settings, values)
        for line in (complaints or []) + more:
            if line not in self._complained:
                self._complained.add(line)
                _log.warning("%s", line)
                self._peer.notify("window/logMessage", {"type": 2, "message": f"albor: {line}"})

    async def _read_configuration(self) -> None:
        items = [{"section": "albor"}]
        answer = await self._ask_client("workspace/configuration", {"items": items})
        if isinstance(answer, list) and answer:
            self._change_settings(answer[0])

    def _configuration_changed(self, params: Any) -> Coroutine[Any, Any, None] | None:
        values = _section((params or {}).get("settings"))
        if values:
            self._change_settings(values)
            return None
        return self._read_configuration() if self._client.has_configuration else None

    def _change_settings(self, values: object) -> None:
        old = self._settings
        self._take(values)
        if self._assistant is None or self._settings == old:
            return
        self._assistant.settings = self._settings
        if _server_of(old) != _server_of(self._settings):
            self._spawn(self._restart())

    # --- documents ---

    def _folders_changed(self, params: dict[str, Any]) -> None:
        event = params["event"]
        removed = set(_folders(event.get("removed") or []))
        kept = [folder for folder in self._helper.roots if folder not in removed]
        added = _folders(event.get("added") or [])
        self._helper.roots = list(dict.fromkeys([*kept, *added]))

    def _did_open(self, params: dict[str, Any]) -> None:
        item = params["textDocument"]
        self._helper.open(
            str(item["uri"]), str(item.get("languageId", "")), str(item["text"]), item["version"]
        )

    def _did_change(self, params: dict[str, Any]) -> None:
        changes = to_changes(params["contentChanges"])
        item = params["textDocument"]
        version = item.get("version") or 0
        self._helper.change(str(item["uri"]), changes, self._client.encoding, version)

    def _did_save(self, params: dict[str, Any]) -> None:
        self._helper.save(str(params["textDocument"]["uri"]))

    def _did_close(self, params: dict[str, Any]) -> None:
        self._helper.close_document(str(params["textDocument"]["uri"]))

    @property
    def _helper(self) -> Assistant:
        assert self._assistant is not None
        return self._assistant

    # --- questions ---

    def _inline_completion(self, params: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        uri = str(params["textDocument"]["uri"])
        context = params.get("context") or {}
        document = self._helper.document(uri)
        selected = None
        info = context.get("selectedCompletionInfo")
        if info is not None and document is not None:
            span = info["range"]
            selected = Selected(
                self._point(document, span["start"]),
                self._point(document, span["end"]),
                str(info["text"]),
            )
        asked = self._helper.complete(
            uri,
            _position(params["position"]),
            self._client.encoding,
            invoked=context.get("triggerKind") == INVOKED,
            selected=selected,
        )
        return self._inline_items(asked, document)

    async def _inline_items(
        self, asked: Coroutine[Any, Any, list[Suggestion]], document: Document | None
    ) -> dict[str, Any]:
        suggestions = await asked
        if document is None:
            return {"items": []}
        return {
            "items": [
                {
                    "insertText": suggestion.text,
                    "range": self._range(document, suggestion.start, suggestion.end),
                    "command": _accepted(suggestion),
                }
                for suggestion in suggestions
            ]
        }

    def _completion(self, params: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        uri = str(params["textDocument"]["uri"])
        document = self._helper.document(uri)
        # Clients of this method ask by themselves with the same kind as when a person asks, so
        # that several suggestions, which cost more, are not made. Their menu does not grow by
        # itself: whole answers only.
        asked = self._helper.complete(
            uri, _position(params["position"]), self._client.encoding, whole=True
        )
        return self._menu_items(asked, document)

    async def _menu_items(
        self, asked: Coroutine[Any, Any, list[Suggestion]], document: Document | None
    ) -> dict[str, Any]:
        suggestions = await asked
        items = []
        for suggestion in suggestions if document is not None else []:
            assert document is not None
            line = document.lines[suggestion.start.line]
            word = _word_before(line, suggestion.start.column)
            start = Point(suggestion.start.line, suggestion.start.column - len(word))
            text = word + suggestion.text
            first = text.strip().partition("\n")[0]
            label = first if len(first) <= LABEL_CHARS else first[: LABEL_CHARS - 1] + "…"
            items.append(
                {
                    "documentation": self._documentation(document, text),
                    "label": label,
                    "kind": 1,
                    "filterText": word,
                    # First of all; U+0000 would be too, but Emacs 28 cannot read that.
                    "sortText": "\u0001",
                    "preselect": True,
                    "insertTextFormat": 1,
                    "textEdit": {
                        "range": self._range(document, start, suggestion.end),
                        "newText": text,
                    },
                    "command": _accepted(suggestion),
                }
            )
        return {"isIncomplete": True, "items": items}

    def _documentation(self, document: Document, text: str) -> dict[str, str] | str:
        if self._client.has_markdown:
            return {"kind": "markdown", "value": f"```{document.language}\n{text}\n```"}
        return text

    def _point(self, document: Document, value: dict[str, Any]) -> Point:
        return document.point(_position(value), self._client.encoding)

    def _range(self, document: Document, start: Point, end: Point) -> dict[str, Any]:
        return {
            "start": document.position(start, self._client.encoding)._asdict(),
            "end": document.position(end, self._client.encoding)._asdict(),
        }

    # --- commands ---

    def _execute(self, params: dict[str, Any]) -> Any:
        command, arguments = params["command"], params.get("arguments") or []
        if command == "albor.accepted":
            if arguments:
                self._helper.accepted(str(arguments[0]))
            return None
        if command == "albor.pause":
            helper = self._helper
            helper.is_paused = bool(arguments[0]) if arguments else not helper.is_paused
            self._status()
            return helper.is_paused
        if command == "albor.restart":
            return self._restart()
        if command == "albor.showLog":
            return "\n".join(self._log_lines()) + "\n"
        if command == "albor.explain":
            return self._explain()
        if command == "albor.stats":
            return f"```\n{as_text(self._statistics.days())}```\n"
        raise RpcError(INVALID_PARAMS, f"no such command: {str(command)[:60]}")

    async def _restart(self) -> None:
        if self._service is not None:
            settings = self._settings
            await self._service.restart(api_key=settings.api_key, model=settings.model)

    async def _explain(self) -> str:
        explained = self._helper.explained()
        if explained is None:
            return "Nothing was suggested yet.\n"
        try:
            tokens = await self._helper.probabilities(explained)
        except LspError:
            tokens = ()
        lines = [
            "# The last suggestion",
            "",
            "```",
            explained.shown,
            "```",
            "",
            f"{explained.source}, {explained.total_ms:.1f} ms",
        ]
        lines += [f"- {name}: {value:g}" for name, value in explained.answer.timings.items()]
        if tokens:
            lines += ["", "| token | probability |", "|---|---|"]
            lines += [f"| `{text!r}` | {2.718281828459045**value:.2f} |" for text, value in tokens]
        query = explained.query
        lines += ["", "## Before the cursor", "", "```", query.prefix, "```"]
        lines += ["", "## After it", "", "```", query.window.suffix, "```"]
        for chunk in query.chunks:
            lines += ["", f"## {chunk.path}", "", "```", chunk.text, "```"]
        return "\n".join(lines) + "\n"

    # --- status ---

    def _accepted(self, explained: Explained) -> None:
        if self._settings.statistics:
            self._statistics.accepted(explained.shown)

    def _answered(self, explained: Explained) -> None:
        if self._settings.statistics and explained.is_new:
            self._statistics.shown(explained.shown, explained.total_ms)
        self._latency = dict(explained.answer.timings) | {"shown_ms": round(explained.total_ms, 2)}
        self._source = explained.source
        self._status()

    def _tell(self, health: Health) -> None:
        _log.info("server: %s %s %s", health.state, health.model, health.message)
        self._status()
        if health.state == "ready" and self._assistant is not None:
            self._assistant.server_came()

    def _tell_start(self, message: str) -> None:
        _log.info("%s", message)
        self._status(Health("starting", message))

    def _status(self, health: Health | None = None) -> None:
        if self._state != "running":
            return
        if health is None:
            health = self._service.health if self._service is not None else Health("connecting")
        is_paused = self._assistant is not None and self._assistant.is_paused
        self._peer.notify(
            "albor/status",
            {
                "state": "paused" if is_paused else health.state,
                "message": health.message,
                "model": health.model,
                "server": health.address,
                "latency": self._latency,
                "source": self._source,
            },
        )

    # --- small things ---

    async def _ask_client(self, method: str, params: Any) -> Any:
        try:
            return await self._peer.request(method, params)
        except RpcError as error:
            _log.info("the client refused %s: %s", method, error)
            return None

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _server_of(settings: Settings) -> tuple[object, ...]:
    return settings.server_url, settings.api_key, settings.model, settings.server_command


def _read_client(params: dict[str, Any]) -> _Client:
    capabilities = params.get("capabilities") or {}
    documents = capabilities.get("textDocument") or {}
    workspace = capabilities.get("workspace") or {}
    offered = (capabilities.get("general") or {}).get("positionEncodings") or ["utf-16"]
    inline = documents.get("inlineCompletion")
    item = (documents.get("completion") or {}).get("completionItem") or {}
    configuration = workspace.get("didChangeConfiguration") or {}
    folders = params.get("workspaceFolders") or []
    if not folders and params.get("rootUri"):
        folders = [{"uri": params["rootUri"]}]
    return _Client(
        encoding=next((each for each in offered if each in ENCODINGS), "utf-16"),
        has_inline=inline is not None,
        has_markdown="markdown" in (item.get("documentationFormat") or ()),
        registers_inline=bool((inline or {}).get("dynamicRegistration")),
        has_configuration=bool(workspace.get("configuration")),
        registers_configuration=bool(configuration.get("dynamicRegistration")),
        folders=_folders(folders),
    )


def _folders(values: Sequence[dict[str, Any]]) -> list[Path]:
    """Those on this machine, each once, in their order."""
    uris = [str(each["uri"]) for each in values]
    paths = [Path(unquote(urlsplit(uri).path)) for uri in uris if uri.startswith("file:")]
    return list(dict.fromkeys(paths))


def _capabilities(client: _Client) -> dict[str, Any]:
    capabilities: dict[str, Any] = {
        "positionEncoding": client.encoding,
        "textDocumentSync": {"openClose": True, "change": 2, "save": {"includeText": False}},
        "executeCommandProvider": {"commands": sorted(COMMANDS)},
        "workspace": {"workspaceFolders": {"supported": True, "changeNotifications": True}},
    }
    if not client.has_inline:
        capabilities["completionProvider"] = {"triggerCharacters": TRIGGERS}
    elif not client.registers_inline:
        capabilities["inlineCompletionProvider"] = {}
    return capabilities


def _section(values: Any) -> Any:
    """Settings that came under the name albor, or bare."""
    if isinstance(values, dict) and set(values) == {"albor"}:
        return values["albor"]
    return values


def _position(value: dict[str, Any]) -> Position:
    return Position(int(value["line"]), int(value["character"]))


def _accepted(suggestion: Suggestion) -> dict[str, Any]:
    return {"title": "", "command": "albor.accepted", "arguments": [suggestion.id]}


def _word_before(line: str, column: int) -> str:
    start = column
    while start > 0 and (line[start - 1].isalnum() or line[start - 1] == "_"):
        start -= 1
    return line[start:column]
