"""The assistant in process, in front of a server that answers as told."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
from albor_lsp.assistant import Assistant, Explained, Selected
from albor_lsp.document import Change, Point, Position
from albor_lsp.http import Address
from albor_lsp.service import Service
from albor_lsp.settings import Settings

from tests.lsp.fakes import FakeServer, until

URI = "file:///work/a.py"
HEAD = "import os\n\n\ndef add(first, second):\n    total = "
QUIET = Settings(prefetch=False, warm_up=False, look_ahead=False)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


class Typist:
    """One person in one document."""

    def __init__(self, assistant: Assistant, text: str, after: str = "\n") -> None:
        self.assistant = assistant
        self.text = text
        self.version = 0
        assistant.open(URI, "python", text + after)

    @property
    def place(self) -> Position:
        return Position(self.text.count("\n"), len(self.text.rpartition("\n")[2]))

    def type(self, text: str) -> None:
        place = self.place
        self.text += text
        self.version += 1
        self.assistant.change(URI, [Change(text, place, place)], "utf-16", self.version)

    async def ask(self, **more: Any) -> list[str]:
        found = await self.assistant.complete(URI, self.place, "utf-16", **more)
        return [each.text for each in found]


@contextlib.asynccontextmanager
async def assisted(
    settings: Settings = QUIET, roots: Sequence[Path] = (), **more: Any
) -> AsyncIterator[tuple[FakeServer, Assistant]]:
    async with FakeServer() as server:

        async def find() -> Address:
            return Address(port=server.port)

        service = Service(find)
        service.start()
        await until(lambda: service.is_ready)
        assistant = Assistant(service, settings, roots, **more)
        try:
            yield server, assistant
        finally:
            await assistant.close()
            await service.close()


def test_a_suggestion_and_typing_through_all_of_it() -> None:
    async def main() -> None:
        async with assisted() as (server, assistant):
            server.reply = lambda _body: "first + second"
            person = Typist(assistant, HEAD)
            assert await person.ask() == ["first + second"]
            assert server.bodies[0]["prompt"] == HEAD
            assert server.bodies[0]["suffix"] == "\n"
            for at, char in enumerate("first + secon", 1):
                person.type(char)
                assert await person.ask() == ["first + second"[at:]]
            assert len(server.bodies) == 1
            person.type("X")
            await person.ask()
            assert len(server.bodies) == 2

    run(main())


def test_an_answer_that_is_coming_is_joined_while_it_agrees() -> None:
    async def main() -> None:
        async with assisted() as (server, assistant):
            server.reply = lambda _body: "first + second"
            server.piece_delay_s = 0.05
            person = Typist(assistant, HEAD)
            early = asyncio.create_task(person.ask())
            await until(lambda: bool(server.bodies))
            await asyncio.sleep(0.02)
            person.type("f")
            assert await person.ask() == ["irst + second"]
            assert await early == []  # superseded, yet answered
            assert len(server.bodies) == 1

    run(main())


def test_an_answer_that_no_longer_agrees_is_given_up() -> None:
    async def main() -> None:
        async with assisted() as (server, assistant):
            server.reply = lambda body: (
                "uick brown fox jumps"
                if body["prompt"].endswith("q")
                else "a lazy dog sleeps there"
            )
            server.piece_delay_s = 0.05
            person = Typist(assistant, HEAD)
            early = asyncio.create_task(person.ask())
            await until(lambda: bool(server.bodies))
            await asyncio.sleep(0.02)
            person.type("q")
            assert await person.ask() == ["uick brown fox jumps"]
            assert await early == []
            assert server.num_closed == 1

    run(main())


def test_work_ahead_of_the_editors_question() -> None:
    async def main() -> None:
        settings = Settings(look_ahead=False)
        async with assisted(settings) as (server, assistant):
            server.reply = lambda _body: "42"
            person = Typist(assistant, HEAD, "word\n")
            person.type(" ")
            await asyncio.sleep(0.05)
            assert [body["max_tokens"] for body in server.bodies] == [0]  # only read, in a word
            person = Typist(assistant, HEAD)
            person.type("4")
            await until(lambda: len(server.asked) == 1)
            server.reply = lambda _body: "never asked"
            assert await person.ask() == ["42"]
            assert len(server.asked) == 1

    run(main())


def test_the_suggestion_after_acceptance_is_there_already() -> None:
    async def main() -> None:
        settings = Settings(prefetch=False, warm_up=False)
        async with assisted(settings) as (server, assistant):
            server.reply = lambda body: (
                "\n    return total" if body["prompt"].endswith("second") else "first + second"
            )
            person = Typist(assistant, HEAD)
            assert await person.ask() == ["first + second"]
            await until(lambda: len(server.asked) == 3)
            assert [body["albor"].get("priority") for body in server.bodies] == [
                None,
                "background",
                "background",
            ]
            await asyncio.sleep(0.05)
            person.type("first + second")
            server.reply = lambda _body: "never shown"
            assert await person.ask() == ["\n    return total"]

    run(main())


def _spell(*tokens: tuple[str, float, dict[str, float]]) -> dict[str, Any]:
    """The log-probabilities of a whole answer."""
    return {
        "tokens": [text for text, _, _ in tokens],
        "token_logprobs": [math.log(chance) for _, chance, _ in tokens],
        "top_logprobs": [
            {other: math.log(value) for other, value in {**others, text: chance}.items()}
            for text, chance, others in tokens
        ],
    }


def test_where_the_person_may_turn_off_is_computed_before() -> None:
    async def main() -> None:
        settings = Settings(prefetch=False, warm_up=False)
        async with assisted(settings) as (server, assistant):

            def reply(body: dict[str, Any]) -> str:
                if "logprobs" in body:
                    return "first + second"
                return {"= ": "first", "= s": "econd"}.get(body["prompt"][len(HEAD) - 2 :], "")

            server.reply = reply
            server.logprobs = lambda _body: _spell(
                ("first", 0.9, {"second": 0.05}), (" +", 0.2, {")": 0.1}), (" second", 0.9, {})
            )
            person = Typist(assistant, HEAD)
            assert await person.ask() == ["first"]
            await until(lambda: any(body["prompt"] == HEAD + "s" for body in server.asked))
            await asyncio.sleep(0.1)
            asked = len(server.asked)
            ahead = [body for body in server.asked[1:] if "logprobs" not in body]
            assert all(body["albor"]["min_confidence"] == 0.3 for body in ahead)
            shown = server.asked[1]
            assert shown["logprobs"] == 10
            assert "min_confidence" not in shown["albor"]
            server.reply = lambda _body: "never shown"
            person.type("s")
            assert await person.ask() == ["econd"]
            person = Typist(assistant, HEAD)
            assert len(server.asked) >= asked

    run(main())


def test_what_stands_behind_the_gate_is_there_when_it_is_reached() -> None:
    async def main() -> None:
        settings = Settings(prefetch=False, warm_up=False)
        async with assisted(settings) as (server, assistant):
            server.reply = lambda body: "first + second" if "logprobs" in body else ""
            server.logprobs = lambda _body: _spell(
                ("first", 0.2, {}), (" +", 0.9, {}), (" second", 0.9, {})
            )
            person = Typist(assistant, HEAD)
            assert await person.ask() == []
            await until(lambda: len(server.asked) >= 2)
            await asyncio.sleep(0.05)
            server.reply = lambda _body: "never shown"
            person.type("first")
            assert await person.ask() == [" + second"]

    run(main())


def test_work_ahead_is_not_begun_twice_while_typing_agrees() -> None:
    async def main() -> None:
        settings = Settings(prefetch=False, warm_up=False)
        async with assisted(settings) as (server, assistant):
            server.reply = lambda _body: "first + second"
            person = Typist(assistant, HEAD)
            await person.ask()
            for char in "first":
                person.type(char)
                await person.ask()
            await asyncio.sleep(0.1)
            assert len([body for body in server.asked if "logprobs" in body]) == 1

    run(main())


def test_a_long_answer_is_shown_line_by_line() -> None:
    async def main() -> None:
        seen: list[Explained] = []
        async with assisted(on_answer=seen.append) as (server, assistant):
            whole = "a = 1\n    b = 2\n    return a + b"
            server.reply = lambda _body: whole
            server.piece_delay_s = 0.03
            person = Typist(assistant, HEAD.removesuffix("total = "))
            assert (await person.ask())[0] in (whole[:5], whole[:15])
            assert seen[-1].source == "partial"
            assert seen[-1].is_new
            # The rest is not asked for again: typing on shows what came meanwhile.
            await asyncio.sleep(0.03 * len(whole))
            person.type("a")
            assert await person.ask() == [whole[1:]]
            assert not seen[-1].is_new
            assert len(server.bodies) == 1
            # By hand, the whole answer is worth the wait.
            person = Typist(assistant, HEAD.removesuffix("total = "))
            assert (await person.ask(invoked=True))[0] == whole

    run(main())


def test_the_rest_of_an_answer_follows_its_accepted_lines() -> None:
    async def main() -> None:
        async with assisted() as (server, assistant):
            whole = "a = 1\n    b = 2\n    c = 3\n    return a + b"
            server.reply = lambda _body: whole
            server.piece_delay_s = 0.03
            person = Typist(assistant, HEAD.removesuffix("total = "))
            (first,) = await person.ask()
            assert first != whole
            assert whole.startswith(first)
            person.type(first)
            rest = await person.ask()
            assert rest
            assert whole.startswith(first + rest[0])
            assert len(server.bodies) == 1

    run(main())


def test_invoked_gives_several() -> None:
    async def main() -> None:
        async with assisted() as (server, assistant):
            answers = iter(["one", "two"])
            server.reply = lambda body: next(answers)
            person = Typist(assistant, HEAD)
            assert await person.ask(invoked=True) == ["one", "two"]
            assert server.bodies[1]["n"] == 3

    run(main())


def test_a_menus_entry_is_extended() -> None:
    async def main() -> None:
        async with assisted() as (server, assistant):
            server.reply = lambda _body: "(first)"
            person = Typist(assistant, HEAD + "pri")
            start, end = Point(4, 12), Point(4, 15)
            (found,) = await assistant.complete(
                URI, person.place, "utf-16", selected=Selected(start, end, "print")
            )
            assert (found.text, found.start, found.end) == ("print(first)", start, end)
            assert server.bodies[0]["albor"]["typed_ahead"] == "nt"
            nothing = await assistant.complete(
                URI, person.place, "utf-16", selected=Selected(start, end, "Other")
            )
            assert nothing == []

    run(main())


@pytest.mark.parametrize("name", [".env", "id_rsa", "server.pem"])
def test_files_with_secrets_stay_here(name: str) -> None:
    async def main() -> None:
        async with assisted(Settings()) as (server, assistant):
            uri = f"file:///work/{name}"
            assistant.open(uri, "plaintext", "PASSWORD=")
            assistant.change(uri, [Change("x", Position(0, 9), Position(0, 9))], "utf-16", 1)
            assert await assistant.complete(uri, Position(0, 10), "utf-16", invoked=True) == []
            await asyncio.sleep(0.05)
            assert server.bodies == []

    run(main())


def test_text_with_a_key_stays_here() -> None:
    async def main() -> None:
        async with assisted(Settings()) as (server, assistant):
            person = Typist(assistant, 'KEY = "-----BEGIN RSA PRIVATE KEY-----\nabc"\nx = ')
            person.type("1")
            assert await person.ask(invoked=True) == []
            await asyncio.sleep(0.05)
            assert server.bodies == []

    run(main())


def test_pausing_languages_and_unknown_documents() -> None:
    async def main() -> None:
        settings = Settings(
            prefetch=False, warm_up=False, look_ahead=False, disabled_languages=("python",)
        )
        async with assisted(settings) as (server, assistant):
            assert await assistant.complete("file:///none", Position(0, 0), "utf-16") == []
            assistant.change("file:///none", [Change("x")], "utf-16")
            assistant.save("file:///none")
            assistant.close_document("file:///none")
            person = Typist(assistant, HEAD)
            assert await person.ask() == []
            assert await person.ask(invoked=True) == ["x"]
            assistant.is_paused = True
            assert await person.ask(invoked=True) == []
            assistant.close_document(URI)
            assert await person.ask() == []
            assert len(server.asked) == 2

    run(main())


def test_a_failing_server_is_an_empty_answer() -> None:
    async def main() -> None:
        async with assisted() as (server, assistant):
            person = Typist(assistant, HEAD)
            server.status = 500
            assert await person.ask() == []
            server.status = 200
            person.type("1")
            assert await person.ask() == ["x"]
            await server.stop()
            person.type("2")
            assert await person.ask() == []
            assert await person.ask() == []

    run(main())


def test_what_was_shown_and_accepted_is_told() -> None:
    async def main() -> None:
        shown: list[Explained] = []
        accepted: list[Explained] = []
        async with assisted(on_answer=shown.append, on_accept=accepted.append) as (
            server,
            assistant,
        ):
            server.reply = lambda _body: "first + second"
            person = Typist(assistant, HEAD)
            await person.ask()
            person.type("f")
            (found,) = await assistant.complete(URI, person.place, "utf-16")
            assert [each.is_new for each in shown] == [True, False]
            assistant.accepted(found.id)
            assistant.accepted("unknown")
            assert [each.shown for each in accepted] == ["irst + second"]
            assert assistant.last is not None
            assert await assistant.probabilities(assistant.last) == (("first + second", -0.1),)

    run(main())


def test_a_new_setting_makes_old_answers_stale() -> None:
    async def main() -> None:
        async with assisted() as (server, assistant):
            person = Typist(assistant, HEAD)
            await person.ask()
            assistant.settings = Settings(
                prefetch=False, warm_up=False, look_ahead=False, max_tokens=5
            )
            await person.ask()
            assert [body["max_tokens"] for body in server.asked][1] == 5

    run(main())


def test_pieces_come_from_the_documents_own_project(tmp_path: Path) -> None:
    async def main() -> None:
        roots = [tmp_path / name for name in ("one", "two", "one/inner")]
        settings = Settings(prefetch=False, warm_up=False, look_ahead=False)
        async with assisted(settings, roots) as (server, assistant):
            for root in roots:
                lines = [f"    {root.name}_{at} = {at} * factor" for at in range(20)]
                code = "\n".join([f"def of_{root.name}():", *lines, ""])
                assistant.open((root / "helper.py").as_uri(), "python", code)

            async def read_beside(path: Path) -> tuple[str, list[str]]:
                assistant.open(path.as_uri(), "python", "x = \n")
                await assistant.complete(path.as_uri(), Position(0, 4), "utf-16")
                extension = server.bodies[-1]["albor"]
                pieces = extension.get("extra_context", [])
                return extension["path"], [piece["text"].split("(")[0] for piece in pieces]

            assert await read_beside(roots[0] / "a.py") == ("a.py", ["def of_one"])
            assert await read_beside(roots[1] / "b.py") == ("b.py", ["def of_two"])
            # The innermost folder is a file's own.
            assert await read_beside(roots[2] / "c.py") == ("c.py", ["def of_inner"])
            # A folder that is closed: its files go with the first one.
            assistant.roots = [roots[1]]
            assert assistant.roots == (roots[1],)
            path, pieces = await read_beside(roots[0] / "d.py")
            assert path == "d.py"
            assert "def of_two" in pieces

    run(main())


def test_brackets_that_the_editor_closed() -> None:
    async def main() -> None:
        settings = Settings(warm_up=False, look_ahead=False)
        async with assisted(settings) as (server, assistant):
            server.reply = lambda _body: "first"
            person = Typist(assistant, HEAD + "abs")
            person.type("()")
            await until(lambda: bool(server.asked))
            assert server.asked[0]["prompt"].endswith("abs(")
            person.text = person.text[:-1]
            assert await person.ask() == ["first"]
            assert len(server.asked) == 1

    run(main())
