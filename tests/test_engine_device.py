"""The engine with a backend that decodes several tokens by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from albor_serve.backends.base import Aborted, DeviceDecoder
from albor_serve.config import DevicePlan, EngineConfig, SamplingParams
from albor_serve.engine import DEVICE_RUN_LEN, Engine
from albor_serve.errors import BackendError
from tests.fakes import ByteTokenizer, HashBackend
from tests.test_engine import GREEDY, PROMPT, TOKENIZER, VOCAB, ask, submit

Start = Callable[..., tuple[Engine, "DeviceBackend"]]


class DeviceBackend(HashBackend):
    """A `HashBackend` that is a `DeviceDecoder` too: greedy, whatever the plan's temperature."""

    def __init__(self, *args: int, **kwargs: float) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.plans: list[DevicePlan] = []
        self.fail = False

    def decode(
        self, slot: int, token: int, plan: DevicePlan, on_token: Callable[[int], bool]
    ) -> list[int]:
        self.plans.append(plan)
        if self.fail:
            raise BackendError("the fake device failed")
        cache, new = self.caches[slot], list[int]()
        assert len(cache) + plan.max_new_tokens <= self.info.max_seq_len
        while len(new) < plan.max_new_tokens:
            time.sleep(self.ms_per_token / 1000)
            if self.flag.is_set():
                raise Aborted
            cache.append(token)
            token = int(self.row(cache).argmax())
            new.append(token)
            if not on_token(token) or token in plan.stop_token_ids:
                break
        return new


@pytest.fixture
def start() -> Iterator[Start]:
    engines: list[Engine] = []

    def make(**kwargs: float) -> tuple[Engine, DeviceBackend]:
        backend = DeviceBackend(VOCAB, **kwargs)
        info = backend.info
        config = EngineConfig(num_slots=info.num_slots, max_seq_len=info.max_seq_len)
        engine = Engine(backend, TOKENIZER, config)
        engine.start()
        engines.append(engine)
        return engine, backend

    yield make
    for engine in engines:
        engine.close()


def test_the_text_is_the_same_and_the_host_takes_part_once_a_run(start: Start) -> None:
    engine, backend = start()
    assert isinstance(backend, DeviceDecoder)
    assert not isinstance(HashBackend(VOCAB), DeviceDecoder)
    reply = ask(engine, num=40)
    assert reply.token_ids == backend.answer(PROMPT, 40, TOKENIZER.eos_token_ids)
    assert reply.end.timings.num_new_tokens == 40
    assert [p.max_new_tokens for p in backend.plans] == [DEVICE_RUN_LEN, DEVICE_RUN_LEN, 7]
    assert backend.caches[0] == [*PROMPT, *reply.token_ids[:39]]
    again = ask(engine, (*PROMPT, *reply.token_ids), num=5)
    assert again.token_ids == backend.answer((*PROMPT, *reply.token_ids), 5)


def test_stops_limits_and_the_context_hold(start: Start) -> None:
    engine, backend = start(max_seq_len=48)
    want = backend.answer(PROMPT, 9)
    for num in range(1, 9):
        assert ask(engine, num=num).token_ids == want[:num]
    stopped = ask(engine, num=30, stop_token_ids=frozenset({want[8]}))
    assert stopped.token_ids == want[:8]
    assert stopped.end.reason == "stop"
    assert len(ask(engine, num=1000).token_ids) == 48 - len(PROMPT)
    assert ask(engine, num=9).token_ids == want


def test_what_needs_the_host_stays_there(start: Start) -> None:
    engine, backend = start()
    for sampling in (
        SamplingParams(temperature=1.0, seed=3),
        SamplingParams(temperature=0.0, num_logprobs=2),
    ):
        ask(engine, sampling=sampling)
    assert not backend.plans
    ask(engine, num=3, forced_bytes=b"ret", sampling=GREEDY)
    assert all(plan.max_new_tokens <= 3 for plan in backend.plans)  # once they are spelled
    ask(engine, sampling=SamplingParams(temperature=1.0, repetition_penalty=1.1), ignore_eos=True)
    plan = backend.plans[-1]
    assert plan.prompt == PROMPT
    assert sum(number for _, number in plan.counts) == 1
    assert plan.banned == tuple(ByteTokenizer().eos_token_ids)


def test_a_cancel_and_a_newcomer_take_effect_within_a_token(start: Start) -> None:
    engine, backend = start(ms_per_token=5.0)
    reply, ticket = submit(engine, num=200)
    assert reply.started.wait(10)
    ticket.cancel()
    assert reply.wait().end.reason == "cancelled"
    backend.ms_per_token = 1.0
    first, _ = submit(engine, num=60)
    assert first.started.wait(10)
    other = tuple(range(20))
    second, _ = submit(engine, other, 10)
    assert second.wait().token_ids == backend.answer(other, 10)
    assert first.wait().token_ids == backend.answer(PROMPT, 60)


def test_a_failure_reaches_the_request_and_the_next_one_works(start: Start) -> None:
    engine, backend = start()
    backend.fail = True
    assert isinstance(ask(engine).error, BackendError)
    backend.fail = False
    assert ask(engine).token_ids == backend.answer(PROMPT, 10)
