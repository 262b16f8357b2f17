"""The "albor" object on requests and answers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from albor_serve.api.completion import Completion, CompletionSpec, Job, ServedModel, plan_jobs
from albor_serve.api.schemas import AlborOptions
from albor_serve.backends.base import Backend
from albor_serve.config import EngineConfig, SamplingParams
from albor_serve.engine import Engine
from albor_serve.fim import TEMPLATES
from tests.api.live import serving_tiny
from tests.fakes import ByteTokenizer, HashBackend, LinearCosts

URL = "/v1/completions"
CODE = {"prompt": "def f(x):\n    re", "suffix": "\n\nf(1)\n", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with (
        serving_tiny(tmp_path_factory.mktemp("model")) as live,
        httpx.Client(base_url=live.url, timeout=60) as client,
    ):
        yield client


def ask(http: httpx.Client, **albor: Any) -> dict[str, Any]:
    response = http.post(URL, json={**CODE, "albor": albor})
    assert response.status_code == 200, response.text
    return response.json()


def test_answers_tell_times_counts_and_what_was_left_out(http: httpx.Client) -> None:
    body = ask(http)
    timings = body["albor"]["timings"]
    assert timings["total_ms"] >= timings["first_token_ms"] > 0
    assert timings["num_prompt_tokens"] == body["usage"]["prompt_tokens"]
    assert timings["num_new_tokens"] == body["usage"]["completion_tokens"]
    assert set(timings) == {
        *("queue_ms", "prefill_ms", "first_token_ms", "decode_ms", "total_ms"),
        *("num_prompt_tokens", "num_cached_tokens", "num_new_tokens"),
        *("num_draft_tokens", "num_accepted"),
    }
    dropped = {"num_prefix_dropped": 0, "num_suffix_dropped": 0, "num_context_dropped": 0}
    assert body["albor"]["fim"] == dropped
    choice = body["choices"][0]["albor"]
    assert 0 < choice["confidence"] < 1
    assert choice["stopped_by"] is None
    assert body["choices"][0]["logprobs"] is None


def test_a_client_that_does_not_ask_gets_openais_fields_alone(http: httpx.Client) -> None:
    body = http.post(URL, json=CODE).json()
    assert "albor" not in body
    assert "albor" not in body["choices"][0]


def test_a_stream_ends_with_the_same_fields(http: httpx.Client) -> None:
    body = {**CODE, "stream": True, "n": 2, "albor": {}}
    with http.stream("POST", URL, json=body) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    chunks = [json.loads(line) for line in lines[:-1]]
    ends = [c for c in chunks if c["choices"][0]["finish_reason"]]
    assert len(ends) == 2
    assert ["albor" in chunk for chunk in ends] == [False, True]
    assert all("confidence" in chunk["choices"][0]["albor"] for chunk in ends)
    assert not any("albor" in chunk for chunk in chunks if chunk not in ends)
    assert ends[-1]["albor"]["timings"]["num_new_tokens"] > 0


def test_a_hopeless_answer_is_empty(http: httpx.Client) -> None:
    body = ask(http, min_confidence=1.0)
    assert body["choices"][0]["text"] == ""
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["albor"] == {"confidence": None, "stopped_by": "confidence"}


def test_a_line_stays_a_line(http: httpx.Client) -> None:
    for seed in range(5):
        body = {**CODE, "temperature": 1.5, "seed": seed, "max_tokens": 40}
        whole = http.post(URL, json=body).json()["choices"][0]["text"]
        body["albor"] = {"stop_scope": "line", "path": "a.py"}
        line = http.post(URL, json=body).json()["choices"][0]["text"]
        assert whole.startswith(line)
        assert "\n" not in line.strip("\n")


def test_typed_ahead_text_is_where_the_answer_begins(http: httpx.Client) -> None:
    ahead = ask(http, typed_ahead="turn x")["choices"][0]["text"]
    typed = {**CODE, "prompt": CODE["prompt"] + "turn x"}
    assert http.post(URL, json=typed).json()["choices"][0]["text"] == ahead
    plain = {"prompt": "abc", "max_tokens": 4, "albor": {"typed_ahead": "de"}}
    assert http.post(URL, json=plain).status_code == 200


def test_a_draft_of_the_answer_does_not_change_it(http: httpx.Client) -> None:
    want = ask(http)["choices"][0]["text"]
    assert ask(http, drafts=[want])["choices"][0]["text"] == want
    assert ask(http, drafts=[want[:3] + "zzz", ""])["choices"][0]["text"] == want


@pytest.mark.parametrize(
    ("albor", "field"),
    [
        ({"stop_scope": "file"}, "albor.stop_scope"),
        ({"min_confidence": 1.1}, "albor.min_confidence"),
        ({"min_confidence": "high"}, "albor.min_confidence"),
        ({"path": ""}, "albor.path"),
        ({"path": "a" * 1025}, "albor.path"),
        ({"extra_context": [{"path": "a"}]}, "albor.extra_context.text"),
        ({"extra_context": [{"path": "a", "text": "b"}] * 65}, "albor.extra_context"),
        ({"extra_context": [{"path": "a", "text": "b" * 262_145}]}, "albor.extra_context.text"),
        ({"drafts": ["a"] * 9}, "albor.drafts"),
        ({"drafts": ["a" * 8193]}, "albor.drafts"),
        ({"typed_ahead": "a" * 1025}, "albor.typed_ahead"),
        ({"first_token_budget_ms": 0}, "albor.first_token_budget_ms"),
        ({"supersede": "no"}, "albor.supersede"),
    ],
)
def test_limits_are_named(http: httpx.Client, albor: dict[str, Any], field: str) -> None:
    response = http.post(URL, json={**CODE, "albor": albor})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
    assert "aaaa" not in response.text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "a", "albor": {"first_token_budget_ms": 5}}, "first_token_budget_ms"),
        (
            {"prompt": "a", "albor": {"extra_context": [{"path": "a", "text": "b"}]}},
            "extra_context",
        ),
        ({"prompt": [5, 6], "albor": {"typed_ahead": "b"}}, "typed_ahead"),
        ({"prompt": "a", "echo": True, "albor": {"typed_ahead": "b"}}, "typed_ahead"),
    ],
)
def test_what_does_not_go_together_is_refused(
    http: httpx.Client, body: dict[str, Any], param: str
) -> None:
    response = http.post(URL, json={"max_tokens": 1, **body})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


PREFIX = "".join(f"line {i} of code\n" for i in range(60))


@pytest.fixture
def slow() -> Iterator[ServedModel]:
    """A model that computes one prompt token in one millisecond, as it says."""
    backend = HashBackend(ByteTokenizer().vocab_size, num_slots=3, max_seq_len=2048)
    engine = Engine(
        backend,
        ByteTokenizer(),
        EngineConfig(num_slots=3, max_seq_len=2048),
        lambda _: LinearCosts(prefill=1.0),
    )
    engine._note_prefill_speed = lambda *_: None  # type: ignore[method-assign]
    engine.start()
    yield ServedModel("slow", engine, TEMPLATES["albor"])
    engine.close()


def plan(served: ServedModel, prefix: str = PREFIX, **options: Any) -> Job:
    spec = CompletionSpec(
        (prefix,),
        2,
        SamplingParams(temperature=0.0),
        fim_suffix="\nafter\n",
        options=AlborOptions(**options),
    )
    return plan_jobs(served, spec)[0]


def run(served: ServedModel, job: Job) -> None:
    async def complete() -> None:
        await Completion(served.engine, [job]).wait()

    asyncio.run(complete())


def test_a_budget_decides_how_much_context_fits(slow: ServedModel) -> None:
    whole = plan(slow)
    assert whole.fim is not None
    assert whole.fim.is_whole
    cut = plan(slow, first_token_budget_ms=200)
    assert cut.fim is not None
    assert 100 < len(cut.request.prompt) <= 200
    assert PREFIX[cut.fim.num_prefix_dropped :].startswith("line ")
    assert cut.growth is None, "nobody would use it without a session"
    # Typing goes on in the same window, so its cache serves; only now and then it moves.
    num_cold = 0
    for num_typed in range(40):
        job = plan(slow, PREFIX + "x" * num_typed, first_token_budget_ms=200)
        num_cold += slow.engine.prefill_ms(job.request.prompt) > 30
        run(slow, job)
    assert num_cold <= 2


def test_the_very_first_request_keeps_its_time() -> None:
    def measure(_: Backend) -> LinearCosts:
        time.sleep(0.3)
        return LinearCosts(prefill=1.0)

    backend = HashBackend(ByteTokenizer().vocab_size, max_seq_len=2048)
    engine = Engine(backend, ByteTokenizer(), EngineConfig(max_seq_len=2048), measure)
    engine.start()
    try:
        served = ServedModel("slow", engine, TEMPLATES["albor"])
        assert len(plan(served, first_token_budget_ms=200).request.prompt) <= 200
    finally:
        engine.close()


def test_extra_files_are_left_out_before_code(slow: ServedModel) -> None:
    files = [{"path": f"{name}.py", "text": f"{name}\n" * 40} for name in "abc"]
    some = plan(slow, "x = 1\n", extra_context=files, first_token_budget_ms=200)
    assert some.fim is not None
    assert some.fim.num_context_dropped in (1, 2)
    assert not some.fim.num_prefix_dropped
    text = ByteTokenizer().decode(some.request.prompt).decode()
    assert "c.py" in text
    assert "a.py" not in text


def test_what_did_not_fit_is_computed_while_idle(slow: ServedModel) -> None:
    cut = plan(slow, first_token_budget_ms=200, session="s")
    assert cut.growth is not None
    run(slow, cut)
    whole = plan(slow)
    for _ in range(500):
        if slow.engine.prefill_ms(whole.request.prompt) == 0:
            break
        time.sleep(0.01)
    again = plan(slow, PREFIX + "x", first_token_budget_ms=200, session="s")
    assert again.fim is not None
    assert again.fim.is_whole
    assert again.growth is None
    run(slow, again)
