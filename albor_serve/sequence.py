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
from albor_serve.scopes import StopScope

__all__ = [
    "CodeAround",
    "Delta",
    "Event",
    "Failed",
    "FinishReason",
    "Finished",
    "GenerateRequest",
    "Priority",
    "StoppedBy",
    "Timings",
    "TokenInfo",
]

FinishReason = Literal["stop", "length", "deadline", "cancelled"]
"""stop: a stop string, stop token or end of text. length: max_new_tokens or the context is used
up. deadline: the request's time is up; the text so far is good. cancelled: by the caller or a
newer request of the same session."""

StoppedBy = Literal["stop", "line", "block", "scope", "suffix", "indent", "confidence"]
"""stop: a stop string. line, block, scope: that scope is over. suffix: the answer began to repeat
the code after the cursor. indent: a line had less indentation than asked for. confidence: the next
token was too unlikely."""

Priority = Literal["interactive", "background"]


@dataclass(frozen=True, slots=True)
class CodeAround:
    """The code around the cursor, for the rules that end an answer."""

    before: str
    after: str
    path: str | None = None
    """Tells the language; it need not exist."""


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
    stop_scope: StopScope = "none"
    """Where the answer ends at the latest; see scopes.py. Other than "none" needs `code`."""
    code: CodeAround | None = None
    min_confidence: float = 0.0
    """The answer ends before its first token that is less likely than this, given the forced
    bytes; 0 lets every token pass. Needs `sampling.num_logprobs`."""
    drafts: tuple[tuple[int, ...], ...] = ()
    """Texts, as tokens, that the answer may repeat, forced bytes included: guesses to verify."""
    session: str | None = None
    """A newer request of the same session cancels this one; the session's cache is protected."""
    supersede: bool = True
    """Whether this request cancels its session's earlier ones."""
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
        if not 0.0 <= self.min_confidence <= 1.0:
            raise RequestError("min_confidence must be 0 to 1", param="min_confidence")
        if self.min_confidence > 0 and self.sampling.num_logprobs is None:
            raise RequestError("min_confidence needs log-probabilities", param="min_confidence")
        if self.stop_scope != "none" and self.code is None:
            raise RequestError("stop_scope needs the code around the cursor", param="stop_scope")


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """One token of the answer (or of the prompt, for prompt log-probabilities)."""

    token_id: int
    token_bytes: bytes
    """The bytes of the answer that this token stands for; shorter than the vocabulary's entry
    where forced bytes were cut off."""
    logprob: float | None = None
    """Natural log of the probability under the model, before temperature and filters but given
    the forced bytes; None unless asked for, and for the first prompt token."""
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
    stopped_by: StoppedBy | None = None
    """Which rule ended the answer; None where the model or a limit did."""
    end_token: TokenInfo | None = None
    """The token that ended it, such as end-of-text; it stands for no text."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The request could not be answered."""

    error: AlborError


Event = Delta | Finished | Failed
