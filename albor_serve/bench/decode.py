"""albor-bench decode: how fast tokens come, beside the peers, in one interleaved run."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from albor_serve.bench.machine import Machine, read_bandwidth
from albor_serve.checkpoint.gguf_header import GgufHeader, open_gguf_header
from albor_serve.errors import BackendError

__all__ = ["DecodeSettings", "EngineFigures", "ModelFigures", "Stat", "measure_model"]

ROW_COUNTS: Final = (1, 2, 3, 4, 6, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """What to measure."""

    prompt_len: int = 512
    num_new: int = 64
    repeats: int = 5
    threads: int = 1
    kinds: tuple[str, ...] = ("albor", "albor+drafts", "llama-server", "llama-cpp-python")


@dataclass(frozen=True, slots=True)
class Stat:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Stat:
        """Of at least one value."""
        ranked = sorted(values)
        if len(ranked) == 1:
            return cls(ranked[0], ranked[0], ranked[0])
        low, median, high = statistics.quantiles(ranked, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(slots=True)
class EngineFigures:
    """One engine's results on one model."""

    kind: str
    load_s: float
    decode_ms: Stat
    prefill_tokens_per_s: Stat
    cold_first_token_ms: Stat
    cached_first_token_ms: Stat
    """A prompt whose all tokens but one are in the cache."""
    rss_bytes: int


@dataclass(slots=True)
class ModelFigures:
    """All results on one model."""

    name: str
    file_bytes: int
    weight_bytes: int
    """Bytes that decoding one token reads."""
    cache_gb_per_s: float
    """Measured read bandwidth for a buffer of this size; above DRAM's if a cache holds it."""
    engines: list[EngineFigures] = field(default_factory=list)
    rows_ms: dict[int, float] = field(default_factory=dict)

    def floor_ms(self, machine: Machine) -> float:
        """Least time a token can take: its weights read once, at the faster of both speeds."""
        best = max(self.cache_gb_per_s, machine.dram_gb_per_s)
        return self.weight_bytes / best / 1e6

    def figures(self, kind: str) -> EngineFigures | None:
        """Results of one engine, if it was measured."""
        return next((engine for engine in self.engines if engine.kind == kind), None)


def measure_model(
    path: Path,
    name: str,
    settings: DecodeSettings,
    progress: Callable[[str, float], None],
) -> ModelFigures:
    """Run all engines on one GGUF file, taking turns.

    Raises:
        AlborError: the file or an engine can't be used.
    """
    header = open_gguf_header(path)
    weight_bytes = sum(tensor.num_bytes for tensor in header.tensors.values())
    figures = ModelFigures(
        name=name,
        file_bytes=header.num_bytes,
        weight_bytes=weight_bytes,
        cache_gb_per_s=read_bandwidth(weight_bytes, settings.threads) / 1e9,
    )
    context = settings.prompt_len + settings.num_new + 64
    workers = []
    try:
        for at, kind in enumerate(settings.kinds):
            progress(f"{name}: loading {kind}", at / len(settings.kinds))
            workers.append(_Worker(kind, path, context, settings.threads))
        tokens = _prompt(workers[0], header, settings.prompt_len)
        samples: dict[str, list[tuple[float, float, float]]] = {w.kind: [] for w in workers}
        for worker in workers:
            worker.generate(tokens, 8, fresh=True)  # warm-up
        for repeat in range(settings.repeats):
            for worker in workers:
                progress(f"{name}: {worker.kind}", repeat / settings.repeats)
                samples[worker.kind].append(_one_round(worker, tokens, settings))
        for worker in workers:
            rounds = samples[worker.kind]
            cold = [first for first, _, _ in rounds]
            figures.engines.append(
                EngineFigures(
                    kind=worker.kind,
                    load_s=worker.load_s,
                    decode_ms=Stat.of([each for _, each, _ in rounds]),
                    prefill_tokens_per_s=Stat.of([len(tokens) * 1000 / ms for ms in cold]),
                    cold_first_token_ms=Stat.of(cold),
                    cached_first_token_ms=Stat.of([cached for _, _, cached in rounds]),
                    rss_bytes=worker.ask(what="memory")["rss_bytes"],
                )
            )
    finally:
        for worker in workers:
            worker.close()
    progress(f"{name}: rows", 0.9)
    with _Worker("albor-backend", path, context, settings.threads) as worker:
        counts = [count for count in ROW_COUNTS if count < settings.num_new + 64]
        rows = worker.ask(what="rows", counts=counts, context_len=settings.prompt_len)["rows"]
        figures.rows_ms = {int(count): ms for count, ms in rows.items()}
    return figures


def _prompt(albor: _Worker, header: GgufHeader, prompt_len: int) -> list[int]:
    """Real code for a trained model, so that drafts are as good as in life; random ids for one
    with random weights, whose vocabulary has no words."""
    if not header.metadata.string("general.name", "").startswith("random-"):
        # This package's own source: code that no model was trained on.
        text = "".join(path.read_text() for path in sorted(Path(__file__).parent.glob("*.py")))
        tokens: list[int] = albor.ask(what="tokenize", text=text)["tokens"]
        if len(tokens) >= prompt_len:
            return tokens[:prompt_len]
    vocab_size = len(header.metadata.raw_strings("tokenizer.ggml.tokens"))
    rng = random.Random(0)
    return [rng.randrange(vocab_size // 4, vocab_size) for _ in range(prompt_len)]


def _one_round(
    worker: _Worker, tokens: list[int], settings: DecodeSettings
) -> tuple[float, float, float]:
    """(cold first token ms, ms a token, first token ms with all but one token cached)."""
    run = worker.generate(tokens, settings.num_new, fresh=True)
    worker.generate(tokens[:-1], 1, fresh=False)
    cached = worker.generate(tokens, 1, fresh=False)
    return run["first_token_ms"], run["decode_ms"], cached["first_token_ms"]


class _Worker:
    """A worker process; see bench/worker.py."""

    def __init__(self, kind: str, path: Path, context: int, threads: int) -> None:
        self.kind = kind
        options = json.dumps({"context": context, "threads": threads})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "albor_serve.bench.worker", kind, str(path), options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            self.load_s: float = self._read()["load_s"]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> _Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def generate(self, tokens: list[int], num_new: int, *, fresh: bool) -> dict[str, Any]:
        """One generation; checks that the engine made as many tokens as it was asked for."""
        answer = self.ask(what="generate", tokens=tokens, new=num_new, fresh=fresh)
        if answer["num_tokens"] != num_new:
            raise BackendError(
                f"{self.kind} made {answer['num_tokens']} tokens instead of {num_new}: its times "
                f"can't be compared"
            )
        return answer

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its result."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        # A native library may print to the same pipe: results are the lines that are JSON.
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise BackendError(
            f"the worker for {self.kind} ended: run python -m albor_serve.bench.worker "
            f"{self.kind} to see why"
        )
