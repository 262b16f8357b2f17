"""Several models behind one live server: on demand, evicted, idle, failing."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from albor_serve.api.completion import ServedModel
from albor_serve.api.registry import ModelRegistry, ModelSource, RegistryLimits
from albor_serve.config import EngineConfig
from albor_serve.engine import Engine
from albor_serve.errors import CheckpointError, ConfigError
from albor_serve.fim import detect_template
from tests.api.live import serving_registry
from tests.fakes import ByteTokenizer, HashBackend


@dataclass
class Models:
    """Fake models that record what became of them."""

    ms_per_token: float = 0.0
    log: list[str] = field(default_factory=list)
    backends: dict[str, HashBackend] = field(default_factory=dict)
    failing: set[str] = field(default_factory=set)
    gates: dict[str, threading.Event] = field(default_factory=dict)

    def source(self, name: str, num_bytes: int = 1, aliases: tuple[str, ...] = ()) -> ModelSource:
        return ModelSource(name, lambda: self._load(name), aliases, lambda: num_bytes)

    def _load(self, name: str) -> ServedModel:
        self.log.append(f"load {name}")
        if name in self.gates:
            assert self.gates[name].wait(20)
        if name in self.failing:
            raise CheckpointError(f"there is no model at /secret/{name}")
        tokenizer = ByteTokenizer()
        backend = HashBackend(tokenizer.vocab_size, ms_per_token=self.ms_per_token)
        self.backends[name] = backend
        engine = Engine(backend, tokenizer, EngineConfig(num_slots=2, max_seq_len=256))
        engine.start()
        return ServedModel(name, engine, detect_template(tokenizer, "albor"))


def first(registry: ModelRegistry) -> ServedModel:
    """The default model, loaded by its caller as albor-serve does."""
    return registry.source(None).load()


@contextlib.contextmanager
def running(models: Models, names: str = "ab", **limits: Any) -> Iterator[tuple[str, Any]]:
    registry = ModelRegistry([models.source(name) for name in names], RegistryLimits(**limits))
    registry.adopt(first(registry))
    try:
        with serving_registry(registry) as url:
            yield url, registry
    finally:
        registry.close()


def ask(url: str, model: str | None = None, **more: Any) -> httpx.Response:
    body: dict[str, Any] = {"prompt": "x", "max_tokens": 2, "ignore_eos": True, **more}
    if model is not None:
        body["model"] = model
    return httpx.post(f"{url}/v1/completions", json=body, timeout=30)


def states(url: str) -> dict[str, str]:
    data = httpx.get(f"{url}/v1/models").json()["data"]
    return {entry["id"]: entry["status"]["value"] for entry in data}


def until(done: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def test_models_are_loaded_on_demand_and_named_in_answers() -> None:
    models = Models()
    with running(models, "abc") as (url, _):
        assert states(url) == {"a": "loaded", "b": "unloaded", "c": "unloaded"}
        assert ask(url).json()["model"] == "a"
        assert ask(url, "b").json()["model"] == "b"
        assert ask(url, "default").json()["model"] == "a"
        assert states(url) == {"a": "loaded", "b": "loaded", "c": "unloaded"}
        assert models.log == ["load a", "load b"]
        entry = httpx.get(f"{url}/v1/models/c").json()
        assert entry["meta"] is None
        assert httpx.get(f"{url}/v1/models/b").json()["meta"]["max_seq_len"] == 256


def test_an_unknown_model_is_404_with_the_names() -> None:
    with running(Models()) as (url, _):
        answer = ask(url, "zebra")
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert error["code"] == "model_not_found"
        assert "a, b" in error["message"]
        assert "zebra" not in error["message"]


def test_the_least_recently_used_makes_room() -> None:
    models = Models()
    with running(models, "abc", max_loaded=2) as (url, _):
        ask(url, "b")
        ask(url, "a")
        assert ask(url, "c").status_code == 200
        assert states(url) == {"a": "loaded", "b": "unloaded", "c": "loaded"}
        assert models.backends["b"].num_closed == 1
        assert ask(url, "b").status_code == 200
        assert states(url)["a"] == "unloaded"


def test_a_memory_budget_evicts_and_refuses_what_can_never_fit() -> None:
    models = Models()
    info = HashBackend(ByteTokenizer().vocab_size).info
    one = info.weight_bytes + info.kv_bytes_per_token * 2 * 256
    sources = [models.source("a", one), models.source("b", one), models.source("huge", 9 * one)]
    registry = ModelRegistry(sources, RegistryLimits(max_memory_bytes=one + one // 2))
    registry.adopt(first(registry))
    try:
        with serving_registry(registry) as url:
            assert ask(url, "b").status_code == 200
            assert states(url)["a"] == "unloaded"
            assert ask(url, "huge").status_code == 503
            assert states(url)["b"] == "loaded", "a hopeless load must evict nobody"
    finally:
        registry.close()


def test_a_running_answer_ends_before_its_model_goes() -> None:
    models = Models(ms_per_token=20.0)
    with running(models, max_loaded=1) as (url, _):
        answers: dict[str, httpx.Response] = {}

        def long() -> None:
            answers["a"] = ask(url, "a", max_tokens=40)

        thread = threading.Thread(target=long)
        thread.start()
        until(lambda: bool(models.backends["a"].calls))
        answers["b"] = ask(url, "b")
        thread.join()
        assert answers["a"].json()["usage"]["completion_tokens"] == 40
        assert answers["b"].json()["model"] == "b"
        assert models.backends["a"].num_closed == 1


def test_a_streamed_answer_keeps_its_model() -> None:
    models = Models(ms_per_token=20.0)
    with running(models, max_loaded=1) as (url, _):
        body = {"prompt": "x", "max_tokens": 30, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as stream:
            lines = stream.iter_lines()
            next(lines)
            thread = threading.Thread(target=ask, args=(url, "b"))
            thread.start()
            rest = [line for line in lines if line]
        thread.join()
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason": "length"' in rest[-2]


def test_a_model_that_never_gets_free_is_503_and_stays() -> None:
    models = Models(ms_per_token=20.0)
    with running(models, max_loaded=1, drain_s=0.1) as (url, _):
        thread = threading.Thread(target=ask, args=(url, "a"), kwargs={"max_tokens": 60})
        thread.start()
        until(lambda: bool(models.backends["a"].calls))
        answer = ask(url, "b")
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "queue_timeout"
        assert states(url) == {"a": "loaded", "b": "unloaded"}
        thread.join()
        assert ask(url, "b").status_code == 200


def test_a_load_stalls_no_other_model_and_happens_once() -> None:
    models = Models(gates={"b": threading.Event()})
    with running(models, max_loaded=2) as (url, _):
        waiting = [threading.Thread(target=ask, args=(url, "b")) for _ in range(12)]
        for thread in waiting:
            thread.start()
        until(lambda: "load b" in models.log)
        assert states(url)["b"] == "loading"
        assert ask(url, "a", prompt="y" * 9000).status_code == 400, "planned beside the loop"
        assert ask(url, "a").status_code == 200
        models.gates["b"].set()
        for thread in waiting:
            thread.join()
        assert models.log.count("load b") == 1


def test_a_failed_load_is_typed_names_no_path_and_poisons_nobody() -> None:
    models = Models(failing={"b"})
    with running(models) as (url, _):
        answer = ask(url, "b")
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "model_load_failed"
        assert "secret" not in answer.text
        assert states(url) == {"a": "loaded", "b": "failed"}
        assert ask(url, "a").status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200
        models.failing.clear()
        assert ask(url, "b").status_code == 200


def test_an_idle_model_sleeps_through_questions_and_wakes_on_demand() -> None:
    models = Models()
    with running(models, idle_unload_s=0.3) as (url, _):
        assert ask(url).status_code == 200
        until(lambda: states(url)["a"] == "unloaded")
        assert models.backends["a"].num_closed == 1
        assert httpx.get(f"{url}/health").json()["loaded"] == []
        assert httpx.get(f"{url}/props").json()["is_sleeping"] is True
        assert httpx.get(f"{url}/slots").json() == []
        metrics = httpx.get(f"{url}/metrics").text
        assert 'albor_model_loaded{model="a"} 0' in metrics
        assert 'albor_requests_total{model="a",outcome="finished"} 1' in metrics
        assert models.log == ["load a"], "none of these wakes it"
        assert ask(url).status_code == 200
        assert 'albor_model_loads_total{model="a"} 2' in httpx.get(f"{url}/metrics").text


def test_a_busy_model_is_not_idle_and_health_is_no_use() -> None:
    models = Models(ms_per_token=20.0)
    with running(models, idle_unload_s=0.2) as (url, _):
        assert ask(url, max_tokens=40).json()["usage"]["completion_tokens"] == 40
        for _ in range(100):
            assert httpx.get(f"{url}/health").status_code == 200
            if states(url)["a"] == "unloaded":
                break
            time.sleep(0.05)
        assert states(url)["a"] == "unloaded"


def test_props_and_slots_take_a_model() -> None:
    with running(Models()) as (url, _):
        assert httpx.get(f"{url}/props?model=a").json()["total_slots"] == 2
        assert httpx.get(f"{url}/props?model=b").json()["is_sleeping"] is True
        assert len(httpx.get(f"{url}/slots").json()) == 2
        assert httpx.get(f"{url}/slots?model=zebra").status_code == 404


def test_closing_ends_waiting_requests() -> None:
    models = Models(gates={"b": threading.Event()})
    with running(models, "abc") as (url, registry):
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda name=name: answers.append(ask(url, name)))  # type: ignore[misc]
            for name in "bc"
        ]
        for thread in threads:
            thread.start()
            time.sleep(0.2)
        registry.close()
        models.gates["b"].set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [503, 503]
        assert {answer.json()["error"]["code"] for answer in answers} == {"shutting_down"}
        assert models.backends["b"].num_closed == 1
        assert ask(url, "a").status_code == 503


def test_many_clients_over_few_places_lose_nothing() -> None:
    models = Models()
    with running(models, "abc", max_loaded=2) as (url, _):
        failed: list[str] = []

        def client(seed: int) -> None:
            for turn in range(8):
                name = "abc"[(seed + turn * (seed % 2 + 1)) % 3]
                answer = ask(url, name)
                if answer.status_code != 200 or answer.json()["model"] != name:
                    failed.append(answer.text)

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert sum(state == "loaded" for state in states(url).values()) == 2


@pytest.mark.parametrize(
    "limits", [{"max_loaded": 0}, {"max_memory_bytes": 0}, {"idle_unload_s": 0.0}]
)
def test_limits_out_of_range(limits: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ModelRegistry([Models().source("a")], RegistryLimits(**limits))


def test_real_models_swap_by_name(tmp_path: Path) -> None:
    from albor_serve.loader import LoadOptions, load_model
    from tests.fixtures_tiny import save_gguf, tiny_model

    def source(name: str, seed: int) -> ModelSource:
        config, weights = tiny_model("qwen3", seed=seed, max_seq_len=256)
        path = save_gguf(tmp_path / f"{name}.gguf", config, weights)

        def load() -> ServedModel:
            loaded = load_model(path, LoadOptions(num_slots=1))
            loaded.engine.start()
            return ServedModel(name, loaded.engine, loaded.template)

        return ModelSource(name, load)

    registry = ModelRegistry([source("a", 1), source("b", 2)], RegistryLimits(max_loaded=1))
    registry.adopt(first(registry))
    try:
        with serving_registry(registry) as url:
            texts = {
                (turn, name): ask(url, name, temperature=0, max_tokens=8).json()["choices"][0]
                for turn in range(2)
                for name in "ab"
            }
    finally:
        registry.close()
    assert texts[0, "a"] == texts[1, "a"]
    assert texts[0, "b"] == texts[1, "b"]
    assert texts[0, "a"] != texts[0, "b"]
