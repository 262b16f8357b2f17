"""llama.cpp's /infill, as llama.vim and llama.vscode send and read it.

What llama.cpp's server promises and does not do is done here: `t_max_prompt_ms` fits the context
to the time, and a warm-up (`n_predict: 0`) gives way to whoever types.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from albor_serve.api.completion import CompletionSpec, ServedModel
from albor_serve.api.dialect import Host, complete
from albor_serve.api.document import route
from albor_serve.api.llamacpp import LlamaCppBody, LlamaCppResult, LlamaCppWriter
from albor_serve.api.schemas import (
    MAX_EXTRA_CHARS,
    MAX_EXTRA_FILES,
    MAX_PATH_CHARS,
    AlborOptions,
    Body,
    ExtraContext,
    parse_body,
)

__all__ = ["InfillBody", "infill_router", "infill_spec"]


UNNAMED = "unnamed"
"""Stands for the path of a piece that came without one."""


class ExtraChunk(Body):
    """A piece of another file."""

    text: Annotated[str, Field(max_length=MAX_EXTRA_CHARS)]
    """What the model reads of the file."""
    filename: Annotated[str, Field(max_length=MAX_PATH_CHARS)] | None = None
    """Where it lies in the project."""


class InfillBody(LlamaCppBody):
    """Request body of /infill."""

    input_prefix: str
    """The lines before the cursor's."""
    input_suffix: str
    """Everything after the cursor."""
    prompt: str | None = None
    """The cursor's line up to the cursor."""
    input_extra: Annotated[list[ExtraChunk], Field(max_length=MAX_EXTRA_FILES)] | None = None
    """Pieces of other files, the oldest first."""


def infill_spec(served: ServedModel, body: InfillBody) -> CompletionSpec:
    """What a checked body asks of the completion core.

    Raises:
        RequestError: stop or logit_bias is malformed.
    """
    given = body.albor or AlborOptions()
    changes: dict[str, object] = {}
    if body.is_warm_up:
        changes["priority"] = "background"
    elif body.t_max_prompt_ms:
        changes["first_token_budget_ms"] = body.t_max_prompt_ms
    if body.input_extra:
        changes["extra_context"] = [
            ExtraContext(path=chunk.filename or UNNAMED, text=chunk.text)
            for chunk in body.input_extra
            if chunk.text
        ]
    changes = {name: v for name, v in changes.items() if name not in given.model_fields_set}
    return CompletionSpec(
        prompts=(body.input_prefix + (body.prompt or ""),),
        max_new_tokens=body.max_new_tokens(served),
        sampling=body.sampling(served.engine.tokenizer),
        fim_suffix=body.input_suffix,
        fits_window=True,
        num_candidates=1 if body.is_warm_up else body.num_choices,
        is_greedy_first=body.is_greedy_first,
        stop=body.stops(),
        ignore_eos=bool(body.ignore_eos),
        min_indent=body.n_indent or 0,
        max_decode_ms=body.t_max_predict_ms or None,
        options=given.model_copy(update=changes),
    )


def infill_router(host: Host) -> APIRouter:
    """The route /infill."""
    router = APIRouter()

    async def infill(request: Request) -> Response:
        return await complete(
            host,
            request,
            lambda value: parse_body(InfillBody, value),
            infill_spec,
            lambda served, body, completion: LlamaCppWriter(
                served, body, completion, is_list=body.num_choices > 1
            ),
        )

    route(
        router,
        "POST",
        "/infill",
        infill,
        summary="llama.cpp's fill-in-the-middle.",
        body=InfillBody,
        answer=LlamaCppResult,
        streams=True,
    )
    return router
