"""The albor-bench command."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from albor_serve.bench.gpu_command import add_gpu
from albor_serve.bench.replay.command import add_replay
from albor_serve.errors import AlborError, ConfigError

__all__ = ["main"]

PEER_HINT = "pip install 'albor[bench]', or name a program with --llama-server"
HELP = """\
examples:
  albor-bench decode                                  the embedded model and two larger shapes
  albor-bench decode model.gguf --peers none          one file, albor alone
  albor-bench decode --http --json out.json --plot out.png
  albor-bench perplexity a.gguf b.gguf --text src/*.py
  albor-bench infill --data HumanEval-SingleLineInfilling.jsonl.gz --every 10
  albor-bench cancel --rounds 100                     a client goes away: when is its slot free?
  albor-bench replay --scenes 12 --plot replay.png    what a person feels while typing
  albor-bench gpu --shape 350m --json gpu.json        one GPU, beside torch and llama.cpp

Peers: llama-server (as its users start it), llama-server-noflash (without flash attention, which
slows decoding on CPUs; albor does without it, too), llama-cpp-python (as its users call it),
llama-cpp-python-loop (its token loop alone, on the same native library as albor's).
The peers llama-server and matplotlib come with: pip install 'albor[bench]'
Close other programs first: engines whose threads wait for each other suffer most.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="albor-bench",
        description="Measure albor on this machine, beside its peers.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_decode(commands)
    _add_perplexity(commands)
    _add_infill(commands)
    _add_cancel(commands)
    add_replay(commands)
    _add_load(commands)
    add_gpu(commands)
    options = parser.parse_args(argv)
    options.command = shlex.join(["albor-bench", *(sys.argv[1:] if argv is None else argv)])
    try:
        code: int = options.run(options)
    except ConfigError as error:
        print(f"albor-bench: {error}", file=sys.stderr)
        return 2
    except AlborError as error:
        print(f"albor-bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return code


def _add_decode(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("decode", help="decode and prefill speed, memory")
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help=".gguf files")
    parser.add_argument(
        "--shapes",
        default=None,
        help="comma-separated: 33m, 125m, 350m with random weights (125m,350m beside the "
        "embedded model where no MODEL is given)",
    )
    parser.add_argument("--prompt-len", type=int, default=512, help="tokens (%(default)s)")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (%(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="(the physical cores)")
    parser.add_argument(
        "--peers",
        default=None,
        help="comma-separated, or none (all that are installed; see below)",
    )
    parser.add_argument(
        "--http",
        action="store_true",
        help="also ask albor-serve and llama-server over HTTP, streamed, with the client's clock",
    )
    parser.add_argument(
        "--llama-server",
        type=Path,
        metavar="PROGRAM",
        help="a llama-server of your own instead of the one inside the package xllamacpp",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw ms/token (.png, .svg)")
    parser.set_defaults(run=_decode)


def _decode(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from albor_serve.backends.llamacpp_native import num_physical_cores
    from albor_serve.bench.decode import DecodeSettings, measure_model
    from albor_serve.bench.machine import describe_machine
    from albor_serve.bench.peers import PEERS
    from albor_serve.bench.report import decode_json, plot_decode, print_decode, write_text

    for name, low in (("prompt_len", 2), ("new", 2), ("repeats", 1)):
        if getattr(options, name) < low:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {low}")
    settings = DecodeSettings(
        prompt_len=options.prompt_len,
        num_new=options.new,
        repeats=options.repeats,
        threads=options.threads or num_physical_cores(),
        kinds=_chosen_kinds(options),
        llama_server=str(options.llama_server) if options.llama_server else None,
        command=options.command,
    )
    models = _chosen_models(options)
    # After all that can be wrong with the arguments: an error is one line.
    if options.peers is None:
        for peer in PEERS:
            if peer not in settings.kinds:
                print(f"left out: {peer}; {PEER_HINT}", file=sys.stderr)
    console = Console(width=None if sys.stdout.isatty() else 140)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring the machine", total=1.0)
        machine = describe_machine()

        def show(text: str, part: float) -> None:
            bar.update(task, description=text, completed=part)

        figures = [measure_model(path, name, settings, show) for name, path in models]
    print_decode(console, machine, figures, settings)
    if options.json:
        write_text(options.json, decode_json(machine, figures, settings))
    if options.plot:
        plot_decode(options.plot, machine, figures)
    return 0


def _chosen_kinds(options: argparse.Namespace) -> tuple[str, ...]:
    """Names of the engines to measure, albor first."""
    from albor_serve.bench.peers import HTTP_SUFFIX, NO_FLASH, PEERS, available_peers

    available = set(available_peers())
    if options.llama_server is not None:
        available |= {"llama-server", NO_FLASH}
    if options.peers is None:
        peers = tuple(peer for peer in PEERS if peer in available)
    else:
        peers = () if options.peers == "none" else tuple(dict.fromkeys(options.peers.split(",")))
    for peer in peers:
        if peer not in PEERS:
            raise ConfigError(f"no such peer: {peer}; there are {', '.join(PEERS)} and none")
        if peer not in available:
            raise ConfigError(f"the peer {peer} is not installed: {PEER_HINT}")
    kinds = ("albor", "albor+drafts", *peers)
    if options.http:
        asked = [kind for kind in ("albor", "llama-server", NO_FLASH) if kind in kinds]
        kinds += tuple(kind + HTTP_SUFFIX for kind in asked)
    return kinds


def _chosen_models(options: argparse.Namespace) -> list[tuple[str, Path]]:
    """(name, file) of what to measure."""
    from albor_serve.bench.shapes import SHAPES, shape_gguf
    from albor_serve.loader import embedded_path

    models = [(path.stem, path) for path in options.models]
    shapes = options.shapes
    if not models and shapes is None:
        models.append(("albor-33m", embedded_path()))
        shapes = "125m,350m"
    names = shapes.split(",") if shapes else []
    for name in names:
        if name not in SHAPES:
            raise ConfigError(f"no such shape: {name}; there are {', '.join(SHAPES)}")
    return models + [(name, shape_gguf(name)) for name in names]


def _add_perplexity(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("perplexity", help="how well models predict given files")
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help=".gguf files")
    parser.add_argument(
        "--text", nargs="+", type=Path, required=True, metavar="FILE", help="files to predict"
    )
    parser.add_argument("--ctx", type=int, default=1024, help="window in tokens (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=None, help="stop after so many tokens")
    parser.set_defaults(run=_perplexity)


def _perplexity(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from albor_serve.bench.perplexity import perplexity

    try:
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in options.text]
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from error
    results = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        for path in options.models:
            task = bar.add_task(path.name, total=None)

            def show(done: int, total: int, task: object = task) -> None:
                bar.update(task, completed=done, total=total)  # type: ignore[arg-type]

            results.append(
                perplexity(path, texts, options.ctx, show, max_tokens=options.max_tokens)
            )
    table = Table()
    for heading in ("model", "perplexity", "ratio to first", "bits/byte", "tokens"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for path, result in zip(options.models, results, strict=True):
        table.add_row(
            path.name,
            f"{result.perplexity:.4f}",
            f"{result.perplexity / results[0].perplexity:.4f}",
            f"{result.bits_per_byte:.4f}",
            str(result.num_tokens),
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 0


def _add_infill(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("infill", help="exact matches of a missing line, by cursor")
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL", help="(the embedded one)")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help="in HumanEval-Infilling's format"
    )
    parser.add_argument("--every", type=int, default=1, help="take every n-th problem")
    parser.add_argument("--path", metavar="NAME", help="put this file path before the code")
    parser.add_argument(
        "--extra", type=Path, metavar="FILE", help="put this other file before the code as well"
    )
    parser.set_defaults(run=_infill)


def _infill(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from albor_serve.bench.infill import read_problems, score_infill
    from albor_serve.fim import ExtraFile
    from albor_serve.loader import LoadOptions, load_model

    if options.every < 1:
        raise ConfigError("--every must be at least 1")
    problems = read_problems(options.data, options.every)
    extra: tuple[ExtraFile, ...] = ()
    if options.extra is not None:
        try:
            text = options.extra.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{options.extra} can't be read as text ({type(error).__name__}): give a file of "
                f"code"
            ) from error
        extra = (ExtraFile(options.extra.name, text),)
    loaded = load_model(options.model, LoadOptions(num_slots=1))
    try:
        if loaded.template is None:
            raise ConfigError(f"{loaded.name} was not trained to fill in the middle")
        loaded.engine.start()
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(f"{len(problems)} problems", total=1.0)

            def show(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            scores = score_infill(
                loaded.engine, loaded.template, problems, show, path=options.path, extra=extra
            )
    finally:
        loaded.engine.close()
    table = Table(
        title=f"{loaded.name}, {loaded.template.family}, {len(problems)} problems, greedy"
    )
    for heading in ("cursor", "token healing", "exact match"):
        table.add_column(heading)
    for score in scores:
        table.add_row(score.cursor, "yes" if score.is_healed else "no", f"{score.percent:.1f} %")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 0


def _add_cancel(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("cancel", help="time from a disconnect to the free slot")
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL", help="(the embedded one)")
    parser.add_argument("--rounds", type=int, default=50, help="of each phase (%(default)s)")
    parser.add_argument("--prompt-len", type=int, default=1500, help="tokens (%(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="(the physical cores)")
    parser.set_defaults(run=_cancel)


def _cancel(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from albor_serve.backends.llamacpp_native import num_physical_cores
    from albor_serve.bench.cancel import Phase, measure_cancels
    from albor_serve.bench.peers import AlborServer, PeerOptions
    from albor_serve.loader import embedded_path

    if options.rounds < 1 or options.prompt_len < 16:
        raise ConfigError("--rounds must be at least 1 and --prompt-len at least 16")
    path = options.model or embedded_path()
    threads = options.threads or num_physical_cores()
    table = Table(title=f"{path.name}: from a client's disconnect to the free slot")
    for heading in ("while", "rounds", "p50 ms", "p99 ms", "max ms", "one question ms"):
        table.add_column(heading)
    settings = PeerOptions(context=options.prompt_len + 512, threads=threads)
    with contextlib.closing(AlborServer("albor", path, settings)) as server:
        step = server.generate([*range(300, 316)], 64, fresh=True)
        phases: tuple[Phase, ...] = ("prefill", "decode")
        for phase in phases:
            times = measure_cancels(
                server.address, phase, options.rounds, prompt_len=options.prompt_len
            )
            table.add_row(
                phase,
                str(options.rounds),
                f"{times.quantile(0.5):.1f}",
                f"{times.quantile(0.99):.1f}",
                f"{max(times.free_ms):.1f}",
                f"{times.ask_ms:.1f}",
            )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(f"one decode step of this model here takes {step.decode_ms:.1f} ms")
    return 0


def _add_load(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("load", help="many clients at once against running servers")
    parser.add_argument(
        "servers", nargs="+", metavar="NAME=URL[#PID]", help="servers that speak /infill"
    )
    parser.add_argument("--clients", type=int, default=64, help="at once (%(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="for each server (%(default)s)")
    parser.add_argument("--new", type=int, default=24, help="tokens to generate (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures")
    parser.set_defaults(run=_load)


def _load(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from albor_serve.bench.machine import describe_machine
    from albor_serve.bench.mixed_load import (
        FINISHED_KINDS,
        LoadTarget,
        MixSettings,
        percentiles,
        run_load,
    )
    from albor_serve.bench.report import write_text

    targets = []
    for text in options.servers:
        name, is_named, rest = text.partition("=")
        url, _, pid = rest.partition("#")
        if not is_named or not url.startswith("http") or (pid and not pid.isdecimal()):
            raise ConfigError(
                f"{text} is not NAME=URL or NAME=URL#PID: give albor=http://HOST:PORT"
            )
        targets.append(LoadTarget(name, url, int(pid) if pid else None))
    settings = MixSettings(options.clients, options.seconds, options.rounds, options.new)
    machine = describe_machine()
    tallies = run_load(targets, settings)
    table = Table(title=f"{options.clients} clients, {machine.cpu}, commit {machine.commit}")
    headings = ["server", "first token p50/p95/p99 ms", *FINISHED_KINDS, "total p50/p95/p99 ms"]
    for heading in (
        *headings,
        "done",
        "tokens/s",
        "refused",
        "cancelled",
        "lost",
        "busy slots",
        "RSS MiB",
    ):
        table.add_column(heading)
    for name, tally in tallies.items():
        rss = tally.rss_mib
        table.add_row(
            name,
            *(
                " / ".join(f"{ms:.0f}" for ms in percentiles(tally.first_token_ms, kind))
                for kind in (None, *FINISHED_KINDS)
            ),
            " / ".join(f"{ms:.0f}" for ms in percentiles(tally.total_ms)),
            str(tally.num_finished),
            f"{tally.num_tokens / tally.seconds:.0f}",
            ", ".join(f"{n}x {status}" for status, n in sorted(tally.statuses.items())) or "0",
            str(tally.num_cancelled),
            str(tally.num_lost),
            "?" if tally.num_busy_slots is None else str(tally.num_busy_slots),
            f"{rss[0]:.0f} to {rss[-1]:.0f}" if rss else "?",
        )
    Console(width=None if sys.stdout.isatty() else 180).print(table)
    if options.json:
        figures = {
            "machine": machine.as_dict(),
            "command": options.command,
            "settings": asdict(settings),
            "servers": {name: asdict(tally) for name, tally in tallies.items()},
        }
        write_text(options.json, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
