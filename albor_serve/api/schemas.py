"""Request bodies: what may be in them, checked before anything is computed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from albor_serve.errors import RequestError

__all__ = [
    "AlborOptions",
    "Body",
    "CompletionBody",
    "ExtraContext",
    "ModelName",
    "Prompt",
    "Stop",
    "check_stops",
    "is_token_id",
    "parse_body",
    "parse_completion",
    "parse_json",
    "with_inner",
]

MAX_PROMPTS = 16
MAX_CHOICES = 16
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGIT_BIAS = 300
MAX_TOKENS = 1 << 20
MAX_NAME_CHARS = 512
MAX_PATH_CHARS = 1024
MAX_EXTRA_FILES = 64
MAX_EXTRA_CHARS = 1 << 18
MAX_DRAFTS = 8
MAX_DRAFT_CHARS = 8192
MAX_TYPED_CHARS = 1024
TABBY_MAX_TOKENS = 64

Prompt = str | tuple[int, ...]
"""One prompt: text, or token ids."""

_TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT_SCHEMA = {
    "description": "Text, token ids, or a list of either (mixed too); with suffix, one text: what "
    "stands before the cursor.",
    "anyOf": [
        {"type": "string", "minLength": 1},
        _TOKEN_IDS,
        {
            "type": "array",
            "items": {"anyOf": [{"type": "string", "minLength": 1}, _TOKEN_IDS]},
            "minItems": 1,
            "maxItems": MAX_PROMPTS,
        },
    ],
}
_STOP_STRING = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_STOP_SCHEMA = {
    "anyOf": [
        _STOP_STRING,
        {"type": "array", "items": _STOP_STRING, "maxItems": MAX_STOPS},
        {"type": "null"},
    ]
}
_BIAS_SCHEMA = {
    "anyOf": [
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_LOGIT_BIAS,
        },
        {"type": "null"},
    ]
}


BodyT = TypeVar("BodyT", bound=BaseModel)
Stop = Annotated[Any, WithJsonSchema(_STOP_SCHEMA)]
"""A `stop` field; read it with `check_stops`."""
ModelName = Annotated[str, Field(max_length=MAX_NAME_CHARS)]
"""A `model` field."""


class Body(BaseModel):
    """Base of all request bodies: exact types, unknown fields ignored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: bool = False
    """A last event has the usage; its choices are empty."""


class ExtraContext(Body):
    """A piece of another file."""

    path: Annotated[str, Field(min_length=1, max_length=MAX_PATH_CHARS)]
    """Where the file lies in the project."""
    text: Annotated[str, Field(max_length=MAX_EXTRA_CHARS)]
    """What the model reads of it."""


class AlborOptions(Body):
    """albor's own extensions."""

    session: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """A newer request of the same session cancels the older ones; its KV cache is kept."""
    supersede: bool = True
    """False leaves the session's older requests alone."""
    deadline_ms: Annotated[float, Field(gt=0, le=3_600_000)] | None = None
    """Time after which the answer ends with what there is."""
    priority: Literal["interactive", "background"] = "interactive"
    """Background requests give way to interactive ones."""
    stop_scope: Literal["line", "block", "scope", "none"] = "none"
    """Where the answer ends at the latest: at its line, its block, its enclosing scope."""
    path: Annotated[str, Field(min_length=1, max_length=MAX_PATH_CHARS)] | None = None
    """Path of the file being edited; tells the language, and the model where it is."""
    extra_context: Annotated[list[ExtraContext], Field(max_length=MAX_EXTRA_FILES)] = Field(
        default_factory=list
    )
    """Pieces of other files, most stable first. Needs suffix."""
    min_confidence: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The answer ends before its first token that is less likely than this; unless given, the
    server's --min-confidence where a suffix asks for fill-in-the-middle."""
    first_token_budget_ms: Annotated[float, Field(gt=0, le=3_600_000)] | None = None
    """The prompt is cut so that computing it takes about this long at most; needs suffix."""
    drafts: Annotated[
        list[Annotated[str, Field(max_length=MAX_DRAFT_CHARS)]], Field(max_length=MAX_DRAFTS)
    ] = Field(default_factory=list)
    """Texts that are likely to be the answer, such as the previous suggestion."""
    typed_ahead: Annotated[str, Field(max_length=MAX_TYPED_CHARS)] = ""
    """The answer begins with this text, which is not returned. Needs one prompt of text."""


class TabbySnippet(Body):
    """A piece of another file, as Tabby's clients send it."""

    filepath: Annotated[str, Field(max_length=MAX_PATH_CHARS)] = ""
    """Where the file lies in the project."""
    body: Annotated[str, Field(max_length=MAX_EXTRA_CHARS)]
    """What the model reads of it."""


_Snippets = Annotated[list[TabbySnippet], Field(max_length=MAX_EXTRA_FILES)]


class TabbySegments(Body):
    """The code around the cursor, as Tabby's clients send it."""

    prefix: str
    """The text before the cursor."""
    suffix: str | None = None
    """The text after it."""
    filepath: Annotated[str, Field(max_length=MAX_PATH_CHARS)] | None = None
    """Path of the file being edited."""
    declarations: _Snippets | None = None
    """Code that the language server knows to be used here."""
    relevant_snippets_from_changed_files: _Snippets | None = None
    """Similar code that was edited lately."""
    relevant_snippets_from_recently_opened_files: _Snippets | None = None
    """Similar code that was looked at lately."""

    @property
    def snippets(self) -> list[TabbySnippet]:
        """All pieces of other files, the most stable first."""
        return [
            *(self.declarations or ()),
            *(self.relevant_snippets_from_recently_opened_files or ()),
            *(self.relevant_snippets_from_changed_files or ()),
        ][:MAX_EXTRA_FILES]


class CompletionBody(Body):
    """Request body of /v1/completions. Unknown fields are ignored."""

    model: ModelName | None = None
    """One of the names that /v1/models lists; without it the default model."""
    prompt: Annotated[Any, WithJsonSchema(_PROMPT_SCHEMA)] = "<|endoftext|>"
    suffix: str | None = None
    """Text after the cursor: asks for fill-in-the-middle."""
    segments: TabbySegments | None = None
    """Tabby's way to ask for fill-in-the-middle, instead of `prompt` and `suffix`; 64 of the
    likeliest tokens unless max_tokens and temperature say otherwise."""
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = 16
    """0 only computes the prompt into the cache."""
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    """0 takes the likeliest token; 1 unless given."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draw among the likeliest tokens that have this probability together."""
    top_k: Annotated[int, Field(ge=-1, le=1 << 24)] | None = None
    """Draw among so many likeliest tokens; 0 and -1 mean all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Draw among tokens that are at least this part as likely as the likeliest one."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    """Answers to each prompt."""
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    """Answers computed, of which the `n` likeliest are returned."""
    echo: bool | None = False
    """Begin the answer with the prompt; with max_tokens 0 and logprobs this scores a text."""
    stream: bool | None = False
    """Send the answer as server-sent events while it comes."""
    stream_options: StreamOptions | None = None
    """Only with `stream`."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Return the log-probability of each token and of so many likeliest ones at its place."""
    stop: Stop = None
    """The answer ends before the first of these texts."""
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    """The same seed gives the same answer."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Taken off the logit of each token that the answer already has."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """The same for each time that it has it."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    """Divides the logits of tokens in prompt and answer; 1 does nothing."""
    logit_bias: Annotated[Any, WithJsonSchema(_BIAS_SCHEMA)] = None
    """Added to the logits of these token ids; -100 forbids one."""
    ignore_eos: bool | None = False
    """Never end by a token that ends texts."""
    user: Annotated[str, Field(max_length=MAX_NAME_CHARS)] | None = None
    """Accepted and ignored."""
    albor: AlborOptions | None = None
    """What only albor knows; an answer then has an `albor` object too."""

    @property
    def num_candidates(self) -> int:
        """Answers computed for each prompt."""
        return max(self.best_of or 1, self.num_choices)

    @property
    def num_choices(self) -> int:
        """Answers returned for each prompt."""
        return self.n or 1

    def prompts(self) -> list[Prompt]:
        """The prompts one by one."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not isinstance(prompt, list) or not prompt:
            raise _prompt_error()
        if all(is_token_id(item) for item in prompt):
            return [tuple(prompt)]
        if len(prompt) > MAX_PROMPTS:
            raise RequestError(
                f"prompt holds {len(prompt)} prompts, but at most {MAX_PROMPTS} are taken at "
                f"once: send several requests",
                param="prompt",
            )
        return [_one_prompt(item) for item in prompt]

    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return check_stops(self.stop)

    def biases(self) -> tuple[tuple[int, float], ...]:
        """The logit biases as (token id, bias)."""
        bias = self.logit_bias
        if bias is None:
            return ()
        if not isinstance(bias, dict) or len(bias) > MAX_LOGIT_BIAS:
            raise RequestError(
                f"logit_bias must be an object of at most {MAX_LOGIT_BIAS} token ids",
                param="logit_bias",
            )
        pairs = []
        for key, value in bias.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            # The range is checked here already: a whole number may be too large for a float.
            if not re.fullmatch(r"[0-9]{1,9}", key) or not is_number or not -100 <= value <= 100:
                raise RequestError(
                    "logit_bias must map token ids (as strings) to numbers, -100 to 100",
                    param="logit_bias",
                )
            pairs.append((int(key), float(value)))
        return tuple(pairs)


def parse_json(data: bytes) -> Any:
    """Parse a body; raises RequestError for anything that is not plain JSON."""
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    except ValueError as error:
        # UnicodeDecodeError, too many digits, or malformed; its text may quote the input.
        where = f" (position {error.pos})" if isinstance(error, json.JSONDecodeError) else ""
        raise RequestError(f"the body is not valid JSON{where}") from None


def parse_body(schema: type[BodyT], value: Any) -> BodyT:
    """Check a parsed body.

    Raises:
        RequestError: naming the first field at fault and its rule, never its value.
    """
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        known = _field_names(schema)
        field = ".".join(str(part) for part in first["loc"] if part in known)
        raise RequestError(f"{field}: {first['msg']}", param=field or None) from None


def parse_completion(value: Any) -> CompletionBody:
    """Check a parsed body of /v1/completions; see `parse_body`."""
    body = parse_body(CompletionBody, value)
    if body.best_of is not None and body.best_of < body.num_choices:
        raise RequestError("best_of must be at least n", param="best_of")
    if body.stream and body.num_candidates > body.num_choices:
        raise RequestError("best_of can't be streamed: leave out one of them", param="best_of")
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream: true", param="stream_options")
    if body.segments is not None:
        return _from_segments(body, body.segments)
    if body.suffix is not None and body.echo:
        raise RequestError("echo can't be combined with suffix", param="echo")
    return body


def _from_segments(body: CompletionBody, segments: TabbySegments) -> CompletionBody:
    """Tabby's body in the words of the others."""
    given = body.model_fields_set
    if body.echo or given & {"prompt", "suffix"}:
        raise RequestError(
            "segments can't be combined with prompt, suffix or echo", param="segments"
        )
    options = body.albor or AlborOptions()
    extra = [
        ExtraContext(path=each.filepath or "untitled", text=each.body) for each in segments.snippets
    ]
    changes: dict[str, object] = {}
    if segments.filepath and options.path is None:
        changes["path"] = segments.filepath
    if extra and not options.extra_context:
        changes["extra_context"] = extra
    return body.model_copy(
        update={
            "prompt": segments.prefix,
            "suffix": segments.suffix or "",
            "max_tokens": body.max_tokens if "max_tokens" in given else TABBY_MAX_TOKENS,
            "temperature": body.temperature or 0.0,
            "albor": options.model_copy(update=changes) if changes else body.albor,
        }
    )


def check_stops(stop: Any) -> tuple[str, ...]:
    """The stop strings of a `stop` field: a string, a list of strings or None.

    Raises:
        RequestError: it is something else, or there are too many or too long ones.
    """
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(item, str) for item in stops):
        raise RequestError("stop must be a string or a list of strings", param="stop")
    if len(stops) > MAX_STOPS or any(not 0 < len(item) <= MAX_STOP_CHARS for item in stops):
        raise RequestError(
            f"stop may hold at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters",
            param="stop",
        )
    return tuple(stops)


def _field_names(schema: type[BaseModel]) -> frozenset[object]:
    """Names of a schema's fields and of those inside them: what an error may speak of."""
    return frozenset(name for each in with_inner([schema]) for name in each.model_fields)


def with_inner(models: Iterable[type[BaseModel]]) -> set[type[BaseModel]]:
    """These models and those of their fields."""
    found: set[type[BaseModel]] = set()
    waiting: list[Any] = list(models)
    while waiting:
        each = waiting.pop()
        waiting += get_args(each)
        if isinstance(each, type) and issubclass(each, BaseModel) and each not in found:
            found.add(each)
            waiting += [field.annotation for field in each.model_fields.values()]
    return found


def is_token_id(item: object) -> bool:
    """Whether a JSON value may be a token id: a whole number, and neither true nor false."""
    return isinstance(item, int) and not isinstance(item, bool)


def _one_prompt(item: object) -> Prompt:
    if isinstance(item, str):
        return item
    if isinstance(item, list) and item and all(is_token_id(token_id) for token_id in item):
        return tuple(item)
    raise _prompt_error()


def _prompt_error() -> RequestError:
    return RequestError(
        "prompt must be text, a list of token ids, or a list of such prompts, none of them empty",
        param="prompt",
    )


def _refuse_constant(name: str) -> None:
    raise ValueError(name)
