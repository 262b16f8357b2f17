from __future__ import annotations

import codecs
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from albor_serve.config import EngineConfig, SamplingParams
from albor_serve.engine import Engine, Ticket
from albor_serve.errors import (
    BackendError,
    EngineClosedError,
    PromptTooLongError,
    QueueFullError,
    QueueTimeoutError,
    RequestError,
)
from albor_serve.kv_slots import SlotTable
from albor_serve.sequence import Delta, Event, Failed, Finished, GenerateRequest
from tests.fakes import ByteTokenizer, HashBackend, LinearCosts

TOKENIZER = ByteTokenizer()
VOCAB = TOKENIZER.vocab_size
GREEDY = SamplingParams(temperature=0.0)
PROMPT = tuple(TOKENIZER.encode("def f(x):\n"))


@dataclass
class Reply:
    """Collects one request's events."""

    events: list[Event] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    started: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        assert not self.done.is_set(), "an event came after the last one"
        self.events.append(event)
        self.started.set()
        if isinstance(event, Finished | Failed):
            self.done.set()

    def wait(self) -> Reply:
        assert self.done.wait(20), "the request did not end"
        return self

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Delta))

    @property
    def token_ids(self) -> list[int]:
        return [t.token_id for e in self.events if isinstance(e, Delta) for t in e.tokens]

    @property
    def end(self) -> Finished:
        assert isinstance(self.events[-1], Finished), self.events[-1]
        return self.events[-1]

    @property
    def error(self) -> Exception:
        assert isinstance(self.events[-1], Failed), self.events[-1]
        return self.events[-1].error


Start = Callable[..., tuple[Engine, HashBackend]]


@pytest.fixture
def start() -> Iterator[Start]:
    engines: list[Engine] = []

    def make(
        config: EngineConfig | None = None, costs: LinearCosts | None = None, **kwargs
    ) -> tuple[Engine, HashBackend]:
        backend = HashBackend(VOCAB, **kwargs)
        info = backend.info
        config = config or EngineConfig(num_slots=info.num_slots, max_seq_len=info.max_seq_len)
        engine = Engine(backend, TOKENIZER, config, (lambda _: costs) if costs else None)
        engine.start()
        engines.append(engine)
        return engine, backend

    yield make
    for engine in engines:
        engine.close()


def ask(engine: Engine, prompt: tuple[int, ...] = PROMPT, num: int = 10, **kwargs) -> Reply:
    return submit(engine, prompt, num, **kwargs)[0].wait()


def submit(
    engine: Engine, prompt: tuple[int, ...] = PROMPT, num: int = 10, **kwargs
) -> tuple[Reply, Ticket]:
    kwargs.setdefault("sampling", GREEDY)
    reply = Reply()
    ticket = engine.submit(GenerateRequest(prompt, num, **kwargs), reply)
    return reply, ticket


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.002)


def idle(engine: Engine) -> bool:
    stats = engine.stats()
    return not stats.num_running and not stats.num_waiting


def test_answers_with_the_models_greedy_text(start: Start) -> None:
    engine, backend = start()
    reply = ask(engine)
    want = backend.answer(PROMPT, 10, TOKENIZER.eos_token_ids)
    assert reply.token_ids == want
    assert reply.text == TOKENIZER.decode(want).decode(errors="replace")
    assert reply.end.reason == "length"
    assert reply.end.timings.num_prompt_tokens == len(PROMPT)
    assert reply.end.timings.num_new_tokens == 10


def test_prompts_longer_than_a_chunk_give_the_same_text(start: Start) -> None:
    prompt = tuple(range(100))
    whole, backend = start()
    small, _ = start(EngineConfig(max_seq_len=256, prefill_chunk_len=7))
    want = backend.answer(prompt, 8)
    assert ask(whole, prompt, 8).token_ids == want
    assert ask(small, prompt, 8).token_ids == want


def test_a_repeated_prompt_computes_one_token(start: Start) -> None:
    engine, backend = start(num_slots=1)
    first = ask(engine)
    backend.calls.clear()
    second = ask(engine)
    assert second.token_ids == first.token_ids
    assert second.end.timings.num_cached_tokens == len(PROMPT) - 1
    assert [len(step.tokens) for call in backend.calls for step in call] == [1] * 10


def test_an_extended_prompt_computes_only_what_is_new(start: Start) -> None:
    engine, _ = start(num_slots=1)
    first = ask(engine, num=5)
    longer = (*PROMPT, *first.token_ids[:3], 65, 66)
    reply = ask(engine, longer)
    assert reply.end.timings.num_cached_tokens == len(PROMPT) + 3


def test_a_warm_up_returns_no_text_and_fills_the_cache(start: Start) -> None:
    engine, backend = start(num_slots=1)
    warm = ask(engine, num=0)
    assert warm.text == ""
    assert warm.end.reason == "length"
    assert backend.caches[0] == list(PROMPT)
    assert ask(engine, num=0).end.timings.num_cached_tokens == len(PROMPT)
    assert ask(engine).end.timings.num_cached_tokens == len(PROMPT) - 1


def test_sequences_run_side_by_side_and_alike(start: Start) -> None:
    engine, backend = start(num_slots=3, max_seq_len=1024, ms_per_token=0.2)
    prompts = [tuple(range(i, i + 20)) for i in range(8)]
    replies = [submit(engine, prompt, 15)[0] for prompt in prompts]
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply.wait().token_ids == backend.answer(prompt, 15, TOKENIZER.eos_token_ids)
    assert max(len(call) for call in backend.calls) == 3


def test_a_long_prompt_does_not_stall_running_text(start: Start) -> None:
    config = EngineConfig(num_slots=2, max_seq_len=2048, prefill_chunk_len=1000, busy_prefill_ms=10)
    engine, backend = start(
        config, LinearCosts(prefill=0.5), num_slots=2, max_seq_len=2048, ms_per_token=0.5
    )
    running, _ = submit(engine, num=60)
    assert running.started.wait(5)
    submit(engine, tuple(range(200)) * 5, 1)[0].wait()
    lengths = [len(step.tokens) for call in backend.calls for step in call]
    assert 8 <= max(lengths) <= 40
    assert running.wait().token_ids == backend.answer(PROMPT, 60, TOKENIZER.eos_token_ids)


def test_stops_at_a_stop_string_that_spans_tokens(start: Start) -> None:
    engine, backend = start()
    whole = TOKENIZER.decode(backend.answer(PROMPT, 30)).decode(errors="replace")
    stop = whole[7:10]
    at = whole.index(stop)
    reply = ask(engine, num=30, stop=(stop,))
    assert reply.text == whole[:at]
    assert reply.end.reason == "stop"
    assert reply.end.stop_string == stop


def test_stops_at_end_tokens_and_at_asked_for_tokens(start: Start) -> None:
    engine, backend = start()
    eos = next(iter(TOKENIZER.eos_token_ids))
    forced = SamplingParams(temperature=0.0, logit_bias=((eos, 100.0),))
    reply = ask(engine, sampling=forced)
    assert (reply.text, reply.end.reason, reply.end.timings.num_new_tokens) == ("", "stop", 1)
    want = backend.answer(PROMPT, 4)
    asked = ask(engine, stop_token_ids=frozenset({want[3]}))
    assert asked.token_ids == want[:3]
    assert ask(engine, sampling=forced, ignore_eos=True).end.reason == "length"


def test_ends_where_the_context_ends(start: Start) -> None:
    engine, backend = start(max_seq_len=32)
    reply = ask(engine, tuple(range(28)), 100)
    assert reply.token_ids == backend.answer(tuple(range(28)), 4)
    assert reply.end.reason == "length"
    full = ask(engine, tuple(range(31)), 100)
    assert len(full.token_ids) == 1


def test_forced_bytes_come_first_and_are_not_shown(start: Start) -> None:
    engine, _ = start()
    reply = ask(engine, num=12, forced_bytes=b"    ret")
    shown = codecs.getincrementaldecoder("utf-8")("replace").decode  # drops half a last character
    assert reply.text == shown(TOKENIZER.decode(reply.token_ids))
    timings = reply.end.timings
    # Tokens that only heal are not counted: the caller gets as many as it asked for.
    assert 4 <= timings.num_healed_tokens <= 7  # four spaces may be one token
    assert timings.num_new_tokens == 12
    assert len(reply.token_ids) == 12


def test_a_token_that_goes_beyond_the_forced_bytes_counts(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = start()
    real = TOKENIZER.token_bytes
    monkeypatch.setattr(TOKENIZER, "token_bytes", lambda i: b"ab" if real(i) == b"a" else real(i))
    reply = ask(engine, num=1, forced_bytes=b"a")
    assert (reply.text, reply.end.timings.num_new_tokens) == ("b", 1)
    assert reply.end.timings.num_healed_tokens == 0


def test_forced_bytes_that_cannot_be_spelled_end_the_answer(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = start()
    real = TOKENIZER.token_bytes
    monkeypatch.setattr(TOKENIZER, "token_bytes", lambda i: b"" if real(i)[:1] == b"q" else real(i))
    reply = ask(engine, forced_bytes=b"q")
    assert (reply.text, reply.end.reason) == ("", "stop")


def test_same_seed_same_text_whatever_runs_beside_it(start: Start) -> None:
    engine, _ = start(num_slots=3, ms_per_token=0.1)
    sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=5)
    alone = ask(engine, sampling=sampling, num=20)
    crowd = [submit(engine, tuple(range(i, 40)), 40)[0] for i in range(4)]
    beside = ask(engine, sampling=sampling, num=20)
    assert beside.token_ids == alone.token_ids
    for other in crowd:
        other.wait()


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=0.8, seed=3)])
def test_speculation_changes_speed_but_not_text(start: Start, sampling: SamplingParams) -> None:
    plain, _ = start(period=5)
    quick, backend = start(costs=LinearCosts(1.0, 0.0), period=5)
    want = ask(plain, num=60, sampling=sampling)
    got = ask(quick, num=60, sampling=sampling)
    assert got.token_ids == want.token_ids
    assert got.text == want.text
    if sampling.is_greedy:
        timings = got.end.timings
        assert timings.num_accepted > 20
        assert len(backend.calls) < 40
    assert backend.caches[0][: len(PROMPT) + 59] == [*PROMPT, *want.token_ids[:59]]
    off = ask(quick, num=60, sampling=sampling, speculate=False)
    assert off.end.timings.num_draft_tokens == 0
    assert off.token_ids == want.token_ids


def test_drafts_respect_stops_limits_and_the_context(start: Start) -> None:
    engine, backend = start(costs=LinearCosts(1.0, 0.0), period=3, max_seq_len=48)
    for num in range(1, 12):
        reply = ask(engine, num=num)
        assert len(reply.token_ids) == num
    full = ask(engine, PROMPT, 1000)
    assert len(full.token_ids) == 48 - len(PROMPT)
    stop_id = backend.answer(PROMPT, 9)[8]
    stopped = ask(engine, stop_token_ids=frozenset({stop_id}), num=40)
    assert stop_id not in stopped.token_ids
    again = ask(engine, num=20)
    assert again.token_ids == backend.answer(PROMPT, 20)


def test_a_cache_that_cannot_be_cut_still_gives_right_text(start: Start) -> None:
    engine, backend = start(costs=LinearCosts(1.0, 0.0), period=0, num_slots=1)
    backend.can_rewind = False
    for prompt in (PROMPT, PROMPT, (*PROMPT, 1, 2), tuple([7, 8, 9] * 10)):
        want = backend.answer(prompt, 20, TOKENIZER.eos_token_ids)
        assert ask(engine, prompt, 20).token_ids == want


def test_cancel_ends_it_within_one_call_and_keeps_the_cache(start: Start) -> None:
    engine, backend = start(num_slots=1, ms_per_token=5.0)
    reply, ticket = submit(engine, tuple(range(200)), 5)
    until(lambda: len(backend.caches[0]) > 10)
    ticket.cancel()
    reply.wait()
    assert reply.end.reason == "cancelled"
    computed = len(backend.caches[0])
    assert computed < 60
    backend.ms_per_token = 0.0
    again = ask(engine, tuple(range(200)), 5)
    assert again.end.timings.num_cached_tokens >= computed - 1
    assert again.token_ids == backend.answer(tuple(range(200)), 5)
    ticket.cancel()  # harmless afterwards


def test_cancelling_one_does_not_disturb_another(start: Start) -> None:
    engine, backend = start(num_slots=2, ms_per_token=0.5)
    keep, _ = submit(engine, num=40)
    drop, ticket = submit(engine, (9, 9, 9), 200)
    assert drop.started.wait(5)
    ticket.cancel()
    assert drop.wait().end.reason == "cancelled"
    assert keep.wait().token_ids == backend.answer(PROMPT, 40, TOKENIZER.eos_token_ids)


def test_a_newer_request_of_a_session_supersedes_the_older(start: Start) -> None:
    engine, _ = start(num_slots=2, ms_per_token=1.0)
    old, _ = submit(engine, num=200, session="editor")
    other, _ = submit(engine, (5, 6), 30, session="elsewhere")
    assert old.started.wait(5)
    new, _ = submit(engine, num=3, session="editor")
    assert old.wait().end.reason == "cancelled"
    assert new.wait().end.reason == "length"
    assert other.wait().end.reason == "length"


def test_requests_of_one_group_do_not_supersede_each_other(start: Start) -> None:
    engine, _ = start(num_slots=2, ms_per_token=0.5)
    pair = [submit(engine, num=20, session="s", group="g")[0] for _ in range(2)]
    assert [reply.wait().end.reason for reply in pair] == ["length", "length"]


def test_a_waiting_request_can_be_cancelled(start: Start) -> None:
    engine, _ = start(num_slots=1, ms_per_token=1.0)
    running, running_ticket = submit(engine, num=200)
    waiting, ticket = submit(engine, (1, 2, 3), 5)
    ticket.cancel()
    assert waiting.wait().end.reason == "cancelled"
    assert waiting.end.timings.num_new_tokens == 0
    running_ticket.cancel()
    running.wait()


def test_a_background_request_gives_way(start: Start) -> None:
    engine, backend = start(num_slots=2, ms_per_token=2.0)
    background, _ = submit(engine, tuple(range(150)), 0, priority="background")
    until(lambda: len(backend.caches[0]) + len(backend.caches[1]) > 5)
    person = ask(engine, num=5)
    assert not background.done.is_set()
    assert person.token_ids == backend.answer(PROMPT, 5, TOKENIZER.eos_token_ids)
    assert background.wait().end.reason == "length"
    assert list(range(150)) in backend.caches


def test_an_interrupted_background_answer_is_still_right(start: Start) -> None:
    engine, backend = start(num_slots=3, ms_per_token=1.0)
    pair = [submit(engine, (i, i + 1, i + 2), 40, priority="background")[0] for i in (10, 60)]
    for reply in pair:
        assert reply.started.wait(5)
    for _ in range(6):
        ask(engine, num=2)
    for i, reply in zip((10, 60), pair, strict=True):
        want = backend.answer((i, i + 1, i + 2), 40, TOKENIZER.eos_token_ids)
        assert reply.wait().token_ids == want


def test_a_deadline_ends_the_answer_with_what_there_is(start: Start) -> None:
    engine, backend = start(ms_per_token=2.0)
    reply = ask(engine, num=240, deadline_ms=120)
    assert reply.end.reason == "deadline"
    got = reply.token_ids
    assert 0 < len(got) < 100
    assert got == backend.answer(PROMPT, len(got))
    assert reply.end.timings.total_ms >= 120


def test_a_deadline_can_pass_while_waiting(start: Start) -> None:
    engine, _ = start(num_slots=1, ms_per_token=1.0)
    running, ticket = submit(engine, num=200)
    late, _ = submit(engine, (1, 2), 5, deadline_ms=30)
    assert late.wait().end.reason == "deadline"
    assert not running.done.is_set()
    ticket.cancel()
    running.wait()


def test_the_queue_has_limits_of_length_and_time(start: Start) -> None:
    config = EngineConfig(num_slots=1, max_seq_len=256, max_queue_len=1, queue_timeout_ms=60)
    engine, _ = start(config, num_slots=1, ms_per_token=1.0)
    running, ticket = submit(engine, num=200)
    assert running.started.wait(5)
    waiting, _ = submit(engine, (1, 2), 5)
    with pytest.raises(QueueFullError, match="limit is 1"):
        submit(engine, (3, 4), 5)
    assert isinstance(waiting.wait().error, QueueTimeoutError)
    assert not running.done.is_set()
    ticket.cancel()
    running.wait()


def test_a_cancelled_request_leaves_its_place_in_the_queue_at_once(start: Start) -> None:
    config = EngineConfig(num_slots=1, max_seq_len=256, max_queue_len=1)
    engine, _ = start(config, num_slots=1, ms_per_token=40.0)
    running, ticket = submit(engine, num=200)
    assert running.started.wait(5)
    waiting, second = submit(engine, (1, 2), 5)
    second.cancel()
    third, third_ticket = submit(engine, (3, 4), 5)
    with pytest.raises(QueueFullError):
        submit(engine, (5, 6), 5)
    for one in (ticket, third_ticket):
        one.cancel()
    for reply in (running, waiting, third):
        assert reply.wait().end.reason == "cancelled"


def test_a_full_queue_takes_the_request_that_supersedes_a_waiting_one(start: Start) -> None:
    config = EngineConfig(num_slots=1, max_seq_len=256, max_queue_len=1)
    engine, _ = start(config, num_slots=1, ms_per_token=40.0)
    running, ticket = submit(engine, num=200, session="other")
    assert running.started.wait(5)
    older, _ = submit(engine, (1, 2), 5, session="s")
    newer, newer_ticket = submit(engine, (1, 2, 3), 5, session="s")
    # One that is refused supersedes nothing.
    with pytest.raises(QueueFullError):
        submit(engine, (1, 2), 5, session="other")
    assert not running.done.is_set()
    for one in (ticket, newer_ticket):
        one.cancel()
    for reply in (older, newer, running):
        assert reply.wait().end.reason == "cancelled"


def test_a_group_that_has_begun_waits_without_limit(start: Start) -> None:
    config = EngineConfig(num_slots=1, max_seq_len=256, queue_timeout_ms=60)
    engine, _ = start(config, num_slots=1, ms_per_token=1.0)
    grouped = [submit(engine, PROMPT, 60, group="g")[0] for _ in range(3)]
    alone, _ = submit(engine, (1, 2), 5)
    assert isinstance(alone.wait().error, QueueTimeoutError)
    for reply in grouped:
        assert len(reply.wait().token_ids) == 60


def test_bad_requests_are_refused_at_once(start: Start) -> None:
    engine, backend = start(max_seq_len=64)
    with pytest.raises(PromptTooLongError, match="64 tokens") as caught:
        submit(engine, (1,) * 64, 1)
    assert caught.value.num_prompt_tokens == 64
    for bad in (-1, VOCAB, 1 << 40):
        with pytest.raises(RequestError, match="vocabulary"):
            submit(engine, (1, bad), 1)
        with pytest.raises(RequestError, match="logit_bias"):
            submit(engine, sampling=SamplingParams(logit_bias=((bad, 1.0),)))
    for make in (lambda: GenerateRequest((), 1), lambda: GenerateRequest((1,), -1)):
        with pytest.raises(RequestError):
            make()
    with pytest.raises(RequestError):
        GenerateRequest((1,), 1, deadline_ms=float("nan"))
    assert not backend.calls
    assert ask(engine, num=2).end.reason == "length"


def test_logprobs_of_answer_and_prompt(start: Start) -> None:
    engine, backend = start(EngineConfig(max_seq_len=256, prefill_chunk_len=5))
    sampling = SamplingParams(temperature=0.0, num_logprobs=2)
    prompt = tuple(range(80))
    for _ in range(2):  # the second time the prompt is cached
        reply = ask(engine, prompt, 3, sampling=sampling, prompt_logprobs=True)
        infos = reply.end.prompt_tokens
        assert [info.token_id for info in infos] == list(prompt)
        assert infos[0].logprob is None
        for at in range(1, 80):
            row = backend.row(prompt[:at]).astype(float)
            assert infos[at].top_logprobs[0][0] == int(row.argmax())
            assert infos[at].logprob is not None
        tokens = [t for e in reply.events if isinstance(e, Delta) for t in e.tokens]
        assert all(token.top_logprobs[0] == (token.token_id, token.logprob) for token in tokens)
    only = ask(engine, prompt, 0, sampling=sampling, prompt_logprobs=True)
    assert len(only.end.prompt_tokens) == 80


def test_a_device_failure_fails_the_request_and_the_engine_lives(start: Start) -> None:
    engine, backend = start()
    backend.fail_on = lambda steps: True
    assert isinstance(ask(engine).error, BackendError)
    backend.fail_on = lambda steps: False
    assert ask(engine).token_ids == backend.answer(PROMPT, 10, TOKENIZER.eos_token_ids)
    assert engine.stats().num_failed == 1
    assert engine.stats().failure is None


def test_a_device_that_is_gone_fails_everything_clearly(start: Start) -> None:
    engine, backend = start(num_slots=1, ms_per_token=0.5)
    first, _ = submit(engine, num=200)
    second, _ = submit(engine, (1, 2), 5)
    assert first.started.wait(5)
    backend.fail_rewind = True
    backend.fail_on = lambda steps: True
    assert isinstance(first.wait().error, BackendError)
    assert isinstance(second.wait().error, BackendError)
    assert engine.stats().failure is not None
    with pytest.raises(BackendError):
        submit(engine)


def test_logits_that_are_not_numbers_never_become_text(start: Start) -> None:
    engine, backend = start()
    backend.row = lambda tokens: HashBackend.row(backend, tokens) * float("nan")
    reply = ask(engine)
    assert reply.text == ""
    assert isinstance(reply.error, BackendError)


def test_a_bug_in_the_engine_leaves_nobody_waiting(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, backend = start()

    def broken(slot: int) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(backend, "length", broken)
    assert isinstance(ask(engine).error, BackendError)
    with pytest.raises(BackendError):
        submit(engine)
    engine.close()
    assert backend.num_closed == 1


def test_a_receiver_that_fails_is_dropped(start: Start) -> None:
    engine, backend = start(num_slots=1)

    def broken(event: Event) -> None:
        raise RuntimeError

    engine.submit(GenerateRequest(PROMPT, 200, GREEDY), broken)
    assert ask(engine).token_ids == backend.answer(PROMPT, 10, TOKENIZER.eos_token_ids)
    assert engine.stats().num_cancelled == 1


def test_close_drains_then_cancels_and_frees_the_backend(start: Start) -> None:
    engine, backend = start(num_slots=1, ms_per_token=1.0)
    drained, _ = submit(engine, num=20)
    engine.close(drain_s=10)
    assert drained.end.reason == "length"
    assert backend.num_closed == 1
    with pytest.raises(EngineClosedError):
        submit(engine)
    engine.close()

    engine, backend = start(num_slots=1, ms_per_token=1.0)
    cut, _ = submit(engine, num=240)
    assert cut.started.wait(5)
    engine.close()
    assert cut.end.reason == "cancelled"


def test_close_before_start_frees_the_backend() -> None:
    backend = HashBackend(VOCAB)
    engine = Engine(backend, TOKENIZER, EngineConfig())
    engine.close()
    assert backend.num_closed == 1
    with pytest.raises(EngineClosedError):
        submit(engine)


def test_a_common_start_is_copied_between_slots(start: Start) -> None:
    engine, backend = start(num_slots=2)
    long = tuple(range(150))
    ask(engine, long, 2, session="a")
    reply = ask(engine, (*long, 200), 2, session="b")
    assert reply.end.timings.num_cached_tokens == 150
    assert reply.token_ids == backend.answer((*long, 200), 2)


def test_the_same_new_text_asked_for_three_times_is_read_once(start: Start) -> None:
    engine, backend = start(num_slots=3, max_seq_len=1024, ms_per_token=0.2)
    long = tuple(i * i % 251 for i in range(600))
    replies = [
        submit(engine, (*long, last), 2, session=str(last), priority=priority)[0]
        for last, priority in ((1, "background"), (2, "background"), (3, "interactive"))
    ]
    for last, reply in enumerate(replies, 1):
        assert reply.wait().token_ids == backend.answer((*long, last), 2)
    computed = sum(
        reply.end.timings.num_prompt_tokens - reply.end.timings.num_cached_tokens
        for reply in replies
    )
    assert computed < 600 + 2 * SlotTable.MIN_FORK_GAIN + 32


def test_a_cache_that_cannot_be_shared_in_part_is_not_asked_again(start: Start) -> None:
    engine, backend = start(num_slots=2, max_seq_len=1024, ms_per_token=0.2)
    backend.can_rewind = False
    long = tuple(i * i % 251 for i in range(600))
    pair = [submit(engine, (*long, last), 2, priority="background")[0] for last in (1, 2)]
    for last, reply in enumerate(pair, 1):
        assert reply.wait().token_ids == backend.answer((*long, last), 2)


def test_a_copy_of_what_another_reads_may_fail(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, backend = start(num_slots=2, max_seq_len=1024, ms_per_token=0.2)

    def broken(src: int, dst: int, length: int) -> None:
        raise BackendError("the fake device could not copy")

    monkeypatch.setattr(backend, "fork", broken)
    long = tuple(i * i % 251 for i in range(600))
    pair = [submit(engine, (*long, last), 2, priority="background")[0] for last in (1, 2)]
    ends = [reply.wait() for reply in pair]
    assert isinstance(ends[1].error, BackendError)
    assert ends[0].token_ids == backend.answer((*long, 1), 2)
    until(lambda: idle(engine))


def test_a_copy_between_slots_that_fails_fails_the_request_alone(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, backend = start(num_slots=2)
    long = tuple(range(150))
    ask(engine, long, 2, session="a")

    def broken(src: int, dst: int, length: int) -> None:
        raise BackendError("the fake device could not copy")

    monkeypatch.setattr(backend, "fork", broken)
    assert isinstance(ask(engine, (*long, 200), 2, session="b").error, BackendError)
    assert ask(engine, num=4).token_ids == backend.answer(PROMPT, 4)


def test_calibration_runs_on_the_engines_thread_and_its_failure_is_told() -> None:
    names: list[str] = []

    def calibrate(backend: object) -> LinearCosts:
        names.append(threading.current_thread().name)
        raise BackendError("the fake device is too warm")

    backend = HashBackend(VOCAB)
    engine = Engine(backend, TOKENIZER, EngineConfig(max_seq_len=256), calibrate)
    engine.start()
    until(lambda: engine.stats().failure is not None)
    with pytest.raises(BackendError, match="too warm"):
        submit(engine)
    assert names == ["albor-engine"]
    assert (engine.backend, engine.tokenizer, engine.max_seq_len) == (backend, TOKENIZER, 256)
    engine.close()


def test_storm_of_requests_cancels_and_supersedes(start: Start) -> None:
    """No slot leaks and every answer that was not cancelled is the one given alone."""
    engine, backend = start(
        EngineConfig(num_slots=3, max_seq_len=256, max_queue_len=1000, prefill_chunk_len=16),
        LinearCosts(1.0, 0.1, 0.05),
        num_slots=3,
        ms_per_token=0.02,
        period=0,
    )
    base = tuple(random.Random(0).randrange(300) % VOCAB for _ in range(120))
    ends = TOKENIZER.eos_token_ids

    def client(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(30):
            prompt = (*base[: rng.randrange(1, 120)], rng.randrange(VOCAB))
            num = rng.randrange(0, 30)
            kwargs = {}
            if rng.random() < 0.3:
                kwargs["session"] = f"s{rng.randrange(3)}"
            if rng.random() < 0.2:
                kwargs["priority"] = "background"
            reply, ticket = submit(engine, prompt, num, **kwargs)
            if rng.random() < 0.3:
                time.sleep(rng.random() * 0.01)
                ticket.cancel()
            reply.wait()
            want = backend.answer(prompt, num, ends)
            got = reply.token_ids
            if reply.end.reason == "cancelled":
                assert got == want[: len(got)]
            else:
                assert got == want

    failures: list[BaseException] = []

    def guarded(seed: int) -> None:
        try:
            client(seed)
        except BaseException as error:  # noqa: BLE001 - reported by the test
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures, failures[0]
    assert idle(engine)
    stats = engine.stats()
    assert not any(slot.is_busy for slot in stats.slots)
    assert stats.num_finished + stats.num_cancelled == stats.num_requests == 240
    for slot, cache in zip(stats.slots, backend.caches, strict=True):
        assert slot.num_cached_tokens == len(cache)


def test_of_a_cancelled_prompt_only_what_was_read_counts(start: Start) -> None:
    engine, backend = start(num_slots=1, max_seq_len=1024, ms_per_token=1.0)
    reply, ticket = submit(engine, tuple(range(200)) * 4, 1)
    until(lambda: len(backend.caches[0]) > 5)
    ticket.cancel()
    reply.wait()
    until(lambda: idle(engine))
    assert engine.stats().num_prompt_tokens == len(backend.caches[0]) < 800
    ask(engine, tuple(range(200)) * 4, 1)
    assert engine.stats().num_prompt_tokens - engine.stats().num_cached_tokens == 800
