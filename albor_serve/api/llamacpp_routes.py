"""llama.cpp's other routes: /completion, /tokenize, /detokenize, /props and /slots."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, Field, RootModel, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from albor_serve import __version__
from albor_serve.api.completion import CompletionSpec, ServedModel
from albor_serve.api.dialect import LARGE_BODY_BYTES, Host, complete, json_response
from albor_serve.api.document import route
from albor_serve.api.llamacpp import LlamaCppBody, LlamaCppResult, LlamaCppWriter
from albor_serve.api.schemas import (
    MAX_PROMPTS,
    AlborOptions,
    Body,
    ModelName,
    Prompt,
    is_token_id,
    parse_body,
)
from albor_serve.errors import QueueFullError, RequestError
from albor_serve.tokenizer import Tokenizer

__all__ = ["llamacpp_router"]

MAX_DETOKENIZED = 1 << 17
"""Token ids in one request to /detokenize."""

_PIECES = {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "string"}]}}
_PROMPT_SCHEMA = {
    "description": "Text, a list of token ids and texts, or a list of such prompts.",
    "anyOf": [
        {"type": "string"},
        _PIECES,
        {"type": "array", "items": {"anyOf": [{"type": "string"}, _PIECES]}},
        {"type": "object", "properties": {"prompt_string": {"type": "string"}}},
    ],
}


_MODEL_QUERY = "One of the names that /v1/models lists; without it the default model."


class PlainBody(LlamaCppBody):
    """Request body of /completion."""

    prompt: Annotated[Any, WithJsonSchema(_PROMPT_SCHEMA)]


class TokenizeBody(Body):
    """Request body of /tokenize."""

    content: str
    """The text."""
    add_special: bool = False
    """Put the beginning-of-text token first, where the model has one."""
    parse_special: bool = True
    """Whether spellings such as <|fim_prefix|> become control tokens."""
    with_pieces: bool = False
    """Return each token's text too."""
    model: ModelName | None = None
    """Whose tokens; without it the default model."""


class TokenPiece(BaseModel):
    """A token and what it stands for: text, or its bytes where they are no whole characters."""

    id: int
    piece: str | list[int]


class TokenizeAnswer(BaseModel):
    """The answer of /tokenize."""

    tokens: list[int | TokenPiece]


class DetokenizeBody(Body):
    """Request body of /detokenize."""

    tokens: Annotated[list[int], Field(max_length=MAX_DETOKENIZED)]
    """Token ids."""
    model: ModelName | None = None
    """Whose tokens; without it the default model."""


class DetokenizeAnswer(BaseModel):
    """The answer of /detokenize; control tokens stand for no text."""

    content: str


class Props(BaseModel):
    """The answer of /props."""

    default_generation_settings: dict[str, Any]
    total_slots: int
    model_alias: str
    model_path: str
    chat_template: str
    modalities: dict[str, bool]
    build_info: str
    is_sleeping: bool


class SlotState(BaseModel):
    """One slot of /slots."""

    id: int
    n_ctx: int
    speculative: bool
    is_processing: bool
    n_prompt_tokens_cache: int


class Slots(RootModel[list[SlotState]]):
    """The answer of /slots."""


def _prompts(tokenizer: Tokenizer, prompt: Any) -> tuple[Prompt, ...]:
    """The prompts one by one, as llama.cpp tells them apart."""
    if isinstance(prompt, list) and not any(is_token_id(part) for part in prompt):
        if not 0 < len(prompt) <= MAX_PROMPTS:
            raise RequestError(f"prompt must hold 1 to {MAX_PROMPTS} prompts", param="prompt")
        return tuple(_one_prompt(tokenizer, part) for part in prompt)
    return (_one_prompt(tokenizer, prompt),)


def _one_prompt(tokenizer: Tokenizer, prompt: Any) -> Prompt:
    if isinstance(prompt, dict) and set(prompt) == {"prompt_string"}:
        prompt = prompt["prompt_string"]
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt:
        ids: list[int] = []
        for part in prompt:
            if isinstance(part, str):
                ids += tokenizer.encode(part, parse_special=True)
            elif is_token_id(part):
                ids.append(part)
            else:
                raise _prompt_error()
        if ids:
            return tuple(ids)
    raise _prompt_error()


def _prompt_error() -> RequestError:
    return RequestError(
        "prompt must be text, a list of token ids and texts, or a list of such prompts, none of "
        "them empty",
        param="prompt",
    )


def _plain_spec(served: ServedModel, body: PlainBody) -> CompletionSpec:
    tokenizer = served.engine.tokenizer
    return CompletionSpec(
        prompts=_prompts(tokenizer, body.prompt),
        max_new_tokens=body.max_new_tokens(served),
        sampling=body.sampling(tokenizer),
        num_candidates=body.num_choices,
        is_greedy_first=body.is_greedy_first,
        stop=body.stops(),
        ignore_eos=bool(body.ignore_eos),
        min_indent=body.n_indent or 0,
        max_decode_ms=body.t_max_predict_ms or None,
        options=body.albor or AlborOptions(),
    )


def llamacpp_router(host: Host) -> APIRouter:
    """The routes of this module."""
    router = APIRouter()

    async def completion(request: Request) -> Response:
        return await complete(
            host,
            request,
            lambda value: parse_body(PlainBody, value),
            _plain_spec,
            lambda served, body, completion: LlamaCppWriter(
                served, body, completion, is_list=len(completion.answers) > 1
            ),
        )

    async def tokenize(request: Request) -> Response:
        value, num_bytes = await host.read_json(request)
        body = parse_body(TokenizeBody, value)
        tokenizer = (await host.find_model(request, body.model)).engine.tokenizer

        def answer() -> Response:
            ids = tokenizer.encode(body.content, parse_special=body.parse_special)
            if body.add_special and tokenizer.adds_bos and tokenizer.bos_token_id is not None:
                ids = [tokenizer.bos_token_id, *ids]
            if not body.with_pieces:
                return json_response({"tokens": ids})
            pieces = [{"id": i, "piece": _piece(tokenizer.token_bytes(i))} for i in ids]
            return json_response({"tokens": pieces})

        is_large = num_bytes > LARGE_BODY_BYTES
        return await asyncio.to_thread(answer) if is_large else answer()

    async def detokenize(request: Request) -> Response:
        value, _ = await host.read_json(request)
        body = parse_body(DetokenizeBody, value)
        tokenizer = (await host.find_model(request, body.model)).engine.tokenizer
        if not all(0 <= token_id < tokenizer.vocab_size for token_id in body.tokens):
            raise RequestError(
                f"a token id is outside this model's vocabulary: use 0 to "
                f"{tokenizer.vocab_size - 1}",
                param="tokens",
            )
        return json_response({"content": tokenizer.decode(body.tokens).decode("utf-8", "replace")})

    async def props(request: Request) -> Response:
        view = host.view_model(request.query_params.get("model"))
        served = view.served
        settings: dict[str, Any] = {}
        if view.facts is not None:
            settings["n_ctx"] = view.facts.max_seq_len
        if served is not None:
            defaults = PlainBody(prompt="").sampling(served.engine.tokenizer)
            settings["params"] = {
                "temperature": defaults.temperature,
                "top_k": defaults.top_k,
                "top_p": defaults.top_p,
                "min_p": defaults.min_p,
                "n_predict": -1,
            }
        return json_response(
            {
                "default_generation_settings": settings,
                "total_slots": len(view.stats.slots) if view.stats else 0,
                "model_alias": view.name,
                # Where the file lies is nobody's business.
                "model_path": view.name,
                "chat_template": "",
                "modalities": {"vision": False, "audio": False},
                "build_info": f"albor {__version__}",
                "is_sleeping": served is None,
            }
        )

    async def slots(request: Request) -> Response:
        view = host.view_model(request.query_params.get("model"))
        views = view.stats.slots if view.stats else ()
        wants_free = request.query_params.get("fail_on_no_slot", "") not in ("", "0")
        if wants_free and views and all(slot.is_busy for slot in views):
            raise QueueFullError("every slot is busy: try again later")
        max_seq_len = view.facts.max_seq_len if view.facts else 0
        states = [
            {
                "id": slot.index,
                "n_ctx": max_seq_len,
                "speculative": False,
                "is_processing": slot.is_busy,
                "n_prompt_tokens_cache": slot.num_cached_tokens,
            }
            for slot in views
        ]
        return json_response(states)

    for path in ("/completion", "/completions"):
        route(
            router,
            "POST",
            path,
            completion,
            summary="llama.cpp's text completion.",
            body=PlainBody,
            answer=LlamaCppResult,
            streams=True,
        )
    route(
        router,
        "POST",
        "/tokenize",
        tokenize,
        summary="Text to token ids.",
        body=TokenizeBody,
        answer=TokenizeAnswer,
        statuses=(400, 401, 403, 404, 408, 413),
    )
    route(
        router,
        "POST",
        "/detokenize",
        detokenize,
        summary="Token ids to text.",
        body=DetokenizeBody,
        answer=DetokenizeAnswer,
        statuses=(400, 401, 403, 404, 408, 413),
    )
    route(
        router,
        "GET",
        "/props",
        props,
        summary="The model's settings.",
        answer=Props,
        query={"model": _MODEL_QUERY},
    )
    route(
        router,
        "GET",
        "/slots",
        slots,
        summary="What each slot does.",
        answer=Slots,
        query={
            "model": _MODEL_QUERY,
            "fail_on_no_slot": "With 1, the answer is 503 where every slot is busy.",
        },
    )
    return router


def _piece(data: bytes) -> str | list[int]:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return list(data)
