"""The algorithm of llama.vim, written anew from its description, in front of llama-server.

The plugin asks /infill, which writes prompts with the text before the cursor first. albor's models
are trained with it last and answer three times worse that way, so that the peer would lose by the
prompt and not by its algorithm: here the prompt is written out as the model knows it, for
/completion, which caches alike. Pieces of other files are left out, as /infill does where the
context is no longer than one batch.

It asks at each key without waiting, never cancels, tries again 100 ms later while a request is
in flight, keeps answers under the text they belong to (and under what is left of it after up to
128 typed characters), and asks for what would follow once its suggestion were accepted.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final

from albor_serve.bench.replay.clients.base import Client, EditorState
from albor_serve.bench.replay.clients.http import post_json
from albor_serve.bench.replay.clients.plain import llama_record
from albor_serve.bench.replay.clock import Clock
from albor_serve.bench.replay.scenes import Source

__all__ = ["LlamaVimClient"]

PATH: Final = "/completion"
LINES_BEFORE: Final = 256
LINES_AFTER: Final = 64
CHARS_BEFORE: Final = 4000
CHARS_AFTER: Final = 1300
MAX_RIGHT_CHARS: Final = 8
"""It asks only where no more follows in the cursor's line."""
MAX_NEW_TOKENS: Final = 128
FIRST_MS: Final = 250
SPECULATIVE_MS: Final = 1000
PROMPT_MS: Final = 500
RETRY_S: Final = 0.1
CACHE_LEN: Final = 250
MAX_TYPED: Final = 128
NUM_SCROLLED: Final = 3

Key = tuple[str, str]


class LlamaVimClient(Client):
    """See the module. Greedy, so that peers differ by their algorithm alone."""

    editor_keeps_ghost = False

    def __init__(self, name: str, address: str, clock: Clock) -> None:
        super().__init__(name)
        self._address = address
        self._clock = clock
        self._cache: OrderedDict[Key, str] = OrderedDict()
        self._state: EditorState | None = None
        self._is_busy = False
        self._retry: asyncio.Task[None] | None = None

    async def open(self, state: EditorState, others: Sequence[Source]) -> None:
        """Warm the server, as the plugin does when other files are open."""
        self._cache.clear()
        self._is_busy = False
        self._state = None
        if others:
            await post_json(self._address, PATH, self._body(state, FIRST_MS) | {"n_predict": 0})

    def on_text(self, state: EditorState) -> None:
        """See `Client.on_text`."""
        self._state = state
        if len(state.after.partition("\n")[0]) > MAX_RIGHT_CHARS:
            return
        if not self._show_cached():
            self._ask(state)

    def _ask(self, state: EditorState) -> None:
        """Ask now, or look again in a while if a request is in flight."""
        if self._is_busy:
            if self._retry is not None:
                self._retry.cancel()
            self._retry = self.spawn(self._ask_later(state))
            return
        self._is_busy = True
        self.spawn(self._fetch(state, FIRST_MS, is_speculative=False))

    async def _ask_later(self, state: EditorState) -> None:
        await self._clock.sleep(RETRY_S)
        self._retry = None
        if state is self._state and not self._show_cached():
            self._ask(state)

    async def _fetch(self, state: EditorState, limit_ms: int, *, is_speculative: bool) -> None:
        self.work.num_requests += 1
        try:
            with self._clock.working():
                value = await post_json(self._address, PATH, self._body(state, limit_ms))
        finally:
            self._is_busy = False
        record = llama_record(value)
        self.work.answers.append(record)
        text = _tidy(value["content"], state)
        for key in _keys(state):
            self._cache[key] = text
        while len(self._cache) > CACHE_LEN:
            self._cache.popitem(last=False)
        record.is_shown = self._show_cached() and bool(text.strip()) and not is_speculative

    def _show_cached(self) -> bool:
        """Offer what the cache knows for the present text; False if it knows nothing."""
        state = self._state
        text = self._lookup(state) if state is not None else None
        if state is None or text is None:
            return False
        if text.strip():
            self.offer(state.version, text)
            accepted = EditorState(state.path, state.before + text, state.after, state.version)
            if not self._is_busy and self._lookup(accepted) is None:
                self._is_busy = True
                self.spawn(self._fetch(accepted, SPECULATIVE_MS, is_speculative=True))
        return True

    def _lookup(self, state: EditorState) -> str | None:
        """The answer to this text, or what is left of the answer to a text shortly before."""
        before, after = _window(state)
        if (before, after) in self._cache:
            return self._cache[before, after]
        best = None
        for size in range(1, min(MAX_TYPED, len(before)) + 1):
            text = self._cache.get((before[:-size], after), "")
            typed = before[-size:]
            if len(text) > size and text.startswith(typed):
                best = max(best or "", text[size:], key=len)
        return best

    def _body(self, state: EditorState, limit_ms: int) -> dict[str, Any]:
        before, after = _window(state)
        line = before.rpartition("\n")[2]
        return {
            "prompt": f"<|fim_prefix|><|fim_suffix|>{after}<|fim_middle|>{before}",
            "n_predict": MAX_NEW_TOKENS,
            "n_indent": len(line) - len(line.lstrip()),
            "temperature": 0,
            "stream": False,
            "cache_prompt": True,
            "id_slot": 0,
            "t_max_prompt_ms": PROMPT_MS,
            "t_max_predict_ms": limit_ms,
        }


def _window(state: EditorState) -> Key:
    before = "\n".join(state.before.split("\n")[-LINES_BEFORE - 1 :])
    after = "\n".join(state.after.split("\n")[: LINES_AFTER + 1])
    # /infill gives three quarters of a batch to the text before the cursor, a quarter to the rest.
    if len(before) > CHARS_BEFORE:
        before = before[-CHARS_BEFORE:].partition("\n")[2]
    return before, after[:CHARS_AFTER]


def _keys(state: EditorState) -> list[Key]:
    """The window, and the same scrolled by up to three lines."""
    before, after = _window(state)
    keys = [(before, after)]
    for _ in range(NUM_SCROLLED):
        _, newline, before = before.partition("\n")
        if not newline:
            break
        keys.append((before, after))
    return keys


def _tidy(text: str, state: EditorState) -> str:
    """One line where code follows in the cursor's line; nothing that repeats the next lines."""
    rest, _, following = state.after.partition("\n")
    if rest.strip():
        return text.partition("\n")[0].removesuffix(rest)
    lines = text.rstrip().split("\n")
    next_line = next((line for line in following.split("\n") if line.strip()), None)
    for at, line in enumerate(lines):
        if at and line == next_line:
            return "\n".join(lines[:at])
    return "\n".join(lines)
