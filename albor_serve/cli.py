"""The albor-serve command."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import re
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from albor_serve import __version__
from albor_serve.errors import AlborError, ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress

    from albor_serve.api.auth import ApiKeys
    from albor_serve.api.completion import ServedModel
    from albor_serve.api.server import Ready
    from albor_serve.loader import LoadedModel, LoadOptions
    from albor_serve.model_args import NamedModel

__all__ = ["main"]

SWITCH_S = 0.0005
"""The engine's thread gets the interpreter so long after it asks: between two tokens Python's 5 ms
would be longer than a token."""

SERVE_HELP = """\
examples:
  albor-serve                                   the embedded model on http://127.0.0.1:8080
  albor-serve model.gguf --port 9000            a GGUF file
  albor-serve ~/models/Qwen2.5-Coder-0.5B       a Hugging Face folder (becomes Q4_0 once, cached)
  albor-serve a.gguf=code b.gguf=text           two models; requests pick one with "model"
  albor-serve convert SRC OUT.gguf              convert without serving; see convert --help

then:
  curl http://127.0.0.1:8080/v1/completions -d '{"prompt": "def fib(n):", "max_tokens": 32}'
with code after the cursor:
  curl http://127.0.0.1:8080/v1/completions -d '{"prompt": "def add(a, b):\\n    return ",
    "suffix": "\\n\\nprint(add(1, 2))", "max_tokens": 16, "temperature": 0}'
"""

CONVERT_HELP = """\
examples:
  albor-serve convert ./my-model my-model-q4_0.gguf
  albor-serve convert ./my-model my-model-f16.gguf --quant f16
"""


class _Parser(argparse.ArgumentParser):
    """Argument errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}: see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (0 fine, 1 failed, 2 asked for the impossible)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["convert"]:
            return _convert(arguments[1:])
        return _serve(arguments)
    except ConfigError as error:
        print(f"albor-serve: {error}", file=sys.stderr)
        return 2
    except AlborError as error:
        print(f"albor-serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _serve(arguments: list[str]) -> int:
    options = _serve_parser().parse_args(arguments)
    _set_up_logging(options.log_level, options.log_format, log_prompts=options.log_prompts)
    if options.threads is not None and options.threads < 1:
        raise ConfigError(f"--threads is {options.threads}: it must be at least 1")
    if options.fallback != "none" and options.backend != "cuda":
        raise ConfigError(f"--fallback {options.fallback} needs --backend cuda")

    for origin in options.cors_origin:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+/?", origin.lower()):
            raise ConfigError("--cors-origin must be * or a site such as https://example.org:8443")

    from albor_serve.api.auth import read_api_keys
    from albor_serve.api.server import TlsFiles, bind, bind_unix, serve

    keys = read_api_keys(options.api_key, options.api_key_file)
    started = time.perf_counter()
    tls = None
    if options.tls_cert is not None:
        tls = TlsFiles(options.tls_cert, options.tls_key)
        tls.check()
    elif options.tls_key is not None:
        raise ConfigError("--tls-key needs --tls-cert")
    if options.uds is not None:
        sock = bind_unix(options.uds)
        address = f"unix:{options.uds}"
    else:
        sock = bind(options.host, options.port)
        scheme = "http" if tls is None else "https"
        address = f"{scheme}://{_as_url_host(options.host)}:{sock.getsockname()[1]}"
    sys.setswitchinterval(SWITCH_S)
    try:
        serve(
            sock,
            lambda stop: _start(options, keys, address, started, stop),
            log_level=options.log_level,
            tls=tls,
        )
    finally:
        sock.close()
        if options.uds is not None:
            options.uds.unlink(missing_ok=True)
    return 0


def _set_up_logging(level: str, log_format: str, *, log_prompts: bool) -> None:
    from albor_serve.api.request_log import JsonFormatter, TextFormatter

    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    if log_prompts:
        logging.getLogger("albor.request").setLevel(logging.INFO)


def _start(
    options: argparse.Namespace,
    keys: ApiKeys,
    address: str,
    started: float,
    stop: threading.Event,
) -> Ready:
    """Load the default model, complete once with it and make the application.

    Raises KeyboardInterrupt soon after `stop` is set.
    """
    from albor_serve.checkpoint.lora import parse_adapter
    from albor_serve.loader import LoadOptions, embedded_name, needed_bytes
    from albor_serve.model_args import named_models, parse_bytes

    is_embedded = not options.model and options.models_dir is None
    models = named_models(
        options.model, options.alias, options.models_dir, embedded_name() if is_embedded else ""
    )
    chosen = LoadOptions(
        num_slots=options.slots,
        max_seq_len=options.ctx,
        num_threads=options.threads,
        speculate=not options.no_speculation,
        backend=options.backend,
        fallback=options.fallback,
    )
    adapters = tuple(parse_adapter(text) for text in options.lora)
    budget = None if options.max_memory is None else parse_bytes(options.max_memory)
    # The adapters are the first model's.
    choices = [replace(chosen, adapters=adapters), *([chosen] * (len(models) - 1))]
    first, first_token_ms = _load(models[0], choices[0], stop)
    try:
        # Not before: the main thread imports the web framework meanwhile.
        from albor_serve.api.registry import ModelRegistry, ModelSource, RegistryLimits

        registry = ModelRegistry(
            [
                ModelSource(
                    model.name,
                    functools.partial(_load_served, model, choice, stop),
                    model.aliases,
                    functools.partial(needed_bytes, model.path, choice),
                )
                for model, choice in zip(models, choices, strict=True)
            ],
            RegistryLimits(
                max_loaded=options.max_loaded,
                max_memory_bytes=budget,
                idle_unload_s=options.idle_unload,
            ),
        )
        served = _served(models[0], first)
        registry.adopt(served)
        from albor_serve.api.app import AppSettings, create_app
        from albor_serve.api.server import Ready

        settings = AppSettings(
            allowed_hosts=_allowed_hosts(options.host),
            cors_origins=tuple(options.cors_origin),
            api_keys=keys,
            log_prompts=options.log_prompts,
            min_confidence=options.min_confidence,
        )
        app = create_app(registry, settings)
        load_s = time.perf_counter() - started
        text = _greeting(served, address, len(models) - 1, load_s, first_token_ms)
    except BaseException:
        first.engine.close()
        raise

    def announce() -> None:
        print(text, flush=True)
        if not keys and options.uds is None and not _is_loopback(options.host):
            print("anyone who can reach this address can use it: see --api-key-file", flush=True)

    return Ready(app, registry.close, announce)


def _load(
    model: NamedModel, options: LoadOptions, stop: threading.Event
) -> tuple[LoadedModel, float]:
    """Load a model and complete once with it: (the model, that completion's prefill in ms)."""
    from albor_serve.loader import load_model

    with _ProgressLine(stop) as progress:
        loaded = load_model(model.path, options, progress.show)
    try:
        loaded.engine.start()
        return loaded, _warm_up(loaded)
    except BaseException:
        loaded.engine.close()
        raise


def _load_served(model: NamedModel, options: LoadOptions, stop: threading.Event) -> ServedModel:
    return _served(model, _load(model, options, stop)[0])


def _served(model: NamedModel, loaded: LoadedModel) -> ServedModel:
    from albor_serve.api.completion import ServedModel

    return ServedModel(
        name=model.name,
        engine=loaded.engine,
        template=loaded.template,
        aliases=model.aliases,
        description=loaded.description,
    )


def _serve_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="albor-serve",
        description="Serve a code model over an OpenAI-compatible HTTP API on this machine.",
        epilog=SERVE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        nargs="*",
        metavar="MODEL[=NAME]",
        help="a .gguf file or a Hugging Face folder; without it the embedded Python model. The "
        "first one is loaded at once and is the default, further ones as requests name them",
    )
    parser.add_argument(
        "--models-dir",
        type=Path,
        metavar="DIR",
        help="serve each .gguf file and Hugging Face folder in DIR as well",
    )
    parser.add_argument(
        "--max-loaded",
        type=int,
        default=3,
        metavar="N",
        help="models in memory at once; the least recently used makes room (%(default)s)",
    )
    parser.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="memory for weights and caches of all loaded models, such as 4G (no limit)",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[=SCALE]",
        help="LoRA adapter for the first model: a GGUF file or a PEFT folder; may be given several "
        "times",
    )
    parser.add_argument(
        "--idle-unload",
        type=float,
        metavar="SECONDS",
        help="unload a model that nobody has used for so long; the next request loads it (never)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument(
        "--port", type=int, default=8080, help="port; 0 takes any free one (%(default)s)"
    )
    parser.add_argument(
        "--uds",
        type=Path,
        metavar="PATH",
        help="listen on this unix socket, which only you can open, instead of host and port",
    )
    parser.add_argument(
        "--tls-cert", type=Path, metavar="PEM", help="serve https with this certificate (chain)"
    )
    parser.add_argument(
        "--tls-key", type=Path, metavar="PEM", help="its key, where it is in a file of its own"
    )
    parser.add_argument(
        "--slots", type=int, default=4, help="requests computed at once (%(default)s)"
    )
    parser.add_argument(
        "--ctx",
        type=int,
        default=None,
        metavar="TOKENS",
        help="context of each slot (the model's own, 4096 at most)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=None,
        help="fixed number of threads (the cores that other programs leave free)",
    )
    parser.add_argument(
        "--backend",
        choices=("auto", "cpu", "cuda", "llamacpp"),
        default="auto",
        help="who computes: cpu is albor's own kernels (Q4_0 and Q8_0 of Llama, Qwen2 and Qwen3), "
        "cuda its GPU kernels (Q4_0, needs albor[gpu]), llamacpp runs everything else "
        "(auto: cpu where it is fast, else llamacpp)",
    )
    parser.add_argument(
        "--fallback",
        choices=("none", "cpu"),
        default="none",
        help="with --backend cuda: cpu goes on with the CPU where the GPU can't be used or fails, "
        "running requests included; none ends the start with the reason, and answers 503 later "
        "(%(default)s)",
    )
    parser.add_argument(
        "--alias",
        action="append",
        default=[],
        metavar="NAME[=MODEL]",
        help="further name for the model of that name, or for the first; may be given several "
        "times",
    )
    parser.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="key that requests must bring; may be given several times. Other users of this "
        "machine can see it here: prefer --api-key-file or the variable ALBOR_API_KEY",
    )
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="file with one key on each line; # starts a comment line",
    )
    parser.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="site whose pages may use the server, such as https://example.org, or * for all; "
        "may be given several times (none)",
    )
    parser.add_argument(
        "--no-speculation",
        action="store_true",
        help="compute every token alone instead of verifying guessed ones",
    )
    parser.add_argument(
        "--min-confidence",
        type=_probability,
        default=0.0,
        metavar="P",
        help="end suggestions before their first token that is less likely than P, for clients "
        "that do not say so themselves; 0.3 hides many wrong ones (%(default)s)",
    )
    parser.add_argument(
        "--log-level",
        default="warning",
        choices=("debug", "info", "warning", "error"),
        help="how much to log (%(default)s); info logs each request",
    )
    parser.add_argument(
        "--log-format",
        default="text",
        choices=("text", "json"),
        help="log lines for people or JSON objects, on standard error (%(default)s)",
    )
    parser.add_argument(
        "--log-prompts",
        action="store_true",
        help="log each request with its body, code and all; nothing of it is logged otherwise",
    )
    parser.add_argument("--version", action="version", version=f"albor {__version__}")
    return parser


def _warm_up(loaded: LoadedModel) -> float:
    """Complete once, so that the first person does not wait for page faults; returns ms."""
    from albor_serve.config import SamplingParams
    from albor_serve.sequence import Event, Failed, Finished, GenerateRequest

    tokens = loaded.engine.tokenizer.encode("def main():\n") or [0]
    request = GenerateRequest(tuple(tokens), 2, SamplingParams(temperature=0.0))
    ends: list[Event] = []
    done = threading.Event()

    def receive(event: Event) -> None:
        if isinstance(event, Finished | Failed):
            ends.append(event)
            done.set()

    loaded.engine.submit(request, receive)
    done.wait()
    end = ends[0]
    if isinstance(end, Failed):
        raise end.error
    assert isinstance(end, Finished)
    return end.timings.prefill_ms


def _greeting(
    loaded: ServedModel, address: str, num_more: int, start_s: float, first_token_ms: float
) -> str:
    info = loaded.engine.backend.info
    fim = f"fill-in-the-middle: {loaded.template.family}" if loaded.template else "no FIM"
    more = f"{num_more} more models on demand: GET /v1/models\n" if num_more else ""
    example = json.dumps({"prompt": "def fib(n):\n", "max_tokens": 32, "temperature": 0})
    curl, base = "curl", address
    if address.startswith("unix:"):
        curl, base = f"curl --unix-socket {shlex.quote(address[5:])}", "http://localhost"
    return (
        f"albor {__version__}: {loaded.name} ({loaded.description}, {fim}) on {info.device}, "
        f"{info.num_slots} slots of {loaded.engine.max_seq_len} tokens\n"
        f"{more}"
        f"listening on {address} after {start_s:.2f} s; first token in {first_token_ms:.0f} ms\n"
        f"try: {curl} {base}/v1/completions -d '{example}'"
    )


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no probability: give a number from 0 to 1")
    return value


def _allowed_hosts(host: str) -> tuple[str, ...] | None:
    """Host names that requests may use; None where the server is meant for other machines."""
    if host in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        return None
    return ("localhost", "127.0.0.1", "[::1]", _as_url_host(host).lower())


def _as_url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _convert(arguments: list[str]) -> int:
    parser = _Parser(
        prog="albor-serve convert",
        description="Write a Hugging Face folder or a GGUF file as a (quantized) GGUF file.",
        epilog=CONVERT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("src", type=Path, metavar="SRC", help="folder or .gguf file to read")
    parser.add_argument("out", type=Path, metavar="OUT.gguf", help="file to write")
    parser.add_argument(
        "--quant",
        default="q4_0",
        choices=("q4_0", "q8_0", "f16", "f32"),
        help="format of the matrices, embeddings included (%(default)s)",
    )
    options = parser.parse_args(arguments)

    from albor_serve.convert import convert

    with _ProgressLine() as progress:
        report = convert(
            options.src,
            options.out,
            options.quant,
            lambda done, total, name: progress.show(f"converting {name}", done / max(total, 1)),
        )
    print(
        f"{report.out}: {report.out_bytes / 1e6:.1f} MB, {report.num_weights / 1e6:.1f}M weights, "
        f"{report.bits_per_weight:.2f} bits each, relative error {report.relative_error:.4f}, "
        f"{report.seconds:.1f} s"
    )
    return 0


class _ProgressLine:
    """A progress bar on a terminal, after half a second; nothing elsewhere."""

    DELAY_S = 0.5

    def __init__(self, stop: threading.Event | None = None) -> None:
        """Once `stop` is set, `show` raises KeyboardInterrupt, which ends what it reports on."""
        self._stop = stop
        self._started = time.perf_counter()
        self._bar: Progress | None = None

    def __enter__(self) -> _ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, text: str, part: float) -> None:
        """Say what is being done and how much of it is, 0.0 to 1.0."""
        if self._stop is not None and self._stop.is_set():
            raise KeyboardInterrupt
        if not sys.stderr.isatty() or time.perf_counter() - self._started < self.DELAY_S:
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._bar.add_task("", total=1.0)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=part, description=text[:60])
