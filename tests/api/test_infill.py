"""llama.cpp's /infill and /completion: the requests of real plugins, and every field's rule."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from albor_serve.config import EngineConfig
from tests.api.live import Live, serving_backend
from tests.fakes import ByteTokenizer, HashBackend

SECRET = "hunter2-Zebra"


def llama_vim(**changes: Any) -> dict[str, Any]:
    """What llama.vim sends for a suggestion, field by field."""
    return {
        "id_slot": 0,
        "input_prefix": "import os\n\ndef f(path):\n",
        "input_suffix": "\n\nprint(f('.'))\n",
        "input_extra": [
            {"text": "def g(x):\n    return x\n", "time": [1, 2], "filename": "g.py"},
            {"text": "Y = 2\n", "time": [3, 4], "filename": ""},
        ],
        "prompt": "    return ",
        "n_predict": 12,
        "stop": [],
        "n_indent": 4,
        "top_k": 40,
        "top_p": 0.90,
        "samplers": ["top_k", "top_p", "infill"],
        "stream": False,
        "cache_prompt": True,
        "t_max_prompt_ms": 500,
        "t_max_predict_ms": 250,
        "model": "",  # sent even where none was chosen
        "response_fields": [
            "content",
            "timings/prompt_n",
            "timings/prompt_ms",
            "timings/prompt_per_token_ms",
            "timings/prompt_per_second",
            "timings/predicted_n",
            "timings/predicted_ms",
            "timings/predicted_per_token_ms",
            "timings/predicted_per_second",
            "truncated",
            "tokens_cached",
        ],
        **changes,
    }


def llama_vscode(**changes: Any) -> dict[str, Any]:
    """What llama.vscode sends."""
    body = llama_vim(top_p=0.99, t_max_predict_ms=500, n_cmpl=3, lora=[{"id": 0, "scale": 0.5}])
    del body["response_fields"], body["stop"]
    return {**body, **changes}


def ask(http: httpx.Client, body: dict[str, Any], path: str = "/infill") -> Any:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_llama_vim_gets_the_flat_fields_it_reads(http: httpx.Client) -> None:
    body = llama_vim()
    response = http.post("/infill", json=body)
    assert list(response.json()) == body["response_fields"]
    # The plugin looks at the raw text before it parses it.
    assert response.text.startswith("{")
    assert '"content":"' in response.text
    assert "\n" not in response.text
    answer = response.json()
    assert answer["timings/predicted_n"] <= 12
    assert answer["truncated"] is False
    assert answer["tokens_cached"] > 0


def test_llama_vims_ring_update_fills_the_cache_and_answers_nothing(
    live: Live, http: httpx.Client
) -> None:
    text = "class Unseen:\n    pass\n" * 3
    extra = [{"text": text, "time": [0, 0], "filename": "u.py"}]
    warm = {
        "id_slot": 0,
        "input_prefix": "",
        "input_suffix": "",
        "input_extra": extra,
        "prompt": "",
        "n_predict": 0,
        "temperature": 0.0,
        "samplers": [],
        "stream": False,
        "cache_prompt": True,
        "t_max_prompt_ms": 1,
        "t_max_predict_ms": 1,
        "response_fields": [""],
    }
    assert ask(http, warm) == {}
    after = ask(http, llama_vim(input_extra=extra, response_fields=[], t_max_prompt_ms=0))
    assert after["timings"]["cache_n"] >= len(live.engine.tokenizer.encode(text)) // 2


def test_llama_vscode_gets_a_list_with_the_parts_its_status_bar_reads(http: httpx.Client) -> None:
    answers = ask(http, llama_vscode())
    assert [answer["index"] for answer in answers] == [0, 1, 2]
    for answer in answers:
        assert isinstance(answer["content"], str)
        assert answer["generation_settings"]["n_ctx"] == 256
        assert answer["tokens_cached"] > 0
        for name in ("prompt_n", "prompt_ms", "prompt_per_second", "predicted_n", "predicted_ms"):
            assert answer["timings"][name] >= 0
    # The first takes the likeliest tokens, so that it is the same each time.
    assert ask(http, llama_vscode(n_cmpl=1))["content"] == answers[0]["content"]


def test_infill_is_the_openai_route_with_a_suffix(http: httpx.Client) -> None:
    body = llama_vim(input_extra=[], temperature=0, n_indent=0, t_max_prompt_ms=0)
    infilled = ask(http, {**body, "t_max_predict_ms": 0})["content"]
    prompt = body["input_prefix"] + body["prompt"]
    same = {"prompt": prompt, "suffix": body["input_suffix"], "max_tokens": 12, "temperature": 0}
    assert infilled == ask(http, same, "/v1/completions")["choices"][0]["text"]


def test_timings_add_up(http: httpx.Client) -> None:
    body = llama_vim(response_fields=[], t_max_prompt_ms=0)
    for _ in range(2):
        answer = ask(http, body)
        timings = answer["timings"]
        assert timings["cache_n"] + timings["prompt_n"] == answer["tokens_evaluated"]
        assert timings["predicted_n"] == answer["tokens_predicted"]
    assert timings["prompt_n"] == 1


def test_streamed_text_is_the_whole_text(http: httpx.Client) -> None:
    body = llama_vim(response_fields=[], temperature=0)
    whole = ask(http, body)
    with http.stream("POST", "/infill", json={**body, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "".join(event["content"] for event in events) == whole["content"]
    assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]
    assert events[-1]["content"] == ""
    assert events[-1]["timings"]["predicted_n"] == whole["timings"]["predicted_n"]


def test_a_window_that_is_too_large_is_cut_and_said_so(http: httpx.Client) -> None:
    body = llama_vim(input_prefix="x = 1\n" * 400, response_fields=["content", "truncated"])
    assert ask(http, body)["truncated"] is True


def test_why_an_answer_ended_is_told(live: Live, http: httpx.Client) -> None:
    plain = llama_vim(
        response_fields=[], temperature=0, n_indent=0, t_max_predict_ms=0, input_extra=[]
    )
    whole = ask(http, plain)
    assert (whole["stop_type"], whole["stopping_word"]) == ("limit", "")
    word = whole["content"][3:5]
    stopped = ask(http, {**plain, "stop": [word]})
    assert (stopped["stop_type"], stopped["stopping_word"]) == ("word", word)
    assert stopped["content"] == whole["content"][: whole["content"].index(word)]
    end = next(iter(live.engine.tokenizer.eos_token_ids))
    ended = ask(http, {"prompt": "a", "logit_bias": [[end, 100]]}, "/completion")
    assert (ended["stop_type"], ended["content"]) == ("eos", "")


def test_probabilities_and_tokens(live: Live, http: httpx.Client) -> None:
    body = llama_vim(response_fields=[], temperature=0, n_probs=3, return_tokens=True, n_predict=4)
    answer = ask(http, body)
    tokens = answer["completion_probabilities"]
    assert [token["id"] for token in tokens] == answer["tokens"]
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode() == answer["content"]
    for token in tokens:
        assert len(token["top_logprobs"]) == 3
        assert all(top["logprob"] <= 0 for top in token["top_logprobs"])


def test_biases_name_tokens_by_id_or_text(live: Live, http: httpx.Client) -> None:
    body = {"prompt": "def f(", "temperature": 0, "n_predict": 3}
    for bias in ([["x", 100]], [[live.engine.tokenizer.encode("x")[0], 100]], {"x": 100}):
        assert ask(http, {**body, "logit_bias": bias}, "/completion")["content"] == "xxx"
    never = {**body, "logit_bias": [["x", 30], ["x", False]]}
    assert "xxx" not in ask(http, never, "/completion")["content"]


def test_alborsown_fields_work_here_too(http: httpx.Client) -> None:
    answer = ask(http, llama_vim(response_fields=[], albor={"session": "a", "stop_scope": "line"}))
    assert answer["content"].count("\n") <= 1
    assert set(answer["albor"]) == {"timings", "fim", "confidence", "stopped_by"}


def test_samplers_decide_which_filters_count(http: httpx.Client) -> None:
    plain = {"prompt": "def f(", "n_predict": 8, "seed": 7}
    settings = ask(http, plain, "/completion")["generation_settings"]
    assert (settings["temperature"], settings["top_k"], settings["top_p"]) == (0.8, 40, 0.95)
    some = ask(http, {**plain, "samplers": ["min_p", "xtc"]}, "/completion")
    settings = some["generation_settings"]
    assert (settings["temperature"], settings["top_k"], settings["min_p"]) == (1.0, 0, 0.05)
    letters = ask(http, {**plain, "samplers": "kt?"}, "/completion")["generation_settings"]
    assert (letters["temperature"], letters["top_k"], letters["top_p"]) == (0.8, 40, 1.0)


def test_completion_takes_every_form_of_prompt(live: Live, http: httpx.Client) -> None:
    def content(prompt: Any) -> Any:
        body = {"prompt": prompt, "n_predict": 5, "temperature": 0}
        answer = ask(http, body, "/completions")
        return answer["content"] if isinstance(answer, dict) else [a["content"] for a in answer]

    encode = live.engine.tokenizer.encode
    text = "def f(x):\n"
    alone = content(text)
    assert content(encode(text)) == alone
    assert content({"prompt_string": text}) == alone
    assert content([*encode("def f("), "x):\n"]) == alone
    assert content([text]) == alone
    assert content([text, encode("import a"), [text]]) == [alone, content("import a"), alone]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input_prefix": None}, "input_prefix"),
        ({"input_suffix": 5}, "input_suffix"),
        ({"prompt": [SECRET]}, "prompt"),
        ({"input_extra": SECRET}, "input_extra"),
        ({"input_extra": [SECRET]}, "input_extra"),
        ({"input_extra": [{"filename": SECRET}]}, "input_extra.text"),
        ({"input_extra": [{"text": 5}]}, "input_extra.text"),
        ({"input_extra": [{"text": SECRET * 25_000}]}, "input_extra.text"),
        ({"input_extra": [{"text": "", "filename": "a" * 1025}]}, "input_extra.filename"),
        ({"input_extra": [{"text": "a"}] * 65}, "input_extra"),
        ({"n_predict": -2}, "n_predict"),
        ({"n_predict": 1 << 21}, "n_predict"),
        ({"max_tokens": SECRET}, "max_tokens"),
        ({"n_cmpl": 0}, "n_cmpl"),
        ({"n_cmpl": 17}, "n_cmpl"),
        ({"temperature": -1}, "temperature"),
        ({"top_k": -2}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"repeat_penalty": 0}, "repeat_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"samplers": [SECRET] * 33}, "samplers"),
        ({"samplers": [5]}, "samplers"),
        ({"samplers": "k" * 129}, "samplers"),
        ({"seed": -2}, "seed"),
        ({"seed": 1 << 64}, "seed"),
        ({"stop": [SECRET] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"ignore_eos": SECRET}, "ignore_eos"),
        ({"logit_bias": SECRET}, "logit_bias"),
        ({"logit_bias": [[SECRET, SECRET]]}, "logit_bias"),
        ({"logit_bias": [[SECRET]]}, "logit_bias"),
        ({"logit_bias": [[5, 101]]}, "logit_bias"),
        ({"logit_bias": [[5, True]]}, "logit_bias"),
        ({"logit_bias": [["", 1]]}, "logit_bias"),
        ({"logit_bias": [[512, 1]]}, "logit_bias"),
        ({"logit_bias": [[SECRET * 10, 1]]}, "logit_bias"),
        ({"logit_bias": [[5, 1]] * 301}, "logit_bias"),
        ({"n_probs": 21}, "n_probs"),
        ({"stream": 1}, "stream"),
        ({"cache_prompt": SECRET}, "cache_prompt"),
        ({"id_slot": -2}, "id_slot"),
        ({"return_tokens": 1}, "return_tokens"),
        ({"timings_per_token": 1}, "timings_per_token"),
        ({"n_indent": -1}, "n_indent"),
        ({"n_indent": 1025}, "n_indent"),
        ({"t_max_predict_ms": -1}, "t_max_predict_ms"),
        ({"t_max_prompt_ms": SECRET}, "t_max_prompt_ms"),
        ({"t_max_prompt_ms": 1e9}, "t_max_prompt_ms"),
        ({"response_fields": [SECRET] * 65}, "response_fields"),
        ({"response_fields": ["a" * 129]}, "response_fields"),
        ({"response_fields": [5]}, "response_fields"),
        ({"albor": {"session": ""}}, "albor.session"),
    ],
)
def test_a_wrong_field_is_named(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    response = http.post("/infill", json=llama_vim(**body))
    assert response.status_code == 400, response.text
    assert SECRET not in response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        [],
        [[]],
        [""],
        [SECRET, [SECRET, True]],
        {"prompt_string": 5},
        {SECRET: "a"},
        5,
        None,
        ["a"] * 17,
        [-1],
        [512],
        [{"prompt_string": "a", "multimodal_data": [SECRET]}],
    ],
)
def test_a_wrong_prompt_is_named(http: httpx.Client, prompt: Any) -> None:
    response = http.post("/completion", json={"prompt": prompt})
    assert response.status_code == 400, response.text
    assert SECRET not in response.text
    assert response.json()["error"]["param"] == "prompt"


def test_missing_fields_and_models(http: httpx.Client) -> None:
    for body in ({}, {"input_prefix": "a"}, {"input_suffix": "a"}):
        assert http.post("/infill", json=body).status_code == 400
    assert http.post("/completion", json={}).status_code == 400
    assert http.post("/infill", json=llama_vim(model=SECRET)).status_code == 404


def test_tokenize_and_back(live: Live, http: httpx.Client) -> None:
    encode = live.engine.tokenizer.encode
    for text in ("def f(é):\n    pass", "", "<|fim_prefix|>a", "x = 1\n" * 3000):
        ids = ask(http, {"content": text}, "/tokenize")["tokens"]
        assert ids == encode(text, parse_special=True)
        plain = ask(http, {"content": text, "parse_special": False}, "/tokenize")["tokens"]
        assert plain == encode(text)
        assert ask(http, {"tokens": plain}, "/detokenize")["content"] == text
    pieces = ask(http, {"content": "é変", "with_pieces": True}, "/tokenize")["tokens"]
    got = [p["piece"] if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces]
    assert b"".join(p.encode() if isinstance(p, str) else p for p in got).decode() == "é変"
    for path, body in (
        ("/tokenize", {}),
        ("/tokenize", {"content": 5}),
        ("/tokenize", {"content": "a", "with_pieces": SECRET}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": [SECRET]}),
        ("/detokenize", {"tokens": [512]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [1 << 80]}),
    ):
        response = http.post(path, json=body)
        assert response.status_code == 400
        assert SECRET not in response.text


def test_props_and_slots(http: httpx.Client) -> None:
    props = http.get("/props").json()
    assert props["default_generation_settings"]["n_ctx"] == 256
    assert props["total_slots"] == 4
    assert "/" not in props["model_path"]
    slots = http.get("/slots").json()
    assert [slot["id"] for slot in slots] == [0, 1, 2, 3]
    assert not any(slot["is_processing"] for slot in slots)
    assert http.get("/slots?fail_on_no_slot=1").status_code == 200


TOKENIZER = ByteTokenizer()


@pytest.fixture
def slow() -> Iterator[tuple[HashBackend, httpx.Client]]:
    backend = HashBackend(TOKENIZER.vocab_size, num_slots=1, max_seq_len=4096, ms_per_token=1.0)
    config = EngineConfig(num_slots=1, max_seq_len=4096, prefill_chunk_len=64)
    with (
        serving_backend(backend, TOKENIZER, config) as live,
        httpx.Client(base_url=live.url, timeout=60) as http,
    ):
        yield backend, http


def test_the_time_to_predict_counts_once_there_is_a_line(
    slow: tuple[HashBackend, httpx.Client],
) -> None:
    _, http = slow
    body = {"prompt": "a", "n_predict": 600, "temperature": 0, "ignore_eos": True, "stop": []}
    line_end = TOKENIZER.encode("\n")[0]
    never = [[i, False] for i in (line_end, *TOKENIZER.encode("\n\n"))]
    timed = {**body, "t_max_predict_ms": 30}
    without = ask(http, {**timed, "logit_bias": never}, "/completion")
    assert without["tokens_predicted"] == 600
    soon = ask(http, {**timed, "logit_bias": [[line_end, 3.0]]}, "/completion")
    assert soon["has_new_line"]
    assert soon["tokens_predicted"] < 300
    assert soon["stop_type"] == "limit"


def test_the_time_for_the_prompt_is_kept(slow: tuple[HashBackend, httpx.Client]) -> None:
    """1 ms a token: 100 ms hold about 100 tokens of the 3,000."""
    _, http = slow
    body = llama_vim(input_prefix="x = 1\n" * 500, input_extra=[], response_fields=[])
    # A first request teaches the engine how fast it is.
    ask(http, {**body, "input_prefix": "y = 2\n" * 50, "t_max_prompt_ms": 0})
    began = time.monotonic()
    answer = ask(http, {**body, "n_predict": 1, "t_max_prompt_ms": 100})
    assert time.monotonic() - began < 1.5
    assert answer["truncated"] is True
    assert answer["timings"]["prompt_n"] < 200


def test_a_warm_up_gives_way_to_whoever_types(slow: tuple[HashBackend, httpx.Client]) -> None:
    backend, http = slow
    warm = llama_vim(n_predict=0, input_prefix="w = 3\n" * 600, t_max_prompt_ms=1)
    thread = threading.Thread(target=http.post, args=("/infill",), kwargs={"json": warm})
    thread.start()
    while not backend.calls:
        time.sleep(0.005)
    [slot] = http.get("/slots").json()
    assert slot["is_processing"]
    assert http.get("/slots?fail_on_no_slot=1").status_code == 503
    thread.join()


def test_lines_with_too_little_indentation_end_the_answer(
    slow: tuple[HashBackend, httpx.Client],
) -> None:
    _, http = slow
    likely = [[i, 2.0] for i in (TOKENIZER.encode("\n")[0], TOKENIZER.encode("    ")[0])]
    body = {"prompt": "a", "n_predict": 300, "temperature": 0.8, "seed": 1, "logit_bias": likely}
    whole = ask(http, body, "/completion")["content"]
    cut = ask(http, {**body, "n_indent": 4}, "/completion")
    assert cut["stop_type"] == "word"
    assert whole.startswith(cut["content"])
    lines = cut["content"].split("\n")[1:]
    assert all(not line.strip() or line.startswith("    ") for line in lines)
