"""The assistant: follows open documents, and answers what to suggest at a cursor.

It knows nothing of LSP's wire; a language server is a thin shell around it, and tests and
benchmarks drive it directly. All of it runs in one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from albor_lsp.beyond import places_beyond, turns
from albor_lsp.completion_cache import CompletionCache, Key
from albor_lsp.context import Chunk, ContextBuilder, ContextSettings, Window
from albor_lsp.document import Change, Document, Encoding, Point, Position
from albor_lsp.errors import LspError, ServerDownError
from albor_lsp.ignore import holds_secret, is_secret_name
from albor_lsp.policy import Debounce, Decision, should_ask
from albor_lsp.service import Answer, Ask, Service, now_ms
from albor_lsp.settings import Settings
from albor_lsp.tidy import detect_indent, tidy

__all__ = ["Assistant", "Explained", "Selected", "Suggestion"]

NUM_CHOICES: Final = 3
"""Suggestions to choose from when the person asked."""
CHOICE_TEMPERATURE: Final = 0.6
WARM_TOKENS: Final = 0
AHEAD_TOKENS: Final = 32
"""How far an answer ahead of the person goes."""
NUM_ALTERNATIVES: Final = 10
NUM_TURNS: Final = 10
"""Places to be ready for where the person does not write what is suggested."""
PATIENCE_MS: Final = 60.0
"""How long whole answers of several lines are waited for: then the lines that are there are shown,
and the rest as soon as the person types on."""
BUSY_MS: Final = 100.0
"""A question that waited longer stood behind others."""
MAX_REMEMBERED: Final = 64
JUMP_LINES: Final = 32
ORIGIN: Final = Point(0, 0)
_PAIRS: Final = ("()", "[]", "{}", '""', "''", "``")

_log = logging.getLogger("albor_lsp")


@dataclass(frozen=True, slots=True)
class Selected:
    """The entry that is selected in the editor's completion menu."""

    start: Point
    end: Point
    text: str
    """What would stand in the range."""


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Text to offer.

    Attributes:
        start, end: what `text` replaces; both are the cursor but for a menu's selected entry.
        id: for `Assistant.accepted`.
    """

    id: str
    text: str
    start: Point
    end: Point


@dataclass(frozen=True, slots=True)
class Explained:
    """How a suggestion came to be."""

    query: _Query
    shown: str
    answer: Answer
    source: str
    """computed, joined, cached, or partial: lines of an answer that is still coming."""
    total_ms: float
    is_new: bool = True
    """Not just what is left of the one before."""


@dataclass(frozen=True, slots=True)
class _Query:
    """A cursor in a text, ready to be asked about."""

    opened: _Open
    point: Point
    window: Window
    chunks: tuple[Chunk, ...]
    decision: Decision
    key: Key
    typed_ahead: str = ""

    @property
    def prefix(self) -> str:
        """All that an answer goes on from."""
        return self.window.prefix + self.typed_ahead


class _Flight:
    """A question on its way. Whoever waits is woken at each piece of text and at the end."""

    def __init__(self, query: _Query) -> None:
        self.query = query
        self.text = ""
        self.answer: Answer | None = None
        self.error: Exception | None = None
        self.was_shown_in_part = False
        self.task: asyncio.Task[None] | None = None
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def is_done(self) -> bool:
        return self.answer is not None or self.error is not None

    def add(self, piece: str) -> None:
        self.text += piece
        self.wake()

    def wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            if not each.done():
                each.set_result(None)

    async def changed(self, timeout_s: float | None = None) -> None:
        """Wait for a piece of text or the end; raises TimeoutError."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        async with asyncio.timeout(timeout_s):
            await future

    def typed_since(self, query: _Query) -> str | None:
        """What was typed since it was asked; None where its answer can't fit any more."""
        if query.key != self.query.key or not query.prefix.startswith(self.query.prefix):
            return None
        typed = query.prefix[len(self.query.prefix) :]
        if self.text.startswith(typed):
            return typed
        # Still short: go on while it agrees, unless nothing of it is there yet to judge by.
        agrees = bool(self.text) and typed.startswith(self.text) and not self.is_done
        return typed if agrees else None


@dataclass(slots=True)
class _Open:
    """An open document and what is being done for it."""

    document: Document
    path: str
    """Inside its project."""
    context: ContextBuilder
    """Its project's."""
    session: str
    is_secret: bool
    """Its name says that it holds keys: nothing of it is sent anywhere."""
    flight: _Flight | None = None
    ticket: object | None = None
    """Of the latest question; an older one gives up when it sees another's."""
    warming: asyncio.Task[None] | None = None
    ahead: asyncio.Task[None] | None = None
    ahead_of: tuple[Key, str] | None = None
    """Where `ahead` leads, and what it was for: it is not begun twice."""
    point: Point = ORIGIN
    asked_at: int = -1
    """Number of changes when a person's cursor was last asked about."""
    num_changes: int = 0
    query: _Query | None = None
    query_state: tuple[object, ...] = ()
    """What `query` was made from."""
    shown: str = ""
    recent: deque[str] = field(default_factory=lambda: deque(maxlen=2))


class Assistant:
    """Suggestions for one editor.

    Args:
        service: the completion server.
        settings: may be replaced while it runs, by assigning the attribute.
        roots: the projects' folders. Pieces of other files come from the document's own project;
            a document outside of all goes with the first one.
        on_answer: called with (Explained) after each suggestion.
    """

    def __init__(
        self,
        service: Service,
        settings: Settings,
        roots: Sequence[Path] = (),
        *,
        on_answer: Callable[[Explained], None] = lambda _explained: None,
        on_accept: Callable[[Explained], None] = lambda _explained: None,
    ) -> None:
        self.service = service
        self._roots: tuple[Path | None, ...] = tuple(roots) or (None,)
        self.is_paused = False
        self.last: Explained | None = None
        self._settings = settings
        self._on_answer = on_answer
        self._on_accept = on_accept
        self._documents: dict[str, _Open] = {}
        self._cache: CompletionCache[Answer] = CompletionCache()
        self._contexts = self._new_contexts()
        self._debounce = Debounce()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._shown: dict[str, Explained] = {}
        self._ids = count(1)
        self._run = uuid.uuid4().hex[:8]
        self._num_asking = 0
        self._current: _Open | None = None

    @property
    def settings(self) -> Settings:
        """What the person chose; assign to change."""
        return self._settings

    @settings.setter
    def settings(self, settings: Settings) -> None:
        if settings != self._settings:
            self._settings = settings
            self._begin_anew()

    @property
    def roots(self) -> tuple[Path, ...]:
        """The projects' folders; assign to change."""
        return tuple(root for root in self._roots if root is not None)

    @roots.setter
    def roots(self, roots: Sequence[Path]) -> None:
        if tuple(roots) != self.roots:
            self._roots = tuple(roots) or (None,)
            self._begin_anew()

    async def close(self) -> None:
        """Cancel all work."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def open(self, uri: str, language: str, text: str, version: int = 0) -> None:
        """A document was opened."""
        root, path = self._place(uri)
        digest = hashlib.sha256(uri.encode("utf-8", "replace")).hexdigest()[:12]
        document = Document(uri, language, text, version)
        is_secret = is_secret_name(unquote(urlsplit(uri).path))
        context = self._contexts[root]
        opened = _Open(document, path, context, f"{self._run}-{digest}", is_secret)
        self._close(uri)
        self._documents[uri] = opened
        context.opened(path, text, language)
        # No warm-up yet: where the cursor goes is not known, and from the start of a file a
        # server would read what it never needs again.

    def change(
        self, uri: str, changes: Sequence[Change], encoding: Encoding, version: int = 0
    ) -> None:
        """A document was edited. For one that is not open it does nothing."""
        opened = self._documents.get(uri)
        if opened is None or not changes:
            return
        document = opened.document
        end = document.apply(changes, encoding, version)
        opened.num_changes += 1
        self._current = opened
        if changes[-1].text in _PAIRS:
            # Editors close brackets and quotes: the cursor stands between.
            end = Point(end.line, end.column - 1)
        opened.point = end
        opened.context.edited(opened.path, lambda: document.text, end.line)
        typed = changes[-1].start is not None and len(changes[-1].text) <= 256
        if self._settings.prefetch and typed and len(changes) == 1:
            self._later(self._prefetch, opened, opened.num_changes)
        else:
            self._warm(opened)

    def server_came(self) -> None:
        """There is a server now: let it read what the person is at."""
        if self._current is not None and self._current.document.uri in self._documents:
            self._warm(self._current)

    def save(self, uri: str) -> None:
        """A document was saved."""
        opened = self._documents.get(uri)
        if opened is not None:
            opened.context.saved(opened.path, opened.document.text)

    def close_document(self, uri: str) -> None:
        """A document was closed."""
        self._close(uri)

    def document(self, uri: str) -> Document | None:
        """An open document."""
        opened = self._documents.get(uri)
        return None if opened is None else opened.document

    def complete(
        self,
        uri: str,
        position: Position,
        encoding: Encoding,
        *,
        invoked: bool = False,
        whole: bool = False,
        selected: Selected | None = None,
    ) -> Coroutine[Any, Any, list[Suggestion]]:
        """What to suggest at a cursor, best first; await the result.

        An answer of several lines that takes long is shown in part at first, unless `invoked` or
        `whole` asks for all of it.

        The text and cursor are taken when this is called. A later call for the same document
        makes this one return nothing. Without a server, and for a document that is not open, the
        answer is nothing, never an error.
        """
        opened = self._documents.get(uri)
        if opened is None:
            return _nothing()
        point = opened.document.point(position, encoding)
        self._current = opened
        moved = abs(point.line - opened.point.line)
        opened.point = point
        opened.asked_at = opened.num_changes
        opened.ticket = object()
        if opened.flight is not None:
            opened.flight.wake()
        if moved > JUMP_LINES:
            opened.context.jumped(opened.path, point.line)
        if not self._wants(opened, invoked=invoked):
            return _nothing()
        query = self._query(opened, point, invoked=invoked, selected=selected)
        if query is None:
            return _nothing()
        if not query.decision.ask:
            self._warm(opened)
            return _nothing()
        return self._suggestions(
            query, opened.ticket, invoked=invoked, whole=whole or invoked, selected=selected
        )

    def accepted(self, suggestion_id: str) -> None:
        """The person took a suggestion over."""
        explained = self._shown.get(suggestion_id)
        if explained is not None:
            self._on_accept(explained)

    def explained(self, suggestion_id: str | None = None) -> Explained | None:
        """How a suggestion, or the last one, came to be."""
        return self.last if suggestion_id is None else self._shown.get(suggestion_id)

    async def probabilities(self, explained: Explained) -> tuple[tuple[str, float], ...]:
        """The tokens of a suggestion with their log-probabilities; asks the server again."""
        ask = self._ask(explained.query)
        ask = replace(ask, logprobs=True, supersede=False, drafts=(), min_confidence=0.0)
        return (await self.service.complete(ask)).tokens

    # --- questions ---

    def _wants(self, opened: _Open, *, invoked: bool) -> bool:
        if self.is_paused or not self._settings.enabled:
            return False
        if opened.document.language in self._settings.disabled_languages and not invoked:
            return False
        if opened.is_secret:
            return False
        if not self.service.is_ready:
            self.service.start()
            return False
        return True

    def _query(
        self,
        opened: _Open,
        point: Point,
        *,
        invoked: bool = False,
        selected: Selected | None = None,
    ) -> _Query | None:
        """The question at a point, made once for each text; None where none may be asked."""
        generations = (self.service.generation, opened.context.generation, self._settings)
        state = (opened.num_changes, point, invoked, selected, *generations)
        if opened.query_state != state:
            opened.query = self._new_query(opened, point, invoked=invoked, selected=selected)
            opened.query_state = state
        return opened.query

    def _new_query(
        self,
        opened: _Open,
        point: Point,
        *,
        invoked: bool = False,
        selected: Selected | None = None,
    ) -> _Query | None:
        document, typed_ahead = opened.document, ""
        if selected is not None:
            line = document.lines[point.line]
            typed = line[selected.start.column : point.column]
            if selected.start.line != point.line or not selected.text.startswith(typed):
                return None
            typed_ahead = selected.text[len(typed) :]
        offset = document.offset(point)
        window = opened.context.window(document.text, offset)
        if holds_secret(window.prefix) or holds_secret(window.suffix):
            return None
        decision = should_ask(
            window.prefix + typed_ahead, window.suffix, document.language, invoked
        )
        if not self._settings.multiline and decision.stop_scope != "line":
            decision = replace(decision, stop_scope="line")
        chunks: tuple[Chunk, ...] = ()
        if self._settings.other_files:
            chunks = opened.context.chunks(opened.path, document.text, offset)
        key = Key(
            uri=document.uri,
            model=f"{self.service.generation}:{self.service.model}",
            generation=opened.context.generation if self._settings.other_files else 0,
            suffix=window.suffix,
            scope="invoked" if invoked else "",
        )
        return _Query(opened, point, window, chunks, decision, key, typed_ahead)

    def _ask(self, query: _Query) -> Ask:
        settings = self._settings
        opened = query.opened
        return Ask(
            prefix=query.window.prefix,
            suffix=query.window.suffix,
            path=opened.path,
            session=opened.session,
            chunks=query.chunks,
            max_tokens=min(query.decision.max_tokens, settings.max_tokens),
            stop_scope=query.decision.stop_scope,
            typed_ahead=query.typed_ahead,
            drafts=tuple(opened.recent) if settings.drafts else (),
            min_confidence=settings.min_confidence,
            first_token_budget_ms=settings.first_token_budget_ms,
            deadline_ms=settings.deadline_ms,
        )

    async def _suggestions(
        self,
        query: _Query,
        ticket: object,
        *,
        invoked: bool,
        whole: bool,
        selected: Selected | None,
    ) -> list[Suggestion]:
        started = now_ms()
        try:
            text, answer, source = await self._text(query, ticket, invoked=invoked, whole=whole)
            texts = [text]
            if invoked:
                texts += await self._others(query)
        except LspError as error:
            _log.info("no suggestion: %s", error)
            return []
        if query.opened.ticket is not ticket:
            return []
        document = query.opened.document
        indent = detect_indent(document.text)
        shown = []
        for each in texts:
            kept = tidy(each, query.prefix, query.window.suffix, indent)
            if kept is not None and kept not in shown:
                shown.append(kept)
        if not shown:
            if source != "partial":
                self._look_ahead(query, "")
            return []
        is_new = not query.opened.shown.endswith(shown[0]) and not self._goes_on(query, source)
        explained = Explained(query, shown[0], answer, source, now_ms() - started, is_new)
        query.opened.shown = shown[0]
        self.last = explained
        self._on_answer(explained)
        if source != "partial":
            self._look_ahead(query, shown[0])
        return [self._suggestion(query, each, explained, selected) for each in shown]

    def _suggestion(
        self, query: _Query, text: str, explained: Explained, selected: Selected | None
    ) -> Suggestion:
        name = f"{self._run}-{next(self._ids)}"
        self._shown[name] = replace(explained, shown=text)
        while len(self._shown) > MAX_REMEMBERED:
            del self._shown[next(iter(self._shown))]
        if selected is not None:
            return Suggestion(name, selected.text + text, selected.start, selected.end)
        return Suggestion(name, text, query.point, query.point)

    async def _text(
        self, query: _Query, ticket: object, *, invoked: bool, whole: bool
    ) -> tuple[str, Answer, str]:
        """(what follows the prefix, the answer it is from, where it was found)."""
        found = self._found(query)
        if found is not None:
            return found[0], found[1], "cached"
        delay_ms = 0.0 if invoked else self._delay_ms()
        if delay_ms and not self._joins(query):
            await asyncio.sleep(delay_ms / 1000)
            found = self._found(query)
            if found is not None:
                return found[0], found[1], "cached"
        source = "joined" if self._joins(query) else "computed"
        flight = self._fly(query)
        shows_part_at_ms = None if whole else now_ms() + PATIENCE_MS
        while query.opened.ticket is ticket:
            typed = flight.typed_since(query)
            if typed is None or (flight.is_done and typed and flight.text == typed):
                flight = self._fly(query)
            elif flight.error is not None:
                raise flight.error
            elif flight.answer is not None:
                return flight.text[len(typed) :], flight.answer, source
            elif shows_part_at_ms is None:
                await flight.changed()
            elif (left_ms := shows_part_at_ms - now_ms()) > 0:
                with contextlib.suppress(TimeoutError):
                    await flight.changed(left_ms / 1000)
            elif lines := _whole_lines(flight.text[len(typed) :]):
                flight.was_shown_in_part = True
                return lines, Answer(()), "partial"
            else:
                await flight.changed()
        return "", Answer(()), "replaced"

    def _goes_on(self, query: _Query, source: str) -> bool:
        """Whether this is more of what was shown in part before."""
        flight = query.opened.flight
        if flight is None or not flight.was_shown_in_part or source == "partial":
            return False
        return flight.typed_since(query) is not None

    async def _others(self, query: _Query) -> list[str]:
        """More suggestions, less likely ones."""
        ask = replace(
            self._ask(query),
            num_choices=NUM_CHOICES,
            temperature=CHOICE_TEMPERATURE,
            supersede=False,
            drafts=(),
            min_confidence=0.0,
        )
        try:
            return list((await self.service.complete(ask)).texts)
        except LspError:
            return []

    def _found(self, query: _Query) -> tuple[str, Answer] | None:
        return self._cache.find(query.key, query.prefix, type_through=self._settings.type_through)

    def _joins(self, query: _Query) -> bool:
        flight = query.opened.flight
        if flight is None or flight.error is not None:
            return False
        typed = flight.typed_since(query)
        if typed is None or (typed and not self._settings.type_through):
            return False
        return not (flight.is_done and typed == flight.text and typed)

    def _fly(self, query: _Query) -> _Flight:
        """The question that is on its way where its answer will do, else a new one."""
        opened = query.opened
        if opened.flight is not None and self._joins(query):
            return opened.flight
        self._stop(opened.ahead)
        if opened.flight is not None:
            self._stop(opened.flight.task)
        flight = opened.flight = _Flight(query)
        flight.task = self._spawn(self._carry_out(flight))
        return flight

    async def _carry_out(self, flight: _Flight) -> None:
        query = flight.query
        started = now_ms()
        self._num_asking += 1
        try:
            answer = await self.service.complete(self._ask(query), flight.add)
            text = answer.texts[0] if answer.texts else ""
            flight.text = text
            flight.answer = answer
            self._cache.put(query.key, query.prefix, text, answer)
            is_busy = answer.timings.get("queue_ms", 0.0) > BUSY_MS
            self._debounce.observe(now_ms() - started, is_busy)
            if text.strip():
                query.opened.recent.append(text)
        except LspError as error:
            flight.error = error
        finally:
            self._num_asking -= 1
            if not flight.is_done:
                flight.error = ServerDownError("the question was withdrawn")
            if query.opened.flight is flight and flight.error is not None:
                query.opened.flight = None
            flight.wake()

    def _delay_ms(self) -> float:
        chosen = self._settings.debounce_ms
        return self._debounce.delay_ms() if chosen < 0 else float(chosen)

    # --- work ahead of questions ---

    def _prefetch(self, opened: _Open, num_changes: int) -> None:
        """Ask about the place of an edit, unless the editor did or there was another one."""
        if opened.num_changes != num_changes or opened.asked_at == num_changes:
            return
        if not self._wants(opened, invoked=False):
            return
        query = self._query(opened, opened.point)
        if query is None or self._found(query) is not None:
            return
        if query.decision.ask:
            self._fly(query)
        else:
            self._warm(opened)

    def _warm(self, opened: _Open) -> None:
        """Have the server read the text up to the cursor, behind everything else."""
        if not self._settings.warm_up or not self._wants(opened, invoked=False):
            return
        if not self._works_ahead():
            return
        if opened.flight is not None and not opened.flight.is_done:
            return
        self._stop(opened.warming)
        query = self._query(opened, opened.point)
        if query is None:
            return
        ask = replace(
            self._ask(query),
            max_tokens=WARM_TOKENS,
            supersede=False,
            is_background=True,
            drafts=(),
            first_token_budget_ms=0.0,
            deadline_ms=0.0,
        )
        opened.warming = self._spawn(self._quietly(ask))

    async def _quietly(self, ask: Ask) -> None:
        with contextlib.suppress(LspError):
            await self.service.complete(ask)

    def _look_ahead(self, query: _Query, shown: str) -> None:
        """Have answers ready for what the person may do with a suggestion, or without one."""
        if not self._settings.look_ahead or not self._works_ahead():
            return
        opened = query.opened
        leads_to = query.key, query.prefix + shown
        if opened.ahead_of == leads_to:
            return
        self._stop(opened.ahead)
        opened.ahead_of = leads_to
        opened.ahead = self._spawn(self._work_ahead(query, shown))

    async def _work_ahead(self, query: _Query, shown: str) -> None:
        capabilities = self.service.capabilities
        with contextlib.suppress(LspError):
            if capabilities is not None and capabilities.is_albor:
                for turn in await self._go_beyond(query, shown):
                    await self._answer_ahead(query, turn)
            if shown:
                await self._answer_ahead(query, shown)

    async def _go_beyond(self, query: _Query, shown: str) -> list[str]:
        """Keep what stands behind the gate; return where the person may turn off."""
        ask = replace(
            self._ask(query),
            prefix=query.prefix,
            typed_ahead="",
            max_tokens=min(query.decision.max_tokens, self._settings.max_tokens, AHEAD_TOKENS),
            supersede=False,
            is_background=True,
            drafts=(shown,) if shown else (),
            min_confidence=0.0,
            logprobs=True,
            num_alternatives=NUM_ALTERNATIVES,
        )
        answer = await self.service.complete(ask)
        tokens = self._tokens_of(answer)
        places = places_beyond(
            tokens,
            answer.alternatives,
            self._settings.min_confidence,
            is_whole=len(tokens) < ask.max_tokens,
        )
        for typed, rest in places:
            if typed:
                self._cache.put(query.key, query.prefix + typed, rest, answer)
        return turns(tokens, answer.alternatives, query.prefix, NUM_TURNS)

    async def _answer_ahead(self, query: _Query, typed: str) -> None:
        """Answer as if `typed` stood before the cursor."""
        prefix = query.prefix + typed
        language = query.opened.document.language
        decision = should_ask(prefix, query.window.suffix, language, False)
        window = replace(query.window, prefix=prefix)
        after = replace(query, window=window, decision=decision, typed_ahead="")
        if not decision.ask or self._found(after) is not None:
            return
        ask = replace(self._ask(after), supersede=False, is_background=True, drafts=())
        answer = await self.service.complete(ask)
        if answer.texts:
            self._cache.put(after.key, prefix, answer.texts[0], answer)

    def _tokens_of(self, answer: Answer) -> tuple[tuple[str, float], ...]:
        """The tokens that the text is made of; none where they don't spell it."""
        text, kept = (answer.texts or ("",))[0], []
        spelled = ""
        for piece, logprob in answer.tokens:
            if len(spelled) >= len(text):
                break
            spelled += piece
            kept.append((piece, logprob))
        if spelled == text:
            return tuple(kept)
        if kept and spelled.startswith(text):
            # The text ends inside of the last token, as at a line's end.
            last, logprob = kept[-1]
            kept[-1] = last[: len(last) - (len(spelled) - len(text))], logprob
            return tuple(kept)
        return ()

    def _works_ahead(self) -> bool:
        capabilities = self.service.capabilities
        return capabilities is not None and capabilities.works_ahead

    # --- small things ---

    def _later(self, function: Callable[..., None], *args: Any) -> None:
        loop = asyncio.get_running_loop()
        delay_ms = self._delay_ms()
        if delay_ms:
            loop.call_later(delay_ms / 1000, function, *args)
        else:
            loop.call_soon(function, *args)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("work in the background failed", exc_info=task.exception())

    def _stop(self, task: asyncio.Task[None] | None) -> None:
        if task is not None and not task.done():
            task.cancel()

    def _close(self, uri: str) -> None:
        opened = self._documents.pop(uri, None)
        if opened is not None:
            opened.ticket = object()
            self._withdraw(opened)
            self._cache.drop(uri)

    def _withdraw(self, opened: _Open) -> None:
        """Give up all that is being asked about a document."""
        self._stop(opened.warming)
        self._stop(opened.ahead)
        flight, opened.flight = opened.flight, None
        if flight is not None:
            self._stop(flight.task)

    def _begin_anew(self) -> None:
        """After a change of what is read: forget answers and pieces, take up open documents."""
        self._cache.clear()
        self._contexts = self._new_contexts()
        for uri, opened in self._documents.items():
            self._withdraw(opened)
            root, opened.path = self._place(uri)
            opened.context = self._contexts[root]
            opened.query_state = ()
            document = opened.document
            opened.context.opened(opened.path, document.text, document.language)

    def _new_contexts(self) -> dict[Path | None, ContextBuilder]:
        settings = self._settings
        sizes = ContextSettings(
            prefix_lines=settings.prefix_lines,
            suffix_lines=settings.suffix_lines,
            max_context_tokens=settings.other_files_tokens,
        )
        return {root: ContextBuilder(root, sizes) for root in self._roots}

    def _place(self, uri: str) -> tuple[Path | None, str]:
        """(project's folder, path inside it for the model to read) of a document."""
        parts = urlsplit(uri)
        path = unquote(parts.path) or uri
        if parts.scheme == "file":
            full = Path(path)
            inside = [root for root in self.roots if full.is_relative_to(root)]
            if inside:
                # Projects may lie in each other.
                root = max(inside, key=lambda root: len(root.parts))
                return root, full.relative_to(root).as_posix()[:1024] or "untitled"
        return self._roots[0], Path(path).name[:1024] or "untitled"


def _whole_lines(text: str) -> str:
    """The part of a text that no later token can change, without its last line end."""
    lines = text.rpartition("\n")[0]
    return lines if lines.strip() else ""


async def _nothing() -> list[Suggestion]:
    return []
