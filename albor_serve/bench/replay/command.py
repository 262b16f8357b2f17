"""albor-bench replay: the command's arguments and its run."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import sys
from pathlib import Path
from typing import Any, Final

from albor_serve.errors import ConfigError

__all__ = ["add_replay"]

LLAMA_HINT: Final = "pip install 'albor[bench]', or name a program with --llama-server"
LSP_HINT: Final = "install albor with its language server, or name one with --lsp"
HELP = """\
clients:
  albor        albor-lsp in front of albor-serve, in real time (it works ahead unseen)
  llama-vim    llama.vim's algorithm in front of llama-server
  llama-plain  llama-server behind a plain client, 350 ms debounce
  albor-plain  albor-serve behind the same plain client
  albor-eager  albor-serve asked at each key, newest request first, no language server
  albor-eager-nodrafts  the same without drafted tokens

Every client gets the same scenes, the same keys at the same pauses and the same model, and a
server of its own. Time in which nothing is in flight is not waited for; --real-time waits.
"""


def add_replay(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "replay",
        help="what a person feels: real typing against running stacks",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL", help="(the embedded one)")
    parser.add_argument("--client", action="append", metavar="NAME", help="(all; repeatable)")
    parser.add_argument("--scenes", type=int, default=None, metavar="N", help="how many (all)")
    parser.add_argument("--seed", type=int, default=0, help="of typing and choice (%(default)s)")
    parser.add_argument("--fast", action="store_true", help="a fast typist")
    parser.add_argument("--real-time", action="store_true", help="wait idle pauses out")
    parser.add_argument(
        "--threads",
        type=int,
        default=None,
        help="fixed number (albor-serve: its own choice; others: the physical cores)",
    )
    parser.add_argument(
        "--interleave",
        action="store_true",
        help="all clients at once, scene by scene in random order: what else the machine does "
        "then falls on all of them",
    )
    parser.add_argument("--ctx", type=int, default=2048, help="tokens (%(default)s)")
    parser.add_argument(
        "--llama-server",
        type=Path,
        metavar="PROGRAM",
        help="a llama-server of your own instead of the one inside the package xllamacpp",
    )
    parser.add_argument(
        "--lsp", metavar="COMMAND", help="the language server to start (albor-lsp of this Python)"
    )
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="add the client albor under another name and with these settings; repeatable, so "
        "that techniques can be switched off one at a time",
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="scenes (those of albor)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw them (.png, .svg)")
    parser.set_defaults(run=_replay)


def _replay(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from albor_serve.backends.llamacpp_native import num_physical_cores
    from albor_serve.bench.machine import describe_machine
    from albor_serve.bench.peers import PeerOptions
    from albor_serve.bench.replay.report import plot_replay, print_replay, replay_json
    from albor_serve.bench.replay.run import ReplaySettings, replay_clients
    from albor_serve.bench.replay.scenes import load_scenes, pick_scenes
    from albor_serve.bench.replay.typist import FAST, NORMAL
    from albor_serve.bench.report import write_text
    from albor_serve.loader import embedded_path

    lsp_command = _lsp_command(options.lsp)
    variants = dict(_variant(text) for text in options.variant)
    names = _chosen_clients(options, has_lsp=lsp_command is not None)
    if variants and lsp_command is None:
        raise ConfigError(f"--variant needs the language server: {LSP_HINT}")
    names += [name for name in variants if name not in names]
    if options.scenes is not None and options.scenes < 1:
        raise ConfigError("--scenes must be at least 1")
    settings = ReplaySettings(
        model=options.model or embedded_path(),
        options=PeerOptions(
            options.ctx,
            options.threads or num_physical_cores(),
            options.llama_server,
            albor_chooses_threads=options.threads is None,
        ),
        typist=FAST if options.fast else NORMAL,
        seed=options.seed,
        skip_idle=not options.real_time,
        lsp_command=lsp_command or (),
        variants=variants,
        command=options.command,
    )
    scenes = pick_scenes(load_scenes(options.data), options.scenes, options.seed)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring the machine", total=1.0)
        machine = describe_machine()

        def show(text: str, part: float) -> None:
            bar.update(task, description=text, completed=part)

        groups = [names] if options.interleave else [[name] for name in names]
        figures = [one for group in groups for one in replay_clients(group, scenes, settings, show)]
    print_replay(Console(width=None if sys.stdout.isatty() else 140), machine, figures, settings)
    if options.json:
        write_text(options.json, replay_json(machine, figures, settings))
    if options.plot:
        plot_replay(options.plot, figures)
    return 0


def _lsp_command(text: str | None) -> tuple[str, ...] | None:
    """How to start the language server; None if it is not installed."""
    if text is not None:
        return tuple(shlex.split(text))
    if importlib.util.find_spec("albor_lsp") is None:
        return None
    return sys.executable, "-c", "import sys; from albor_lsp.cli import main; sys.exit(main())"


def _variant(text: str) -> tuple[str, dict[str, Any]]:
    name, _, settings = text.partition("=")
    try:
        value = json.loads(settings)
    except ValueError:
        value = None
    if not name or not isinstance(value, dict):
        raise ConfigError(f"--variant {text}: write NAME={{...}}, settings as a JSON object")
    return name, value


def _chosen_clients(options: argparse.Namespace, *, has_lsp: bool) -> list[str]:
    """Names, in the order given; without any, all that can be run."""
    from albor_serve.bench.peers import available_peers
    from albor_serve.bench.replay.run import CLIENTS, OURS

    has_llama = options.llama_server is not None or "llama-server" in available_peers()
    hints = {}
    for name, kind in CLIENTS.items():
        if kind.server != "albor" and not has_llama:
            hints[name] = LLAMA_HINT
        if name == OURS and not has_lsp:
            hints[name] = LSP_HINT
    if not options.client:
        for name, hint in hints.items():
            print(f"left out: {name}; {hint}", file=sys.stderr)
        return [name for name in CLIENTS if name not in hints]
    for name in options.client:
        if name not in CLIENTS:
            raise ConfigError(f"no such client: {name}; there are {', '.join(CLIENTS)}")
        if name in hints:
            raise ConfigError(f"the client {name} can't run: {hints[name]}")
    return list(dict.fromkeys(options.client))
