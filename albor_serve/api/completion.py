"""The completion core: prompts to engine requests, engine events to answers.

Every dialect of the HTTP surface plans `Job`s, runs them through one `Completion` and reads the
same `Answer`s; only the shape of its JSON is its own.
"""

from __future__ import annotations

import asyncio
import codecs
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

from albor_serve.api.bridge import EventBridge
from albor_serve.api.errors import SupersededError
from albor_serve.api.schemas import AlborOptions, Prompt
from albor_serve.config import SamplingParams
from albor_serve.engine import Engine, Ticket
from albor_serve.errors import AlborError, EngineClosedError, PromptTooLongError, RequestError
from albor_serve.fim import FimPrompt, FimTemplate, build_fim_prompt
from albor_serve.sequence import (
    Delta,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerateRequest,
    Timings,
    TokenInfo,
)

__all__ = ["Answer", "Completion", "CompletionSpec", "Job", "ServedModel", "Update", "plan_jobs"]

MAX_JOBS = 64
"""Answers that one request may ask for, over all its prompts; an empty queue takes as many."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded model under the names that clients use."""

    name: str
    engine: Engine
    template: FimTemplate | None
    """How the model fills in the middle; None where it can't."""
    aliases: tuple[str, ...] = ()
    description: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def answers_to(self, name: str | None) -> bool:
        """Whether a request for `name` is for this model."""
        return name in (None, "", "default", self.name, *self.aliases)


@dataclass(frozen=True, slots=True)
class Job:
    """One engine request and what its answer needs to know of it."""

    request: GenerateRequest
    prompt_index: int
    echo: str = ""
    """Text to put before the answer's."""
    wants_logprobs: bool = False
    fim: FimPrompt | None = None
    """The prompt around the cursor, where there is one."""

    @property
    def is_truncated(self) -> bool:
        """Whether code around the cursor was left out for want of room."""
        fim = self.fim
        return fim is not None and bool(fim.num_prefix_dropped or fim.num_suffix_dropped)


@dataclass(frozen=True, slots=True)
class CompletionSpec:
    """What a caller wants, whatever dialect it was asked in; checked by that dialect."""

    prompts: tuple[Prompt, ...]
    max_new_tokens: int = 16
    """0 only computes the prompts into the cache."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """Of the first candidate; each further one adds 1 to the seed, if there is one."""
    fim_suffix: str | None = None
    """Text after the cursor: the only prompt is then the text before it."""
    fits_window: bool = False
    """Whether code that is too long for the context may be cut at the far ends; otherwise it is
    an error. For fill-in-the-middle alone."""
    num_candidates: int = 1
    """Answers computed for each prompt."""
    is_greedy_first: bool = False
    """Whether the first candidate takes the likeliest tokens, whatever `sampling` says."""
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_indent: int = 0
    """The answer ends before a line with less indentation; see `GenerateRequest`."""
    max_decode_ms: float | None = None
    """Time for sampling once the answer has a line end; see `GenerateRequest`."""
    echo: bool = False
    """Put the prompt before the answer, and report its log-probabilities if any are wanted."""
    wants_logprobs: bool = False
    """Whether the caller sees log-probabilities; `sampling` asks for them also to rank answers."""
    options: AlborOptions = field(default_factory=AlborOptions)


def plan_jobs(served: ServedModel, spec: CompletionSpec) -> list[Job]:
    """One job for each candidate answer, prompts in order.

    Tokenizes, so a large body takes milliseconds: run it in a thread then.

    Raises:
        RequestError: the model can't fill in, a prompt is empty or does not fit.
    """
    prompts = spec.prompts
    if spec.fim_suffix is not None and len(prompts) > 1:
        raise RequestError("suffix needs exactly one prompt", param="suffix")
    num_jobs = len(prompts) * spec.num_candidates
    if num_jobs > MAX_JOBS:
        raise RequestError(
            f"{len(prompts)} prompts with {spec.num_candidates} answers each make {num_jobs} "
            f"answers, but one request may ask for {MAX_JOBS}: send several requests",
            param="n",
        )
    group = secrets.token_hex(8)
    options = spec.options
    jobs = []
    for prompt_index, prompt in enumerate(prompts):
        tokens, echo, fim = _prompt_tokens(served, spec, prompt)
        for candidate in range(spec.num_candidates):
            request = GenerateRequest(
                prompt=tokens,
                max_new_tokens=spec.max_new_tokens,
                sampling=_sampling(spec, candidate),
                stop=spec.stop,
                ignore_eos=spec.ignore_eos,
                forced_bytes=fim.forced_bytes if fim is not None else b"",
                min_indent=spec.min_indent,
                max_decode_ms=spec.max_decode_ms,
                session=options.session,
                group=group,
                deadline_ms=options.deadline_ms,
                priority=options.priority,
                prompt_logprobs=spec.echo and spec.wants_logprobs,
            )
            jobs.append(Job(request, prompt_index, echo, spec.wants_logprobs, fim))
    return jobs


def _prompt_tokens(
    served: ServedModel, spec: CompletionSpec, prompt: Prompt
) -> tuple[tuple[int, ...], str, FimPrompt | None]:
    """(tokens, text to echo, what it was made of if it is fill-in-the-middle) of one prompt."""
    tokenizer = served.engine.tokenizer
    if not isinstance(prompt, str) and not all(0 <= i < tokenizer.vocab_size for i in prompt):
        raise RequestError(
            f"a prompt token id is outside this model's vocabulary: use 0 to "
            f"{tokenizer.vocab_size - 1}",
            param="prompt",
        )
    if spec.fim_suffix is not None:
        text = (
            prompt
            if isinstance(prompt, str)
            else tokenizer.decode(prompt).decode("utf-8", "replace")
        )
        fim = _fim_prompt(served, text, spec.fim_suffix, fits_window=spec.fits_window)
        return fim.tokens, "", fim
    if isinstance(prompt, str):
        ids = tuple(tokenizer.encode(prompt, parse_special=True))
        if tokenizer.adds_bos and tokenizer.bos_token_id is not None:
            ids = (tokenizer.bos_token_id, *ids)
        if not ids:
            raise RequestError("the prompt is empty: give at least one character", param="prompt")
        return ids, prompt if spec.echo else "", None
    echo = tokenizer.decode(prompt).decode("utf-8", "replace") if spec.echo else ""
    return prompt, echo, None


def _fim_prompt(served: ServedModel, prefix: str, suffix: str, *, fits_window: bool) -> FimPrompt:
    """The prompt around the cursor; without `fits_window`, all of it or an error."""
    tokenizer = served.engine.tokenizer
    if served.template is None:
        raise RequestError(
            f"the model {served.name} was not trained to fill in the middle: leave out suffix, or "
            f"serve a model with FIM tokens such as the embedded one",
            param="suffix",
            code="fim_unsupported",
        )
    max_seq_len = served.engine.max_seq_len
    fim = build_fim_prompt(
        served.template, tokenizer, prefix, suffix, max_prompt_len=max_seq_len - 1
    )
    if (fim.num_prefix_dropped or fim.num_suffix_dropped) and not fits_window:
        # Never cut silently: the caller has to know what the model did not see.
        code_len = len(tokenizer.encode(prefix)) + len(tokenizer.encode(suffix))
        raise PromptTooLongError(code_len + len(served.template.spellings), max_seq_len)
    return fim


def _sampling(spec: CompletionSpec, candidate: int) -> SamplingParams:
    sampling = spec.sampling
    if candidate == 0:
        return replace(sampling, temperature=0.0) if spec.is_greedy_first else sampling
    if sampling.seed is None:
        return sampling
    return replace(sampling, seed=(sampling.seed + candidate) % (1 << 64))


@dataclass(slots=True)
class Answer:
    """One job's answer as far as it has come."""

    job: Job
    text: str = ""
    tokens: list[TokenInfo] = field(default_factory=list)
    reason: FinishReason | None = None
    stopped_by: str | None = None
    """The stop string that ended it, if one did."""
    timings: Timings | None = None
    prompt_tokens: tuple[TokenInfo, ...] = ()

    @property
    def mean_logprob(self) -> float:
        """Average log-probability of its tokens; best_of keeps the highest."""
        known = [token.logprob for token in self.tokens if token.logprob is not None]
        return sum(known) / len(known) if known else float("-inf")


@dataclass(frozen=True, slots=True)
class Update:
    """What is new about one answer."""

    index: int
    text: str
    tokens: tuple[TokenInfo, ...]
    reason: FinishReason | None


class Completion:
    """Jobs in flight. Use it in the event loop that made it; `cancel` when nobody listens."""

    def __init__(self, engine: Engine, jobs: Sequence[Job]) -> None:
        """Submit all jobs.

        Raises:
            AlborError: the engine refused one; those before it are cancelled.
        """
        self.answers = tuple(Answer(job) for job in jobs)
        self._bridge = EventBridge()
        self._tickets: list[Ticket] = []
        self._num_open = len(jobs)
        try:
            for index, job in enumerate(jobs):
                self._tickets.append(engine.submit(job.request, self._bridge.sink(index)))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Stop all jobs that still run."""
        for ticket in self._tickets:
            ticket.cancel()

    async def updates(self, idle_s: float | None = None) -> AsyncIterator[list[Update]]:
        """Batches of updates until every job has ended; [] after each `idle_s` without news.

        Raises:
            AlborError: a job failed, or was cancelled by a newer request of its session. The
                other jobs are cancelled then.
        """
        try:
            while self._num_open:
                try:
                    async with asyncio.timeout(idle_s):
                        batch = await self._bridge.next_batch()
                except TimeoutError:
                    yield []
                    continue
                news = self._merge(batch)
                if news:
                    yield news
        finally:
            if self._num_open:
                self.cancel()

    async def wait(self) -> None:
        """Run to the end, keeping everything in `answers`. Raises what `updates` raises."""
        async for _ in self.updates():
            pass

    def _merge(self, batch: list[tuple[int, Event]]) -> list[Update]:
        """Add events to the answers; at most one update an answer."""
        texts: dict[int, list[str]] = {}
        tokens: dict[int, list[TokenInfo]] = {}
        for index, event in batch:
            answer = self.answers[index]
            match event:
                case Delta():
                    answer.text += event.text
                    answer.tokens += event.tokens
                    texts.setdefault(index, []).append(event.text)
                    tokens.setdefault(index, []).extend(event.tokens)
                case Finished():
                    self._num_open -= 1
                    if event.reason == "cancelled":
                        raise _cancelled(answer.job.request)
                    answer.reason = event.reason
                    answer.stopped_by = event.stop_string
                    answer.timings = event.timings
                    answer.prompt_tokens = event.prompt_tokens
                    texts.setdefault(index, [])
                case Failed():
                    self._num_open -= 1
                    raise _fresh(event.error)
        return [
            Update(index, "".join(parts), tuple(tokens.get(index, ())), self.answers[index].reason)
            for index, parts in texts.items()
        ]


def _cancelled(request: GenerateRequest) -> AlborError:
    if request.session is None:
        return EngineClosedError("the server is shutting down: try again later")
    return SupersededError(
        "the request was cancelled: a newer one of its session took its place, or the server is "
        "shutting down"
    )


def _fresh(error: AlborError) -> AlborError:
    """The error itself: engine threads keep no traceback of it that could grow."""
    error.__traceback__ = None
    return error


class TokenOffsets:
    """Where each token starts in the text, in characters; tokens may end inside a character."""

    def __init__(self, start: int = 0) -> None:
        """`start` is the length of the text before the first token."""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at = start

    def next(self, piece: bytes) -> int:
        """Start of the next token, whose bytes are `piece`."""
        at = self._at
        self._at += len(self._decoder.decode(piece))
        return at
