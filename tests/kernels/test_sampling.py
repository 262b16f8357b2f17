"""On-device sampling in Triton's interpreter, against its reference and the host's sampler."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from albor_serve.config import DevicePlan, SamplingParams  # noqa: E402
from albor_serve.errors import ConfigError  # noqa: E402
from albor_serve.kernels.sampling import DeviceSampler, reference_probs  # noqa: E402
from albor_serve.sampler import Sampler  # noqa: E402
from tests.scripts import run_script  # noqa: E402

_COMMON = """
import sys
import torch
from albor_serve.config import DevicePlan, SamplingParams
from albor_serve.kernels import sampling
from albor_serve.kernels.sampling import DeviceSampler, reference_probs

V = int(sys.argv[1])
sampling._BLOCK = 32
torch.manual_seed(0)
logits = torch.zeros(8, V)
logits[0] = torch.randn(V) * 2
logits[0, 7] = logits[0, 9]  # a tie
device = torch.device("cpu")
sampler = DeviceSampler(V, 600, device)
keys = torch.full((4, 8), -(1 << 63), dtype=torch.int64)
best = int(logits[0].argmax())
bits = int(logits[0, best].view(torch.int32))
keys[2, 0] = (bits << 32) | (0xFFFFFF - best)

def run(num, seed=0, counts=(), stops=(), banned=(), prompt=(), begin=True, **rules):
    plan = DevicePlan(SamplingParams(**rules), num, seed, stops, banned, prompt, counts)
    sampler.begin(plan)
    tokens, position = torch.zeros(8, dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
    for _ in range(num + 2):
        sampler.choose(logits, keys, tokens, position, 4, pdl=False)
    got = sampler.mailbox[: num + 1].tolist()
    new = [t for t in got if t >= 0]
    assert int(position) == 5 + len(new), (position, got)
    assert not new or int(tokens[0]) == new[-1]
    return new, got[len(new)], plan

"""

_RULES_OF_ONE_RUN = """
# Greedy, by the head's keys; the budget ends it and further steps change nothing.
assert run(3, temperature=0.0)[:2] == ([best] * 3, -4)
# A stop token is kept and ends the run.
assert run(3, temperature=0.0, stops=(1, best))[:2] == ([best], -3)
# Penalties, bias and bans: greedy against the reference, step after step.
rules = dict(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=0.4,
             logit_bias=((3, 5.0), (3, 1.0), (11, -2.0)))
new, end, plan = run(8, banned=(best,), prompt=(3, 20), counts=((20, 2),), **rules)
counts, seen = torch.zeros(V, dtype=torch.int64), torch.zeros(V, dtype=torch.bool)
counts[20], seen[3], seen[20] = 2, True, True
for token in new:
    assert reference_probs(logits[0], plan, counts=counts, seen=seen)[token] == 1.0
    counts[token] += 1
assert len(set(new)) > 2 and best not in new and end == -4
# Cancelled before the first token.
plan = DevicePlan(SamplingParams(temperature=0.0), 3)
sampler.begin(plan)
sampler.ask_to_stop()
tokens, position = torch.zeros(8, dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
sampler.choose(logits, keys, tokens, position, 4, pdl=False)
assert sampler.mailbox[:2].tolist() == [-5, -1] and int(position) == 5
# Seeds.
same = [run(6, seed=s, temperature=1.0)[0] for s in (1, 1, 2, 1 << 40)]
assert same[0] == same[1] and same[0] != same[2] and same[0] != same[3]
# In several pieces, filters keep what they should.
for rules in (dict(top_k=3), dict(top_p=0.5)):
    new, _, plan = run(4, temperature=5.0, **rules)
    assert all(reference_probs(logits[0], plan)[t] > 0 for t in new), rules
# Not finite: an error and not a token.
logits[0, 30] = float("nan")
assert run(2, temperature=1.0)[1] == -6
logits[0] = -float("inf")
assert run(2, temperature=1.0)[1] == -6
"""


_DISTRIBUTION = """
# The distribution, by Pearson's chi-square false alarms about 1e-6.
for rules in (
    dict(temperature=0.8, top_k=5),
    dict(temperature=1.5, top_p=0.7),
    dict(temperature=1.0, top_k=12, top_p=0.8, min_p=0.05),
    dict(temperature=2.0, logit_bias=((5, 4.0),), repetition_penalty=1.0),
):
    new, end, plan = run(250, seed=3, **rules)
    want = reference_probs(logits[0], plan)
    got = torch.bincount(torch.tensor(new), minlength=V).double()
    assert got[want == 0].sum() == 0, rules
    often = want * 250 >= 5
    expected = torch.cat([want[often], (1 - want[often].sum())[None]]) * 250
    seen = torch.cat([got[often], (250 - got[often].sum())[None]])
    valid = expected > 1e-9
    chi = ((seen - expected)[valid] ** 2 / expected[valid]).sum()
    freedom = int(valid.sum()) - 1
    # Wilson and Hilferty 1931: the cube root of chi-square / freedom is about normal.
    z = ((chi / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert z < 4.9, (rules, chi, freedom)
# The same rules keep exactly the reference's tokens: a nearly flat race shows them all.
for k in (1, 2, 23, 24, 200):
    new, _, plan = run(20, temperature=50.0, top_k=k)
    allowed = reference_probs(logits[0], plan) > 0
    assert all(allowed[t] for t in new), k
"""


def _interpret(script: str, vocab_size: int) -> None:
    pytest.importorskip("triton")
    run_script(_COMMON + script, str(vocab_size))


def test_the_kernel_follows_the_rules_in_the_interpreter() -> None:
    _interpret(_RULES_OF_ONE_RUN, 80)  # three pieces, the last one short


@pytest.mark.slow
def test_the_kernel_draws_from_the_reference_distribution() -> None:
    _interpret(_DISTRIBUTION, 24)


_RULES = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        "top_k": st.integers(0, 12),
        "top_p": st.floats(0.05, 1.0),
        "min_p": st.floats(0.0, 0.3),
        "repetition_penalty": st.floats(0.7, 1.5),
        "frequency_penalty": st.floats(-1.0, 1.0),
        "presence_penalty": st.floats(-1.0, 1.0),
        "logit_bias": st.lists(
            st.tuples(st.integers(0, 9), st.floats(-3, 3)), max_size=3
        ).map(tuple),
    }
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(rules=_RULES, seed=st.integers(0, 1000))
def test_the_reference_follows_the_rules_of_the_hosts_sampler(
    rules: dict[str, Any], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=10).astype(np.float32)
    prompt, generated, banned = (1, 2), (2, 4, 4), (6,)
    params = SamplingParams(**rules, seed=seed)
    host = Sampler(params, 10, prompt, banned)
    counts = torch.zeros(10, dtype=torch.int64)
    for token in generated:
        host.accept(token)
        counts[token] += 1
    seen = torch.zeros(10, dtype=torch.bool)
    seen[list(prompt)] = True
    plan = DevicePlan(params, 1, banned=banned)
    probs = reference_probs(torch.from_numpy(logits), plan, counts=counts, seen=seen)
    assert math.isclose(float(probs.sum()), 1.0, abs_tol=1e-9)
    drawn = {host.sample(logits).token_id for _ in range(60)}
    # The host works in float32: a token at the very edge may fall on either side.
    assert all(probs[token] > 0 for token in drawn) or float(probs[probs > 0].min()) < 0.02


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        (DevicePlan(SamplingParams(), 0), "max_new_tokens is 0"),
        (DevicePlan(SamplingParams(), 9), "1 to 8"),
        (DevicePlan(SamplingParams(), 1, stop_token_ids=tuple(range(33))), "33 stop tokens"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan: DevicePlan, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        DeviceSampler(16, 8, torch.device("cpu")).begin(plan)
