"""OpenAI's shapes for /v1/completions and /v1/models, streamed and not."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel

from albor_serve.api.completion import (
    Answer,
    Completion,
    CompletionSpec,
    ServedModel,
    TokenOffsets,
    Update,
)
from albor_serve.api.document import Usage
from albor_serve.api.errors import error_body
from albor_serve.api.extension import answer_extension, choice_extension
from albor_serve.api.registry import ModelView
from albor_serve.api.schemas import AlborOptions, CompletionBody
from albor_serve.config import SamplingParams
from albor_serve.errors import AlborError
from albor_serve.sequence import FinishReason, TokenInfo

__all__ = [
    "CompletionAnswer",
    "CompletionWriter",
    "ModelEntry",
    "ModelList",
    "completion_spec",
    "finish_reason",
    "model_body",
    "models_body",
    "usage_of",
]

DEFAULT_MAX_TOKENS = 16


class Logprobs(BaseModel):
    """Log-probabilities of one answer's tokens, one entry for each."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """None for the first token of an echoed prompt."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Where each token starts in the text, in characters."""


class Choice(BaseModel):
    """One answer."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]
    albor: dict[str, Any] | None = None
    """`confidence` and `stopped_by`, where the request has an `albor` object."""


class CompletionAnswer(BaseModel):
    """The answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    albor: dict[str, Any] | None = None
    """`timings` and `fim`, where the request has an `albor` object."""


class ModelMeta(BaseModel):
    """What is known of a model."""

    description: str
    max_seq_len: int
    """Tokens that one request may hold, answer included."""
    vocab_size: int
    fim: str | None
    """The family of its fill-in-the-middle prompts; None where it has none."""


class ModelStatus(BaseModel):
    """Whether a model is in memory; requests load it on demand."""

    value: Literal["unloaded", "loading", "loaded", "unloading", "failed"]


class ModelEntry(BaseModel):
    """One model under one of its names."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    status: ModelStatus
    meta: ModelMeta | None
    """None until it has been loaded once."""


class ModelList(BaseModel):
    """The answer of /v1/models."""

    object: Literal["list"]
    data: list[ModelEntry]


def completion_spec(body: CompletionBody) -> CompletionSpec:
    """What a checked body asks of the completion core.

    Raises:
        RequestError: prompt, stop or logit_bias is malformed.
    """
    num_logprobs = body.logprobs
    if num_logprobs is None and (body.num_candidates > body.num_choices or body.albor is not None):
        num_logprobs = 0  # best_of ranks by them, and albor's answers tell their confidence
    sampling = SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=body.biases(),
        seed=body.seed,
        num_logprobs=num_logprobs,
    )
    return CompletionSpec(
        prompts=tuple(body.prompts()),
        max_new_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        sampling=sampling,
        fim_suffix=body.suffix,
        # Tabby's clients send whole files.
        fits_window=body.segments is not None,
        num_candidates=body.num_candidates,
        stop=body.stops(),
        ignore_eos=bool(body.ignore_eos),
        echo=bool(body.echo),
        wants_logprobs=body.logprobs is not None,
        options=body.albor or AlborOptions(),
    )


class CompletionWriter:
    """One answer of /v1/completions, whole or as server-sent events."""

    def __init__(self, served: ServedModel, body: CompletionBody, completion: Completion) -> None:
        self._served = served
        self._body = body
        self._completion = completion
        self._head = _head(served)
        # Everything but the choice is the same in all chunks: encode it once.
        usage = ', "usage": null' if self._wants_usage else ""
        self._before = json.dumps({**self._head, "choices": []}).removesuffix("]}")
        self._after = f"]{usage}}}\n\n"
        self._offsets: dict[int, TokenOffsets] = {}
        self._num_ended = 0

    def whole(self) -> dict[str, Any]:
        """The whole answer, once every job has ended."""
        num_choices = self._body.num_choices
        answers = self._completion.answers
        choices = []
        for prompt_index, candidates in _by_prompt(answers):
            ranked = candidates
            if self._body.num_candidates > num_choices:
                ranked = sorted(candidates, key=lambda answer: -answer.mean_logprob)
            for at, answer in enumerate(ranked[:num_choices]):
                text = answer.job.echo + answer.text
                choices.append(
                    {
                        "index": prompt_index * num_choices + at,
                        "text": text,
                        "logprobs": _whole_logprobs(self._served, answer, text),
                        "finish_reason": finish_reason(answer.reason),
                        **({"albor": choice_extension(answer)} if self._is_extended else {}),
                    }
                )
        return {
            **self._head,
            "choices": choices,
            "usage": usage_of(answers),
            **({"albor": answer_extension(answers)} if self._is_extended else {}),
        }

    def first(self) -> Iterator[bytes]:
        """What can be sent before the first token: the echoed prompts."""
        if self._body.echo:
            for index, answer in enumerate(self._completion.answers):
                if not answer.job.request.prompt_logprobs:
                    yield self._chunk(index, answer.job.echo, None, None)

    def update(self, update: Update) -> Iterator[bytes]:
        """Chunks for an update; the finish reason comes in a chunk of its own at the end."""
        answer = self._completion.answers[update.index]
        job = answer.job
        text, logprobs = update.text, None
        if job.wants_logprobs:
            logprobs = self._logprobs(update)
        if job.request.prompt_logprobs and update.reason is not None:
            # Prompt log-probabilities are known at the end alone: everything comes in one chunk.
            text = job.echo + answer.text
            logprobs = _whole_logprobs(self._served, answer, text)
            yield self._chunk(update.index, text, logprobs, None)
        elif (text or (logprobs and logprobs["tokens"])) and not job.request.prompt_logprobs:
            yield self._chunk(update.index, text, logprobs, None)
        if update.reason is not None:
            yield self._end(update.index, answer)

    def last(self) -> Iterator[bytes]:
        """The usage, if asked for, and the end mark."""
        if self._wants_usage:
            usage = {**self._head, "choices": [], "usage": usage_of(self._completion.answers)}
            yield b"data: " + json.dumps(usage).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"

    def failed(self, error: AlborError) -> Iterator[bytes]:
        """An error after the headers were sent."""
        yield b"data: " + json.dumps(error_body(error)).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"

    def _chunk(
        self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None
    ) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return f"data: {self._before}{json.dumps(choice)}{self._after}".encode()

    def _end(self, index: int, answer: Answer) -> bytes:
        """The chunk with the finish reason; the last of all choices' carries the timings."""
        reason = finish_reason(answer.reason)
        logprobs = None
        if answer.job.wants_logprobs and answer.end_token is not None:
            logprobs = self._logprobs(Update(index, "", (answer.end_token,), None))
        if not self._is_extended:
            return self._chunk(index, "", logprobs, reason)
        choice = {"index": index, "text": "", "logprobs": logprobs, "finish_reason": reason}
        chunk = {**self._head, "choices": [{**choice, "albor": choice_extension(answer)}]}
        if self._wants_usage:
            chunk["usage"] = None
        answers = self._completion.answers
        self._num_ended += 1
        if self._num_ended == len(answers):
            chunk["albor"] = answer_extension(answers)
        return b"data: " + json.dumps(chunk).encode() + b"\n\n"

    @property
    def _is_extended(self) -> bool:
        """Whether the caller knows albor's own fields."""
        return self._body.albor is not None

    @property
    def _wants_usage(self) -> bool:
        options = self._body.stream_options
        return options is not None and options.include_usage

    def _logprobs(self, update: Update) -> dict[str, Any]:
        offsets = self._offsets.get(update.index)
        if offsets is None:
            echo = self._completion.answers[update.index].job.echo
            offsets = self._offsets[update.index] = TokenOffsets(len(echo))
        starts = [offsets.next(token.token_bytes) for token in update.tokens]
        return _logprobs(self._served, update.tokens, starts)


def models_body(models: Sequence[ModelView]) -> dict[str, Any]:
    """The list of models, aliases included."""
    return {
        "object": "list",
        "data": [
            model_body(model, name) for model in models for name in (model.name, *model.aliases)
        ],
    }


def model_body(model: ModelView, name: str) -> dict[str, Any]:
    """One model under one of its names."""
    facts = model.facts
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "albor",
        "status": {"value": model.state},
        "meta": None if facts is None else asdict(facts),
    }


def _head(served: ServedModel) -> dict[str, Any]:
    return {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": served.name,
    }


def _by_prompt(answers: Sequence[Answer]) -> Iterator[tuple[int, list[Answer]]]:
    groups: dict[int, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.job.prompt_index, []).append(answer)
    yield from groups.items()


def usage_of(answers: Sequence[Answer]) -> dict[str, Any]:
    """OpenAI's usage object for finished answers."""
    num_prompt = num_cached = num_new = 0
    for _, candidates in _by_prompt(answers):
        # A prompt counts once, however many answers it has.
        first = candidates[0].timings
        num_prompt += first.num_prompt_tokens if first else 0
        num_cached += first.num_cached_tokens if first else 0
        num_new += sum(answer.timings.num_new_tokens for answer in candidates if answer.timings)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def finish_reason(reason: FinishReason | None) -> str | None:
    """OpenAI's word for the end of an answer."""
    return "length" if reason == "deadline" else reason


def _whole_logprobs(served: ServedModel, answer: Answer, text: str) -> dict[str, Any] | None:
    """Log-probabilities of a finished answer; tokens cut off by a stop string are left out."""
    if not answer.job.wants_logprobs:
        return None
    if answer.prompt_tokens:
        offsets = TokenOffsets()
        tokens = [*answer.prompt_tokens, *answer.tokens]
    else:
        offsets = TokenOffsets(len(answer.job.echo))
        tokens = list(answer.tokens)
    num_prompt = len(answer.prompt_tokens)
    starts = [offsets.next(token.token_bytes) for token in tokens]
    num_kept = sum(at < num_prompt or start < len(text) for at, start in enumerate(starts))
    tokens, starts = tokens[:num_kept], starts[:num_kept]
    if answer.end_token is not None:
        # Evaluation harnesses count on one entry for each sampled token, this one too.
        tokens.append(answer.end_token)
        starts.append(len(text))
    return _logprobs(served, tokens, starts)


def _logprobs(
    served: ServedModel, tokens: Sequence[TokenInfo], starts: Sequence[int]
) -> dict[str, Any]:
    piece = served.engine.tokenizer.token_bytes
    return {
        "tokens": [_as_text(token.token_bytes) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_top(token, piece) for token in tokens],
        "text_offset": list(starts),
    }


def _top(token: TokenInfo, piece: Callable[[int], bytes]) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    # The chosen token is always among them, however unlikely it was. Tokens that are parts of
    # characters look alike: the likeliest stays.
    own_text = _as_text(token.token_bytes)
    top: dict[str, float] = {}
    for token_id, logprob in token.top_logprobs:
        top.setdefault(
            own_text if token_id == token.token_id else _as_text(piece(token_id)), logprob
        )
    return {**top, own_text: token.logprob}


def _as_text(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")
