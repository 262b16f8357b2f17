"""albor-train: the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from albor_serve.errors import AlborError
from albor_train.spec import load_spec

if TYPE_CHECKING:
    from albor_train.scaling import Point

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors are one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except AlborError as error:
        print(f"albor-train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("albor-train: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="albor-train", description="Train small Python models, each from a committed spec."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    cores = max(1, os.cpu_count() or 1)

    def command(name: str, run: object, text: str, *, spec: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if spec:
            sub.add_argument("spec", type=Path, metavar="SPEC", help="YAML file")
        return sub

    def add_work(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--work", type=Path, default=Path("work"), help="folder of artefacts (default: work)"
        )
        sub.add_argument(
            "--jobs", type=int, default=cores, help=f"processes to use (default: {cores})"
        )

    command("plan", _plan, "print what a spec would do; reads and writes nothing else")

    sub = command("pin", _pin, "pin packages of the index into a lock file", spec=False)
    sub.add_argument("names", nargs="+", metavar="NAME[==VERSION]")
    sub.add_argument("--lock", type=Path, required=True, help="lock file to extend")
    sub.add_argument("--work", type=Path, default=Path("work"), help="folder of artefacts")

    sub = command("data", _data, "make corpus, tokenizer and token shards")
    add_work(sub)
    sub.add_argument("--shard-mib", type=int, default=36, help="largest shard (default: 36)")

    sub = command("tokenizers", _tokenizers, "bytes per token of tokenizers on held-out text")
    add_work(sub)
    sub.add_argument(
        "tokenizers", type=Path, nargs="+", metavar="FILE", help="tokenizer.json or .gguf"
    )

    sub = command("train", _train, "pack and train, or go on training; torchrun starts several")
    add_work(sub)
    sub.add_argument("--tokens", type=Path, required=True, help="folder of token shards")
    sub.add_argument("--out", type=Path, required=True, dest="folder", help="the run's folder")
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    sub.add_argument("--stop-after", type=int, help="most steps to do now")
    sub.add_argument("--max-seconds", type=float, help="begin no step after so long")
    sub.add_argument("--balance", action="store_true", help="give faster processes more work")

    sub = command("report", _report, "write a run's curves as an HTML file", spec=False)
    sub.add_argument("folder", type=Path, metavar="RUN")
    sub.add_argument("out", type=Path, metavar="OUT.html")

    sub = command("bench", _bench, "time training steps of several variants")
    sub.add_argument("--variants", nargs="+", metavar="VARIANT", help="such as plain ours:rows=32")
    sub.add_argument("--steps", type=_positive, default=8, help="timed of each (%(default)s)")
    sub.add_argument("--batch-tokens", type=_positive, help="of one step, instead of the spec's")
    sub.add_argument(
        "--max-seconds", type=float, default=280.0, help="begin no variant later (%(default)s)"
    )
    sub.add_argument("--profile", metavar="VARIANT", help="only list this variant's kernels")
    sub.add_argument("--json", type=Path, metavar="OUT", help="write all figures")
    sub.add_argument("--tiny", action="store_true", help="at a size for two CPU cores")
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")

    sub = command("scaling", _scaling, "fit finished runs and predict others", spec=False)
    sub.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders or .json files")
    sub.add_argument(
        "--bytes-per-token", type=float, default=3.64, help="of the runs' tokenizer (%(default)s)"
    )
    sub.add_argument(
        "--unique-tokens",
        type=float,
        default=203.5e6,
        help="one pass of the runs' text (%(default)g)",
    )
    sub.add_argument(
        "--predict",
        action="append",
        default=[],
        metavar="PARAMETERS:TOKENS[:UNIQUE]",
        help="such as 400e6:10e9; may be given several times",
    )
    sub.add_argument("--plot", type=Path, metavar="OUT.svg", help="draw the curves")

    sub = command("export", _export, "write checkpoints as a model folder, averaged", spec=False)
    sub.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    sub.add_argument("--out", type=Path, required=True, help="new folder")
    sub.add_argument("--ema", action="store_true", help="take the running averages")
    sub.add_argument("--quant", nargs="*", default=[], choices=("q4_0", "q8_0", "f16", "f32"))

    sub = command("eval", _eval, "measure a model on what a spec names")
    add_work(sub)
    sub.add_argument("model", type=Path, metavar="MODEL", help="checkpoint folder or .gguf file")
    sub.add_argument("--benchmarks", nargs="*", metavar="NAME", help="instead of the spec's")
    sub.add_argument("--every", type=_positive, default=1, help="take every n-th problem")
    sub.add_argument(
        "--stop-scope",
        choices=("none", "line", "block", "scope"),
        default="none",
        help="where albor-serve ends infilling answers of a .gguf file (%(default)s)",
    )
    sub.add_argument("--no-held-out", action="store_true", help="run only the benchmarks")
    sub.add_argument(
        "--sandbox-python",
        default=sys.executable,
        metavar="PYTHON",
        help="interpreter with the libraries of DS-1000 (default: this one)",
    )
    sub.add_argument("--out", type=Path, required=True, help="folder of results")
    sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu")

    sub = command("reproduce", _reproduce, "walk the whole path of a spec")
    add_work(sub)
    sub.add_argument("--tiny", action="store_true", help="at a size for two CPU cores")
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _progress(what: str, done: int, total: int) -> None:
    end = "\n" if done == total else "\r"
    if sys.stderr.isatty() or done == total or done % 50 == 0:
        of = f" of {total}" if total else ""
        print(f"{what}: {done}{of}", file=sys.stderr, end=end, flush=True)


def _plan(options: argparse.Namespace) -> None:
    from albor_train.plan import plan_lines

    print("\n".join(plan_lines(load_spec(options.spec))))


def _pin(options: argparse.Namespace) -> int:
    from albor_train.errors import DataError
    from albor_train.sources import pin, read_lock, write_lock

    known = {p.name: p for p in read_lock(options.lock)} if options.lock.exists() else {}
    refused = 0
    for text in options.names:
        name, _, version = text.partition("==")
        try:
            package = pin(name, version, options.work / "packages")
        except DataError as error:
            refused += 1
            _say(f"refused: {error}")
            continue
        known[package.name] = package
        _say(f"{package.name} {package.version}, {package.licence}")
        write_lock(known.values(), options.lock)
    return 1 if refused else 0


def _data(options: argparse.Namespace) -> None:
    from albor_train.ladder import prepare

    spec = load_spec(options.spec)
    corpus, tokens = prepare(
        spec,
        options.work,
        processes=options.jobs,
        shard_bytes=options.shard_mib << 20,
        progress=_progress,
    )
    print(corpus.folder)
    print(tokens.folder)


def _tokenizers(options: argparse.Namespace) -> None:
    from albor_train.data import build_held_out, read_documents
    from albor_train.tokenizer import bytes_per_token, open_encoder

    spec = load_spec(options.spec)
    held_out = build_held_out(spec, options.work, processes=options.jobs, progress=_progress)
    documents = list(read_documents(held_out.folder / "validation.jsonl.gz"))
    projects = sorted({document.project for document in documents})
    print(f"| tokenizer | all | {' | '.join(projects)} |")
    print("|---" * (len(projects) + 2) + "|")
    for path in options.tokenizers:
        encode = open_encoder(path)
        cells = [bytes_per_token(encode, [document.text for document in documents])]
        for project in projects:
            texts = [document.text for document in documents if document.project == project]
            cells.append(bytes_per_token(encode, texts))
        name = path.parent.name if path.name == "tokenizer.json" else path.stem
        print(f"| {name} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")


def _train(options: argparse.Namespace) -> None:
    from albor_train.ladder import train
    from albor_train.monitor import Monitor
    from albor_train.pack import open_tokens
    from albor_train.world import open_world

    spec = load_spec(options.spec)
    with open_world(options.device) as world, Monitor(spec.train.steps) as monitor:
        records = train(
            spec,
            open_tokens(options.tokens),
            options.work,
            options.folder,
            world,
            processes=options.jobs,
            stop_after=options.stop_after,
            max_seconds=options.max_seconds,
            balance=options.balance,
            on_step=monitor.on_step,
            say=_say,
        )
        if world.is_first and not records:
            _say(f"{options.folder} has done its {spec.train.steps} steps already")


def _report(options: argparse.Namespace) -> None:
    from albor_train.monitor import write_report

    write_report(options.folder, options.out)


def _bench(options: argparse.Namespace) -> None:
    from albor_train.artefact import write_json
    from albor_train.bench import DEFAULT_VARIANTS, bench, profile, table
    from albor_train.world import open_world

    spec = load_spec(options.spec)
    if options.tiny:
        # Only here: the ladder's modules need more packages than a machine for timings may have.
        from albor_train.ladder import tiny

        spec = tiny(spec)
    with open_world(options.device) as world:
        if options.profile:
            print(
                profile(
                    spec, options.profile, device=world.device, batch_tokens=options.batch_tokens
                )
            )
            return
        rows = bench(
            spec,
            options.variants or DEFAULT_VARIANTS,
            device=world.device,
            steps=options.steps,
            batch_tokens=options.batch_tokens,
            max_seconds=options.max_seconds,
            say=_say,
        )
    print(table(rows), end="")
    if options.json is not None:
        write_json(options.json, {"spec": spec.name, "rows": [dataclasses.asdict(r) for r in rows]})


def _scaling(options: argparse.Namespace) -> None:
    from albor_train.scaling import draw, fit, read_points, report

    points = read_points(options.runs, options.bytes_per_token, options.unique_tokens)
    laws = fit(points)
    targets = [_target(text) for text in options.predict]
    print(report(points, laws, targets), end="")
    if options.plot is not None:
        options.plot.write_text(draw(points, laws, targets), "utf-8")


def _target(text: str) -> Point:
    from albor_train.errors import TrainingError
    from albor_train.scaling import Point

    try:
        parameters, tokens, *rest = map(float, text.split(":"))
        (unique,) = rest or [tokens]
    except ValueError as error:
        raise TrainingError(
            f"--predict is {text!r}: give PARAMETERS:TOKENS or PARAMETERS:TOKENS:UNIQUE"
        ) from error
    name = f"{parameters / 1e6:.0f}M on {tokens / 1e6:,.0f}M"
    return Point(name, parameters, tokens, unique, float("nan"))


def _export(options: argparse.Namespace) -> None:
    from albor_train.export import export_folder, export_gguf

    export_folder(options.checkpoints, options.out, ema=options.ema)
    for quant in options.quant:
        report = export_gguf(options.out, options.out / f"{options.out.name}-{quant}.gguf", quant)
        _say(f"{report.out}: {report.out_bytes / 1e6:.1f} MB")


def _eval(options: argparse.Namespace) -> None:
    from albor_train.data import build_held_out
    from albor_train.evaluate.measure import table
    from albor_train.ladder import evaluate

    spec = load_spec(options.spec)
    if options.benchmarks is not None:
        chosen = dataclasses.replace(spec.evaluate, benchmarks=tuple(options.benchmarks))
        spec = dataclasses.replace(spec, evaluate=chosen)
    held_out = None
    if not options.no_held_out:
        held_out = build_held_out(spec, options.work, processes=options.jobs, progress=_progress)
    results = evaluate(
        spec,
        options.model,
        held_out,
        options.out,
        device=options.device,
        processes=options.jobs,
        every=options.every,
        python=options.sandbox_python,
        stop_scope=options.stop_scope,
        say=_say,
    )
    print(table({options.model.stem: results}))


def _reproduce(options: argparse.Namespace) -> None:
    from albor_train.ladder import reproduce, tiny
    from albor_train.world import open_world

    spec = load_spec(options.spec)
    if options.tiny:
        spec = tiny(spec)
    with open_world("cpu" if options.tiny else options.device) as world:
        scores = reproduce(spec, options.work, world=world, processes=options.jobs, say=_say)
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    sys.exit(main())
