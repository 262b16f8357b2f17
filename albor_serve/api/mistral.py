"""Mistral's /v1/fim/completions: a FIM request whose answers have the shape of chat."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from albor_serve.api.completion import Completion, CompletionSpec, ServedModel, Update
from albor_serve.api.dialect import Host, complete, encode_json
from albor_serve.api.document import Usage, route
from albor_serve.api.errors import error_body
from albor_serve.api.extension import answer_extension, choice_extension
from albor_serve.api.openai import finish_reason, usage_of
from albor_serve.api.schemas import (
    MAX_TOKENS,
    AlborOptions,
    Body,
    ModelName,
    Stop,
    check_stops,
    parse_body,
)
from albor_serve.config import SamplingParams
from albor_serve.errors import AlborError

__all__ = ["FimBody", "MistralWriter", "fim_spec", "mistral_router"]


class FimBody(Body):
    """Request body of /v1/fim/completions. Unknown fields are ignored."""

    model: ModelName | None = None
    """One of the names that /v1/models lists; without it the default model."""
    prompt: str
    """The text before the cursor."""
    suffix: str | None = None
    """The text after it."""
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    """None sets no limit but the context's; 0 only computes the prompt into the cache."""
    min_tokens: Annotated[int, Field(ge=0, le=0)] | None = None
    """Only 0: an answer is never longer than the model wants it to be."""
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    """0, the likeliest tokens, unless given."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draw among the likeliest tokens that have this probability together."""
    random_seed: Annotated[int, Field(ge=0, lt=1 << 64)] | None = None
    """The same seed gives the same answer."""
    stop: Stop = None
    """The answer ends before the first of these texts."""
    stream: bool | None = None
    """Send the answer as server-sent events while it comes."""
    albor: AlborOptions | None = None
    """What only albor knows, as in /v1/completions."""


class FimMessage(BaseModel):
    """The text of an answer."""

    role: Literal["assistant"]
    content: str


class FimChoice(BaseModel):
    """One answer."""

    index: int
    message: FimMessage
    finish_reason: Literal["stop", "length"]


class FimAnswer(BaseModel):
    """The answer of /v1/fim/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[FimChoice]
    usage: Usage
    albor: dict[str, Any] | None = None
    """albor's own fields, where the request has an `albor` object."""


def fim_spec(served: ServedModel, body: FimBody) -> CompletionSpec:
    """What a checked body asks of the completion core.

    Raises:
        RequestError: stop is malformed.
    """
    # A model that can't fill in may still go on with the prompt.
    is_plain = not body.suffix and served.template is None
    return CompletionSpec(
        prompts=(body.prompt,),
        max_new_tokens=served.engine.max_seq_len if body.max_tokens is None else body.max_tokens,
        sampling=SamplingParams(
            temperature=body.temperature or 0.0,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.random_seed,
        ),
        fim_suffix=None if is_plain else body.suffix or "",
        fits_window=True,
        stop=check_stops(body.stop),
        options=body.albor or AlborOptions(),
    )


class MistralWriter:
    """Answers in Mistral's shape, whole or streamed."""

    def __init__(self, served: ServedModel, completion: Completion, *, is_extended: bool) -> None:
        """`is_extended` adds albor's own fields."""
        self._is_extended = is_extended
        self._served = served
        self._completion = completion
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def whole(self) -> dict[str, Any]:
        """The whole answer, once the job has ended."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text},
                "finish_reason": finish_reason(answer.reason),
            }
            for index, answer in enumerate(self._completion.answers)
        ]
        answers = self._completion.answers
        body = {**self._head("chat.completion"), "choices": choices, "usage": usage_of(answers)}
        if self._is_extended:
            body["albor"] = {**answer_extension(answers), **choice_extension(answers[0])}
        return body

    def first(self) -> Iterator[bytes]:
        """The role, which some clients want before any text."""
        for index in range(len(self._completion.answers)):
            yield self._chunk(index, {"role": "assistant", "content": ""}, None)

    def update(self, update: Update) -> Iterator[bytes]:
        """A chunk for new text, and one for the end with the usage."""
        if update.text:
            yield self._chunk(update.index, {"content": update.text}, None)
        if update.reason is not None:
            yield self._chunk(update.index, {"content": ""}, finish_reason(update.reason))

    def last(self) -> Iterator[bytes]:
        """The end mark."""
        yield b"data: [DONE]\n\n"

    def failed(self, error: AlborError) -> Iterator[bytes]:
        """An error after the headers were sent."""
        yield b"data: " + encode_json(error_body(error)) + b"\n\n"
        yield from self.last()

    def _chunk(self, index: int, delta: dict[str, str], reason: str | None) -> bytes:
        chunk = {
            **self._head("chat.completion.chunk"),
            "choices": [{"index": index, "delta": delta, "finish_reason": reason}],
        }
        if reason is not None:
            answers = self._completion.answers
            chunk["usage"] = usage_of(answers)
            if self._is_extended:
                chunk["albor"] = {**answer_extension(answers), **choice_extension(answers[index])}
        return b"data: " + encode_json(chunk) + b"\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._served.name,
        }


def mistral_router(host: Host) -> APIRouter:
    """The route /v1/fim/completions."""
    router = APIRouter()

    async def fim_completions(request: Request) -> Response:
        return await complete(
            host,
            request,
            lambda value: parse_body(FimBody, value),
            fim_spec,
            lambda served, body, completion: MistralWriter(
                served, completion, is_extended=body.albor is not None
            ),
        )

    route(
        router,
        "POST",
        "/v1/fim/completions",
        fim_completions,
        summary="Mistral's fill-in-the-middle: chat-shaped answers.",
        body=FimBody,
        answer=FimAnswer,
        streams=True,
    )
    return router
