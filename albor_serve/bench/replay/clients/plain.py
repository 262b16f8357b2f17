"""A plain client: waits until typing stops, asks once, shows the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from albor_serve.bench.replay.clients.base import Client, EditorState, RequestRecord
from albor_serve.bench.replay.clients.http import post_json
from albor_serve.bench.replay.clock import Clock
from albor_serve.bench.replay.scenes import Source

__all__ = ["ALBOR", "DEBOUNCE_S", "LLAMA_SERVER", "Dialect", "PlainClient"]

DEBOUNCE_S: Final = 0.350
PREFIX_CHARS: Final = 3000
SUFFIX_CHARS: Final = 1000
"""Together about 1,100 tokens, a usual window; it slides by lines with the cursor."""
MAX_NEW_TOKENS: Final = 64


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a server is asked to fill in the middle, and where its answer says what it cost."""

    path: str
    is_albor: bool

    def body(self, before: str, after: str, stops: list[str]) -> dict[str, Any]:
        """The request: greedy, alone."""
        common = {"temperature": 0, "stop": stops}
        if self.is_albor:
            asked = {"prompt": before, "suffix": after, "max_tokens": MAX_NEW_TOKENS}
            return common | asked
        # The layout that albor's models are trained for, written out as such clients do.
        prompt = f"<|fim_prefix|><|fim_suffix|>{after}<|fim_middle|>{before}"
        return common | {"prompt": prompt, "n_predict": MAX_NEW_TOKENS, "cache_prompt": True}

    def answer(self, value: dict[str, Any]) -> tuple[str, RequestRecord]:
        """(text, cost)."""
        if self.is_albor:
            usage = value["usage"]
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            prompt = usage["prompt_tokens"]
            record = RequestRecord(prompt, prompt - cached, usage["completion_tokens"])
            return value["choices"][0]["text"], record
        return value["content"], llama_record(value)


def llama_record(value: dict[str, Any]) -> RequestRecord:
    """The cost that llama-server tells."""
    timings = value.get("timings", {})
    new = timings.get("prompt_n", 0)
    return RequestRecord(new + timings.get("cache_n", 0), new, timings.get("predicted_n", 0))


ALBOR: Final = Dialect("/v1/completions", True)
LLAMA_SERVER: Final = Dialect("/completion", False)


class PlainClient(Client):
    """One request after `debounce_s` without a key; a key closes the request in flight.

    Stops at the line's end where code follows the cursor in its line, else at an empty line.
    """

    def __init__(
        self,
        name: str,
        address: str,
        dialect: Dialect,
        clock: Clock,
        debounce_s: float = DEBOUNCE_S,
        session: str | None = None,
    ) -> None:
        super().__init__(name)
        self._address = address
        self._dialect = dialect
        self._clock = clock
        self._debounce_s = debounce_s
        self._session = session
        self._task: asyncio.Task[None] | None = None
        self._is_asking = False

    async def open(self, state: EditorState, others: Sequence[Source]) -> None:
        """See `Client.open`; nothing is asked before the first key."""

    def on_text(self, state: EditorState) -> None:
        """See `Client.on_text`."""
        self._cancel()
        self._task = self.spawn(self._ask(state))

    def _cancel(self) -> None:
        if self._task is not None and not self._task.done():
            self._task.cancel()
            self.work.num_cancelled += self._is_asking
        self._is_asking = False

    async def _ask(self, state: EditorState) -> None:
        if self._debounce_s:
            await self._clock.sleep(self._debounce_s)
        before, after = window(state)
        has_rest = bool(after.partition("\n")[0].strip())
        body = self._dialect.body(before, after, ["\n" if has_rest else "\n\n"])
        if self._session is not None:
            body["albor"] = {"session": self._session}
        self.work.num_requests += 1
        self._is_asking = True
        with self._clock.working():
            value = await post_json(self._address, self._dialect.path, body)
        self._is_asking = False
        text, record = self._dialect.answer(value)
        record.is_shown = bool(text.strip())
        self.work.answers.append(record)
        self.offer(state.version, text)


def window(state: EditorState) -> tuple[str, str]:
    """Whole lines around the cursor."""
    before, after = state.before, state.after
    if len(before) > PREFIX_CHARS:
        before = before[-PREFIX_CHARS:].partition("\n")[2]
    if len(after) > SUFFIX_CHARS:
        after = after[:SUFFIX_CHARS].rpartition("\n")[0] + "\n"
    return before, after
