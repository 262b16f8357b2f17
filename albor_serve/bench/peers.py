"""Everything that decode measures, each in a process of its own, behind one interface.

Separate processes keep memory figures apart and let the peers take turns: one that waits for its
next request computes nothing (`Peer.cpu_seconds` shows whether that is so).
"""

from __future__ import annotations

import abc
import contextlib
import http.client
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from albor_serve.errors import BackendError, ConfigError

__all__ = [
    "HTTP_SUFFIX",
    "NO_FLASH",
    "PEERS",
    "PRESET",
    "AlborServer",
    "LlamaServer",
    "Peer",
    "PeerOptions",
    "Run",
    "Worker",
    "available_peers",
    "open_peer",
    "process_cpu_seconds",
    "stream_completion",
]

NO_FLASH: Final = "llama-server-noflash"
PEERS: Final = ("llama-server", NO_FLASH, "llama-cpp-python", "llama-cpp-python-loop")
"""What albor is compared with. llama-server runs as its users start it, with flash attention,
and once more without, as albor and llama-cpp-python run."""
PRESET: Final = "llama-server-preset"
"""llama-server with the settings that its completion presets give: batches of 1,024, reuse of
shifted cache from 256 tokens on; and with its counters on."""
HTTP_SUFFIX: Final = "+http"
"""Ends the names of engines that are asked over HTTP and timed by the client."""
START_S: Final = 120.0
REQUEST_S: Final = 600.0
_BAD_ANSWERS: Final = (OSError, http.client.HTTPException, ValueError, LookupError)
"""A broken connection, or an answer of another shape."""


@dataclass(frozen=True, slots=True)
class PeerOptions:
    """Settings that are the same for all."""

    context: int
    """Tokens that the one sequence may hold."""
    threads: int
    llama_server: Path | None = None
    """A llama-server program to measure instead of the one inside xllamacpp."""
    albor_chooses_threads: bool = False
    """albor-serve isn't told `threads`: as in use, it fits them to the machine's load."""


@dataclass(frozen=True, slots=True)
class Run:
    """One generation."""

    first_token_ms: float
    """From the request to the first token."""
    decode_ms: float
    """Mean time of a token after the first."""
    num_tokens: int


def available_peers() -> tuple[str, ...]:
    """The peers whose packages are installed."""
    has_server = importlib.util.find_spec("xllamacpp") is not None
    return tuple(peer for peer in PEERS if has_server or not peer.startswith("llama-server"))


def process_cpu_seconds(pid: int) -> float:
    """CPU time that a process has used; 0.0 where the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    # The command's name, in brackets, may hold spaces.
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Peer(abc.ABC):
    """One engine that can be measured. Close it: its process runs until then."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.load_s = 0.0
        """From the start of the process or of the load inside it, whichever can be seen."""
        self.build = ""
        """Instruction sets that its llama.cpp was compiled for; "" where it doesn't tell."""

    @property
    @abc.abstractmethod
    def pid(self) -> int:
        """Of the process that computes."""

    @abc.abstractmethod
    def generate(self, tokens: Sequence[int], num_new: int, *, fresh: bool) -> Run:
        """Greedy generation of `num_new` tokens; `fresh` forgets the prompt cache first.

        Raises:
            BackendError: the engine failed, or made another number of tokens.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """End the process."""

    def rss_bytes(self) -> int:
        """Resident memory, the mapped model file included; 0 where the system does not tell."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return 0
        [resident] = [line for line in status.splitlines() if line.startswith("VmRSS:")]
        return int(resident.split()[1]) * 1024

    def cpu_seconds(self) -> float:
        """CPU time that the process has used; 0.0 where the system does not tell."""
        return process_cpu_seconds(self.pid)

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _checked(self, run: Run, num_new: int) -> Run:
        if run.num_tokens != num_new:
            raise BackendError(
                f"{self.kind} made {run.num_tokens} tokens instead of {num_new}: its times can't "
                f"be compared"
            )
        return run


class _Process:
    """A child whose last words are kept for the error message."""

    def __init__(self, arguments: Sequence[str], *, stdin: int = subprocess.DEVNULL) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        try:
            self.child = subprocess.Popen(
                arguments,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                errors="replace",
            )
        except OSError as error:
            self._log.close()
            raise ConfigError(f"cannot run {arguments[0]}: {error.strerror}") from error

    def last_words(self) -> str:
        """The last line of its standard error."""
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "no message")

    def close(self) -> None:
        self.child.kill()
        self.child.wait()
        for pipe in (self.child.stdin, self.child.stdout):
            if pipe is not None:
                # Closing flushes what a dead child did not read.
                with contextlib.suppress(OSError):
                    pipe.close()
        self._log.close()


class Worker(Peer):
    """An engine inside a Python process, told what to do over a pipe; see bench/worker.py.

    It is timed by the engine's own clocks or next to them: no HTTP, no pipe.
    """

    def __init__(self, kind: str, path: Path, options: PeerOptions) -> None:
        super().__init__(kind)
        settings = json.dumps({"context": options.context, "threads": options.threads})
        command = [sys.executable, "-m", "albor_serve.bench.worker", kind, str(path), settings]
        self._process = _Process(command, stdin=subprocess.PIPE)
        try:
            hello = self._read()
        except BaseException:
            self.close()
            raise
        self.load_s = hello["load_s"]
        self.build = hello["build"]

    @property
    def pid(self) -> int:
        """Of the process that computes."""
        return self._process.child.pid

    def generate(self, tokens: Sequence[int], num_new: int, *, fresh: bool) -> Run:
        """See `Peer.generate`."""
        answer = self._ask(what="generate", tokens=list(tokens), new=num_new, fresh=fresh)
        return self._checked(Run(**answer), num_new)

    def rows(self, counts: Sequence[int], context_len: int) -> dict[int, float]:
        """Milliseconds of one step with so many rows after `context_len` tokens."""
        answer = self._ask(what="rows", counts=list(counts), context_len=context_len)
        return {int(count): ms for count, ms in answer["rows"].items()}

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, by the model's own tokenizer."""
        tokens: list[int] = self._ask(what="tokenize", text=text)["tokens"]
        return tokens

    def address(self) -> str:
        """Host and port that the engine inside listens on."""
        address: str = self._ask(what="address")["address"]
        return address

    def close(self) -> None:
        """End the process."""
        self._process.close()

    def _ask(self, **command: Any) -> dict[str, Any]:
        pipe = self._process.child.stdin
        assert pipe is not None
        try:
            pipe.write(json.dumps(command) + "\n")
            pipe.flush()
        except OSError:
            raise self._ended() from None
        return self._read()

    def _read(self) -> dict[str, Any]:
        pipe = self._process.child.stdout
        assert pipe is not None
        # A native library may print to the same pipe: results are the lines that are JSON.
        for line in pipe:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise self._ended()

    def _ended(self) -> BackendError:
        self._process.child.wait()
        return BackendError(f"{self.kind} ended: {self._process.last_words()}")


class _Http(Peer):
    """A server, asked over loopback as an editor would; the client's clock counts."""

    address = ""

    def generate(self, tokens: Sequence[int], num_new: int, *, fresh: bool) -> Run:
        """See `Peer.generate`."""
        run = stream_completion(self.address, tokens, num_new, fresh=fresh)
        return self._checked(run, num_new)

    def _wait_until_ready(self, process: _Process) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            if process.child.poll() is not None:
                raise BackendError(f"{self.kind} ended: {process.last_words()}")
            if _is_healthy(self.address):
                return
            time.sleep(0.02)
        raise BackendError(f"{self.kind} was not ready after {START_S:.0f} s")


class AlborServer(_Http):
    """albor-serve in a process of its own, with further arguments of its command."""

    def __init__(
        self,
        kind: str,
        path: Path,
        options: PeerOptions,
        extra: Sequence[str] = ("--slots", "1", "--no-speculation"),
    ) -> None:
        super().__init__(kind)
        started = time.perf_counter()
        arguments = ["--port", "0", *extra]
        arguments += ["--ctx", str(options.context)]
        if not options.albor_chooses_threads:
            arguments += ["--threads", str(options.threads)]
        main = "import sys; from albor_serve.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", main, str(path), *arguments]
        self._process = _Process(command)
        try:
            self.address = self._read_address()
            self._wait_until_ready(self._process)
        except BaseException:
            self.close()
            raise
        self.load_s = time.perf_counter() - started

    @property
    def pid(self) -> int:
        """Of the process that computes."""
        return self._process.child.pid

    def generate(self, tokens: Sequence[int], num_new: int, *, fresh: bool) -> Run:
        """See `Peer.generate`."""
        if fresh:
            # There is no switch for the cache; with one slot another prompt empties it.
            stream_completion(self.address, tokens[-1:], 1, fresh=True)
        return super().generate(tokens, num_new, fresh=fresh)

    def close(self) -> None:
        """End the process."""
        self._process.close()

    def _read_address(self) -> str:
        pipe = self._process.child.stdout
        assert pipe is not None
        for line in pipe:
            if line.startswith("listening on "):
                return line.split()[2].removeprefix("http://")
        self._process.child.wait()
        raise BackendError(f"{self.kind} ended: {self._process.last_words()}")


class LlamaServer(_Http):
    """A llama-server program, or the one that a worker holds.

    A kind with "+http" takes the client's clock, one without the server's own times, which are
    the more favourable ones.
    """

    def __init__(self, kind: str, path: Path, options: PeerOptions) -> None:
        super().__init__(kind)
        self._worker: Worker | None = None
        self._process: _Process | None = None
        started = time.perf_counter()
        try:
            if options.llama_server is None:
                self._worker = Worker(kind.removesuffix(HTTP_SUFFIX), path, options)
                self.address = self._worker.address()
                self.build = self._worker.build
            else:
                self.address = f"127.0.0.1:{_free_port()}"
                command = _server_command(options.llama_server, path, options, self.address)
                if kind.startswith(NO_FLASH):
                    command += ["--flash-attn", "off"]
                if kind == PRESET:
                    command += ["--batch-size", "1024", "--ubatch-size", "1024"]
                    command += ["--cache-reuse", "256", "--metrics"]
                self._process = _Process(command)
                self._wait_until_ready(self._process)
        except BaseException:
            self.close()
            raise
        self.load_s = time.perf_counter() - started

    @property
    def pid(self) -> int:
        """Of the process that computes."""
        if self._worker is not None:
            return self._worker.pid
        assert self._process is not None
        return self._process.child.pid

    def generate(self, tokens: Sequence[int], num_new: int, *, fresh: bool) -> Run:
        """See `Peer.generate`."""
        if self.kind.endswith(HTTP_SUFFIX):
            return super().generate(tokens, num_new, fresh=fresh)
        return self._checked(llama_completion(self.address, tokens, num_new, fresh), num_new)

    def close(self) -> None:
        """End the process."""
        for owned in (self._worker, self._process):
            if owned is not None:
                owned.close()


def open_peer(kind: str, path: Path, options: PeerOptions) -> Peer:
    """Start one engine on one GGUF file."""
    if kind == "albor" + HTTP_SUFFIX:
        return AlborServer(kind, path, options)
    asks_over_http = kind.endswith(HTTP_SUFFIX) or options.llama_server is not None
    if kind.startswith("llama-server") and asks_over_http:
        return LlamaServer(kind, path, options)
    return Worker(kind, path, options)


def stream_completion(address: str, tokens: Sequence[int], num_new: int, *, fresh: bool) -> Run:
    """One streamed request to /v1/completions, timed where its text arrives.

    `fresh` asks the server not to use its prompt cache; albor has no such switch.

    Raises:
        BackendError: the server refused it or broke off.
    """
    body = {
        "prompt": list(tokens),
        "max_tokens": num_new,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": not fresh,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.perf_counter()
    first = last = None
    num_tokens = -1
    connection = http.client.HTTPConnection(address, timeout=REQUEST_S)
    try:
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        if response.status != 200:
            raise BackendError(f"the server at {address} answered {response.status}")
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            arrived = time.perf_counter()
            event = json.loads(line[6:])
            for choice in event.get("choices", ()):
                if choice["text"] or choice["finish_reason"]:
                    # The chunk with the finish reason says that the last token is done.
                    first, last = first or arrived, arrived
            if event.get("usage"):
                num_tokens = event["usage"]["completion_tokens"]
    except _BAD_ANSWERS as error:
        raise BackendError(f"the server at {address} broke off: {error!r}") from error
    finally:
        connection.close()
    if first is None or last is None:
        raise BackendError(f"the server at {address} sent no text")
    each = (last - first) * 1000 / (num_new - 1) if num_new > 1 else 0.0
    return Run((first - started) * 1000, each, num_tokens)


def llama_completion(address: str, tokens: Sequence[int], num_new: int, fresh: bool) -> Run:
    """One request to llama-server's /completion, timed by the server's own clocks.

    Raises:
        BackendError: the server refused it or broke off.
    """
    body = {
        "prompt": list(tokens),
        "n_predict": num_new,
        # Its own samplers: an empty list costs it up to half as much again as the model.
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": not fresh,
    }
    # A connection for each request: it drops idle ones while the others have their turn.
    connection = http.client.HTTPConnection(address, timeout=REQUEST_S)
    try:
        connection.request("POST", "/completion", json.dumps(body))
        response = connection.getresponse()
        if response.status != 200:
            raise BackendError(f"llama-server answered {response.status}: see its log")
        timings = json.loads(response.read())["timings"]
        num_tokens = timings["predicted_n"]
        each = timings["predicted_ms"] / max(num_tokens - 1, 1)
        return Run(timings["prompt_ms"], each, num_tokens)
    except _BAD_ANSWERS as error:
        raise BackendError(f"llama-server at {address} broke off: {error!r}") from error
    finally:
        connection.close()


def _server_command(program: Path, model: Path, options: PeerOptions, address: str) -> list[str]:
    host, _, port = address.rpartition(":")
    arguments = ["--model", str(model), "--host", host, "--port", port, "--parallel", "1"]
    arguments += ["--ctx-size", str(options.context)]
    arguments += ["--threads", str(options.threads), "--threads-batch", str(options.threads)]
    return [str(program), *arguments]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _is_healthy(address: str) -> bool:
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
