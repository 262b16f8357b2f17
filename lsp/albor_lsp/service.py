"""The completion server, whatever it is: what it can do, how it is asked, whether it is there."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from albor_lsp.context import Chunk
from albor_lsp.errors import LspError, ServerDownError, ServerRefusedError
from albor_lsp.fim_dialects import Family, family_of, infill_body, suffix_body, token_body
from albor_lsp.http import Address, HttpClient
from albor_lsp.policy import StopScope

__all__ = ["Answer", "Ask", "Capabilities", "Health", "Service"]

PROBE_S: Final = 5.0
RETRY_S: Final = (0.25, 0.5, 1.0, 2.0, 5.0)

Find = Callable[[], Awaitable[Address]]
"""Where the server is; starts one where that is wanted. Raises LspError."""

_log = logging.getLogger("albor_lsp")


@dataclass(frozen=True, slots=True)
class Ask:
    """One question to the model."""

    prefix: str
    suffix: str
    path: str
    session: str
    chunks: tuple[Chunk, ...] = ()
    max_tokens: int = 32
    stop_scope: StopScope = "line"
    typed_ahead: str = ""
    """The answer begins with this, which is not returned."""
    drafts: tuple[str, ...] = ()
    min_confidence: float = 0.0
    is_background: bool = False
    supersede: bool = True
    first_token_budget_ms: float = 0.0
    """0: none."""
    deadline_ms: float = 0.0
    num_choices: int = 1
    temperature: float = 0.0
    logprobs: bool = False
    num_alternatives: int = 0
    """Likeliest tokens to tell of at each place, with `logprobs`."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said."""

    texts: tuple[str, ...]
    confidence: float | None = None
    """Geometric mean of the tokens' probabilities, where the server tells."""
    stopped_by: str | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    tokens: tuple[tuple[str, float], ...] = ()
    """(text, log-probability), where asked for."""
    alternatives: tuple[Mapping[str, float], ...] = ()
    """For each token, the likeliest ones with their log-probabilities, where asked for."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a server was found to be."""

    kind: Literal["albor", "infill", "suffix", "tokens"]
    """albor-serve; llama-server's /infill; /v1/completions with `suffix`; the same without it."""
    model: str
    family: Family | None = None
    """Whose control tokens are written out, for the kind "tokens"."""

    @property
    def is_albor(self) -> bool:
        """Takes and tells all that albor-serve does."""
        return self.kind == "albor"

    @property
    def works_ahead(self) -> bool:
        """Whether it may be asked for what is not needed yet: it is local and keeps a cache."""
        return self.kind in ("albor", "infill")


@dataclass(frozen=True, slots=True)
class Health:
    """Whether suggestions can be had now."""

    state: str
    """connecting, starting, loading, ready, offline or error."""
    message: str = ""
    model: str = ""
    address: str = ""


class Service:
    """Finds a server, asks it, and finds it again when it was gone. One per language server.

    Questions fail at once while there is no server; a task in the background keeps looking.

    Attributes:
        health: the latest; `on_health` is called when it changes.
        generation: changes with the server or its model.
    """

    def __init__(
        self,
        find: Find,
        *,
        api_key: str = "",
        model: str = "",
        timeout_s: float = 20.0,
        on_health: Callable[[Health], None] = lambda _health: None,
    ) -> None:
        self.health = Health("connecting")
        self.generation = 0
        self.capabilities: Capabilities | None = None
        self._find = find
        self._api_key = api_key or os.environ.get("ALBOR_API_KEY", "")
        self._model = model
        self._timeout_s = timeout_s
        self._on_health = on_health
        self._client: HttpClient | None = None
        self._looking: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def is_ready(self) -> bool:
        """Whether a question makes sense now."""
        return self._client is not None and self.capabilities is not None

    @property
    def model(self) -> str:
        """The model that answers; "" while there is none."""
        return self.capabilities.model if self.capabilities is not None else ""

    def start(self) -> None:
        """Look for the server, unless that is being done or it is there."""
        if not self._is_closed and not self.is_ready and self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._look())
            self._looking.add_done_callback(self._looked)

    async def close(self) -> None:
        """Stop looking, close connections."""
        self._is_closed = True
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        await self._disconnect()

    async def restart(self, *, api_key: str, model: str) -> None:
        """Forget the server and look for one at once, with this key and model."""
        self._api_key = api_key or os.environ.get("ALBOR_API_KEY", "")
        self._model = model
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        await self._disconnect()
        self._tell(Health("connecting"))
        self.start()

    async def complete(
        self, ask: Ask, on_text: Callable[[str], None] = lambda _text: None
    ) -> Answer:
        """Ask; `on_text` gets pieces of the first choice as they come.

        Raises:
            ServerDownError: there is no server, or it is gone; it is being looked for.
            ServerRefusedError: it can't or won't answer this.
        """
        client, capabilities = self._client, self.capabilities
        if client is None or capabilities is None:
            self.start()
            raise ServerDownError(self.health.message or "no server yet")
        path, body = _request(ask, capabilities, self._model)
        if path is None:
            return Answer(())
        answer = _Collected(on_text)
        try:
            whole = await client.post(
                path,
                body,
                timeout_s=self._timeout_s,
                headers={"X-Session-Id": ask.session},
                on_event=answer.add,
            )
        except ServerDownError as error:
            await self._lost(client, error)
            raise
        except ServerRefusedError as error:
            if error.status in (401, 403, 503):
                await self._lost(client, error)
            raise
        if whole is not None:
            answer.add(whole)
        return answer.finish()

    async def _lost(self, client: HttpClient, error: LspError) -> None:
        if self._client is not client:
            return
        _log.info("%s", error)
        await self._disconnect()
        self._tell(self._health_of(error))
        self.start()

    async def _disconnect(self) -> None:
        client, self._client, self.capabilities = self._client, None, None
        if client is not None:
            await client.close()

    def _looked(self, task: asyncio.Task[None]) -> None:
        self._looking = None
        if not task.cancelled() and task.exception() is not None:
            _log.error("looking for a server failed", exc_info=task.exception())

    async def _look(self) -> None:
        attempt = 0
        while not self._is_closed:
            try:
                address = await self._find()
                client = HttpClient(address, self._api_key)
                try:
                    capabilities = await _probe(client, self._model)
                except BaseException:
                    await client.close()
                    raise
            except LspError as error:
                self._tell(self._health_of(error))
                await asyncio.sleep(RETRY_S[min(attempt, len(RETRY_S) - 1)])
                attempt += 1
                continue
            self._client, self.capabilities = client, capabilities
            self.generation += 1
            self._tell(Health("ready", "", capabilities.model, str(address)))
            return

    def _health_of(self, error: LspError) -> Health:
        if isinstance(error, ServerRefusedError):
            if error.status == 503:
                return Health("loading", "the server is loading its model")
            return Health("error", str(error))
        return Health("offline", str(error))

    def _tell(self, health: Health) -> None:
        if health != self.health:
            self.health = health
            self._on_health(health)


async def _probe(client: HttpClient, model: str) -> Capabilities:
    """Find out what answers, and how it is asked to fill in the middle. Raises LspError."""
    try:
        answer = await client.get("/v1/models", timeout_s=PROBE_S)
    except ServerRefusedError as error:
        if error.status in (401, 403, 503):
            raise
        raise ServerRefusedError(
            error.status,
            f"{client.address} is no completion server (HTTP {error.status} for /v1/models): "
            "check serverUrl",
        ) from error
    models = answer.get("data", []) if isinstance(answer, dict) else []
    first = models[0] if models and isinstance(models[0], dict) else {}
    name = model or str(first.get("id", ""))
    owner = first.get("owned_by")
    if owner == "albor":
        return Capabilities("albor", name)
    if owner == "llamacpp":
        return await _probe_infill(client, name)
    body = suffix_body("a = ", "\n", "line", 1, name) | {"stream": False}
    try:
        await client.post("/v1/completions", body, timeout_s=PROBE_S * 4)
    except ServerRefusedError as error:
        if error.status in (401, 403, 503):
            raise
        family = family_of(name)
        if family is None:
            raise ServerRefusedError(
                error.status,
                f"the server does not fill in the middle with {name or 'its model'}: {error}",
            ) from error
        return Capabilities("tokens", name, family)
    return Capabilities("suffix", name)


async def _probe_infill(client: HttpClient, name: str) -> Capabilities:
    body = infill_body("a = ", "\n", [], "line", 1) | {"stream": False}
    try:
        await client.post("/infill", body, timeout_s=PROBE_S * 4)
    except ServerRefusedError as error:
        if error.status in (401, 403, 503):
            raise
        family = family_of(name)
        if family is None:
            raise ServerRefusedError(
                error.status, f"the model {name} does not fill in the middle: {error}"
            ) from error
        return Capabilities("tokens", name, family)
    return Capabilities("infill", name)


def _request(ask: Ask, capabilities: Capabilities, model: str) -> tuple[str | None, dict[str, Any]]:
    """(path, body) of a question; no path where the server has no use for it."""
    if capabilities.is_albor:
        return "/v1/completions", _albor_body(ask, model)
    prefix = ask.prefix + ask.typed_ahead
    scope, size = ask.stop_scope, ask.max_tokens
    if capabilities.kind == "infill":
        chunks = [(chunk.path, chunk.text) for chunk in ask.chunks]
        return "/infill", infill_body(prefix, ask.suffix, chunks, scope, size)
    if size == 0 or ask.num_choices > 1:
        return None, {}
    if capabilities.family is not None:
        body = token_body(prefix, ask.suffix, scope, size, capabilities.model, capabilities.family)
    else:
        body = suffix_body(prefix, ask.suffix, scope, size, capabilities.model)
    return "/v1/completions", body


def _albor_body(ask: Ask, model: str) -> dict[str, Any]:
    body: dict[str, Any] = {
        "prompt": ask.prefix,
        "suffix": ask.suffix,
        "max_tokens": ask.max_tokens,
        "temperature": ask.temperature,
        "stream": ask.num_choices == 1 and ask.max_tokens > 0 and not ask.logprobs,
        "albor": _extension(ask),
    }
    if model:
        body["model"] = model
    if ask.num_choices > 1:
        body["n"] = ask.num_choices
    if ask.logprobs:
        body["logprobs"] = ask.num_alternatives
    return body


def _extension(ask: Ask) -> dict[str, Any]:
    extension: dict[str, Any] = {
        "session": ask.session,
        "stop_scope": ask.stop_scope,
        "path": ask.path,
        "supersede": ask.supersede,
    }
    if ask.is_background:
        extension["priority"] = "background"
    if ask.chunks:
        extension["extra_context"] = [{"path": c.path, "text": c.text} for c in ask.chunks]
    if ask.typed_ahead:
        extension["typed_ahead"] = ask.typed_ahead
    if ask.drafts:
        extension["drafts"] = list(ask.drafts)
    if ask.min_confidence:
        extension["min_confidence"] = ask.min_confidence
    if ask.first_token_budget_ms:
        extension["first_token_budget_ms"] = ask.first_token_budget_ms
    if ask.deadline_ms:
        extension["deadline_ms"] = ask.deadline_ms
    return extension


class _Collected:
    """An answer while it comes."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self._on_text = on_text
        self._texts: dict[int, str] = {}
        self._choice: dict[str, Any] = {}
        self._whole: dict[str, Any] = {}
        self._tokens: list[tuple[str, float]] = []
        self._alternatives: list[dict[str, float]] = []

    def add(self, event: dict[str, Any]) -> None:
        """Take an event of a stream, or a whole answer."""
        error = event.get("error")
        if isinstance(error, dict):
            raise ServerRefusedError(500, str(error.get("message", "the server failed"))[:200])
        if "content" in event:
            # llama-server's /infill.
            self._take(0, str(event["content"]))
            for name, value in (event.get("timings") or {}).items():
                self._whole.setdefault("timings", {})[name] = value
        for choice in event.get("choices") or ():
            index = choice.get("index", 0)
            self._take(index, choice.get("text") or "")
            if index == 0:
                self._choice |= choice.get("albor") or {}
                logprobs = choice.get("logprobs") or {}
                self._tokens += [
                    (text, value)
                    for text, value in zip(
                        logprobs.get("tokens", ()), logprobs.get("token_logprobs", ()), strict=False
                    )
                    if value is not None
                ]
                self._alternatives += [top or {} for top in logprobs.get("top_logprobs") or ()]
        self._whole |= event.get("albor") or {}

    def _take(self, index: int, piece: str) -> None:
        self._texts[index] = self._texts.get(index, "") + piece
        if piece and index == 0:
            self._on_text(piece)

    def finish(self) -> Answer:
        """The answer as a whole."""
        return Answer(
            texts=tuple(self._texts[index] for index in sorted(self._texts)),
            confidence=self._choice.get("confidence"),
            stopped_by=self._choice.get("stopped_by"),
            timings={
                name: value
                for name, value in (self._whole.get("timings") or {}).items()
                if isinstance(value, int | float)
            },
            tokens=tuple(self._tokens),
            alternatives=tuple(self._alternatives),
        )


def now_ms() -> float:
    """A clock for latencies."""
    return time.perf_counter() * 1000
