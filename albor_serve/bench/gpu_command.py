"""albor-bench gpu: the command's arguments and its run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from albor_serve.errors import ConfigError

__all__ = ["add_gpu"]

HELP: Final = """\
Every row is printed and saved as it is measured. A row that fails says why.
Peers: torch-bf16 and torch-int4 (one token at a time, torch.compile and a CUDA graph),
transformers (generate with a static cache), llama.cpp (its llama-bench with CUDA: build one with
scripts/llama_cuda.sh and name it with --llama-bench).
"""
SHAPE_NAMES: Final = ("33m", "125m", "350m")


def add_gpu(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "gpu",
        help="tokens, prompts and suggestions on an NVIDIA GPU, beside its peers",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", type=Path, metavar="GGUF", help="a Q4_0 file")
    source.add_argument(
        "--shape", choices=SHAPE_NAMES, default="350m", help="random weights (%(default)s)"
    )
    parser.add_argument("--peers", metavar="NAMES", help="comma-separated, or none (all)")
    parser.add_argument("--llama-bench", type=Path, metavar="PROGRAM", help="built with CUDA")
    for name, what in (
        ("contexts", "tokens in the cache"),
        ("batches", "sequences at once"),
        ("rows", "tokens at once, for drafts to verify"),
        ("prompts", "tokens of prompts"),
    ):
        parser.add_argument(f"--{name}", metavar="N,N,...", help=what)
    parser.add_argument("--repeats", type=int, default=30, help="of each row (%(default)s)")
    parser.add_argument(
        "--max-seconds", type=float, default=540.0, metavar="S", help="for all (%(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all rows")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw µs a token (.png, .svg)")
    parser.set_defaults(run=_gpu)


def _gpu(options: argparse.Namespace) -> int:
    from albor_serve.bench.gpu import GPU_PEERS, GpuJob, run_gpu
    from albor_serve.bench.gpu_rows import GpuReport

    if options.repeats < 1:
        raise ConfigError(f"--repeats is {options.repeats}: it must be at least 1")
    if not options.max_seconds > 0:
        raise ConfigError(f"--max-seconds is {options.max_seconds}: it must be above 0")
    if options.model is not None and not options.model.is_file():
        raise ConfigError(f"there is no file {options.model}: name a Q4_0 .gguf file")
    peers = GPU_PEERS
    if options.peers is not None:
        names = [] if options.peers == "none" else options.peers.split(",")
        peers = tuple(dict.fromkeys(names))
    for peer in peers:
        if peer not in GPU_PEERS:
            raise ConfigError(f"no such peer: {peer}; there are {', '.join(GPU_PEERS)} and none")
    plain = GpuJob()
    job = GpuJob(
        shape=options.shape,
        model=None if options.model is None else str(options.model),
        contexts=_numbers("contexts", options.contexts, plain.contexts, 1 << 17),
        batches=_numbers("batches", options.batches, plain.batches, 64),
        rows=_numbers("rows", options.rows, plain.rows, 256),
        prompts=_numbers("prompts", options.prompts, plain.prompts, 1 << 17),
        repeats=options.repeats,
    )
    report = GpuReport(
        model=options.shape if options.model is None else options.model.stem,
        command=options.command,
        path=options.json,
        show=lambda line: print(line, flush=True),
    )
    is_whole = run_gpu(
        job,
        report,
        peers=peers,
        max_seconds=options.max_seconds,
        llama_bench=options.llama_bench,
    )
    for line in report.ratios():
        report.show(line)
    if options.plot is not None:
        report.plot(options.plot)
    return 0 if is_whole else 1


def _numbers(name: str, text: str | None, plain: tuple[int, ...], most: int) -> tuple[int, ...]:
    """What an option of several numbers says.

    Raises:
        ConfigError: it is not a list of numbers from 1 to `most`.
    """
    if text is None:
        return plain
    parts = text.split(",")
    if not all(part.isdecimal() and 1 <= int(part) <= most for part in parts):
        raise ConfigError(f"--{name} is {text!r}: give numbers from 1 to {most}, such as 1,2,4")
    return tuple(dict.fromkeys(int(part) for part in parts))
