"""The completion core: prompts to engine requests, engine events to answers.

Every dialect of the HTTP surface plans `Job`s, runs them through one `Completion` and reads the
same `Answer`s; only the shape of its JSON is its own.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from albor_serve.api.bridge import EventBridge
from albor_serve.api.errors import SupersededError
from albor_serve.api.schemas import AlborOptions, Prompt
from albor_serve.config import SamplingParams
from albor_serve.engine import Engine, Ticket
from albor_serve.errors import AlborError, EngineClosedError, PromptTooLongError, RequestError
from albor_serve.fim import (
    ExtraFile,
    FimPrompt,
    FimTemplate,
    build_fim_prompt,
    heal_text,
    split_written,
)
from albor_serve.sequence import (
    CodeAround,
    Delta,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerateRequest,
    StoppedBy,
    Timings,
    TokenInfo,
)
from albor_serve.tokenizer import Tokenizer

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
    knows_paths: bool = False
    """Whether naming the edited file's path helps the model; measure with albor-bench infill."""
    created: int = field(default_factory=lambda: int(time.time()))


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
    growth: GenerateRequest | None = None
    """A warm-up to run when the answer is done: the whole prompt, of which only a part fitted the
    time to the first token."""

    @property
    def is_truncated(self) -> bool:
        """Whether code around the cursor was left out for want of room."""
        return self.fim is not None and not self.fim.is_whole


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
    _check_options(spec)
    jobs: list[Job] = []
    for prompt_index, prompt in enumerate(prompts):
        planned = _plan_prompt(served, spec, prompt)
        for candidate in range(spec.num_candidates):
            request = GenerateRequest(
                prompt=planned.tokens,
                max_new_tokens=spec.max_new_tokens,
                sampling=_sampling(spec, candidate),
                stop=spec.stop,
                ignore_eos=spec.ignore_eos,
                forced_bytes=planned.forced_bytes,
                min_indent=spec.min_indent,
                max_decode_ms=spec.max_decode_ms,
                stop_scope=options.stop_scope,
                code=planned.code,
                min_confidence=options.min_confidence,
                drafts=planned.drafts,
                session=options.session,
                supersede=options.supersede,
                group=group,
                deadline_ms=options.deadline_ms,
                priority=options.priority,
                prompt_logprobs=spec.echo and spec.wants_logprobs,
            )
            growth = planned.growth if not jobs else None
            jobs.append(
                Job(request, prompt_index, planned.echo, spec.wants_logprobs, planned.fim, growth)
            )
    return jobs


def _check_options(spec: CompletionSpec) -> None:
    options = spec.options
    if spec.fim_suffix is None:
        for name, value in (
            ("extra_context", options.extra_context),
            ("first_token_budget_ms", options.first_token_budget_ms),
        ):
            if value:
                raise RequestError(f"{name} needs suffix, which may be empty", param=name)
    text_only = ("typed_ahead", "drafts") if options.stop_scope == "none" else ("stop_scope",)
    for name in text_only:
        if getattr(options, name) and not all(isinstance(each, str) for each in spec.prompts):
            raise RequestError(f"{name} needs a prompt of text, not of token ids", param=name)
    if options.typed_ahead and spec.echo:
        raise RequestError("typed_ahead can't be combined with echo", param="typed_ahead")


@dataclass(frozen=True, slots=True)
class _PlannedPrompt:
    """One prompt, ready for the engine."""

    tokens: tuple[int, ...]
    echo: str = ""
    forced_bytes: bytes = b""
    code: CodeAround | None = None
    drafts: tuple[tuple[int, ...], ...] = ()
    fim: FimPrompt | None = None
    growth: GenerateRequest | None = None


def _plan_prompt(served: ServedModel, spec: CompletionSpec, prompt: Prompt) -> _PlannedPrompt:
    tokenizer, options = served.engine.tokenizer, spec.options
    if not isinstance(prompt, str) and not all(0 <= i < tokenizer.vocab_size for i in prompt):
        raise RequestError(
            f"a prompt token id is outside this model's vocabulary: use 0 to "
            f"{tokenizer.vocab_size - 1}",
            param="prompt",
        )
    if isinstance(prompt, str):
        text = prompt + options.typed_ahead
    else:
        text = tokenizer.decode(prompt).decode("utf-8", "replace")
    if isinstance(prompt, str) and spec.fim_suffix is None and not spec.echo:
        written = split_written(served.template, prompt)
        if written is not None:
            text = written[0] + options.typed_ahead
            spec = replace(spec, fim_suffix=written[1])
    code = CodeAround(text, spec.fim_suffix or "", options.path)
    if spec.fim_suffix is not None:
        fim, growth = _fim_prompt(served, spec, text)
        drafts = _drafts(tokenizer, options, fim.forced_bytes)
        return _PlannedPrompt(fim.tokens, "", fim.forced_bytes, code, drafts, fim, growth)
    echo = text if spec.echo else ""
    if not isinstance(prompt, str):
        return _PlannedPrompt(prompt, echo, code=code)
    forced = ""
    if options.typed_ahead:
        # A prompt as text is taken as it is; only what is typed ahead may end inside a token.
        kept, forced = heal_text(text)
        text, forced = (kept, forced) if kept else (text, "")  # a prompt can't be empty
    ids = tuple(tokenizer.encode(text, parse_special=True))
    if tokenizer.adds_bos and tokenizer.bos_token_id is not None:
        ids = (tokenizer.bos_token_id, *ids)
    if not ids:
        raise RequestError("the prompt is empty: give at least one character", param="prompt")
    forced_bytes = forced.encode("utf-8", "replace")
    drafts = _drafts(tokenizer, options, forced_bytes)
    return _PlannedPrompt(ids, echo, forced_bytes, code, drafts)


def _drafts(
    tokenizer: Tokenizer, options: AlborOptions, forced_bytes: bytes
) -> tuple[tuple[int, ...], ...]:
    """The drafts as the model would spell them after the end of the prompt."""
    forced = forced_bytes.decode("utf-8", "replace")
    return tuple(tuple(tokenizer.encode(forced + draft)) for draft in options.drafts if draft)


WINDOW_LENS: Final = tuple(size << k for k in range(11) for size in (64, 96))
"""Prompt lengths that a time to the first token may ask for. Few, so that from one keystroke to
the next the same is chosen and its cache serves."""
MAX_SMALLER_WINDOWS: Final = 2
"""How many sizes below the largest that fits are looked at for one that is cached."""


def _fim_prompt(
    served: ServedModel, spec: CompletionSpec, text: str
) -> tuple[FimPrompt, GenerateRequest | None]:
    """The prompt around the cursor, and what to compute once it is answered.

    All of the code or an error, unless the caller lets it be cut or gives a time.
    """
    engine, options = served.engine, spec.options
    template = served.template
    if template is None:
        raise RequestError(
            f"the model {served.name} was not trained to fill in the middle: leave out suffix, or "
            f"serve a model with FIM tokens such as the embedded one",
            param="suffix",
            code="fim_unsupported",
        )
    suffix = spec.fim_suffix or ""
    extra = tuple(ExtraFile(each.path, each.text) for each in options.extra_context)

    def build(max_prompt_len: int) -> FimPrompt:
        return build_fim_prompt(
            template,
            engine.tokenizer,
            text,
            suffix,
            max_prompt_len=max_prompt_len,
            path=options.path if served.knows_paths or extra else None,
            extra=extra,
        )

    whole = build(engine.max_seq_len - 1)
    budget_ms = options.first_token_budget_ms
    if (whole.num_prefix_dropped or whole.num_suffix_dropped) and not (
        spec.fits_window or budget_ms
    ):
        # Never cut silently: the caller has to know what the model did not see.
        code_len = len(engine.tokenizer.encode(text)) + len(engine.tokenizer.encode(suffix))
        raise PromptTooLongError(code_len + len(template.spellings), engine.max_seq_len)
    if budget_ms is None or engine.prefill_ms(whole.tokens) <= budget_ms:
        return whole, None
    fim = _window_for(engine, whole, build, budget_ms)
    if options.session is None or fim is whole:
        return fim, None
    # A session of its own: it must not take the cache of what is being typed.
    growth = GenerateRequest(
        whole.tokens, 0, session=f"{options.session}\0growth", priority="background"
    )
    return fim, growth


def _window_for(
    engine: Engine, whole: FimPrompt, build: Callable[[int], FimPrompt], budget_ms: float
) -> FimPrompt:
    """The largest window that fits the time, or one nearly as large that is cached already."""
    fitting: FimPrompt | None = None
    num_smaller = 0
    fim = whole
    for size in reversed(WINDOW_LENS):
        if size >= len(whole.tokens):
            continue
        fim = build(size)
        ms = engine.prefill_ms(fim.tokens)
        if ms > budget_ms:
            continue
        if ms * 2 <= engine.prefill_ms_per_token * len(fim.tokens):
            return fim
        # Cold: every keystroke that chose another cold window would pay the whole time again.
        fitting = fitting or fim
        if num_smaller == MAX_SMALLER_WINDOWS:
            break
        num_smaller += 1
    return fitting or fim


def _sampling(spec: CompletionSpec, candidate: int) -> SamplingParams:
    sampling = spec.sampling
    if candidate == 0 and spec.is_greedy_first:
        sampling = replace(sampling, temperature=0.0)
    if candidate and sampling.seed is not None:
        sampling = replace(sampling, seed=(sampling.seed + candidate) % (1 << 64))
    if spec.options.min_confidence > 0 and sampling.num_logprobs is None:
        sampling = replace(sampling, num_logprobs=0)
    return sampling


@dataclass(slots=True)
class Answer:
    """One job's answer as far as it has come."""

    job: Job
    text: str = ""
    tokens: list[TokenInfo] = field(default_factory=list)
    reason: FinishReason | None = None
    stopped_by: StoppedBy | None = None
    """The rule that ended it; None where the model or a limit did."""
    stop_string: str | None = None
    """The stop string, if one ended it."""
    timings: Timings | None = None
    prompt_tokens: tuple[TokenInfo, ...] = ()
    end_token: TokenInfo | None = None
    """The token that ended it, such as end-of-text; it stands for no text."""

    @property
    def mean_logprob(self) -> float:
        """Average log-probability of its tokens; best_of keeps the highest."""
        known = [token.logprob for token in self.tokens if token.logprob is not None]
        return sum(known) / len(known) if known else float("-inf")

    @property
    def confidence(self) -> float | None:
        """Geometric mean of the probabilities of the tokens that are shown, the last one perhaps
        in part; None where they are not known or there are none."""
        offsets = TokenOffsets()
        shown = [
            token.logprob
            for token in self.tokens
            if offsets.next(token.token_bytes) < len(self.text) and token.logprob is not None
        ]
        return math.exp(sum(shown) / len(shown)) if shown else None


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
        self._engine = engine
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
        self._grow()

    def _grow(self) -> None:
        """Compute, while nobody waits, the prompts that did not fit the time."""
        for answer in self.answers:
            if answer.job.growth is not None:
                # It is a help for later requests, no part of this answer.
                with contextlib.suppress(AlborError):
                    self._engine.submit(answer.job.growth, lambda _: None)

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
                    answer.stopped_by = event.stopped_by
                    answer.stop_string = event.stop_string
                    answer.timings = event.timings
                    answer.prompt_tokens = event.prompt_tokens
                    answer.end_token = event.end_token
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
