"""One request's way through the engine: what is asked, what comes back.

A `GenerateRequest` goes in; a stream of events comes out: any number of `Delta`s, then exactly
one `Finished` or `Failed`. Text in the events is ready to show: whole characters only, nothing of
a stop string, nothing of the forced bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from albor_serve.config import SamplingParams
from albor_serve.errors import AlborError, RequestError

__all__ = [
    "Delta",
    "Event",
    "Failed",
    "FinishReason",
    "Finished",
    "GenerateRequest",
    "Priority",
    "Timings",
    "TokenInfo",
]

FinishReason = Literal["stop", "length", "deadline", "cancelled"]
"""stop: a stop string, stop token or end of text. length: max_new_tokens or the context is used
up. deadline: the request's time is up; the text so far is good. cancelled: by the caller or a
newer request of the same session."""

Priority = Literal["interactive", "background"]


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Everything the engine needs to answer one prompt."""

    prompt: tuple[int, ...]
    """Token ids, special ones included; at least one."""
    max_new_tokens: int
    """0 computes the prompt into the cache and returns no text (a warm-up)."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    """Strings that end the answer; neither they nor anything after them is returned."""
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the answer besides the model's own end-of-text tokens."""
    ignore_eos: bool = False
    forced_bytes: bytes = b""
    """Token healing: the answer must begin with these bytes (UTF-8 text that stands before the
    cursor but was left out of `prompt`); they are not returned."""
    session: str | None = None
    """A newer request of the same session cancels this one; the session's cache is protected."""
    group: str | None = None
    """Requests of one group (the choices of one HTTP request) do not supersede each other."""
    deadline_ms: float | None = None
    """Time from submission after which the answer ends with what there is."""
    min_indent: int = 0
    """The answer ends before a line after its first whose indentation has fewer characters.
    Blank lines don't count."""
    max_decode_ms: float | None = None
    """Time from the first sampled token after which the answer ends, once it has a line end:
    whoever waits gets at least one whole line."""
    priority: Priority = "interactive"
    """background requests run only while no interactive one wants the backend."""
    prompt_logprobs: bool = False
    """Report the log-probability of each prompt token (needs the whole prompt computed anew)."""
    speculate: bool = True

    def __post_init__(self) -> None:
        if not self.prompt:
            raise RequestError("the prompt is empty: give at least one token", param="prompt")
        if self.max_new_tokens < 0:
            raise RequestError("max_tokens must be 0 or more", param="max_tokens")
        if self.deadline_ms is not None and not self.deadline_ms > 0:
            raise RequestError("deadline_ms must be above 0", param="deadline_ms")


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """One token of the answer (or of the prompt, for prompt log-probabilities)."""

    token_id: int
    token_bytes: bytes
    """The bytes of the answer that this token stands for; shorter than the vocabulary's entry
    where forced bytes were cut off."""
    logprob: float | None = None
    """Natural log of the probability under the model, before temperature and filters; None
    unless asked for, and for the first prompt token."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability) of the most likely tokens, most likely first."""


@dataclass(slots=True)
class Timings:
    """Where one request's time went. Written by the engine alone; read it once finished."""

    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    """Time spent computing prompt tokens, other sequences' steps in between included."""
    first_token_ms: float | None = None
    """From submission to the first sampled token; None when there was none."""
    decode_ms: float = 0.0
    total_ms: float = 0.0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens found in the KV cache."""
    num_new_tokens: int = 0
    """Sampled tokens of the answer, an end-of-text token included."""
    num_healed_tokens: int = 0
    """Sampled tokens that only spell the forced bytes; neither returned nor counted above."""
    num_draft_tokens: int = 0
    num_accepted: int = 0
    """Drafted tokens that the model confirmed."""


@dataclass(frozen=True, slots=True)
class Delta:
    """New text, and the tokens sampled since the last event.

    `text` may lag behind `tokens`: bytes of an unfinished character or of a possible stop string
    are held back until they are settled.
    """

    text: str
    tokens: tuple[TokenInfo, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete."""

    reason: FinishReason
    timings: Timings
    prompt_tokens: tuple[TokenInfo, ...] = ()
    """One for each prompt token if prompt_logprobs was asked."""
    stop_string: str | None = None
    """The stop string that ended the answer, if one did."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The request could not be answered."""

    error: AlborError


Event = Delta | Finished | Failed
