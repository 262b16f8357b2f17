from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from albor_serve.config import SamplingParams
from albor_serve.errors import BackendError, RequestError
from albor_serve.sampler import Sampler, log_softmax, top_logprobs

VOCAB = 50
LOGITS = np.random.default_rng(7).standard_normal(VOCAB).astype(np.float32) * 3


def draw(params: SamplingParams, logits: np.ndarray = LOGITS, num: int = 1, **kwargs) -> list[int]:
    sampler = Sampler(params, VOCAB, **kwargs)
    return [sampler.sample(logits).token_id for _ in range(num)]


def frequencies(params: SamplingParams, num: int = 6000, **kwargs) -> np.ndarray:
    return np.bincount(draw(params, num=num, **kwargs), minlength=VOCAB) / num


def softmax(logits: np.ndarray) -> np.ndarray:
    wide = np.exp(logits.astype(np.float64) - logits.max())
    return wide / wide.sum()


def test_greedy_takes_the_maximum_and_the_lowest_id_of_a_tie() -> None:
    tied = np.zeros(VOCAB, dtype=np.float32)
    assert draw(SamplingParams(temperature=0.0)) == [int(LOGITS.argmax())]
    assert draw(SamplingParams(temperature=0.0), tied) == [0]
    assert draw(SamplingParams(temperature=3.0, top_k=1)) == [int(LOGITS.argmax())]
    sampler = Sampler(SamplingParams(temperature=0.0), VOCAB)
    assert sampler.sample(tied, np.array([9, 4, 7])).token_id == 4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_distribution(temperature: float) -> None:
    got = frequencies(SamplingParams(temperature=temperature, seed=1))
    want = softmax(LOGITS / temperature)
    assert np.abs(got - want).max() < 0.025


def test_top_k_keeps_the_k_most_likely() -> None:
    best = set(np.argsort(-LOGITS)[:3].tolist())
    got = draw(SamplingParams(temperature=5.0, top_k=3, seed=2), num=500)
    assert set(got) == best


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    probs = softmax(LOGITS)
    order = np.argsort(-probs)
    num = int(np.searchsorted(np.cumsum(probs[order]), 0.8)) + 1
    got = draw(SamplingParams(top_p=0.8, seed=3), num=4000)
    assert set(got) == set(order[:num].tolist())
    assert set(draw(SamplingParams(top_p=1e-9, seed=3), num=50)) == {int(order[0])}


def test_min_p_drops_the_unlikely() -> None:
    probs = softmax(LOGITS)
    got = draw(SamplingParams(min_p=0.2, seed=4), num=3000)
    assert set(got) == set(np.flatnonzero(probs >= 0.2 * probs.max()).tolist())


def test_same_seed_same_draws_and_another_seed_others() -> None:
    first = draw(SamplingParams(seed=11), num=40)
    assert first == draw(SamplingParams(seed=11), num=40)
    assert first != draw(SamplingParams(seed=12), num=40)
    assert draw(SamplingParams(seed=-1), num=5) == draw(SamplingParams(seed=-1), num=5)
    assert draw(SamplingParams(), num=40) != draw(SamplingParams(), num=40)


def test_logit_bias_forces_and_forbids() -> None:
    assert draw(SamplingParams(temperature=0.0, logit_bias=((5, 100.0),))) == [5]
    best = int(LOGITS.argmax())
    assert draw(SamplingParams(temperature=0.0, logit_bias=((best, -100.0),))) != [best]
    twice = SamplingParams(temperature=0.0, logit_bias=((5, 60.0), (5, 40.0), (6, 80.0)))
    assert draw(twice) == [5]


def test_banned_tokens_never_come() -> None:
    best = int(LOGITS.argmax())
    assert best not in draw(SamplingParams(temperature=1.0, seed=5), num=300, banned={best})


def test_penalties_count_only_what_was_accepted() -> None:
    logits = np.zeros(VOCAB, dtype=np.float32)
    logits[3], logits[4] = 1.0, 0.6
    for params in (
        SamplingParams(temperature=0.0, presence_penalty=0.5),
        SamplingParams(temperature=0.0, frequency_penalty=0.5),
    ):
        sampler = Sampler(params, VOCAB, prompt=[3, 3, 3])
        assert sampler.sample(logits).token_id == 3  # the prompt does not count
        sampler.accept(3)
        assert sampler.sample(logits).token_id == 4


def test_frequency_grows_and_presence_does_not() -> None:
    logits = np.zeros(VOCAB, dtype=np.float32)
    logits[3], logits[4] = 1.0, 0.0
    frequency = Sampler(SamplingParams(temperature=0.0, frequency_penalty=0.4), VOCAB)
    presence = Sampler(SamplingParams(temperature=0.0, presence_penalty=0.4), VOCAB)
    for sampler, last in ((frequency, 0), (presence, 3)):
        for _ in range(3):
            sampler.accept(3)
        assert sampler.sample(logits).token_id == last


def test_repetition_penalty_counts_the_prompt_and_handles_both_signs() -> None:
    logits = np.full(VOCAB, -10.0, dtype=np.float32)
    logits[3], logits[4], logits[5] = 1.0, 0.9, -1.0
    sampler = Sampler(SamplingParams(temperature=0.0, repetition_penalty=1.5), VOCAB, prompt=[3])
    assert sampler.sample(logits).token_id == 4
    negative = np.full(VOCAB, -9.0, dtype=np.float32)
    negative[3], negative[4] = -1.0, -1.2
    assert sampler.sample(negative).token_id == 4


def test_only_allowed_ids_are_chosen() -> None:
    allowed = np.array([40, 2, 17])
    for params in (SamplingParams(temperature=0.0), SamplingParams(seed=9)):
        sampler = Sampler(params, VOCAB)
        got = {sampler.sample(LOGITS, allowed).token_id for _ in range(200)}
        assert got <= {40, 2, 17}
    best = max([40, 2, 17], key=lambda i: LOGITS[i])
    greedy = Sampler(SamplingParams(temperature=0.0), VOCAB)
    assert greedy.sample(LOGITS, allowed).token_id == best


def test_logprobs_are_those_of_the_model() -> None:
    params = SamplingParams(temperature=0.3, num_logprobs=3, logit_bias=((1, 100.0),))
    sampled = Sampler(params, VOCAB).sample(LOGITS)
    want = np.log(softmax(LOGITS))
    assert sampled.token_id == 1
    assert sampled.logprob == pytest.approx(want[1])
    assert [i for i, _ in sampled.top_logprobs] == np.argsort(-LOGITS)[:3].tolist()
    assert sampled.top_logprobs[0][1] == pytest.approx(want.max())


def test_logprobs_zero_reports_the_token_alone_and_none_nothing() -> None:
    with_zero = Sampler(SamplingParams(temperature=0.0, num_logprobs=0), VOCAB).sample(LOGITS)
    assert with_zero.logprob is not None
    assert with_zero.top_logprobs == ()
    assert Sampler(SamplingParams(temperature=0.0), VOCAB).sample(LOGITS).logprob is None


@given(arrays(np.float32, 12, elements=st.floats(-1e4, 1e4, width=32)), st.integers(0, 15))
def test_log_softmax_and_top_logprobs(logits: np.ndarray, num: int) -> None:
    logprobs = log_softmax(logits)
    assert math.isclose(float(np.exp(logprobs).sum()), 1.0, rel_tol=1e-9)
    top = top_logprobs(logprobs, num)
    assert len(top) == min(num, 12)
    assert list(top) == sorted(top, key=lambda pair: (-pair[1], pair[0]))
    if top:
        assert top[0][1] == logprobs.max()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers_raise(bad: float) -> None:
    logits = LOGITS.copy()
    logits[20] = bad
    for params in (SamplingParams(temperature=0.0), SamplingParams()):
        with pytest.raises(
            BackendError,
            match=r"^the model's logits are not finite numbers: the weights are damaged or the "
            r"device computed wrongly; convert the checkpoint again or use another backend$",
        ):
            Sampler(params, VOCAB).sample(logits)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("seed", 1 << 64),
        ("num_logprobs", 21),
    ],
)
def test_values_outside_their_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param in (field, "logprobs")


def test_bias_outside_its_range_is_refused() -> None:
    with pytest.raises(RequestError):
        SamplingParams(logit_bias=((1, math.nan),))


def test_logprobs_of_a_limited_choice_are_those_among_the_allowed() -> None:
    allowed = np.array([40, 2, 17])
    sampler = Sampler(SamplingParams(temperature=0.0, num_logprobs=5), VOCAB)
    sampled = sampler.sample(LOGITS, allowed)
    want = dict(zip(allowed.tolist(), np.log(softmax(LOGITS[allowed])), strict=True))
    assert sampled.logprob == pytest.approx(want[sampled.token_id])
    assert dict(sampled.top_logprobs) == pytest.approx(want)  # the others have no probability


def test_top_k_of_one_is_greedy_and_of_all_is_none() -> None:
    assert set(draw(SamplingParams(temperature=5.0, top_k=1, seed=3), num=200)) == {
        int(LOGITS.argmax())
    }
    everything = SamplingParams(temperature=2.0, top_k=VOCAB, seed=3)
    plain = SamplingParams(temperature=2.0, seed=3)
    assert draw(everything, num=100) == draw(plain, num=100)


def test_min_p_keeps_what_is_just_likely_enough() -> None:
    logits = np.full(VOCAB, -20.0, dtype=np.float32)
    logits[[3, 4]] = 1.0  # the second is exactly as likely as the first
    assert set(draw(SamplingParams(min_p=1.0, seed=1), logits, num=200)) == {3, 4}


def test_frequency_penalty_takes_its_value_once_for_each_occurrence() -> None:
    logits = np.zeros(VOCAB, dtype=np.float32)
    logits[3], logits[4] = 1.0, 0.3
    sampler = Sampler(SamplingParams(temperature=0.0, frequency_penalty=0.5), VOCAB)
    sampler.accept(3)
    assert sampler.sample(logits).token_id == 3  # 0.5 against 0.3
    sampler.accept(3)
    assert sampler.sample(logits).token_id == 4  # 0 against 0.3


def test_repetition_penalty_counts_what_was_accepted() -> None:
    logits = np.full(VOCAB, -10.0, dtype=np.float32)
    logits[3], logits[4] = 1.0, 0.9
    sampler = Sampler(SamplingParams(temperature=0.0, repetition_penalty=1.5), VOCAB)
    assert sampler.sample(logits).token_id == 3
    sampler.accept(3)
    assert sampler.sample(logits).token_id == 4


def test_log_softmax_treats_rows_apart() -> None:
    rows = np.stack([LOGITS, LOGITS[::-1] + 2000])
    together = log_softmax(rows)
    for row, logprobs in zip(rows, together, strict=True):
        assert logprobs == pytest.approx(log_softmax(row))
        assert float(np.exp(logprobs).sum()) == pytest.approx(1.0)


def test_only_differences_of_logits_count() -> None:
    for shift in (-5000, 5000):
        shifted = (LOGITS + shift).astype(np.float32)
        near = (shifted - shift).astype(np.float32)
        params = SamplingParams(temperature=1.5, seed=8)
        assert draw(params, shifted, num=50) == draw(params, near, num=50)


@pytest.mark.parametrize("rules", [{"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 6, "top_p": 0.8}])
def test_what_is_kept_keeps_its_proportions(rules: dict[str, float]) -> None:
    params = SamplingParams(seed=6, **rules)  # type: ignore[arg-type]
    got = frequencies(params)
    kept = got > 0
    want = np.where(kept, softmax(LOGITS), 0.0)
    assert 1 < kept.sum() < VOCAB
    assert np.abs(got - want / want.sum()).max() < 0.025


def test_of_equally_likely_tokens_the_lowest_ids_are_kept() -> None:
    tied = np.zeros(VOCAB, dtype=np.float32)
    got = set(draw(SamplingParams(top_p=0.499, seed=1), tied, num=2000))
    assert got == set(range(25))


def test_a_repetition_penalty_of_two_counts_as_well() -> None:
    logits = np.zeros(VOCAB, dtype=np.float32)
    logits[3], logits[4] = 1.0, 0.6
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    assert Sampler(params, VOCAB, prompt=[3]).sample(logits).token_id == 4
