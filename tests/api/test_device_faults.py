"""A GPU that fails, over HTTP: what clients are told, and who answers then."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

pytest.importorskip("torch")

from albor_serve.api.completion import ServedModel
from albor_serve.errors import (
    BackendError,
    ConfigError,
    DeviceLostError,
    DeviceMemoryError,
)
from albor_serve.loader import FallbackChoice, LoadOptions, load_model
from tests import fake_gpu
from tests.api.live import Live, serving, tiny_gguf
from tests.fake_gpu import Faults

URL = "/v1/completions"
Serve = Callable[[FallbackChoice], Live]
FAULTS = [
    ("extend", "lost"),
    ("decode", "lost"),
    ("extend", "memory"),
    ("decode", "memory"),
    ("extend", "launch"),
    ("decode", "launch"),
]
CODES = {"lost": "device_lost", "memory": "device_out_of_memory", "launch": "device_error"}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("model"))


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    return fake_gpu.install(monkeypatch)


@pytest.fixture
def serve(gguf: Path, faults: Faults) -> Iterator[Serve]:
    with ExitStack() as servers:

        def start(fallback: FallbackChoice) -> Live:
            options = LoadOptions(num_slots=3, backend="cuda", fallback=fallback)
            loaded = load_model(gguf, options)
            servers.callback(loaded.engine.close)
            loaded.engine.start()
            return servers.enter_context(
                serving(ServedModel("tiny", loaded.engine, loaded.template))
            )

        yield start


def body(word: str = "def f", num: int = 24, **extra: object) -> dict[str, object]:
    return {
        "prompt": f"{word}(x):\n    return", "max_tokens": num, "temperature": 0,
        "ignore_eos": True, **extra,
    }  # fmt: skip


def ask(live: Live, **fields: object) -> httpx.Response:
    return httpx.post(live.url + URL, json=body(**fields), timeout=30)  # type: ignore[arg-type]


def text(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def is_idle(live: Live) -> bool:
    stats = live.engine.stats()
    return not (stats.num_running or stats.num_waiting or any(s.is_busy for s in stats.slots))


@pytest.mark.parametrize(("where", "kind"), FAULTS)
def test_without_a_fallback_the_answer_is_503_and_says_why(
    serve: Serve, faults: Faults, where: str, kind: str
) -> None:
    live = serve("none")
    want = text(ask(live))
    faults.arm(where, kind, after=3 if where == "decode" else 0)
    failed = ask(live, word="class g")
    assert failed.status_code == 503
    assert failed.json()["error"]["code"] == CODES[kind]
    assert "--" in failed.json()["error"]["message"], "no remedy"
    assert is_idle(live)
    later, health = ask(live), httpx.get(live.url + "/health")
    if kind == "lost":
        for answer in (later, health):
            assert answer.status_code == 503
            assert answer.json()["error"] == failed.json()["error"]
        assert "illegal memory access" in later.text
    else:
        assert text(later) == want
        assert health.json()["status"] == "ok"
        assert "degraded" not in health.json()
    assert is_idle(live)


@pytest.mark.parametrize(("where", "kind"), FAULTS)
def test_with_a_fallback_every_request_gets_its_whole_answer(
    serve: Serve, faults: Faults, caplog: pytest.LogCaptureFixture, where: str, kind: str
) -> None:
    live = serve("cpu")
    words = ["def f", "class g", "import h", "def f", "while x"]
    want = {word: text(ask(live, word=word)) for word in words}
    assert live.engine.backend.info.name == "cuda"
    first = faults.backends[0]
    faults.arm(where, kind, after=3 if where == "decode" else 2)
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(5) as pool:
        # A request alone decodes on the device, several at once do not.
        if where == "decode":
            assert text(ask(live, word="class g")) == want["class g"]
        answers = pool.map(lambda word: (word, ask(live, word=word)), words)
        assert {word: text(answer) for word, answer in answers} == want
    assert faults.num_raised == 1
    assert live.engine.backend is not first
    with pytest.raises(BackendError):
        first.extend([])
    lines = [record.getMessage() for record in caplog.records if "albor" in record.name]
    assert len(lines) == 1
    assert "the CPU computes from now on" in lines[0]
    health = httpx.get(live.url + "/health")
    assert health.status_code == 200
    assert health.json()["degraded"] in lines[0]
    assert text(ask(live)) == want["def f"]
    assert is_idle(live)
    assert live.engine.stats().num_failed == 0


@pytest.mark.parametrize("fallback", ["none", "cpu"])
def test_a_stream_that_has_begun_ends_with_the_reason_or_goes_on(
    serve: Serve, faults: Faults, fallback: FallbackChoice
) -> None:
    live = serve(fallback)
    want = text(ask(live))
    faults.arm("decode", "lost", after=5)
    faults.s_per_token = 0.02  # the first tokens are on their way when it happens
    shown, codes = "", []
    request = body(stream=True)
    with httpx.stream("POST", live.url + URL, json=request, timeout=30) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            data = line.removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                codes.append(event["error"]["code"])
            else:
                shown += event["choices"][0]["text"]
    assert faults.num_raised == 1
    if fallback == "cpu":
        assert (shown, codes) == (want, [])
    else:
        assert codes == ["device_lost"]
        assert want.startswith(shown)
        assert shown
    assert is_idle(live)


def test_log_probabilities_are_whole_and_single_after_a_fallback(
    serve: Serve, faults: Faults
) -> None:
    live = serve("cpu")
    fields = {"echo": True, "logprobs": 2, "num": 4}
    want = ask(live, **fields).json()["choices"][0]["logprobs"]
    faults.arm("extend", "lost", after=2)
    got = ask(live, **fields).json()["choices"][0]["logprobs"]
    assert faults.num_raised == 1
    assert got["tokens"] == want["tokens"]
    assert got["token_logprobs"][1:] == pytest.approx(want["token_logprobs"][1:])


@pytest.mark.parametrize(("kind", "error"), [("lost", DeviceLostError),
                                             ("memory", DeviceMemoryError)])  # fmt: skip
def test_a_fault_at_the_start_ends_it_or_leaves_it_to_the_cpu(
    serve: Serve, faults: Faults, caplog: pytest.LogCaptureFixture, kind: str,
    error: type[Exception],
) -> None:  # fmt: skip
    faults.arm("start", kind)
    with pytest.raises(error):
        serve("none")
    faults.is_lost = False
    faults.arm("start", kind)
    with caplog.at_level(logging.WARNING):
        live = serve("cpu")
    assert live.engine.backend.info.name != "cuda"
    assert [r.getMessage()[:17] for r in caplog.records] == ["the CPU computes,"]
    assert text(ask(live))
    assert "GPU" in httpx.get(live.url + "/health").json()["degraded"]


def test_a_fault_while_the_speed_is_measured_counts_too(serve: Serve, faults: Faults) -> None:
    faults.arm("extend", "lost")
    assert ask(serve("none")).json()["error"]["code"] == "device_lost"
    faults.is_lost = False
    faults.arm("extend", "lost")
    assert text(ask(serve("cpu")))


def test_a_gpu_that_is_not_there_is_a_setting_that_cannot_work(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from albor_serve.backends import cuda

    monkeypatch.setattr(cuda, "unsupported", lambda checkpoint: "torch sees no CUDA GPU")
    with pytest.raises(ConfigError, match="torch sees no CUDA GPU; leave out --backend cuda"):
        load_model(gguf, LoadOptions(backend="cuda"))
    loaded = load_model(gguf, LoadOptions(backend="cuda", fallback="cpu"))
    loaded.engine.start()
    degraded = loaded.engine.stats().degraded
    loaded.engine.close()
    assert degraded is not None
    assert "torch sees no CUDA GPU" in degraded


def test_a_cpu_that_cannot_take_over_leaves_the_reason(
    serve: Serve, faults: Faults, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    live = serve("cpu")

    def fails(*_: object, **__: object) -> None:
        raise BackendError("no memory for it")

    monkeypatch.setattr("albor_serve.loader.open_backend", fails)
    faults.arm("extend", "lost")
    assert ask(live).json()["error"]["code"] == "device_lost"
    assert "can't take over: no memory for it" in caplog.text
    assert httpx.get(live.url + "/health").status_code == 503
    assert is_idle(live)
