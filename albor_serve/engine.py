"""The engine: one thread that owns the backend and turns requests into events.

Each turn of its loop: take in new requests and cancels → admit waiting requests to free slots →
one decode step for all running sequences (several drafted tokens for a lone one) → one chunk of
prefill for the sequence that waits longest. So a long prompt never stalls running text for longer
than a chunk, and a cancel takes effect within one backend call, which the abort flag cuts short.
"""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from albor_serve.backends.base import (
    Aborted,
    Backend,
    DeviceDecoder,
    ExtendStep,
    LogitRows,
    LogitsFor,
)
from albor_serve.backends.fallback import Fallback
from albor_serve.config import MAX_DEVICE_STOPS, DevicePlan, EngineConfig
from albor_serve.errors import (
    AlborError,
    BackendError,
    DeviceError,
    DeviceLostError,
    EngineClosedError,
    PromptTooLongError,
    QueueFullError,
    QueueTimeoutError,
    RequestError,
)
from albor_serve.healing import ForcedBytes, TokenIndex
from albor_serve.histogram import EngineMetrics, HistogramView
from albor_serve.kv_slots import Slot, SlotTable
from albor_serve.sampler import Sampled, Sampler, log_softmax, top_logprobs
from albor_serve.scopes import LexerMemo, ScopeGuard
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
from albor_serve.speculate import Draft, DraftPolicy, RowCosts, lookup_text, propose
from albor_serve.stopping import IndentGuard, TextAssembler
from albor_serve.tokenizer import Tokenizer

__all__ = ["Engine", "EngineStats", "SlotView", "Ticket"]

logger = logging.getLogger(__name__)

TokenArray = npt.NDArray[np.int32]
EventSink = Callable[[Event], None]
T = TypeVar("T")

PROMPT_LOGPROBS_CHUNK_LEN = 32
"""Rows of logits are 4·vocab_size bytes each: few at a time keep memory flat."""
MIN_BUSY_CHUNK_LEN = 8
DEVICE_RUN_LEN = 16
"""Tokens that a device decodes by itself before drafts and other requests are looked at again."""


@dataclass(frozen=True, slots=True)
class SlotView:
    """One slot at one moment."""

    index: int
    num_cached_tokens: int
    session: str | None
    is_busy: bool


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine at one moment; counters run since its start."""

    num_running: int
    num_waiting: int
    slots: tuple[SlotView, ...]
    num_requests: int
    num_finished: int
    num_cancelled: int
    num_failed: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_new_tokens: int
    num_draft_tokens: int
    num_accepted: int
    num_steps: int
    """Backend calls that succeeded: while it grows, the engine gets on."""
    num_stale_tokens: int
    """Tokens computed for requests that were then cancelled."""
    histograms: Mapping[str, HistogramView]
    """By name: queue, first_token, inter_token, total, cancel (seconds), new_prompt_tokens."""
    failure: str | None
    """Why the backend can't be used any more; None while it can."""
    error: BackendError | None = None
    """The failure itself."""
    degraded: str | None = None
    """Why another backend computes than the one that was asked for; None if it is that one."""


class Ticket:
    """A submitted request, for cancelling it."""

    def __init__(self, request_id: str, cancel: Callable[[], None]) -> None:
        self.request_id = request_id
        self._cancel = cancel

    def cancel(self) -> None:
        """Stop the request. From any thread, at any time; harmless once it has ended.

        A `Finished` event with reason "cancelled" follows unless another ending came first.
        """
        self._cancel()


@dataclass(slots=True, eq=False)
class _Sequence:
    """One request's state. Written by the engine thread, except `is_cancelled`."""

    request: GenerateRequest
    request_id: str
    emit: EventSink
    prompt: TokenArray
    submitted_s: float
    sampler: Sampler
    text: TextAssembler
    indent: IndentGuard
    guard: ScopeGuard
    drafts: TokenArray
    """The request's drafts end to end, each after the end of the prompt."""
    timings: Timings = field(default_factory=Timings)
    is_cancelled: bool = False
    cancelled_s: float = 0.0
    group_has_begun: bool = False
    """Another request of its group has had a slot: it may wait for its turn without limit."""
    admitted_s: float = 0.0
    decode_started_s: float = 0.0
    slot: Slot | None = None
    num_tokens: int = 0
    """Prompt and sampled tokens in slot.tokens; those beyond slot.cached_len are not computed."""
    is_decoding: bool = False
    may_adopt: bool = True
    """Whether what other slots have computed may be copied into its own."""
    has_line_end: bool = False
    """Whether the text so far has one."""
    forced: ForcedBytes | None = None
    is_unsure: bool = False
    """Whether the next token was too unlikely to be shown."""
    end_token: TokenInfo | None = None
    prompt_infos: list[TokenInfo] = field(default_factory=list)

    @property
    def is_background(self) -> bool:
        return self.request.priority == "background"

    @property
    def deadline_s(self) -> float:
        limit_ms = self.request.deadline_ms
        return float("inf") if limit_ms is None else self.submitted_s + limit_ms / 1000

    @property
    def stopped_by(self) -> StoppedBy | None:
        if self.text.stopped_by is not None and self.guard.stopped_by is None:
            return "stop"
        if self.guard.stopped_by is not None:
            return self.guard.stopped_by
        if self.indent.is_done:
            return "indent"
        return "confidence" if self.is_unsure else None

    @property
    def held_slot(self) -> Slot:
        assert self.slot is not None, "only an admitted sequence runs"
        return self.slot


_State = Literal["new", "running", "closing", "closed"]


class Engine:
    """Owns a backend and answers requests with it.

    `submit`, `Ticket.cancel`, `stats` and `close` may be called from any thread. Events of a
    request arrive in order on the engine's thread; a sink must return quickly.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        config: EngineConfig,
        calibrate: Callable[[Backend], RowCosts] | None = None,
        *,
        fallback: Fallback | None = None,
        degraded: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """The engine closes `backend` when it is closed itself.

        `calibrate` measures the backend on the engine's thread before the first request; without
        it nothing is drafted and prefill chunks are not fitted to time. With a `fallback` it goes
        on with that when the backend's device fails; requests that run are computed again from
        their prompts on. `degraded` says why `backend` is not the one that was asked for.
        """
        info = backend.info
        self._backend = backend
        self._device = backend if isinstance(backend, DeviceDecoder) else None
        self._tokenizer = tokenizer
        self._config = config
        self._clock = clock
        self._max_seq_len = min(config.max_seq_len, info.max_seq_len)
        self._slots = SlotTable(min(config.num_slots, info.num_slots), self._max_seq_len, clock)
        self._calibrate = calibrate
        self._fallback = fallback
        self._retired: Backend | None = None
        self._release_shared = fallback.release if fallback is not None else lambda: None
        self._prefill_ms_per_token = 0.0
        self._draft_policy: DraftPolicy | None = None
        self._token_index: TokenIndex | None = None
        self._ids = count(1)
        self._lexers = LexerMemo()

        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        # Shared with other threads, under the lock:
        self._state: _State = "new"
        self._inbox: list[_Sequence] = []
        self._waiting: list[_Sequence] = []
        self._running: list[_Sequence] = []
        self._in_flight: tuple[_Sequence, ...] = ()
        self._failure: BackendError | None = None
        self._degraded = degraded
        self._totals = Timings()
        self._num_requests = self._num_finished = self._num_cancelled = self._num_failed = 0
        self._num_steps = 0
        self._metrics = EngineMetrics()

        self._is_measured = threading.Event()
        self._thread = threading.Thread(target=self._run, name="albor-engine", daemon=True)

    @property
    def backend(self) -> Backend:
        """The backend; only its `info` may be read while the engine runs."""
        return self._backend

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that prompts must be made with."""
        return self._tokenizer

    @property
    def max_seq_len(self) -> int:
        """Tokens that one sequence may hold, prompt and answer together."""
        return self._max_seq_len

    # ---- other threads ---------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine's thread and wait until it has measured the backend; call it once.

        So the first request's time for its first token is kept, too. A backend that fails
        meanwhile is told of by `submit` and `stats`.
        """
        with self._lock:
            self._state = "running"
        self._thread.start()
        self._is_measured.wait()

    def submit(self, request: GenerateRequest, on_event: EventSink) -> Ticket:
        """Queue a request; `on_event` gets its events on the engine's thread.

        A request with a session cancels that session's earlier ones, unless it says otherwise.

        Raises:
            RequestError: a token id is outside the vocabulary. PromptTooLongError: it does not
                fit. QueueFullError, EngineClosedError, BackendError: the engine can't take it.
        """
        sequence = self._make_sequence(request, on_event)
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if self._state != "running":
                raise EngineClosedError("the server is shutting down: try again later")
            stale = self._superseded_by(request)
            self._check_queue(stale)
            for other in stale:
                self._mark_cancelled(other)
            self._inbox.append(sequence)
            self._num_requests += 1
            # A background warm-up must not delay a person.
            if (
                not sequence.is_background
                and self._in_flight
                and all(other.is_background for other in self._in_flight)
            ):
                self._backend.abort.set()
            self._wake.notify()
        return Ticket(sequence.request_id, lambda: self._cancel(sequence))

    @property
    def prefill_ms_per_token(self) -> float:
        """Measured milliseconds for each token of a long prompt; 0 while not known."""
        return self._prefill_ms_per_token

    def prefill_ms(self, prompt: Sequence[int]) -> float:
        """Estimate of how long `prompt` would take to compute now, cached tokens left out.

        From any thread; 0 while the backend's speed is not known. Waiting for others' requests
        is not counted.
        """
        wanted = np.array(prompt, dtype=np.int32)
        _, cached_len = self._slots.longest(wanted)
        return (wanted.size - cached_len) * self._prefill_ms_per_token

    def stats(self) -> EngineStats:
        """A snapshot for people and metrics."""
        with self._lock:
            return EngineStats(
                num_running=len(self._running),
                num_waiting=len(self._inbox) + len(self._waiting),
                slots=tuple(
                    SlotView(s.index, s.cached_len, s.session, s.is_busy) for s in self._slots.slots
                ),
                num_requests=self._num_requests,
                num_finished=self._num_finished,
                num_cancelled=self._num_cancelled,
                num_failed=self._num_failed,
                num_prompt_tokens=self._totals.num_prompt_tokens,
                num_cached_tokens=self._totals.num_cached_tokens,
                num_new_tokens=self._totals.num_new_tokens,
                num_draft_tokens=self._totals.num_draft_tokens,
                num_accepted=self._totals.num_accepted,
                num_steps=self._num_steps,
                num_stale_tokens=self._metrics.num_stale_tokens,
                histograms={
                    "queue": self._metrics.queue.view(),
                    "first_token": self._metrics.first_token.view(),
                    "inter_token": self._metrics.inter_token.view(),
                    "total": self._metrics.total.view(),
                    "cancel": self._metrics.cancel.view(),
                    "new_prompt_tokens": self._metrics.new_prompt_tokens.view(),
                },
                failure=None if self._failure is None else str(self._failure),
                error=self._failure,
                degraded=self._degraded,
            )

    def close(self, *, drain_s: float = 0.0) -> None:
        """Take no more requests, wait up to `drain_s` for running ones, cancel the rest, and
        free the backend. Closing twice is harmless."""
        with self._lock:
            if self._state == "new":
                self._state = "closed"
                self._close_backend()
                return
            if self._state == "running":
                self._state = "closing"
            self._wake.notify()
        if drain_s > 0:
            self._thread.join(drain_s)
        with self._lock:
            for sequence in (*self._inbox, *self._waiting, *self._running):
                self._mark_cancelled(sequence)
            self._wake.notify()
        self._thread.join()

    def _make_sequence(self, request: GenerateRequest, on_event: EventSink) -> _Sequence:
        vocab_size = self._backend.info.vocab_size
        prompt_len = len(request.prompt)
        if prompt_len + (request.max_new_tokens > 0) > self._max_seq_len:
            raise PromptTooLongError(prompt_len, self._max_seq_len)
        for param, what, ids in (
            ("prompt", "a prompt token id", request.prompt),
            ("drafts", "a draft's token id", [i for draft in request.drafts for i in draft]),
            ("logit_bias", "a logit_bias token id", [i for i, _ in request.sampling.logit_bias]),
        ):
            if not all(0 <= token_id < vocab_size for token_id in ids):
                raise RequestError(
                    f"{what} is outside this model's vocabulary: use 0 to {vocab_size - 1}",
                    param=param,
                )
        code = request.code or CodeAround("", "")
        banned = self._tokenizer.eos_token_ids if request.ignore_eos else ()
        return _Sequence(
            request=request,
            request_id=f"req-{next(self._ids)}",
            emit=on_event,
            prompt=np.array(request.prompt, dtype=np.int32),
            submitted_s=self._clock(),
            sampler=Sampler(request.sampling, vocab_size, request.prompt, banned),
            text=TextAssembler(request.stop),
            indent=IndentGuard(request.min_indent),
            guard=ScopeGuard(request.stop_scope, code.before, code.after, code.path, self._lexers),
            drafts=lookup_text(request.prompt, request.drafts),
        )

    def _check_queue(self, stale: Sequence[_Sequence]) -> None:
        """Refuse a request if too many wait; `stale` ones will make room for it."""
        num_free = sum(not slot.is_busy for slot in self._slots.slots)
        # Cancelled ones leave at the engine's next turn: they must not cost others an answer.
        num_waiting = sum(
            not sequence.is_cancelled and sequence not in stale
            for sequence in (*self._inbox, *self._waiting)
        )
        if num_waiting >= self._config.max_queue_len + num_free:
            raise QueueFullError(
                f"{num_waiting} requests are waiting already and the limit is "
                f"{self._config.max_queue_len}: try again later or start the server with more slots"
            )

    def _superseded_by(self, request: GenerateRequest) -> list[_Sequence]:
        """Requests of the same session that a new one makes stale."""
        if request.session is None or not request.supersede:
            return []
        return [
            sequence
            for sequence in (*self._inbox, *self._waiting, *self._running)
            if sequence.request.session == request.session
            and (request.group is None or sequence.request.group != request.group)
        ]

    def _cancel(self, sequence: _Sequence) -> None:
        with self._lock:
            self._mark_cancelled(sequence)
            self._wake.notify()

    def _mark_cancelled(self, sequence: _Sequence) -> None:
        if not sequence.is_cancelled:
            sequence.is_cancelled = True
            sequence.cancelled_s = self._clock()
        if self._in_flight and all(other.is_cancelled for other in self._in_flight):
            self._backend.abort.set()

    # ---- the engine's thread ---------------------------------------------------------------

    def _run(self) -> None:
        try:
            try:
                self._measure()
            except DeviceError as error:
                self._on_backend_error([], error)
            self._is_measured.set()
            while self._take_in():
                self._drop_ended()
                self._admit()
                self._step()
        except BaseException as error:
            logger.exception("the engine stopped on an internal error")
            self._give_up(BackendError(f"the engine stopped on an internal error ({error!r})"))
        finally:
            with self._lock:
                self._state = "closed"
            self._is_measured.set()
            self._close_backend()

    def _close_backend(self) -> None:
        self._backend.close()
        self._release_shared()

    def _measure(self) -> None:
        """Learn what steps cost here.

        On this thread, not on the caller's: a second thread that has once called llama.cpp keeps
        an OpenMP team of its own, and more threads than cores make every barrier sleep (measured:
        three times slower decoding).
        """
        if self._calibrate is None:
            return
        costs = self._calibrate(self._backend)
        self._prefill_ms_per_token = costs.prefill_ms_per_token
        if self._config.speculate:
            self._draft_policy = DraftPolicy(costs)

    def _take_in(self) -> bool:
        """Wait for something to do; False when the engine is closed and empty."""
        with self._lock:
            while True:
                self._waiting += self._inbox
                self._inbox.clear()
                if self._running or self._waiting:
                    return True
                if self._state == "closing":
                    return False
                self._wake.wait()

    def _drop_ended(self) -> None:
        """End requests that were cancelled or whose time is up."""
        now = self._clock()
        queue_timeout_s = self._config.queue_timeout_ms / 1000
        groups = {sequence.request.group for sequence in self._running} - {None}
        for sequence in self._waiting:
            sequence.group_has_begun |= sequence.request.group in groups
        for sequence in (*self._waiting, *self._running):
            if sequence.is_cancelled:
                self._finish(sequence, "cancelled")
            elif now >= sequence.deadline_s:
                text = self._flush(sequence)
                if text:
                    self._emit(sequence, Delta(text))
                self._finish(sequence, "deadline")
            elif (
                sequence.slot is None
                and not sequence.group_has_begun
                and now - sequence.submitted_s > queue_timeout_s
            ):
                self._fail(
                    sequence,
                    QueueTimeoutError(
                        f"the request waited {self._config.queue_timeout_ms:g} ms for a slot, "
                        f"which is the limit: try again later or start the server with more slots"
                    ),
                )

    def _admit(self) -> None:
        """Give free slots to waiting requests, people's before background ones."""
        for sequence in sorted(self._waiting, key=lambda s: s.is_background):
            request, prompt = sequence.request, sequence.prompt
            max_reuse = prompt.size - (request.max_new_tokens > 0)
            if request.prompt_logprobs:
                max_reuse = 0
            choice = self._slots.choose(prompt, request.session, max_reuse)
            if choice is None:
                return
            slot, reuse_len = choice.slot, choice.reuse_len
            try:
                if choice.fork_from is not None:
                    self._backend.fork(choice.fork_from.index, slot.index, reuse_len)
                else:
                    self._backend.rewind(slot.index, reuse_len)
                # A cache that can't be cut (sliding window, recurrent) may hold less.
                reuse_len = min(reuse_len, self._backend.length(slot.index))
            except BackendError as error:
                if self._fall_back(error):
                    return  # it goes on waiting
                sequence.slot = slot  # what it holds is unknown now: empty it
                self._on_backend_error([sequence], error)
                continue
            now = self._clock()
            slot.cached_len = reuse_len
            slot.tokens[: prompt.size] = prompt
            sequence.slot = slot
            sequence.num_tokens = prompt.size
            sequence.admitted_s = now
            if request.forced_bytes:
                sequence.forced = ForcedBytes(self._get_token_index(), request.forced_bytes)
            sequence.timings.queue_ms = (now - sequence.submitted_s) * 1000
            sequence.timings.num_prompt_tokens = prompt.size
            sequence.timings.num_cached_tokens = reuse_len
            with self._lock:
                self._slots.acquire(slot, request.session)
                self._waiting.remove(sequence)
                self._running.append(sequence)

    def _get_token_index(self) -> TokenIndex:
        if self._token_index is None:
            self._token_index = TokenIndex(self._tokenizer)
        return self._token_index

    def _step(self) -> None:
        runnable = list(self._running)
        if any(not sequence.is_background for sequence in runnable):
            runnable = [sequence for sequence in runnable if not sequence.is_background]
        decoding = [sequence for sequence in runnable if sequence.is_decoding]
        prefilling = [sequence for sequence in runnable if not sequence.is_decoding]
        if decoding:
            self._decode(decoding)
        if prefilling:
            # Shortest first: a warm prompt that lacks two tokens passes a cold one.
            sequence = min(prefilling, key=lambda s: s.num_tokens - s.held_slot.cached_len)
            self._prefill(sequence, is_alone=not decoding)

    def _prefill(self, sequence: _Sequence, *, is_alone: bool) -> None:
        """Compute one chunk of a prompt; at its end sample the first token."""
        slot, request = sequence.held_slot, sequence.request
        if not self._adopt(sequence):
            return
        begin = slot.cached_len
        end = min(sequence.num_tokens, begin + self._chunk_len(sequence, is_alone=is_alone))
        is_last = end == sequence.num_tokens
        if begin == end:  # a warm-up whose prompt is all cached
            self._finish(sequence, "length")
            return
        rows: LogitsFor = "none"
        if request.prompt_logprobs:
            rows = "all"
        elif is_last and request.max_new_tokens > 0:
            rows = "last"
        started = self._clock()
        step = ExtendStep(slot.index, slot.tokens[begin:end].tolist(), rows)
        logits = self._extend([sequence], [step])
        if logits is None:
            return
        self._note_prefill_speed(end - begin, self._clock() - started)
        if request.prompt_logprobs:
            self._add_prompt_infos(sequence, logits[0], begin)
        if not is_last:
            return
        if sequence.timings.first_token_ms is None:
            sequence.decode_started_s = self._clock()
            sequence.timings.prefill_ms = (sequence.decode_started_s - sequence.admitted_s) * 1000
        if request.max_new_tokens == 0:
            self._finish(sequence, "length")
            return
        sequence.is_decoding = True
        self._take_rows(sequence, logits[0][-1:], ())

    def _adopt(self, sequence: _Sequence) -> bool:
        """Copy what another slot has of this prompt by now; False if that failed the request.

        Several requests for the same new text then cost one reading of it.
        """
        if sequence.request.prompt_logprobs or not sequence.may_adopt:
            return True
        slot = sequence.held_slot
        max_reuse = sequence.num_tokens - (sequence.request.max_new_tokens > 0)
        source, reuse_len = self._slots.longest(slot.tokens[:max_reuse])
        gain = reuse_len - slot.cached_len
        if source is slot or gain < SlotTable.MIN_FORK_GAIN:
            return True
        try:
            self._backend.fork(source.index, slot.index, reuse_len)
        except BackendError as error:
            self._on_backend_error([sequence], error)
            return False
        had_len, slot.cached_len = slot.cached_len, self._backend.length(slot.index)
        # Some caches can't be shared in part: once is enough to know.
        sequence.may_adopt = slot.cached_len == reuse_len
        timings = sequence.timings
        timings.num_cached_tokens = max(0, timings.num_cached_tokens + slot.cached_len - had_len)
        return True

    def _chunk_len(self, sequence: _Sequence, *, is_alone: bool) -> int:
        """Prompt tokens to compute in the next step."""
        limit = min(self._config.prefill_chunk_len, self._backend.info.max_batch_len)
        if sequence.request.prompt_logprobs:
            limit = min(limit, PROMPT_LOGPROBS_CHUNK_LEN)
        if self._prefill_ms_per_token > 0:
            budget_ms = (sequence.deadline_s - self._clock()) * 1000
            if not is_alone:
                budget_ms = min(budget_ms, self._config.busy_prefill_ms)
            if budget_ms < limit * self._prefill_ms_per_token:
                fitting = int(budget_ms / self._prefill_ms_per_token)
                limit = min(limit, max(fitting, MIN_BUSY_CHUNK_LEN))
        return limit

    def _note_prefill_speed(self, num_tokens: int, seconds: float) -> None:
        if num_tokens >= 32:  # shorter chunks measure the fixed cost of a call
            measured = seconds * 1000 / num_tokens
            known = self._prefill_ms_per_token
            self._prefill_ms_per_token = 0.7 * known + 0.3 * measured if known else measured

    def _add_prompt_infos(self, sequence: _Sequence, logits: LogitRows, begin: int) -> None:
        """Log-probability of each prompt token, from the row before it. `logits` is [T, V]."""
        tokens = sequence.prompt
        infos = sequence.prompt_infos
        piece = self._tokenizer.token_bytes
        if begin == 0:
            infos.append(TokenInfo(int(tokens[0]), piece(int(tokens[0]))))
        num_top = sequence.request.sampling.num_logprobs or 0
        for row in range(min(len(logits), tokens.size - begin - 1)):
            logprobs = log_softmax(logits[row])
            token_id = int(tokens[begin + row + 1])
            top = top_logprobs(logprobs, num_top)
            infos.append(TokenInfo(token_id, piece(token_id), float(logprobs[token_id]), top))

    def _decode(self, sequences: Sequence[_Sequence]) -> None:
        """One step for all running sequences: the next token, or several drafted ones."""
        ready = [sequence for sequence in sequences if self._is_ready_to_decode(sequence)]
        if not ready:
            return
        drafts = [self._draft(sequence) if len(ready) == 1 else () for sequence in ready]
        if len(ready) == 1 and not drafts[0] and self._can_leave_to_device(ready[0]):
            self._decode_on_device(ready[0])
            return
        steps = []
        for sequence, draft in zip(ready, drafts, strict=True):
            slot = sequence.held_slot
            last = int(slot.tokens[sequence.num_tokens - 1])
            steps.append(ExtendStep(slot.index, (last, *draft), "all"))
        started = self._clock()
        logits = self._extend(ready, steps)
        if logits is None:
            return
        if self._draft_policy is not None and len(ready) == 1:
            took_ms = (self._clock() - started) * 1000
            self._draft_policy.observe_step(steps[0].num_rows, took_ms)
        for sequence, draft, rows in zip(ready, drafts, logits, strict=True):
            self._take_rows(sequence, rows, draft)

    def _can_leave_to_device(self, sequence: _Sequence) -> bool:
        """Whether the backend can choose this sequence's tokens as the engine would.

        A seeded text must not depend on what else runs, so its draws stay with the host.
        """
        sampling = sequence.request.sampling
        return (
            self._device is not None
            and sequence.forced is None
            and sampling.num_logprobs is None
            and (sampling.is_greedy or sampling.seed is None)
            and len(self._stop_ids(sequence)) <= MAX_DEVICE_STOPS
        )

    def _stop_ids(self, sequence: _Sequence) -> frozenset[int]:
        return sequence.request.stop_token_ids | frozenset(self._tokenizer.eos_token_ids)

    def _decode_on_device(self, sequence: _Sequence) -> None:
        """Up to DEVICE_RUN_LEN tokens without logits on the host."""
        device = self._device
        assert device is not None, "_can_leave_to_device said so"
        request, slot = sequence.request, sequence.held_slot
        generated = Counter(slot.tokens[sequence.prompt.size : sequence.num_tokens].tolist())
        plan = DevicePlan(
            request.sampling,
            max_new_tokens=min(
                DEVICE_RUN_LEN,
                self._max_seq_len - sequence.num_tokens,
                request.max_new_tokens - sequence.timings.num_new_tokens,
            ),
            seed=0 if request.sampling.is_greedy else secrets.randbits(64),
            stop_token_ids=tuple(sorted(self._stop_ids(sequence))),
            banned=tuple(self._tokenizer.eos_token_ids) if request.ignore_eos else (),
            prompt=request.prompt,
            counts=tuple(generated.items()),
        )
        reason: FinishReason | None = None

        def on_token(token_id: int) -> bool:
            nonlocal reason
            infos: list[TokenInfo] = []
            text = self._accept(sequence, Sampled(token_id), infos)
            sequence.has_line_end = sequence.has_line_end or "\n" in text
            reason = self._end_of(sequence, token_id)
            if reason is not None:
                text += self._flush(sequence)
            if text or infos:
                self._emit(sequence, Delta(text, tuple(infos)))
            return reason is None and not sequence.is_cancelled and not self._inbox

        last = int(slot.tokens[sequence.num_tokens - 1])
        self._call([sequence], lambda: device.decode(slot.index, last, plan, on_token))
        if reason is not None and sequence.slot is not None:
            self._finish(sequence, reason)

    def _is_ready_to_decode(self, sequence: _Sequence) -> bool:
        """Make the cache hold all tokens but the last; False sends it back to prefill.

        An aborted step may have left the last token in the cache, its logits lost.
        """
        slot = sequence.held_slot
        wanted = sequence.num_tokens - 1
        if slot.cached_len > wanted:
            self._rewind(slot, wanted)
        sequence.is_decoding = slot.cached_len == wanted
        return sequence.is_decoding

    def _draft(self, sequence: _Sequence) -> tuple[int, ...]:
        """Tokens worth verifying after the last sampled one; also scores the last guess."""
        policy = self._draft_policy
        if policy is None or not sequence.request.speculate or sequence.forced is not None:
            return ()
        room = min(
            self._config.max_draft_len,
            self._max_seq_len - sequence.num_tokens - 1,
            sequence.request.max_new_tokens - sequence.timings.num_new_tokens - 1,
            self._backend.info.max_batch_len - 1,
        )
        history = sequence.held_slot.tokens[: sequence.num_tokens]
        if sequence.drafts.size:
            history = np.concatenate((sequence.drafts, history))
        # What would have been guessed one token ago, scored against the token that came.
        if sequence.timings.num_new_tokens > 1:
            past = propose(history[:-1], 1)
            policy.observe(past, past.tokens[:1] == (int(history[-1]),))
        draft: Draft = propose(history, room)
        return draft.tokens[: policy.num_to_verify(draft)]

    def _take_rows(self, sequence: _Sequence, rows: LogitRows, draft: tuple[int, ...]) -> None:
        """Sample along rows [len(draft) + 1, vocab_size] as far as the draft is confirmed."""
        now = self._clock()
        slot, timings = sequence.held_slot, sequence.timings
        computed = sequence.num_tokens
        infos: list[TokenInfo] = []
        text = ""
        reason: FinishReason | None = None
        timings.num_draft_tokens += len(draft)
        for at in range(len(draft) + 1):
            allowed = sequence.forced.allowed() if sequence.forced is not None else None
            if allowed is not None and not allowed.size:
                reason = "stop"  # this vocabulary cannot spell the forced bytes
                break
            try:
                sampled = sequence.sampler.sample(rows[at], allowed)
            except BackendError as error:
                self._on_backend_error([sequence], error)
                return
            if timings.first_token_ms is None:
                timings.first_token_ms = (now - sequence.submitted_s) * 1000
            if self._is_unsure(sequence, sampled):
                sequence.is_unsure = True
                reason = "stop"
                break
            text += self._accept(sequence, sampled, infos)
            sequence.has_line_end = sequence.has_line_end or "\n" in text
            reason = self._end_of(sequence, sampled.token_id)
            confirmed = at < len(draft) and sampled.token_id == draft[at]
            timings.num_accepted += confirmed
            computed += confirmed
            if reason is not None or not confirmed:
                break
        if draft and slot.cached_len > computed:
            # Drafted rows that were not confirmed must leave the cache.
            self._rewind(slot, computed)
            if slot.cached_len < computed:
                # This model's cache can't be cut: a wrong guess costs the whole prompt.
                self._draft_policy = None
        if reason is not None and reason != "cancelled":
            text += self._flush(sequence)
        if text or infos:
            self._emit(sequence, Delta(text, tuple(infos)))
        if reason is not None:
            self._finish(sequence, reason)

    def _is_unsure(self, sequence: _Sequence, sampled: Sampled) -> bool:
        """Whether a token is too unlikely to be shown; those that show nothing never are."""
        limit = sequence.request.min_confidence
        if limit <= 0.0 or sampled.logprob is None or math.exp(sampled.logprob) >= limit:
            return False
        if self._is_end_token(sequence, sampled.token_id):
            return False
        piece = self._tokenizer.token_bytes(sampled.token_id)
        return sequence.forced is None or len(piece) > sequence.forced.num_remaining

    def _accept(self, sequence: _Sequence, sampled: Sampled, infos: list[TokenInfo]) -> str:
        """Add one sampled token to the sequence; return the text that it settles."""
        slot = sequence.held_slot
        token_id = sampled.token_id
        sequence.sampler.accept(token_id)
        slot.tokens[sequence.num_tokens] = token_id
        sequence.num_tokens += 1
        if self._is_end_token(sequence, token_id):
            sequence.timings.num_new_tokens += 1
            sequence.end_token = TokenInfo(token_id, b"", sampled.logprob, sampled.top_logprobs)
            return ""
        piece = self._tokenizer.token_bytes(token_id)
        if sequence.forced is not None:
            piece = sequence.forced.advance(piece)
            if sequence.forced.is_done:
                sequence.forced = None
            if not piece:
                # It only repeats what stands before the cursor: not part of the answer.
                sequence.timings.num_healed_tokens += 1
                return ""
        sequence.timings.num_new_tokens += 1
        infos.append(TokenInfo(token_id, piece, sampled.logprob, sampled.top_logprobs))
        return sequence.indent.feed(sequence.guard.feed(sequence.text.feed(piece)))

    def _flush(self, sequence: _Sequence) -> str:
        """Text that was held back, once nothing more comes."""
        text = sequence.guard.feed(sequence.text.flush()) + sequence.guard.flush()
        return sequence.indent.feed(text) + sequence.indent.flush()

    def _is_end_token(self, sequence: _Sequence, token_id: int) -> bool:
        return (
            token_id in sequence.request.stop_token_ids or token_id in self._tokenizer.eos_token_ids
        )

    def _end_of(self, sequence: _Sequence, token_id: int) -> FinishReason | None:
        """Why the sequence ends after this token, or None."""
        if self._is_end_token(sequence, token_id) or sequence.stopped_by is not None:
            return "stop"
        limit_ms = sequence.request.max_decode_ms
        if limit_ms is not None and sequence.has_line_end:
            decode_ms = (self._clock() - sequence.decode_started_s) * 1000
            if decode_ms > limit_ms:
                return "deadline"
        if sequence.timings.num_new_tokens >= sequence.request.max_new_tokens:
            return "length"
        return "length" if sequence.num_tokens >= self._max_seq_len else None

    def _extend(
        self, sequences: Sequence[_Sequence], steps: Sequence[ExtendStep]
    ) -> list[LogitRows] | None:
        """Logits of one backend call for these sequences; None if it was aborted or failed."""
        return self._call(sequences, lambda: self._backend.extend(steps))

    def _call(self, sequences: Sequence[_Sequence], call: Callable[[], T]) -> T | None:
        """What a call of the backend returns; None if it was aborted or failed."""
        with self._lock:
            if all(sequence.is_cancelled for sequence in sequences):
                return None
            self._backend.abort.clear()
            self._in_flight = tuple(sequences)
        result = None
        try:
            result = call()
        except Aborted:
            pass
        except BackendError as error:
            self._on_backend_error(sequences, error)
            return None
        finally:
            with self._lock:
                self._in_flight = ()
                self._num_steps += result is not None
        for sequence in sequences:
            slot = sequence.held_slot
            slot.cached_len = self._backend.length(slot.index)
        return result

    def _rewind(self, slot: Slot, length: int) -> None:
        self._backend.rewind(slot.index, length)
        slot.cached_len = self._backend.length(slot.index)

    # ---- endings ---------------------------------------------------------------------------

    def _finish(self, sequence: _Sequence, reason: FinishReason) -> None:
        now = self._clock()
        timings = sequence.timings
        timings.total_ms = (now - sequence.submitted_s) * 1000
        if sequence.slot is None:
            timings.queue_ms = timings.total_ms
        elif sequence.is_decoding:
            timings.decode_ms = (now - sequence.decode_started_s) * 1000
        elif not timings.prefill_ms:
            timings.prefill_ms = (now - sequence.admitted_s) * 1000
        with self._lock:
            if reason == "cancelled":
                self._num_cancelled += 1
            else:
                self._num_finished += 1
            num_computed = 0
            if sequence.slot is not None:
                num_computed = max(0, sequence.slot.cached_len - timings.num_cached_tokens)
            cancel_s = now - sequence.cancelled_s if sequence.cancelled_s else 0.0
            self._metrics.observe(reason, timings, num_computed, cancel_s)
            totals = self._totals
            # Of a cancelled one, only what was read.
            num_read = timings.num_cached_tokens + num_computed
            totals.num_prompt_tokens += min(timings.num_prompt_tokens, num_read)
            totals.num_cached_tokens += timings.num_cached_tokens
            totals.num_new_tokens += timings.num_new_tokens
            totals.num_draft_tokens += timings.num_draft_tokens
            totals.num_accepted += timings.num_accepted
        self._release(sequence)
        self._emit(
            sequence,
            Finished(
                reason,
                timings,
                tuple(sequence.prompt_infos),
                sequence.text.stopped_by if sequence.stopped_by == "stop" else None,
                sequence.stopped_by,
                sequence.end_token,
            ),
        )

    def _fail(self, sequence: _Sequence, error: AlborError) -> None:
        with self._lock:
            self._num_failed += 1
        self._release(sequence)
        self._emit(sequence, Failed(error))

    def _release(self, sequence: _Sequence) -> None:
        with self._lock:
            for queue in (self._inbox, self._waiting, self._running):
                if sequence in queue:
                    queue.remove(sequence)
            if sequence.slot is not None:
                self._slots.release(sequence.slot)
                sequence.slot = None

    def _emit(self, sequence: _Sequence, event: Event) -> None:
        try:
            sequence.emit(event)
        except Exception:  # one broken client must not stop the others
            logger.exception("the receiver of %s failed; cancelling it", sequence.request_id)
            sequence.is_cancelled = True

    def _on_backend_error(self, sequences: Sequence[_Sequence], error: BackendError) -> None:
        """Fall back or fail these requests and empty their slots; if even that fails, or the
        device is lost, stop taking requests."""
        if self._fall_back(error):
            return
        logger.error("%s", error)
        if isinstance(error, DeviceLostError):
            self._give_up(error)
            return
        slots = [sequence.slot for sequence in sequences if sequence.slot is not None]
        try:
            for slot in slots:
                self._rewind(slot, 0)
        except BackendError as second:
            self._give_up(second)
            return
        for sequence in sequences:
            self._fail(sequence, error)

    def _fall_back(self, error: BackendError) -> bool:
        """Go on with another backend, if there is one and it was the device that failed.

        Every cache is empty then, so that what runs is read again, prompts and answers so far.
        """
        fallback, self._fallback = self._fallback, None
        if fallback is None or not isinstance(error, DeviceError):
            self._fallback = fallback
            return False
        try:
            backend = fallback.open()
        except AlborError as second:
            logger.error("%s can't take over: %s", fallback.name, second)
            return False
        logger.warning("%s computes from now on, because %s", fallback.name, error)
        # A lost device's memory must not be freed: somebody has to hold it.
        self._retired = self._backend
        self._retired.close()
        with self._lock:
            self._backend = backend
            self._degraded = str(error)
            for slot in self._slots.slots:
                slot.cached_len = 0
        self._device = backend if isinstance(backend, DeviceDecoder) else None
        for sequence in self._running:
            sequence.prompt_infos.clear()
            sequence.timings.num_cached_tokens = 0
            sequence.may_adopt = True
        self._prefill_ms_per_token = 0.0
        self._draft_policy = None
        try:
            self._measure()
        except BackendError as second:
            logger.error("%s", second)
        return True

    def _give_up(self, error: BackendError) -> None:
        """Fail everything, now and from now on."""
        with self._lock:
            self._failure = error
            everyone = [*self._inbox, *self._waiting, *self._running]
        for sequence in everyone:
            with contextlib.suppress(Exception):
                self._fail(sequence, error)
