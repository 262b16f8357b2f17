"""One engine in a process of its own, told what to measure over its standard input.

Separate processes keep memory figures apart and let the peers take turns: a worker that waits
for its next line computes nothing. Run as `python -m albor_serve.bench.worker KIND MODEL JSON`;
each line in is a JSON command, each line out its result.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from albor_serve.bench.peers import NO_FLASH, PRESET, Run, llama_completion
from albor_serve.config import EngineConfig, SamplingParams
from albor_serve.errors import ConfigError
from albor_serve.sequence import Delta, Event, Failed, Finished, GenerateRequest

__all__ = ["KINDS", "main"]


class Measured(Protocol):
    """An engine that can be measured."""

    def generate(self, tokens: list[int], num_new: int, *, fresh: bool) -> Run:
        """Greedy generation of exactly `num_new` tokens; `fresh` forgets the prompt cache."""


class _Albor:
    """albor's engine with the CPU backend."""

    def __init__(self, path: Path, context: int, threads: int, speculate: bool) -> None:
        from albor_serve.backends.calibrate import calibrate
        from albor_serve.checkpoint.gguf import open_gguf_checkpoint
        from albor_serve.engine import Engine
        from albor_serve.loader import open_backend

        config = EngineConfig(num_slots=1, max_seq_len=context, speculate=speculate)
        opened = open_backend(open_gguf_checkpoint(path), 1, context, num_threads=threads)
        self._engine = Engine(opened.backend, opened.tokenizer, config, calibrate)
        self._engine.start()

    def generate(self, tokens: list[int], num_new: int, *, fresh: bool) -> Run:
        if fresh:
            self._run([tokens[-1]], 0)
        end, times = self._run(tokens, num_new)
        decode_ms = (times[-1] - times[0]) * 1000 / (num_new - 1) if num_new > 1 else 0.0
        first = end.timings.first_token_ms
        return Run(first or 0.0, decode_ms, end.timings.num_new_tokens)

    def _run(self, tokens: list[int], num_new: int) -> tuple[Finished, list[float]]:
        times: list[float] = []
        ends: list[Event] = []
        done = threading.Event()

        def receive(event: Event) -> None:
            if isinstance(event, Delta):
                times.append(time.perf_counter())
            else:
                ends.append(event)
                done.set()

        request = GenerateRequest(
            tuple(tokens), num_new, SamplingParams(temperature=0.0), ignore_eos=True
        )
        self._engine.submit(request, receive)
        done.wait()
        end = ends[0]
        if isinstance(end, Failed):
            raise end.error
        assert isinstance(end, Finished)
        return end, times


class _Backend:
    """albor's CPU backend alone, without the engine."""

    def __init__(self, path: Path, context: int, threads: int) -> None:
        from albor_serve.checkpoint.gguf import open_gguf_checkpoint
        from albor_serve.loader import open_backend

        opened = open_backend(open_gguf_checkpoint(path), 1, context, num_threads=threads)
        self._backend, self._tokenizer = opened.backend, opened.tokenizer

    def generate(self, tokens: list[int], num_new: int, *, fresh: bool) -> Run:
        from albor_serve.backends.base import ExtendStep

        backend = self._backend
        backend.rewind(0, 0 if fresh else min(backend.length(0), len(tokens) - 1))
        started = time.perf_counter()
        for begin in range(backend.length(0), len(tokens), backend.info.max_batch_len):
            end = begin + backend.info.max_batch_len
            [logits] = backend.extend([ExtendStep(0, tokens[begin:end])])
        token = int(logits[0].argmax())
        first = time.perf_counter()
        for _ in range(num_new - 1):
            [logits] = backend.extend([ExtendStep(0, [token])])
            token = int(logits[0].argmax())
        decode_s = time.perf_counter() - first
        each = decode_s * 1000 / (num_new - 1) if num_new > 1 else 0.0
        return Run((first - started) * 1000, each, num_new)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self._tokenizer.encode(text)

    def rows(self, counts: list[int], context_len: int) -> dict[int, float]:
        """Milliseconds of one step with so many rows: median of 5."""
        from albor_serve.backends.base import ExtendStep

        backend = self._backend
        backend.rewind(0, 0)
        for begin in range(0, context_len, backend.info.max_batch_len):
            size = min(backend.info.max_batch_len, context_len - begin)
            backend.extend([ExtendStep(0, [5] * size, "none")])
        result = {}
        for count in counts:
            times = []
            for _ in range(5):
                started = time.perf_counter()
                backend.extend([ExtendStep(0, [5] * count, "all")])
                times.append(time.perf_counter() - started)
                backend.rewind(0, context_len)
            result[count] = sorted(times)[len(times) // 2] * 1000
        return result


class _LlamaCppPython:
    """llama-cpp-python's high-level class: `create_completion`, streamed, as its users call it."""

    def __init__(self, path: Path, context: int, threads: int) -> None:
        import llama_cpp

        self._llama = llama_cpp.Llama(
            str(path),
            n_ctx=context,
            n_threads=threads,
            n_threads_batch=threads,
            n_batch=512,
            verbose=False,
        )

    def generate(self, tokens: list[int], num_new: int, *, fresh: bool) -> Run:
        if fresh:
            self._llama.reset()
        started = time.perf_counter()
        times = self._times(tokens, num_new)
        each = (times[-1] - times[0]) * 1000 / (num_new - 1) if num_new > 1 else 0.0
        return Run((times[0] - started) * 1000, each, len(times))

    def _times(self, tokens: list[int], num_new: int) -> list[float]:
        """When each token came."""
        end_of_text = {self._llama.token_eos(): -100.0}
        chunks = self._llama.create_completion(
            tokens,
            max_tokens=num_new,
            temperature=0.0,
            repeat_penalty=1.0,
            logit_bias=end_of_text,
            stream=True,
        )
        times = [time.perf_counter() for _ in chunks]
        # Its last chunk brings the finish reason alone.
        return times[:num_new]


class _LlamaCppPythonLoop(_LlamaCppPython):
    """Its bare token loop: no text, no stop rules; the same native library as albor's."""

    def _times(self, tokens: list[int], num_new: int) -> list[float]:
        times = []
        for _ in self._llama.generate(tokens, temp=0.0, top_k=1, repeat_penalty=1.0):
            times.append(time.perf_counter())
            if len(times) == num_new:
                break
        return times


class _LlamaServer:
    """llama-server inside this process (PyPI xllamacpp), asked over loopback HTTP."""

    def __init__(
        self, path: Path, context: int, threads: int, has_flash: bool, has_preset: bool = False
    ) -> None:
        try:
            import xllamacpp
        except ImportError as error:
            raise ConfigError(
                "the peer llama-server needs the package xllamacpp: pip install 'albor[bench]'"
            ) from error
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context
        params.n_parallel = 1
        params.cpuparams.n_threads = threads
        params.cpuparams_batch.n_threads = threads
        if not has_flash:
            flash = xllamacpp.llama_flash_attn_type
            params.flash_attn_type = flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if has_preset:
            params.n_batch = params.n_ubatch = 1024
            params.n_cache_reuse = 256
            params.endpoint_metrics = True
        params.ui = False
        params.verbosity = -1
        self._server = xllamacpp.Server(params)
        self.address = self._server.listening_address.removeprefix("http://")

    def generate(self, tokens: list[int], num_new: int, *, fresh: bool) -> Run:
        # Its own clocks, without HTTP: what is most favourable to it.
        return llama_completion(self.address, tokens, num_new, fresh)


KINDS: dict[str, Callable[[Path, int, int], Measured]] = {
    "albor": lambda path, context, threads: _Albor(path, context, threads, False),
    "albor+drafts": lambda path, context, threads: _Albor(path, context, threads, True),
    "albor-backend": _Backend,
    "llama-cpp-python": _LlamaCppPython,
    "llama-cpp-python-loop": _LlamaCppPythonLoop,
    "llama-server": lambda path, context, threads: _LlamaServer(path, context, threads, True),
    PRESET: lambda path, context, threads: _LlamaServer(path, context, threads, True, True),
    NO_FLASH: lambda path, context, threads: _LlamaServer(path, context, threads, False),
}
"""What can be measured, by name."""


def main(arguments: list[str]) -> int:
    """Serve measurements until standard input ends."""
    kind, path, options = arguments[0], Path(arguments[1]), json.loads(arguments[2])
    # Native libraries print to file descriptor 1 as they please: results get their own.
    out = sys.stdout
    started = time.perf_counter()
    measured = KINDS[kind](path, options["context"], options["threads"])
    load_s = time.perf_counter() - started
    print(json.dumps({"load_s": load_s, "build": _build(kind)}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(measured, json.loads(line))), file=out, flush=True)
    return 0


def _answer(measured: Measured, command: dict[str, Any]) -> dict[str, Any]:
    match command["what"]:
        case "generate":
            return asdict(
                measured.generate(command["tokens"], command["new"], fresh=command["fresh"])
            )
        case "rows" if isinstance(measured, _Backend):
            return {"rows": measured.rows(command["counts"], command["context_len"])}
        case "tokenize" if isinstance(measured, _Backend):
            return {"tokens": measured.tokenize(command["text"])}
        case "address" if isinstance(measured, _LlamaServer):
            return {"address": measured.address}
    raise ConfigError(f"unknown measurement {command['what']!r}")


def _build(kind: str) -> str:
    """Instruction sets that this engine's llama.cpp was compiled for."""
    if kind.startswith("llama-server"):
        import xllamacpp

        text = xllamacpp.get_system_info()
    else:
        from albor_serve.backends.llamacpp_native import load_library

        text = load_library().llama_print_system_info()
    return enabled_features(text)


def enabled_features(system_info: str | bytes) -> str:
    """The names that llama.cpp's line of "NAME = 1 | NAME = 0" says are there."""
    if isinstance(system_info, bytes):
        system_info = system_info.decode("utf-8", "replace")
    return " ".join(re.findall(r"(\w+) = 1", system_info))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
