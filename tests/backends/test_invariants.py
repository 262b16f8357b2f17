"""The rules of backends/base.py, on every backend and architecture.

The reference is `albor_serve.model` without a cache, in fp32. llama.cpp keeps F32 keys and
values here, so that rounding in the cache does not hide an error.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from albor_serve.backends.base import Aborted, Backend, ExtendStep, LogitRows
from albor_serve.backends.llamacpp import LlamaCppBackend
from albor_serve.backends.torch_ref import TorchReferenceBackend
from albor_serve.config import ModelConfig
from albor_serve.errors import BackendError
from albor_serve.model import load_decoder
from tests.fixtures_tiny import ARCHITECTURES, random_tokens, reader, save_gguf, tiny_model

NUM_SLOTS = 3
MAX_SEQ_LEN = 160
TOLERANCE = 2e-4  # fp32 in two orders of summation; the logits have a standard deviation of 2


class Subject:
    """A backend under test and what its logits should be."""

    def __init__(self, backend: Backend, config: ModelConfig, weights: dict[str, Any]) -> None:
        self.backend = backend
        self.config = config
        self._model = load_decoder(config, reader(weights))

    def expected(self, tokens: list[int]) -> LogitRows:
        with torch.inference_mode():
            rows: LogitRows = self._model(torch.tensor([tokens]))[0].numpy()
        return rows

    def extend(self, slot: int, tokens: list[int], logits_for: Any = "all") -> LogitRows:
        return self.backend.extend([ExtendStep(slot, tokens, logits_for)])[0].copy()

    def assert_slot_holds(self, slot: int, tokens: list[int]) -> None:
        """Prove it by the logits of three more tokens; leaves the slot as it was."""
        assert self.backend.length(slot) == len(tokens)
        more = random_tokens(self.config, 3, seed=99)
        assert_close(self.extend(slot, more), self.expected(tokens + more)[-3:])
        self.backend.rewind(slot, len(tokens))


def assert_close(actual: LogitRows, expected: LogitRows, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == np.float32
    if actual.size:
        assert float(np.abs(actual - expected).max()) <= tolerance


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelConfig, dict[str, Any], Path]:
    config, weights = tiny_model(request.param, seed=7)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return config, weights, save_gguf(path, config, weights)


@pytest.fixture(scope="module", params=["torch_ref", "llamacpp", "llamacpp-unified"])
def loaded(request: pytest.FixtureRequest, checkpoint: Any) -> Iterator[Subject]:
    config, weights, path = checkpoint
    backend: Backend
    if request.param == "torch_ref":
        backend = TorchReferenceBackend(config, reader(weights), NUM_SLOTS, MAX_SEQ_LEN)
    else:
        backend = LlamaCppBackend.load(
            path,
            NUM_SLOTS,
            MAX_SEQ_LEN,
            num_threads=1,
            kv_type="f32",
            micro_batch_len=32,
            unified_kv=request.param == "llamacpp-unified",
        )
    try:
        yield Subject(backend, config, weights)
    finally:
        backend.close()


@pytest.fixture
def subject(loaded: Subject) -> Subject:
    loaded.backend.abort.clear()
    for slot in range(NUM_SLOTS):
        loaded.backend.rewind(slot, 0)
    return loaded


def test_is_a_backend(subject: Subject) -> None:
    assert isinstance(subject.backend, Backend)
    info = subject.backend.info
    assert info.vocab_size == subject.config.vocab_size
    assert (info.num_slots, info.max_seq_len) == (NUM_SLOTS, MAX_SEQ_LEN)
    assert info.max_batch_len >= NUM_SLOTS
    kv = 2 * subject.config.num_layers * subject.config.num_kv_heads * subject.config.head_dim
    assert info.kv_bytes_per_token == 4 * kv
    assert info.weight_bytes == 4 * subject.config.num_parameters


def test_one_call_gives_the_reference_logits(subject: Subject) -> None:
    tokens = random_tokens(subject.config, MAX_SEQ_LEN, seed=1)
    assert_close(subject.extend(0, tokens), subject.expected(tokens))


@pytest.mark.parametrize("cuts", [[1] * 20, [19, 1], [3, 40, 1, 1, 33, 2]])
def test_many_calls_equal_one(subject: Subject, cuts: list[int]) -> None:
    tokens = random_tokens(subject.config, sum(cuts), seed=2)
    expected = subject.expected(tokens)
    begin = 0
    for count in cuts:
        rows = subject.extend(1, tokens[begin : begin + count])
        assert_close(rows, expected[begin : begin + count])
        begin += count
        assert subject.backend.length(1) == begin


def test_rows_asked_are_rows_given(subject: Subject) -> None:
    tokens = random_tokens(subject.config, 9, seed=3)
    expected = subject.expected(tokens)
    steps = [
        ExtendStep(2, tokens, "all"),
        ExtendStep(0, tokens, "none"),
        ExtendStep(1, tokens, "last"),
    ]
    every, none, last = subject.backend.extend(steps)
    assert none.shape == (0, subject.config.vocab_size)
    assert_close(every, expected)
    assert_close(last, expected[-1:])


def test_slots_in_any_order_and_with_gaps(subject: Subject) -> None:
    a, b, c = (random_tokens(subject.config, n, seed=n) for n in (37, 5, 61))
    steps = [ExtendStep(2, a, "all"), ExtendStep(0, b, "last"), ExtendStep(1, c, "all")]
    rows = [r.copy() for r in subject.backend.extend(steps)]
    assert_close(rows[0], subject.expected(a))
    assert_close(rows[1], subject.expected(b)[-1:])
    assert_close(rows[2], subject.expected(c))
    more = random_tokens(subject.config, 4, seed=5)
    steps = [ExtendStep(2, more[:1], "all"), ExtendStep(0, more, "all")]
    rows = [r.copy() for r in subject.backend.extend(steps)]
    assert_close(rows[0], subject.expected(a + more[:1])[-1:])
    assert_close(rows[1], subject.expected(b + more)[-4:])


def test_nothing_asked_nothing_done(subject: Subject) -> None:
    assert subject.backend.extend([]) == []
    rows = subject.backend.extend([ExtendStep(0, [], "last"), ExtendStep(1, [], "all")])
    assert [r.shape for r in rows] == [(0, subject.config.vocab_size)] * 2
    token = random_tokens(subject.config, 1)
    empty, one = subject.backend.extend([ExtendStep(0, [], "all"), ExtendStep(1, token, "all")])
    assert empty.shape[0] == 0
    assert_close(one, subject.expected(token))


@pytest.mark.parametrize("kept", [0, 1, 31, 32, 49, 50])
def test_rewind_then_extend_equals_fresh(subject: Subject, kept: int) -> None:
    tokens = random_tokens(subject.config, 50, seed=4)
    other = random_tokens(subject.config, 20, seed=5)
    subject.extend(0, tokens, "none")
    subject.backend.rewind(0, kept)
    assert subject.backend.length(0) == kept
    expected = subject.expected(tokens[:kept] + other)[kept:]
    assert_close(subject.extend(0, other), expected)


def test_rewind_beyond_the_end_keeps_all(subject: Subject) -> None:
    tokens = random_tokens(subject.config, 10)
    subject.extend(0, tokens, "none")
    subject.backend.rewind(0, 11)
    subject.assert_slot_holds(0, tokens)


@pytest.mark.parametrize("shared", [0, 1, 17, 40])
def test_fork_shares_a_prefix(subject: Subject, shared: int) -> None:
    tokens = random_tokens(subject.config, 40, seed=6)
    old = random_tokens(subject.config, 70, seed=7)
    subject.extend(0, tokens, "none")
    subject.extend(2, old, "none")
    subject.backend.fork(0, 2, shared)
    subject.assert_slot_holds(2, tokens[:shared])
    subject.assert_slot_holds(0, tokens)


def test_fork_then_change_the_source(subject: Subject) -> None:
    tokens = random_tokens(subject.config, 40, seed=8)
    other = random_tokens(subject.config, 50, seed=9)
    subject.extend(0, tokens, "none")
    subject.backend.fork(0, 1, 30)
    subject.backend.rewind(0, 10)
    subject.extend(0, other, "none")
    subject.assert_slot_holds(1, tokens[:30])
    subject.assert_slot_holds(0, tokens[:10] + other)


def test_fork_of_a_fork(subject: Subject) -> None:
    tokens = random_tokens(subject.config, 40, seed=8)
    subject.extend(0, tokens, "none")
    subject.backend.fork(0, 1, 30)
    subject.backend.fork(1, 2, 20)
    subject.backend.fork(2, 0, 10)
    for slot, count in ((0, 10), (1, 30), (2, 20)):
        subject.assert_slot_holds(slot, tokens[:count])


def test_fork_onto_itself_cuts(subject: Subject) -> None:
    tokens = random_tokens(subject.config, 12)
    subject.extend(1, tokens, "none")
    subject.backend.fork(1, 1, 5)
    subject.assert_slot_holds(1, tokens[:5])


def test_slots_never_see_each_other(subject: Subject) -> None:
    texts = [random_tokens(subject.config, 30, seed=s) for s in range(NUM_SLOTS)]
    for begin in range(0, 30, 10):
        steps = [ExtendStep(s, texts[s][begin : begin + 10], "all") for s in range(NUM_SLOTS)]
        for text, rows in zip(texts, subject.backend.extend(steps), strict=True):
            assert_close(rows, subject.expected(text)[begin : begin + 10])
    subject.backend.rewind(1, 0)
    subject.assert_slot_holds(0, texts[0])
    subject.assert_slot_holds(2, texts[2])


@pytest.mark.parametrize(
    ("slot", "tokens", "message"),
    [
        (3, [20], "no slot 3: use 0 to 2"),
        (-1, [20], "no slot -1"),
        (0, [20] * (MAX_SEQ_LEN + 1), "would hold 161 tokens, but it has room for 160"),
        (0, [20, 512], "outside the vocabulary: use 0 to 511"),
        (0, [-1], "outside the vocabulary"),
        (0, [1 << 40], "outside the vocabulary"),
    ],
)
def test_bad_steps_are_refused_and_change_nothing(
    subject: Subject, slot: int, tokens: list[int], message: str
) -> None:
    held = random_tokens(subject.config, 0 if len(tokens) > 9 else 6)
    subject.extend(0, held, "none")
    good = ExtendStep(1, [20, 21], "none")
    with pytest.raises(BackendError, match=message):
        subject.backend.extend([good, ExtendStep(slot, tokens)])
    assert subject.backend.length(1) == 0
    subject.assert_slot_holds(0, held)


def test_more_refusals(subject: Subject) -> None:
    backend = subject.backend
    subject.extend(0, [20, 21], "none")
    with pytest.raises(BackendError, match="slot 0 occurs twice"):
        backend.extend([ExtendStep(0, [20]), ExtendStep(0, [21])])
    with pytest.raises(BackendError, match="cannot share 3 tokens of slot 0: it holds 2"):
        backend.fork(0, 1, 3)
    with pytest.raises(BackendError, match="no slot 7"):
        backend.fork(0, 7, 1)
    with pytest.raises(BackendError, match="cannot rewind to -1"):
        backend.rewind(0, -1)
    with pytest.raises(BackendError, match="no slot 9"):
        backend.length(9)
    subject.assert_slot_holds(0, [20, 21])


def test_abort_set_before_the_call(subject: Subject) -> None:
    tokens = random_tokens(subject.config, 20)
    subject.extend(0, tokens, "none")
    subject.backend.abort.set()
    with pytest.raises(Aborted):
        subject.extend(0, [30, 31])
    with pytest.raises(Aborted):  # it stays set until it is cleared
        subject.extend(1, [30, 31])
    subject.backend.abort.clear()
    subject.assert_slot_holds(0, tokens)
    subject.assert_slot_holds(1, [])


def test_abort_in_mid_prefill_leaves_a_valid_slot(subject: Subject) -> None:
    backend = subject.backend
    kept = random_tokens(subject.config, 30, seed=1)
    subject.extend(1, kept, "none")
    prompt = random_tokens(subject.config, 150, seed=2)
    num_aborted = 0
    for attempt in range(24):
        backend.rewind(0, 0)
        timer = threading.Timer(0.0002 * (attempt % 24), backend.abort.set)
        timer.start()
        try:
            while True:  # long enough for the timer, however slow the machine
                backend.extend([ExtendStep(0, prompt, "last")])
                backend.rewind(0, 0)
        except Aborted:
            num_aborted += 1
        finally:
            timer.join()
            backend.abort.clear()
        held = backend.length(0)
        assert 0 <= held <= len(prompt)
        if attempt % 4 == 0:
            subject.assert_slot_holds(0, prompt[:held])
            subject.assert_slot_holds(1, kept)
    assert num_aborted == 24


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("extend"),
            st.dictionaries(st.integers(0, NUM_SLOTS - 1), st.integers(0, 12), min_size=1),
            st.sampled_from(["none", "last", "all"]),
        ),
        st.tuples(st.just("rewind"), st.integers(0, NUM_SLOTS - 1), st.floats(0, 1)),
        st.tuples(
            st.just("fork"),
            st.tuples(st.integers(0, NUM_SLOTS - 1), st.integers(0, NUM_SLOTS - 1)),
            st.floats(0, 1),
        ),
    ),
    max_size=10,
)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(operations=OPERATIONS, seed=st.integers(0, 1000))
def test_any_sequence_of_operations(subject: Subject, operations: list[Any], seed: int) -> None:
    """Whatever is done, each slot behaves as a fresh cache with the tokens it should hold."""
    backend = subject.backend
    held: list[list[int]] = [[] for _ in range(NUM_SLOTS)]
    for slot in range(NUM_SLOTS):
        backend.rewind(slot, 0)
    for name, what, how in operations:
        if name == "extend":
            seed += 1
            steps = []
            for slot, count in what.items():
                count = min(count, MAX_SEQ_LEN - 3 - len(held[slot]))
                tokens = random_tokens(subject.config, count, seed=seed + slot)
                steps.append(ExtendStep(slot, tokens, how))
                held[slot] = held[slot] + tokens
            for step, rows in zip(steps, backend.extend(steps), strict=True):
                if step.num_rows:
                    assert_close(rows, subject.expected(held[step.slot])[-step.num_rows :])
        elif name == "rewind":
            held[what] = held[what][: round(how * len(held[what]))]
            backend.rewind(what, len(held[what]))
        else:
            src, dst = what
            length = round(how * len(held[src]))
            backend.fork(src, dst, length)
            held[dst] = held[src][:length]
    for slot in range(NUM_SLOTS):
        subject.assert_slot_holds(slot, held[slot])


@pytest.mark.parametrize("name", ["torch_ref", "llamacpp"])
def test_closed_backend_refuses_everything(name: str, checkpoint: Any) -> None:
    config, weights, path = checkpoint
    backend: Backend
    if name == "torch_ref":
        backend = TorchReferenceBackend(config, reader(weights), 1, 32)
    else:
        backend = LlamaCppBackend.load(path, 1, 32, num_threads=1)
    backend.extend([ExtendStep(0, [20])])
    backend.close()
    backend.close()
    for call in (
        lambda: backend.extend([ExtendStep(0, [20])]),
        lambda: backend.rewind(0, 0),
        lambda: backend.fork(0, 0, 0),
        lambda: backend.length(0),
    ):
        with pytest.raises(BackendError, match="closed"):
            call()
    assert backend.info.num_slots == 1
    backend.abort.set()
