"""albor-bench gpu: one model shape on one GPU, albor and its peers, each in a process of its own.

A child writes lines of JSON: {"machine": ...} or {"row": ...}. One that fails, hangs or takes the
GPU down with it leaves its earlier rows and one that says why there are no more.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from albor_serve.bench.gpu_rows import GpuReport, GpuRow

__all__ = ["GPU_PEERS", "GpuJob", "child_command", "llama_rows", "run_gpu", "stream_lines"]

GPU_PEERS: Final = ("torch-bf16", "torch-int4", "llama.cpp", "transformers")
"""Engines to compare with, in the order in which they run."""
_CHILD: Final = "albor_serve.bench.gpu_child"
_SHORT: Final = 300


@dataclass(frozen=True, slots=True)
class GpuJob:
    """What to measure."""

    shape: Literal["33m", "125m", "350m"] = "350m"
    model: str | None = None
    """A Q4_0 GGUF file instead of random weights of `shape`."""
    contexts: tuple[int, ...] = (128, 512, 2048, 8192)
    batches: tuple[int, ...] = (1, 2, 4, 8)
    rows: tuple[int, ...] = (1, 2, 4, 8, 16)
    prompts: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    repeats: int = 30

    def to_json(self) -> str:
        """For a child's command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> GpuJob:
        """The inverse of `to_json`."""
        value: dict[str, Any] = json.loads(text)
        fields: dict[str, Any] = {
            name: tuple(item) if isinstance(item, list) else item for name, item in value.items()
        }
        return cls(**fields)


def child_command(engine: str, job: GpuJob) -> list[str]:
    """How an engine's process is started."""
    return [sys.executable, "-u", "-m", _CHILD, engine, job.to_json()]


def run_gpu(
    job: GpuJob,
    report: GpuReport,
    *,
    peers: Sequence[str],
    max_seconds: float,
    llama_bench: Path | None = None,
    command: Callable[[str, GpuJob], list[str]] = child_command,
) -> bool:
    """Measure albor and then the peers; returns whether albor has rows and none of them failed.

    Args:
        job: what to measure.
        report: takes the rows.
        peers: of GPU_PEERS.
        max_seconds: for all; no engine gets more than half of what is left when it begins, but
            albor and the last.
        llama_bench: the program, for the peer llama.cpp.
        command: starts a child.
    """
    end = time.monotonic() + max_seconds
    for engine in ("machine", "albor", *peers):
        left = end - time.monotonic()
        if left <= 0:
            report.add(GpuRow(engine, "not begun", note="the time of --max-seconds was up"))
            continue
        is_limited = engine in peers and engine != peers[-1]
        limit = left / 2 if is_limited else left
        if engine == "llama.cpp":
            _run_llama(job, report, llama_bench, limit, command)
        else:
            _run_child(engine, command(engine, job), report, limit)
    ours = [row for row in report.rows if row.engine == "albor"]
    return bool(ours) and all(row.us is not None for row in ours)


def _run_child(engine: str, arguments: Sequence[str], report: GpuReport, limit: float) -> None:
    """One engine's process, row by row."""
    try:
        for line in stream_lines(arguments, limit):
            message = _message(line)
            if message is None:
                continue  # Libraries write to standard output, too.
            if "machine" in message:
                report.set_machine(message["machine"])
            elif "row" in message:
                report.add(GpuRow.from_dict(message["row"]))
    except _ChildError as error:
        report.add(GpuRow(engine, "process", note=str(error)))


def _message(line: str) -> dict[str, Any] | None:
    if not line.startswith('{"'):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


class _ChildError(Exception):
    """A child ended badly; the text says how."""


def stream_lines(arguments: Sequence[str], limit_s: float) -> Iterator[str]:
    """Lines of a program's standard output as they come.

    Its process group is ended when `limit_s` seconds are over or the iterator is closed.

    Raises:
        _ChildError: it can't be started, ran too long or did not end with 0. The text holds the
            last of what it wrote to standard error.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        try:
            process = subprocess.Popen(
                arguments,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            raise _ChildError(f"{arguments[0]} can't be started: {error.strerror}") from error
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        stdout = process.stdout
        assert stdout is not None

        def pump() -> None:
            for line in stdout:
                lines.put(line)
            lines.put(None)

        thread = threading.Thread(target=pump, daemon=True)
        thread.start()
        end = time.monotonic() + limit_s
        try:
            while True:
                try:
                    line = lines.get(timeout=max(end - time.monotonic(), 0.001))
                except queue.Empty:
                    raise _ChildError(f"ended after {limit_s:.0f} s: {_tail(errors)}") from None
                if line is None:
                    break
                yield line.rstrip("\n")
            code = process.wait(timeout=max(end - time.monotonic(), 5.0))
        except subprocess.TimeoutExpired:
            raise _ChildError(f"ended after {limit_s:.0f} s: {_tail(errors)}") from None
        finally:
            # Compilers that it started outlive it otherwise.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            thread.join(timeout=5)
            stdout.close()
        if code != 0:
            raise _ChildError(f"ended with {code}: {_tail(errors)}")


def _tail(file: Any) -> str:
    """The last words of a file."""
    file.seek(0)
    return " ".join(file.read().split())[-_SHORT:] or "it said nothing"


def _run_llama(
    job: GpuJob,
    report: GpuReport,
    program: Path | None,
    limit: float,
    command: Callable[[str, GpuJob], list[str]],
) -> None:
    """llama-bench, with and without flash attention."""
    if program is None:
        note = "name a llama-bench with --llama-bench (scripts/llama_cuda.sh builds one)"
        report.add(GpuRow("llama.cpp", "process", note=note))
        return
    end = time.monotonic() + limit
    try:
        model = job.model
        if model is None:
            # Written by a child, since that needs the package gguf.
            model = "".join(stream_lines(command("gguf", job), limit)).strip()
        depths = ",".join(str(context) for context in job.contexts)
        arguments = [str(program), "-m", model, "-p", "512", "-n", "32", "-d", f"0,{depths}"]
        arguments += ["-ngl", "99", "-fa", "0,1", "-r", "5", "-o", "jsonl"]
        for line in stream_lines(arguments, max(end - time.monotonic(), 1)):
            for row in llama_rows(line):
                report.add(row)
    except _ChildError as error:
        report.add(GpuRow("llama.cpp", "process", note=str(error)))


def llama_rows(line: str) -> list[GpuRow]:
    """The row of one line of `llama-bench -o jsonl`; none for lines of another kind."""
    value: Mapping[str, Any] | None = _message(line)
    if value is None or not value.get("avg_ts"):
        return []
    flash = "flash" if value.get("flash_attn") not in (0, False, "off", "0") else "no flash"
    num_new, num_prompt = int(value.get("n_gen", 0)), int(value.get("n_prompt", 0))
    note = f"{flash}, build {value.get('build_commit', '?')}, {value.get('backends', '?')}"
    us: float | None = 1e6 / float(value["avg_ts"])
    if "CUDA" not in str(value.get("backends")):
        # Its time on the CPU must not be taken for the GPU's.
        us, note = None, f"{note}: this llama-bench was built without CUDA"
    context = int(value.get("n_depth", 0))
    if num_new:
        what = f"token, llama-bench, {flash}"
        return [GpuRow("llama.cpp", what, context=context, us=us, note=note)]
    what = f"prompt of {num_prompt}"
    whole = None if us is None else us * num_prompt
    return [GpuRow("llama.cpp", what, context, rows=num_prompt, us=whole, note=note)]
