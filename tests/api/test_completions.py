"""/v1/completions over a real socket, with a real llama.cpp model of random weights."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.api.live import Live

URL = "/v1/completions"


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(http: httpx.Client, **body: Any) -> dict[str, Any]:
    body = {"prompt": "def f(x):\n", "max_tokens": 8, "temperature": 0, **body}
    response = http.post(URL, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def stream(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    body = {"prompt": "def f(x):\n", "max_tokens": 8, "temperature": 0, "stream": True, **body}
    with http.stream("POST", URL, json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == index)


def test_one_completion_has_openais_shape(http: httpx.Client) -> None:
    body = ask(http)
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["model"] == "albor-tiny"
    [choice] = body["choices"]
    assert set(choice) == {"index", "text", "logprobs", "finish_reason"}
    assert choice["finish_reason"] in ("stop", "length")
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_token_ids_are_the_same_prompt_as_their_text(live: Live, http: httpx.Client) -> None:
    ids = live.engine.tokenizer.encode("def f(x):\n")
    assert ask(http, prompt=ids)["choices"][0]["text"] == ask(http)["choices"][0]["text"]
    assert ask(http, prompt=ids)["usage"]["prompt_tokens"] == len(ids)


def test_several_prompts_keep_their_order_mixed_too(live: Live, http: httpx.Client) -> None:
    texts = ["import a", "class B:", "return"]
    alone = [ask(http, prompt=text)["choices"][0]["text"] for text in texts]
    mixed = [texts[0], live.engine.tokenizer.encode(texts[1]), texts[2]]
    for prompts in (texts, mixed):
        choices = ask(http, prompt=prompts)["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2]
        assert [choice["text"] for choice in choices] == alone


def test_streamed_text_is_the_whole_text(http: httpx.Client) -> None:
    whole = ask(http, max_tokens=20)
    chunks = stream(http, max_tokens=20)
    assert text_of(chunks) == whole["choices"][0]["text"]
    reasons = [c["choices"][0]["finish_reason"] for c in chunks]
    assert reasons[-1] == whole["choices"][0]["finish_reason"]
    assert not any(reasons[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)


def test_usage_comes_in_a_last_chunk_without_choices(http: httpx.Client) -> None:
    chunks = stream(http, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["id"] == chunks[0]["id"]
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_n_choices_with_seeds(http: httpx.Client) -> None:
    body = {"n": 3, "temperature": 1.0, "seed": 4, "max_tokens": 12}
    first, second = ask(http, **body), ask(http, **body)
    texts = [choice["text"] for choice in first["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert texts == [choice["text"] for choice in second["choices"]]
    assert len(set(texts)) > 1
    chunks = stream(http, **body)
    assert [text_of(chunks, index) for index in range(3)] == texts
    reasons = [c for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
    assert sorted(choice["index"] for choice in reasons) == [0, 1, 2]
    assert first["usage"]["prompt_tokens"] == ask(http)["usage"]["prompt_tokens"]


def test_best_of_returns_the_likeliest(http: httpx.Client) -> None:
    body = {"temperature": 1.5, "seed": 1, "max_tokens": 6}
    every = ask(http, n=6, logprobs=0, **body)["choices"]
    means = {
        choice["text"]: sum(choice["logprobs"]["token_logprobs"])
        / len(choice["logprobs"]["token_logprobs"])
        for choice in every
    }
    best = ask(http, n=1, best_of=6, **body)["choices"]
    assert len(best) == 1
    assert best[0]["text"] == max(means, key=means.__getitem__)
    assert best[0]["logprobs"] is None


def test_logprobs_in_the_legacy_shape(http: httpx.Client) -> None:
    choice = ask(http, logprobs=3)["choices"][0]
    logprobs = choice["logprobs"]
    lengths = {len(logprobs[key]) for key in logprobs}
    assert lengths == {8}
    assert "".join(logprobs["tokens"]) == choice["text"]
    for token, own, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert 3 <= len(top) <= 4
        assert top[token] == own == max(top.values())
        assert list(top.values()) == sorted(top.values(), reverse=True)
    assert logprobs["text_offset"][0] == 0
    assert all(
        len(top) == 1 for top in ask(http, logprobs=0)["choices"][0]["logprobs"]["top_logprobs"]
    )
    chunks = stream(http, logprobs=2)
    streamed = [c["logprobs"] for chunk in chunks for c in chunk["choices"] if c["logprobs"]]
    assert [t for part in streamed for t in part["tokens"]] == logprobs["tokens"]
    assert [o for part in streamed for o in part["text_offset"]] == logprobs["text_offset"]


def test_the_token_that_ends_an_answer_has_its_logprob(live: Live, http: httpx.Client) -> None:
    end = min(live.engine.tokenizer.eos_token_ids)
    prompt = live.engine.tokenizer.encode("def f(x):\n")
    body = {"prompt": prompt, "max_tokens": 1, "logit_bias": {str(end): 100}, "logprobs": 1}
    scored = ask(http, echo=True, **body)["choices"][0]
    assert scored["text"] == "def f(x):\n"
    assert scored["finish_reason"] == "stop"
    logprobs = scored["logprobs"]
    # One for each token of the prompt and one for what was sampled: harnesses cut the last off.
    assert {len(logprobs[key]) for key in logprobs} == {len(prompt) + 1}
    assert logprobs["tokens"][-1] == ""
    assert logprobs["text_offset"][-1] == len(scored["text"])
    assert logprobs["token_logprobs"][-1] < 0
    streamed = [c["logprobs"] for part in stream(http, **body) for c in part["choices"]]
    (only,) = [part for part in streamed if part]
    assert only["token_logprobs"] == pytest.approx(logprobs["token_logprobs"][-1:], abs=1e-3)


def test_echo_with_logprobs_scores_text(live: Live, http: httpx.Client) -> None:
    prompt = "def add(a, b):\n    return a"
    scored = ask(http, prompt=prompt, echo=True, logprobs=1, max_tokens=0)["choices"][0]
    assert scored["text"] == prompt
    logprobs = scored["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    assert len(logprobs["tokens"]) == len(live.engine.tokenizer.encode(prompt))
    assert "".join(logprobs["tokens"]) == prompt
    longer = ask(http, prompt=prompt, echo=True, logprobs=1)["choices"][0]
    assert longer["text"].startswith(prompt)
    assert longer["logprobs"]["token_logprobs"][:3] == logprobs["token_logprobs"][:3]
    assert len(longer["logprobs"]["tokens"]) == len(logprobs["tokens"]) + 8
    chunks = stream(http, prompt=prompt, echo=True, logprobs=1)
    assert text_of(chunks) == longer["text"]
    plain = stream(http, prompt=prompt, echo=True)
    assert text_of(plain) == longer["text"]


def test_stop_strings_cut_text_and_logprobs(http: httpx.Client) -> None:
    whole = ask(http, max_tokens=24)["choices"][0]["text"]
    stop = whole[5:8]
    cut = whole[: whole.index(stop)]
    for stops in (stop, [stop, "never"]):
        choice = ask(http, max_tokens=24, stop=stops, logprobs=0)["choices"][0]
        assert choice["text"] == cut
        assert choice["finish_reason"] == "stop"
        assert all(offset < len(cut) for offset in choice["logprobs"]["text_offset"])
    assert text_of(stream(http, max_tokens=24, stop=stop)) == cut


def test_logit_bias_and_penalties_reach_the_sampler(live: Live, http: httpx.Client) -> None:
    [token] = live.engine.tokenizer.encode("x")
    assert ask(http, logit_bias={str(token): 100})["choices"][0]["text"] == "x" * 8
    penalised = ask(
        http, logit_bias={str(token): 30}, frequency_penalty=2, presence_penalty=2, max_tokens=40
    )
    assert penalised["choices"][0]["text"].count("x") < 40


def test_a_warm_up_computes_the_prompt_only(http: httpx.Client) -> None:
    prompt = "class Warm:\n    def up(self):\n        pass\n"
    warm = ask(http, prompt=prompt, max_tokens=0)
    assert warm["choices"][0]["text"] == ""
    assert warm["usage"]["completion_tokens"] == 0
    after = ask(http, prompt=prompt)["usage"]
    assert after["prompt_tokens_details"]["cached_tokens"] == after["prompt_tokens"] - 1


def test_suffix_fills_in_and_heals_the_cursor(http: httpx.Client) -> None:
    choice = ask(http, prompt="x = [\n    1,\n    ", suffix="\n]\n", logprobs=0)["choices"][0]
    assert choice["logprobs"]["text_offset"][0] == 0
    ask(http, prompt="", suffix="b")
    ask(http, prompt="a", suffix="")


def test_healing_never_answers_with_more_tokens_than_asked(http: httpx.Client) -> None:
    for prompt in ("def foo(self):\n        ret", "x = some_na", "if a:\n    ", "y =  "):
        for max_tokens in (1, 2, 7):
            usage = ask(http, prompt=prompt, suffix="\n", max_tokens=max_tokens)["usage"]
            assert 0 < usage["completion_tokens"] <= max_tokens


def test_multibyte_text_survives_token_borders(live: Live, http: httpx.Client) -> None:
    for text in ("🙂", "é", "变量"):
        ids = live.engine.tokenizer.encode(text)
        assert len(ids) > 1
        biased = {str(ids[0]): 100}
        for streamed in (False, True):
            if streamed:
                got = text_of(stream(http, logit_bias=biased, max_tokens=3))
            else:
                got = ask(http, logit_bias=biased, max_tokens=3)["choices"][0]["text"]
            assert got.encode()  # no half character, no lone surrogate


def test_model_names(http: httpx.Client) -> None:
    for name in ("albor-tiny", "tiny", "default", "", None):
        assert ask(http, model=name)["model"] == "albor-tiny"
    names = [model["id"] for model in http.get("/v1/models").json()["data"]]
    assert names == ["albor-tiny", "tiny"]
    assert http.get("/v1/models/tiny").json()["id"] == "tiny"
    assert http.get("/v1/models/other").status_code == 404


def test_health_and_home(http: httpx.Client) -> None:
    assert http.get("/health").json()["status"] == "ok"
    assert http.head("/health").status_code == 200
    assert "albor-tiny" in http.get("/").text
    document = http.get("/openapi.json").json()
    schema = document["paths"][URL]["post"]["requestBody"]["content"]["application/json"]["schema"]
    name = schema["$ref"].removeprefix("#/components/schemas/")
    assert {"prompt", "suffix", "albor"} <= set(
        document["components"]["schemas"][name]["properties"]
    )


def test_the_openai_package_works(client: openai.OpenAI) -> None:
    whole = client.completions.create(
        model="albor-tiny", prompt="def f(x):\n", max_tokens=10, temperature=0, logprobs=2
    )
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 10
    streamed = client.completions.create(
        model="albor-tiny", prompt="def f(x):\n", max_tokens=10, temperature=0, stream=True
    )
    assert "".join(c.choices[0].text for c in streamed) == whole.choices[0].text
    filled = client.completions.create(
        model="albor-tiny",
        prompt="def f(",
        suffix="):\n    pass\n",
        max_tokens=4,
        extra_body={"albor": {"session": "editor", "deadline_ms": 5000}},
    )
    assert filled.choices[0].finish_reason in ("stop", "length")
    assert [model.id for model in client.models.list()] == ["albor-tiny", "tiny"]
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-9", prompt="a")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a" * 5000)
    assert caught.value.code == "context_length_exceeded"


def test_the_async_openai_package_works_side_by_side(live: Live) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
            answers = await asyncio.gather(
                *(
                    client.completions.create(
                        model="tiny", prompt=f"def f{i % 3}(x):\n", max_tokens=12, temperature=0
                    )
                    for i in range(9)
                )
            )
            return [answer.choices[0].text for answer in answers]

    texts = asyncio.run(run())
    assert texts[:3] == texts[3:6] == texts[6:]


def test_a_context_overflow_names_both_numbers(live: Live, http: httpx.Client) -> None:
    for body in ({"prompt": [5] * 300}, {"prompt": "x = 1\n" * 300, "suffix": "y"}):
        response = http.post(URL, json=body)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "256" in error["message"]
        assert error["max_seq_len"] == 256
        assert error["num_prompt_tokens"] >= 256


def test_a_converted_folder_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from albor_serve.loader import LoadOptions, load_model
    from tests.fixtures_tiny import save_hf_folder, tiny_model

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = save_hf_folder(tmp_path / "tiny-llama", *tiny_model("llama"))
    said: list[str] = []
    loaded = load_model(folder, LoadOptions(num_slots=1), lambda text, part: said.append(text))
    assert loaded.name == "tiny-llama"
    assert any(text.startswith("converting") for text in said)
    loaded.engine.close()
    said.clear()
    load_model(
        folder, LoadOptions(num_slots=1), lambda text, part: said.append(text)
    ).engine.close()
    assert not any(text.startswith("converting") for text in said)
