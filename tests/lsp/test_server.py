"""The language server as editors meet it: a process, their capabilities, its manners."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest
from albor_lsp.server import COMMANDS
from lsprotocol import types
from pytest_lsp import LanguageClient, client_capabilities
from pytest_lsp.client import make_test_lsp_client

from tests.lsp.fakes import LSP_FOLDER, Editor, FakeServer, editor, gather_within, until

URI = "file:///work/a.py"
TEXT = "import os\n\n\ndef add(first, second):\n    total = "
AT = {"line": 4, "character": 12}

# The part of each editor's capabilities that decides how a server completes.
VSCODE = {
    "general": {"positionEncodings": ["utf-16"]},
    "textDocument": {
        "synchronization": {"dynamicRegistration": True, "didSave": True},
        "completion": {"dynamicRegistration": True, "contextSupport": True},
        "inlineCompletion": {"dynamicRegistration": True},
    },
    "workspace": {
        "configuration": True,
        "workspaceFolders": True,
        "didChangeConfiguration": {"dynamicRegistration": True},
        "executeCommand": {"dynamicRegistration": True},
    },
}
NEOVIM = {
    "general": {"positionEncodings": ["utf-8", "utf-16", "utf-32"]},
    "textDocument": {
        "synchronization": {"dynamicRegistration": False, "didSave": True},
        "completion": {"dynamicRegistration": False},
        "inlineCompletion": {"dynamicRegistration": False},
    },
    "workspace": {
        "configuration": True,
        "workspaceFolders": True,
        "didChangeConfiguration": {"dynamicRegistration": False},
    },
}
HELIX = {
    "general": {"positionEncodings": ["utf-8", "utf-32", "utf-16"]},
    "textDocument": {
        "completion": {"completionItem": {"snippetSupport": True, "insertReplaceSupport": True}}
    },
    "workspace": {
        "configuration": True,
        "workspaceFolders": True,
        "didChangeConfiguration": {"dynamicRegistration": False},
    },
}
QUIET = {"prefetch": False, "warmUp": False, "lookAhead": False}


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


@contextlib.asynccontextmanager
async def talking(
    folder: Path, capabilities: dict[str, Any], text: str = TEXT, **settings: Any
) -> AsyncIterator[tuple[FakeServer, Editor, dict[str, Any]]]:
    """An editor with an open document in front of a server that is ready."""
    async with (
        FakeServer(lambda _body: "first + second") as server,
        editor(folder, server.url) as e,
    ):
        hello = await e.hello(capabilities, initializationOptions=QUIET | settings)
        await e.wait_status("ready")
        e.open(URI, text)
        yield server, e, hello["capabilities"]


def inline(at: dict[str, int] = AT, kind: int = 2, **context: Any) -> dict[str, Any]:
    context = {"triggerKind": kind} | context
    return {"textDocument": {"uri": URI}, "position": at, "context": context}


def change(text: str, at: dict[str, int], version: int = 1) -> dict[str, Any]:
    span = {"start": at, "end": at}
    document = {"uri": URI, "version": version}
    return {"textDocument": document, "contentChanges": [{"range": span, "text": text}]}


def test_vs_code(tmp_path: Path) -> None:
    async def main() -> None:
        async with talking(tmp_path, VSCODE) as (_server, e, offered):
            assert offered["positionEncoding"] == "utf-16"
            assert "completionProvider" not in offered
            assert "inlineCompletionProvider" not in offered  # registered instead
            await until(lambda: len(e.requests) >= 2)
            registered = [
                each["method"]
                for request in e.requests
                if request["method"] == "client/registerCapability"
                for each in request["params"]["registrations"]
            ]
            assert "textDocument/inlineCompletion" in registered
            assert "workspace/didChangeConfiguration" in registered
            (item,) = (await e.ask("textDocument/inlineCompletion", inline()))["items"]
            assert item["insertText"] == "first + second"
            assert item["range"] == {"start": AT, "end": AT}
            await e.ask("workspace/executeCommand", item["command"])
            several = await e.ask("textDocument/inlineCompletion", inline(kind=1))
            assert len(several["items"]) == 1  # the others were the same text
            assert await e.bye() == 0
            counted = json.loads((tmp_path / "state" / "albor" / "statistics.json").read_text())
            (day,) = counted.values()
            assert day["accepted"] == 1
            assert day["chars_accepted"] == len("first + second")

    run(main())


def test_vs_codes_menu_entry(tmp_path: Path) -> None:
    async def main() -> None:
        async with talking(tmp_path, VSCODE, TEXT + "fi") as (server, e, _):
            server.reply = lambda _body: " + second"
            span = {"start": AT, "end": {"line": 4, "character": 14}}
            asked = inline(
                {"line": 4, "character": 14},
                selectedCompletionInfo={"range": span, "text": "first"},
            )
            (item,) = (await e.ask("textDocument/inlineCompletion", asked))["items"]
            assert item["insertText"] == "first + second"
            assert item["range"] == span
            assert server.asked[0]["albor"]["typed_ahead"] == "rst"

    run(main())


def test_neovim(tmp_path: Path) -> None:
    async def main() -> None:
        text = "# 😀 é\nx = '😀'; y = "
        async with talking(tmp_path, NEOVIM, text) as (server, e, offered):
            assert offered["positionEncoding"] == "utf-8"
            assert offered["inlineCompletionProvider"] == {}
            at = {"line": 1, "character": len("x = '😀'; y = ".encode())}
            (item,) = (await e.ask("textDocument/inlineCompletion", inline(at)))["items"]
            assert item["range"] == {"start": at, "end": at}
            assert server.asked[0]["prompt"] == text

    run(main())


def test_helix(tmp_path: Path) -> None:
    async def main() -> None:
        async with talking(tmp_path, HELIX, TEXT + "fi") as (server, e, offered):
            server.reply = lambda _body: "rst + second\n    return total"
            assert offered["positionEncoding"] == "utf-8"
            assert " " in offered["completionProvider"]["triggerCharacters"]
            asked = {
                "textDocument": {"uri": URI},
                "position": {"line": 4, "character": 14},
                "context": {"triggerKind": 1},
            }
            # A question that is not cancelled when the next one comes is answered all the same.
            server.piece_delay_s = 0.02
            _, early = e.ask_later("textDocument/completion", asked)
            _, late = e.ask_later("textDocument/completion", asked)
            first, second = await gather_within(10, early, late)
            assert first["result"] == {"isIncomplete": True, "items": []}
            (item,) = second["result"]["items"]
            assert item["label"] == "first + second"
            assert item["filterText"] == "fi"
            assert item["preselect"] is True
            assert item["textEdit"] == {
                "range": {"start": AT, "end": {"line": 4, "character": 14}},
                "newText": "first + second\n    return total",
            }
            assert item["documentation"] == item["textEdit"]["newText"]

    run(main())


def test_a_cancelled_question_is_answered_as_such(tmp_path: Path) -> None:
    async def main() -> None:
        async with talking(tmp_path, VSCODE) as (server, e, _):
            server.delay_s = 5
            number, answer = e.ask_later("textDocument/inlineCompletion", inline())
            await until(lambda: bool(server.asked))
            e.notify("$/cancelRequest", {"id": number})
            started = time.perf_counter()
            assert (await answer)["error"]["code"] == -32800
            assert time.perf_counter() - started < 2

    run(main())


def test_a_question_is_about_the_text_of_its_moment(tmp_path: Path) -> None:
    async def main() -> None:
        async with talking(tmp_path, VSCODE) as (server, e, _):
            _, answer = e.ask_later("textDocument/inlineCompletion", inline())
            e.notify("textDocument/didChange", change("zzz", {"line": 0, "character": 0}))
            await answer
            assert server.asked[0]["prompt"] == TEXT
            await e.ask("textDocument/inlineCompletion", inline())
            assert server.asked[1]["prompt"] == "zzz" + TEXT

    run(main())


def test_without_a_server_there_is_an_answer_and_one_status(tmp_path: Path) -> None:
    async def main() -> None:
        async with editor(tmp_path, "http://127.0.0.1:9") as e:
            await e.hello(VSCODE)
            e.open(URI, TEXT)
            await e.wait_status("offline")
            for _ in range(20):
                assert await e.ask("textDocument/inlineCompletion", inline()) == {"items": []}
            states = [
                each["params"]["state"]
                for each in e.notifications
                if each["method"] == "albor/status"
            ]
            assert states == ["connecting", "offline"]
            assert not any(each["method"] == "window/showMessage" for each in e.notifications)

    run(main())


def test_a_server_that_dies_and_returns(tmp_path: Path) -> None:
    async def main() -> None:
        async with talking(tmp_path, NEOVIM) as (server, e, _):
            assert (await e.ask("textDocument/inlineCompletion", inline()))["items"]
            await server.stop()
            e.notify("textDocument/didChange", change("1", AT))
            at = {"line": 4, "character": 13}
            assert (await e.ask("textDocument/inlineCompletion", inline(at)))["items"] == []
            e.notifications.clear()
            await server.start()
            await e.wait_status("ready")
            assert (await e.ask("textDocument/inlineCompletion", inline(at)))["items"]

    run(main())


def test_settings_from_every_place(tmp_path: Path) -> None:
    async def main() -> None:
        (tmp_path / "config" / "albor").mkdir(parents=True)
        (tmp_path / "config" / "albor" / "lsp.json").write_text('{"maxTokens": 3, "typo": 1}')
        async with talking(tmp_path, VSCODE) as (server, e, _):
            await e.ask("textDocument/inlineCompletion", inline())
            assert server.asked[0]["max_tokens"] == 3
            for answer in ({"maxTokens": 4, "typo": 2}, {"maxTokens": 5}):
                e.configuration = answer
                number = len(e.requests)
                e.notify("workspace/didChangeConfiguration", {"settings": None})
                await until(lambda number=number: len(e.requests) > number)  # type: ignore[misc]
                await e.ask("textDocument/inlineCompletion", inline())
                assert server.asked[-1]["max_tokens"] == answer["maxTokens"]
            e.notify(
                "workspace/didChangeConfiguration", {"settings": {"albor": {"enabled": False}}}
            )
            assert await e.ask("textDocument/inlineCompletion", inline()) == {"items": []}
            said = [
                each["params"]["message"]
                for each in e.notifications
                if each["method"] == "window/logMessage"
            ]
            assert sum("typo" in line for line in said) == 1

    run(main())


def test_commands(tmp_path: Path) -> None:
    async def main() -> None:
        async with talking(tmp_path, VSCODE) as (_server, e, offered):
            assert set(offered["executeCommandProvider"]["commands"]) == set(COMMANDS)

            async def command(name: str, *arguments: Any) -> Any:
                params = {"command": name, "arguments": list(arguments)}
                return await e.ask("workspace/executeCommand", params)

            assert "Nothing was suggested" in await command("albor.explain")
            await e.ask("textDocument/inlineCompletion", inline())
            explained = await command("albor.explain")
            for words in ("first + second", "prefill_ms", "0.90", "def add(first, second)"):
                assert words in explained
            assert "all days" in await command("albor.stats")
            assert "ready" in await command("albor.showLog")
            assert await command("albor.pause") is True
            assert await e.ask("textDocument/inlineCompletion", inline()) == {"items": []}
            assert (await e.wait_status("paused"))["model"] == "fake"
            assert await command("albor.pause", False) is False
            e.notifications.clear()
            await command("albor.restart")
            await e.wait_status("ready")
            answer = await e.ask_raw("workspace/executeCommand", {"command": "albor.none"})
            assert "no such command" in answer["error"]["message"]

    run(main())


def test_the_order_of_life(tmp_path: Path) -> None:
    async def main() -> None:
        async with editor(tmp_path) as e:
            assert (await e.ask_raw("textDocument/inlineCompletion", inline()))["error"][
                "code"
            ] == -32002
            await e.hello(VSCODE)
            assert "twice" in (await e.ask_raw("initialize", {}))["error"]["message"]
            assert "error" in await e.ask_raw("no/such", {})
            assert "error" in await e.ask_raw("textDocument/inlineCompletion", {"position": 1})
            e.notify("textDocument/didChange", {"nonsense": True})
            await e.ask("shutdown")
            assert (await e.ask_raw("shutdown"))["error"]["code"] == -32600
            e.notify("exit", None)
            assert await asyncio.wait_for(e.process.wait(), 10) == 0

    run(main())


def test_it_ends_with_its_editor(tmp_path: Path) -> None:
    async def main() -> None:
        async with editor(tmp_path) as e:
            await e.hello(VSCODE)
            assert e.process.stdin is not None
            e.process.stdin.close()
            assert await asyncio.wait_for(e.process.wait(), 10) == 1
        async with editor(tmp_path) as e:
            e.process.stdin.write(b"GET / HTTP/1.1\r\n\r\n")  # type: ignore[union-attr]
            assert await asyncio.wait_for(e.process.wait(), 10) == 1

    run(main())


def test_over_tcp(tmp_path: Path) -> None:
    async def main() -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            "import sys; from albor_lsp.cli import main; sys.exit(main())",
            "--tcp",
            "0",
            stderr=asyncio.subprocess.PIPE,
            env={"PYTHONPATH": str(LSP_FOLDER), "HOME": str(tmp_path)},
        )
        try:
            assert process.stderr is not None
            port = int((await process.stderr.readline()).rsplit(b":", 1)[1])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            data = json.dumps({"id": 1, "method": "initialize", "params": {}}).encode()
            writer.write(b"Content-Length: %d\r\n\r\n" % len(data) + data)
            size = int((await reader.readuntil(b"\r\n\r\n")).split(b":")[1])
            assert b"executeCommandProvider" in await reader.readexactly(size)
            writer.close()
        finally:
            process.kill()
            await process.wait()

    run(main())


@pytest.mark.parametrize("name", ["visual-studio-code@v1.65", "neovim@v0.11", "emacs"])
def test_recorded_capabilities(tmp_path: Path, name: str) -> None:
    """A client made by others, with the capabilities that real editors were recorded to send.

    These editors know no inline completion, so that the menu is what they are offered.
    """

    async def main() -> None:
        async with FakeServer(lambda _body: "first + second") as server:
            client: LanguageClient = make_test_lsp_client()
            client.set_configuration({"albor": QUIET | {"serverUrl": server.url}})
            start = "import sys; from albor_lsp.cli import main; sys.exit(main())"
            environment = {
                "PYTHONPATH": str(LSP_FOLDER),
                "HOME": str(tmp_path),
                "XDG_RUNTIME_DIR": str(tmp_path),
            }
            await client.start_io(sys.executable, "-c", start, env=environment)
            result = await client.initialize_session(
                types.InitializeParams(
                    capabilities=client_capabilities(name),
                    root_uri="file:///work",
                    initialization_options=QUIET | {"serverUrl": server.url},
                )
            )
            assert result.capabilities.completion_provider is not None
            client.text_document_did_open(
                types.DidOpenTextDocumentParams(types.TextDocumentItem(URI, "python", 0, TEXT))
            )
            items: list[types.CompletionItem] = []
            async with asyncio.timeout(10):
                while not items:
                    await asyncio.sleep(0.05)
                    found = await client.text_document_completion_async(
                        types.CompletionParams(
                            types.TextDocumentIdentifier(URI), types.Position(4, 12)
                        )
                    )
                    assert isinstance(found, types.CompletionList)
                    items = list(found.items)
            assert items[0].label == "first + second"
            assert "\0" not in (items[0].sort_text or ""), "Emacs 28 cannot read it"
            await client.shutdown_session()
            await client.stop()

    run(main())


# --- how long it takes, and for how long it goes on ---


async def _round_trips(folder: Path, num_keys: int) -> list[float]:
    """Milliseconds from a key to the answer in a file of 5,000 lines, with a model that takes
    no time."""
    text = "".join(f"value_{n} = some_function({n}, 'text')\n" for n in range(5000))
    async with talking(folder, VSCODE, text, prefetch=True, warmUp=True) as (server, e, _):
        server.reply = lambda _body: "never typed"
        times = []
        for n in range(num_keys):
            at = {"line": 2500, "character": n}
            e.notify("textDocument/didChange", change("x", at, n + 1))
            started = time.perf_counter()
            place = {"line": 2500, "character": n + 1}
            await e.ask("textDocument/inlineCompletion", inline(place))
            times.append((time.perf_counter() - started) * 1000)
            await asyncio.sleep(0.01)
        return times


@pytest.mark.slow
def test_how_long_a_round_trip_takes(tmp_path: Path) -> None:
    async def main() -> None:
        times = sorted(await _round_trips(tmp_path, 500))
        print(
            f"\nround trip: p50 {statistics.median(times):.2f} ms, "
            f"p99 {times[int(0.99 * len(times))]:.2f} ms"
        )

    run(main())


@pytest.mark.slow
def test_how_long_the_start_takes(tmp_path: Path) -> None:
    """From starting the process to the answer to initialize."""

    async def once() -> float:
        started = time.perf_counter()
        async with editor(tmp_path, "http://127.0.0.1:9") as e:
            await e.hello(VSCODE)
            return (time.perf_counter() - started) * 1000

    async def main() -> None:
        times = [await once() for _ in range(11)]
        print(f"\nstart: median {statistics.median(times):.0f} ms, most {max(times):.0f} ms")

    run(main())


def test_round_trips_of_a_long_file_are_answered(tmp_path: Path) -> None:
    async def main() -> None:
        assert len(await _round_trips(tmp_path, 20)) == 20

    run(main())


def _memory_kb(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0


def test_folders_come_and_go(tmp_path: Path) -> None:
    async def main() -> None:
        folders = [tmp_path / name for name in ("one", "two")]
        first, second = [{"uri": each.as_uri(), "name": each.name} for each in folders]
        async with FakeServer() as server, editor(tmp_path, server.url) as e:
            server.reply = lambda _body: "1"
            told = await e.hello(VSCODE, workspaceFolders=[first])
            assert told["capabilities"]["workspace"]["workspaceFolders"]["supported"]
            await e.wait_status("ready")
            e.open((folders[1] / "b" / "m.py").as_uri(), "x = ")
            place = {"line": 0, "character": 4}
            context = {"triggerKind": 2}
            document = {"uri": (folders[1] / "b" / "m.py").as_uri()}
            question = {"textDocument": document, "position": place, "context": context}
            await e.ask("textDocument/inlineCompletion", question)
            assert server.bodies[-1]["albor"]["path"] == "m.py"
            event = {"added": [second], "removed": [first]}
            e.notify("workspace/didChangeWorkspaceFolders", {"event": event})
            await e.ask("textDocument/inlineCompletion", question)
            assert server.bodies[-1]["albor"]["path"] == "b/m.py"

    run(main())


async def soak(
    folder: Path, seconds: float, seed: int = 0, pause_s: float = 0.0
) -> tuple[int, int, list[int]]:
    """Random edits in three documents while the server dies and returns; every question gets an
    answer and every answer is for the right text. Returns (questions, restarts, memory in kB)."""
    rng = random.Random(seed)
    uris = [f"file:///work/{name}.py" for name in "abc"]
    texts = {uri: ["x = 1", "", "def f():", "    pass"] for uri in uris}
    prompts: dict[str, str] = {}
    num_asked = num_restarts = 0
    memory: list[int] = []
    async with FakeServer() as server, editor(folder, server.url) as e:
        server.reply = lambda body: f"<{len(body['prompt'])}>"
        e.patience_s = 600  # the machine may stop for others
        await e.hello(NEOVIM, initializationOptions={"otherFiles": False, "lookAhead": False})
        await e.wait_status("ready")
        for uri in uris:
            e.open(uri, "\n".join(texts[uri]))
        ends = time.monotonic() + seconds
        next_memory = 0.0
        version = 0
        while time.monotonic() < ends:
            uri = rng.choice(uris)
            lines = texts[uri]
            line = rng.randrange(len(lines))
            column = len(lines[line])
            new = rng.choice(["a", "é", "😀", " = ", "(", "\n    ", "\n"])
            version += 1
            at = {"line": line, "character": len(lines[line].encode())}
            span = {"start": at, "end": at}
            if len(lines) > 200:
                lines[:] = ["start"]
                changes: list[dict[str, Any]] = [{"text": "start"}]
                line, column = 0, 5
            else:
                fresh = (lines[line] + new).split("\n")
                lines[line : line + 1] = fresh
                changes = [{"range": span, "text": new}]
                line, column = line + len(fresh) - 1, len(fresh[-1])
            document = {"uri": uri, "version": version}
            e.notify(
                "textDocument/didChange", {"textDocument": document, "contentChanges": changes}
            )
            place = {"line": line, "character": len(lines[line][:column].encode())}
            answer = await e.ask(
                "textDocument/inlineCompletion",
                {"textDocument": {"uri": uri}, "position": place, "context": {"triggerKind": 2}},
            )
            num_asked += 1
            for item in answer["items"]:
                before = "\n".join([*lines[:line], lines[line][:column]])
                sent = [b["prompt"] for b in server.bodies if before.endswith(b["prompt"])]
                assert sent, f"no question was about {before[-40:]!r}"
                assert item["range"]["start"] == place
                prompts[uri] = sent[-1]
            del server.bodies[:-200]
            if pause_s:
                await asyncio.sleep(rng.expovariate(1 / pause_s))
            if rng.random() < 0.003:
                num_restarts += 1
                await server.stop()
                await asyncio.sleep(rng.uniform(0, 0.3))
                await server.start()
            if time.monotonic() > next_memory:
                next_memory = time.monotonic() + seconds / 20
                memory.append(_memory_kb(e.process.pid))
        assert e.num_late == 0
        assert await e.bye() == 0
    assert len(prompts) == 3
    return num_asked, num_restarts, memory


def test_soak_shortly(tmp_path: Path) -> None:
    async def main() -> None:
        num_asked, _, _ = await soak(tmp_path, 3.0)
        assert num_asked > 20

    run(main())


@pytest.mark.slow
@pytest.mark.timeout(2 * 3600)
def test_soak(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """--soak-seconds N; an hour by default."""

    async def main() -> None:
        seconds = float(pytestconfig.getoption("--soak-seconds"))
        num_asked, num_restarts, memory = await soak(tmp_path, seconds, pause_s=0.02)
        print(f"\n{num_asked} questions, {num_restarts} restarts, memory {memory} kB")
        early = max(memory[len(memory) // 5 : len(memory) // 2])
        assert memory[-1] < early * 1.15 + 2000

    run(main())
