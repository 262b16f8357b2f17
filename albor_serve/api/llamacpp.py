"""llama.cpp's shapes: the fields and the answers that its /infill and /completion share.

The shapes follow llama.cpp's server documentation and what its server was seen to answer.
Its defaults are kept (temperature 0.8, top_k 40, ...), and its list of `samplers` decides which
filters count, as there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, RootModel, WithJsonSchema

from albor_serve.api.completion import Answer, Completion, ServedModel, Update
from albor_serve.api.dialect import encode_json
from albor_serve.api.errors import error_body
from albor_serve.api.extension import answer_extension, choice_extension
from albor_serve.api.schemas import (
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_TOKENS,
    AlborOptions,
    Body,
    ModelName,
    Stop,
    check_stops,
)
from albor_serve.config import SamplingParams
from albor_serve.errors import AlborError, RequestError
from albor_serve.sequence import Timings, TokenInfo
from albor_serve.tokenizer import Tokenizer

__all__ = ["LlamaCppBody", "LlamaCppResult", "LlamaCppWriter", "timings_body"]

MAX_RESPONSE_FIELDS = 64
MAX_FIELD_CHARS = 128
MAX_SAMPLERS = 32

_SAMPLER_OF_LETTER = {
    "k": "top_k",
    "p": "top_p",
    "m": "min_p",
    "t": "temperature",
    "e": "penalties",
}
_DEFAULT_SAMPLERS = frozenset({"penalties", "top_k", "top_p", "min_p", "temperature"})
_BIAS_SCHEMA = {
    "description": "[[token id or text, bias or false], ...] or an object of them.",
    "anyOf": [
        {
            "type": "array",
            "items": {"type": "array", "minItems": 2, "maxItems": 2},
            "maxItems": MAX_LOGIT_BIAS,
        },
        {"type": "object", "additionalProperties": {"type": "number"}},
        {"type": "null"},
    ],
}


class LlamaCppBody(Body):
    """Fields of llama.cpp's completion requests. Unknown fields are ignored."""

    model: ModelName | None = None
    """One of the names that /v1/models lists; without it the default model."""
    n_predict: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    """Most tokens to generate; 0 only computes the prompt into the cache, -1 sets no limit."""
    max_tokens: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    """Another name for n_predict."""
    n_cmpl: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    """Answers to compute; with more than one, the result is a list."""
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    """0.8 unless given; 0 takes the likeliest token."""
    top_k: Annotated[int, Field(ge=-1, le=1 << 24)] | None = None
    """40 unless given; 0 and -1 mean all."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """0.95 unless given."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """0.05 unless given."""
    repeat_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    """Divides the logits of tokens in prompt and answer; 1 does nothing."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Taken off the logit of each token that the answer already has."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """The same for each time that it has it."""
    samplers: (
        Annotated[
            list[Annotated[str, Field(max_length=MAX_FIELD_CHARS)]], Field(max_length=MAX_SAMPLERS)
        ]
        | Annotated[str, Field(max_length=MAX_FIELD_CHARS)]
        | None
    ) = None
    """Which filters count: top_k, top_p, min_p, temperature, penalties; names that albor lacks
    are ignored. "infill" without a temperature takes the likeliest tokens."""
    seed: Annotated[int, Field(ge=-1, lt=1 << 64)] | None = None
    """-1 draws a fresh one."""
    stop: Stop = None
    """The answer ends before the first of these texts."""
    ignore_eos: bool | None = None
    """Never end by a token that ends texts."""
    logit_bias: Annotated[Any, WithJsonSchema(_BIAS_SCHEMA)] = None
    n_probs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Report this many most likely tokens at each place."""
    stream: bool | None = None
    """Send the answer as server-sent events while it comes."""
    cache_prompt: bool | None = None
    """Accepted; the cache never changes an answer."""
    id_slot: Annotated[int, Field(ge=-1, le=1 << 20)] | None = None
    """Accepted; albor finds the slot whose cache fits best."""
    return_tokens: bool | None = None
    """Return the token ids too."""
    timings_per_token: bool | None = None
    """Accepted; timings come with the last event."""
    n_indent: Annotated[int, Field(ge=0, le=1024)] | None = None
    """The answer ends before a line with less indentation than this many characters."""
    t_max_predict_ms: Annotated[float, Field(ge=0, le=3_600_000)] | None = None
    """Time for generating, once the answer has its first line end; 0 sets no limit."""
    t_max_prompt_ms: Annotated[float, Field(ge=0, le=3_600_000)] | None = None
    """Time for computing the prompt: the context is fitted to it; 0 sets no limit."""
    response_fields: (
        Annotated[
            list[Annotated[str, Field(max_length=MAX_FIELD_CHARS)]],
            Field(max_length=MAX_RESPONSE_FIELDS),
        ]
        | None
    ) = None
    """Parts of the answer to return, such as "content" or "timings/prompt_n"."""
    albor: AlborOptions | None = None
    """What only albor knows, as in /v1/completions."""

    @property
    def num_choices(self) -> int:
        """Answers to compute."""
        return self.n_cmpl or 1

    @property
    def is_warm_up(self) -> bool:
        """Whether only the prompt is wanted, in the cache."""
        return self._limit == 0

    @property
    def is_greedy_first(self) -> bool:
        """Whether the first answer takes the likeliest tokens although others are drawn."""
        return self.temperature is None and "infill" in self._samplers

    @property
    def _limit(self) -> int:
        limit = self.n_predict if self.n_predict is not None else self.max_tokens
        return -1 if limit is None else limit

    @property
    def _samplers(self) -> frozenset[str]:
        if self.samplers is None:
            return _DEFAULT_SAMPLERS
        if isinstance(self.samplers, str):
            return frozenset(_SAMPLER_OF_LETTER.get(letter, "") for letter in self.samplers)
        return frozenset(self.samplers)

    def max_new_tokens(self, served: ServedModel) -> int:
        """Most tokens to generate; the context is the limit where there is no other."""
        return served.engine.max_seq_len if self._limit < 0 else self._limit

    def sampling(self, tokenizer: Tokenizer) -> SamplingParams:
        """How tokens are chosen.

        Raises:
            RequestError: logit_bias is malformed.
        """
        samplers = self._samplers
        penalised = "penalties" in samplers
        temperature = 1.0
        if "temperature" in samplers or self.temperature is not None:
            temperature = 0.8 if self.temperature is None else self.temperature
        top_k = 40 if self.top_k is None else self.top_k
        min_p = 0.05 if self.min_p is None else self.min_p
        top_p = 0.95 if self.top_p is None else self.top_p
        return SamplingParams(
            temperature=temperature,
            top_k=max(top_k, 0) if "top_k" in samplers else 0,
            top_p=top_p if "top_p" in samplers else 1.0,
            min_p=min_p if "min_p" in samplers else 0.0,
            repetition_penalty=(self.repeat_penalty or 1.0) if penalised else 1.0,
            presence_penalty=(self.presence_penalty or 0.0) if penalised else 0.0,
            frequency_penalty=(self.frequency_penalty or 0.0) if penalised else 0.0,
            logit_bias=_biases(self.logit_bias, tokenizer),
            seed=None if self.seed in (None, -1) else self.seed,
            num_logprobs=self.n_probs or None,
        )

    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return check_stops(self.stop)


class LlamaCppTimings(BaseModel):
    """Where the time went; rates are 0 where there was nothing to measure."""

    cache_n: int
    """Prompt tokens found in the KV cache."""
    prompt_n: int
    """Prompt tokens computed."""
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float
    draft_n: int = 0
    draft_n_accepted: int = 0


class LlamaCppAnswer(BaseModel):
    """One answer; with `response_fields`, only these, under their paths."""

    index: int = 0
    content: str = ""
    tokens: list[int] = []
    """Filled with `return_tokens`."""
    id_slot: int = 0
    stop: bool = True
    model: str = ""
    tokens_predicted: int = 0
    tokens_evaluated: int = 0
    generation_settings: dict[str, Any] = {}
    has_new_line: bool = False
    truncated: bool = False
    """Whether code around the cursor was left out for want of room."""
    stop_type: Literal["none", "eos", "limit", "word"] = "limit"
    stopping_word: str = ""
    tokens_cached: int = 0
    timings: LlamaCppTimings | None = None
    completion_probabilities: list[dict[str, Any]] | None = None
    """Filled with `n_probs`."""
    albor: dict[str, Any] | None = None
    """albor's own fields, where the request has an `albor` object."""


class LlamaCppResult(RootModel[LlamaCppAnswer | list[LlamaCppAnswer]]):
    """One answer, or a list where several were asked for."""


def _biases(bias: Any, tokenizer: Tokenizer) -> tuple[tuple[int, float], ...]:
    """(token id, bias) pairs; text stands for each of its tokens, false for "never"."""
    error = RequestError(
        f"logit_bias must hold at most {MAX_LOGIT_BIAS} pairs of a token id or text and a number, "
        f"-100 to 100, or false",
        param="logit_bias",
    )
    if bias is None:
        return ()
    pairs = list(bias.items()) if isinstance(bias, dict) else bias
    if not isinstance(pairs, list) or len(pairs) > MAX_LOGIT_BIAS:
        raise error
    out: list[tuple[int, float]] = []
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise error
        key, value = pair
        if value is False:
            value = -100.0
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise error
        if not -100 <= value <= 100:
            raise error
        if isinstance(key, str) and 0 < len(key) <= MAX_FIELD_CHARS:
            ids = tokenizer.encode(key)
        elif isinstance(key, int) and not isinstance(key, bool):
            ids = [key]
        else:
            raise error
        out += [(token_id, float(value)) for token_id in ids]
        if len(out) > MAX_LOGIT_BIAS:
            raise error
    return tuple(out)


class LlamaCppWriter:
    """Answers in llama.cpp's shape, whole or streamed."""

    def __init__(
        self, served: ServedModel, body: LlamaCppBody, completion: Completion, *, is_list: bool
    ) -> None:
        """`is_list` makes the whole answer a list even of one."""
        self._served = served
        self._body = body
        self._completion = completion
        self._is_list = is_list
        self._num_tokens = [0] * len(completion.answers)

    def whole(self) -> Any:
        """One object, or a list of them where several answers were asked for."""
        answers = [
            self._pick(self._result(index, answer, answer.text, answer.tokens))
            for index, answer in enumerate(self._completion.answers)
        ]
        return answers if self._is_list else answers[0]

    def first(self) -> Iterator[bytes]:
        """Nothing comes before the first token."""
        return iter(())

    def update(self, update: Update) -> Iterator[bytes]:
        """An event for new text; the last one has no text and carries everything else."""
        answer = self._completion.answers[update.index]
        self._num_tokens[update.index] += len(update.tokens)
        if update.text or update.tokens:
            part: dict[str, Any] = {
                "index": update.index,
                "content": update.text,
                "tokens": [token.token_id for token in update.tokens],
                "stop": False,
                "id_slot": -1,
                "tokens_predicted": self._num_tokens[update.index],
                "tokens_evaluated": len(answer.job.request.prompt),
            }
            if self._body.n_probs:
                part["completion_probabilities"] = self._probabilities(update.tokens)
            yield _event(part)
        if update.reason is not None:
            yield _event(self._pick(self._result(update.index, answer, "", ())))

    def last(self) -> Iterator[bytes]:
        """llama.cpp marks the end in the last event itself."""
        return iter(())

    def failed(self, error: AlborError) -> Iterator[bytes]:
        """An error after the headers were sent."""
        yield _event(error_body(error))

    def _result(
        self, index: int, answer: Answer, text: str, tokens: Sequence[TokenInfo]
    ) -> dict[str, Any]:
        timings = answer.timings or Timings()
        stop_type: Literal["none", "eos", "limit", "word"] = "limit"
        if answer.reason == "stop":
            stop_type = "eos" if answer.stopped_by is None else "word"
        request = answer.job.request
        result = {
            "index": index,
            "content": text,
            "tokens": [token.token_id for token in tokens] if self._body.return_tokens else [],
            "id_slot": max(self._body.id_slot or 0, 0),
            "stop": True,
            "model": self._served.name,
            "tokens_predicted": timings.num_new_tokens,
            "tokens_evaluated": timings.num_prompt_tokens,
            "generation_settings": {
                "n_ctx": self._served.engine.max_seq_len,
                "n_predict": request.max_new_tokens,
                "seed": request.sampling.seed,
                "temperature": request.sampling.temperature,
                "top_k": request.sampling.top_k,
                "top_p": request.sampling.top_p,
                "min_p": request.sampling.min_p,
                "repeat_penalty": request.sampling.repetition_penalty,
                "presence_penalty": request.sampling.presence_penalty,
                "frequency_penalty": request.sampling.frequency_penalty,
                "n_probs": self._body.n_probs or 0,
                "stream": bool(self._body.stream),
            },
            "has_new_line": "\n" in answer.text,
            "truncated": answer.job.is_truncated,
            "stop_type": stop_type,
            "stopping_word": answer.stop_string or "",
            "tokens_cached": timings.num_prompt_tokens + max(0, timings.num_new_tokens - 1),
            "timings": timings_body(timings),
        }
        if self._body.albor is not None:
            result["albor"] = {**answer_extension([answer]), **choice_extension(answer)}
        if self._body.n_probs and tokens:
            result["completion_probabilities"] = self._probabilities(tokens)
        return result

    def _pick(self, result: dict[str, Any]) -> dict[str, Any]:
        """Only the fields that were asked for, under the paths that were asked for."""
        if not self._body.response_fields:
            return result
        picked = {}
        for path in self._body.response_fields:
            value: Any = result
            for name in path.split("/"):
                if not isinstance(value, dict) or name not in value:
                    break
                value = value[name]
            else:
                picked[path] = value
        return picked

    def _probabilities(self, tokens: Sequence[TokenInfo]) -> list[dict[str, Any]]:
        piece = self._served.engine.tokenizer.token_bytes
        return [
            {
                **_probability(token.token_id, token.token_bytes, token.logprob),
                "top_logprobs": [
                    _probability(token_id, piece(token_id), logprob)
                    for token_id, logprob in token.top_logprobs
                ],
            }
            for token in tokens
        ]


def timings_body(timings: Timings) -> dict[str, Any]:
    """llama.cpp's `timings` object; rates are 0 where there was nothing to measure."""
    num_prompt = timings.num_prompt_tokens - timings.num_cached_tokens
    body: dict[str, Any] = {
        "cache_n": timings.num_cached_tokens,
        "prompt_n": num_prompt,
        "prompt_ms": timings.prefill_ms,
        "prompt_per_token_ms": _ratio(timings.prefill_ms, num_prompt),
        "prompt_per_second": _ratio(num_prompt * 1000, timings.prefill_ms),
        "predicted_n": timings.num_new_tokens,
        "predicted_ms": timings.decode_ms,
        "predicted_per_token_ms": _ratio(timings.decode_ms, timings.num_new_tokens),
        "predicted_per_second": _ratio(timings.num_new_tokens * 1000, timings.decode_ms),
    }
    if timings.num_draft_tokens:
        body["draft_n"] = timings.num_draft_tokens
        body["draft_n_accepted"] = timings.num_accepted
    return body


def _probability(token_id: int, piece: bytes, logprob: float | None) -> dict[str, Any]:
    return {
        "id": token_id,
        "token": piece.decode("utf-8", "replace"),
        "bytes": list(piece),
        "logprob": logprob,
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _event(value: Any) -> bytes:
    return b"data: " + encode_json(value) + b"\n\n"
