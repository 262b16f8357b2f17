"""A real server on loopback for tests: uvicorn in a thread over a real engine."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from albor_serve.api.app import AppSettings, create_app
from albor_serve.api.completion import ServedModel
from albor_serve.api.limits import MAX_HEADER_BYTES
from albor_serve.api.protocol import GuardedH11
from albor_serve.api.registry import ModelRegistry, single_model
from albor_serve.api.server import bind
from albor_serve.backends.base import Backend
from albor_serve.config import EngineConfig
from albor_serve.engine import Engine
from albor_serve.fim import detect_template
from albor_serve.loader import LoadedModel, LoadOptions, load_model
from albor_serve.tokenizer import Tokenizer
from tests.fixtures_tiny import save_gguf, tiny_model


@dataclass
class Live:
    """A server that runs."""

    url: str
    engine: Engine
    served: ServedModel


def tiny_gguf(folder: Path, max_seq_len: int = 256) -> Path:
    config, weights = tiny_model("qwen3", seed=3, max_seq_len=max_seq_len)
    return save_gguf(folder / "albor-tiny.gguf", config, weights)


def load_tiny(folder: Path, num_slots: int = 4, max_seq_len: int = 256) -> LoadedModel:
    return load_model(tiny_gguf(folder, max_seq_len), LoadOptions(num_slots=num_slots))


@contextlib.contextmanager
def serving(served: ServedModel, settings: AppSettings | None = None) -> Iterator[Live]:
    with serving_registry(single_model(served), settings) as url:
        yield Live(url, served.engine, served)


@contextlib.contextmanager
def serving_registry(registry: ModelRegistry, settings: AppSettings | None = None) -> Iterator[str]:
    sock = bind("127.0.0.1", 0)
    config = uvicorn.Config(
        create_app(registry, settings),
        log_level="error",
        lifespan="off",
        http=GuardedH11,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        sock.close()


@contextlib.contextmanager
def serving_tiny(
    folder: Path, settings: AppSettings | None = None, num_slots: int = 4
) -> Iterator[Live]:
    loaded = load_tiny(folder, num_slots)
    loaded.engine.start()
    try:
        served = ServedModel("albor-tiny", loaded.engine, loaded.template, aliases=("tiny",))
        with serving(served, settings) as live:
            yield live
    finally:
        loaded.engine.close()


@contextlib.contextmanager
def serving_backend(
    backend: Backend,
    tokenizer: Tokenizer,
    config: EngineConfig,
    settings: AppSettings | None = None,
) -> Iterator[Live]:
    """Serve a fake backend, to control time and failure."""
    engine = Engine(backend, tokenizer, config)
    engine.start()
    try:
        template = detect_template(tokenizer, "albor")
        with serving(ServedModel("fake", engine, template), settings) as live:
            yield live
    finally:
        engine.close()
