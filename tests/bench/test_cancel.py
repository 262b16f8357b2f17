"""A client that goes away frees its slot, as other clients see it."""

from __future__ import annotations

import pytest

from albor_serve.bench.cancel import CancelTimes, Phase, measure_cancels
from albor_serve.config import EngineConfig
from albor_serve.errors import BackendError
from tests.api.live import serving_backend
from tests.fakes import ByteTokenizer, HashBackend

NUM_ROUNDS = 4


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_disconnect_frees_the_slot_long_before_the_answer_would_end(phase: Phase) -> None:
    tokenizer = ByteTokenizer()
    # A whole prompt takes 4 s and a whole answer over 5 s.
    backend = HashBackend(tokenizer.vocab_size, max_seq_len=1024, ms_per_token=20.0)
    config = EngineConfig(num_slots=1, max_seq_len=1024)
    with serving_backend(backend, tokenizer, config) as live:
        address = live.url.removeprefix("http://")
        times = measure_cancels(address, phase, NUM_ROUNDS, prompt_len=200)
        stats = live.engine.stats()
    assert len(times.free_ms) == NUM_ROUNDS
    assert stats.num_cancelled == NUM_ROUNDS
    assert stats.num_finished == 0
    # Far fewer tokens were computed than asked for: 200 or 272 in each round.
    assert sum(len(step.tokens) for call in backend.calls for step in call) > 0
    assert stats.num_stale_tokens < NUM_ROUNDS * 60


def test_a_server_that_is_not_there_is_an_error() -> None:
    with pytest.raises(BackendError):
        measure_cancels("127.0.0.1:1", "decode", 1, prompt_len=16)


def test_quantiles_are_nearest_rank() -> None:
    times = CancelTimes("decode", tuple(float(i) for i in range(100, 0, -1)), 1.0)
    assert times.quantile(0.5) == 51.0
    assert times.quantile(0.99) == 100.0
    assert CancelTimes("decode", (3.0,), 1.0).quantile(0.99) == 3.0
