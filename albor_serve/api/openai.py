"""OpenAI's shapes for /v1/completions and /v1/models, streamed and not."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from albor_serve.api.completion import Answer, Completion, ServedModel, TokenOffsets, Update
from albor_serve.api.errors import error_body
from albor_serve.api.schemas import CompletionBody
from albor_serve.errors import AlborError
from albor_serve.sequence import FinishReason, TokenInfo

__all__ = ["CompletionStream", "completion_body", "model_body", "models_body"]


def completion_body(
    served: ServedModel, body: CompletionBody, completion: Completion
) -> dict[str, Any]:
    """The whole answer, once every job has ended."""
    choices = []
    for prompt_index, candidates in _by_prompt(completion.answers):
        ranked = candidates
        if body.num_candidates > body.num_choices:
            ranked = sorted(candidates, key=lambda answer: -answer.mean_logprob)
        for at, answer in enumerate(ranked[: body.num_choices]):
            text = answer.job.echo + answer.text
            choices.append(
                {
                    "index": prompt_index * body.num_choices + at,
                    "text": text,
                    "logprobs": _whole_logprobs(served, answer, text),
                    "finish_reason": _finish_reason(answer.reason),
                }
            )
    return {**_head(served), "choices": choices, "usage": _usage(completion.answers)}


class CompletionStream:
    """Server-sent events of one streamed answer."""

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
            yield self._chunk(update.index, "", None, _finish_reason(update.reason))

    def last(self) -> Iterator[bytes]:
        """The usage, if asked for, and the end mark."""
        if self._wants_usage:
            usage = {**self._head, "choices": [], "usage": _usage(self._completion.answers)}
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


def models_body(models: Sequence[ServedModel]) -> dict[str, Any]:
    """The list of models, aliases included."""
    return {
        "object": "list",
        "data": [
            model_body(model, name) for model in models for name in (model.name, *model.aliases)
        ],
    }


def model_body(model: ServedModel, name: str) -> dict[str, Any]:
    """One model under one of its names."""
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "albor",
        "meta": {
            "description": model.description,
            "max_seq_len": model.engine.max_seq_len,
            "vocab_size": model.engine.tokenizer.vocab_size,
            "fim": model.template.family if model.template else None,
        },
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


def _usage(answers: Sequence[Answer]) -> dict[str, Any]:
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


def _finish_reason(reason: FinishReason | None) -> str | None:
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
    return _logprobs(served, tokens[:num_kept], starts[:num_kept])


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
