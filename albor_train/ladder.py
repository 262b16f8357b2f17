"""From a spec to a measured model: the steps in order, each skipped if its result is there."""

from __future__ import annotations

import dataclasses
import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from albor_serve.checkpoint import open_checkpoint
from albor_serve.model import load_decoder
from albor_train.artefact import Artefact, make
from albor_train.batches import RowStream
from albor_train.data import Progress, build_corpus, read_documents
from albor_train.errors import EvaluationError, TrainingError
from albor_train.evaluate.generate import Answerer, AnySource
from albor_train.evaluate.measure import (
    Result,
    bits_per_byte,
    fim_on_held_out,
    run_benchmark,
    write_results,
)
from albor_train.evaluate.served import serve_answers
from albor_train.export import export_folder, export_gguf
from albor_train.pack import Pack, build_pack, build_tokenizer, build_tokens, open_pack
from albor_train.runs import latest_checkpoint
from albor_train.serving import serves
from albor_train.spec import Spec, check_epochs, content_hash
from albor_train.train import StepRecord, Trainer
from albor_train.world import World

__all__ = ["evaluate", "prepare", "reproduce", "tiny", "train"]

SHARD_BYTES: Final = 36 << 20
"""Default size of a token shard."""

Say = Callable[[str], None]


def tiny(spec: Spec) -> Spec:
    """The same path at a size that two CPU cores walk in minutes: same data rules, small shape.

    Only the spec's folders are read where it has any, so that no network is needed.
    """
    folders = spec.data.folders
    lock = "" if folders else spec.data.lock
    return dataclasses.replace(
        spec,
        name=f"{spec.name}-tiny",
        data=dataclasses.replace(spec.data, lock=lock, held_out=_known_held_out(spec, lock)),
        tokenizer=dataclasses.replace(spec.tokenizer, vocab_size=2048, sample_bytes=4_000_000),
        model=dataclasses.replace(
            spec.model,
            hidden_size=128,
            intermediate_size=384,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            max_seq_len=512,
        ),
        fim=dataclasses.replace(spec.fim, chunk_chars=1200),
        train=dataclasses.replace(
            spec.train,
            steps=100,
            epochs=4,
            batch_tokens=4096,
            micro_batch_rows=8,
            sequence_len=512,
            lr=5e-3,
            warmup_steps=10,
            dtype="float32",
            compile=False,
            attention="document_mask",
            loss_chunk_tokens=1024,
            checkpoint_every=50,
            validate_every=50,
            validation_tokens=16_384,
        ),
        evaluate=dataclasses.replace(
            spec.evaluate, held_out_tokens=8_192, fim_examples=8, benchmarks=()
        ),
    )


def _known_held_out(spec: Spec, lock: str) -> tuple[str, ...]:
    if lock:
        return spec.data.held_out
    names = {source.project for source in spec.data.folders}
    return tuple(name for name in spec.data.held_out if name in names)


def prepare(
    spec: Spec,
    work: Path,
    *,
    processes: int = 1,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> tuple[Artefact, Artefact]:
    """Corpus, tokenizer and token shards; returns (corpus, tokens)."""
    corpus = build_corpus(spec, work, processes=processes, progress=progress)
    tokenizer = build_tokenizer(spec, corpus, work)
    tokens = build_tokens(corpus, tokenizer, work, max_shard_bytes=shard_bytes, progress=progress)
    return corpus, tokens


def train(
    spec: Spec,
    tokens: Artefact,
    work: Path,
    run: Path,
    world: World,
    *,
    processes: int = 1,
    stop_after: int | None = None,
    max_seconds: float | None = None,
    balance: bool = False,
    on_step: Callable[[StepRecord], None] | None = None,
    say: Say = lambda _: None,
) -> list[StepRecord]:
    """Train or go on training; epochs are packed ahead in the background as they are needed.

    The first process packs; the others wait for its packs.
    """
    rows_per_step = spec.train.batch_tokens // spec.train.sequence_len
    needed = spec.train.steps * rows_per_step
    if stop_after is not None:
        needed = min(needed, (_steps_done(run) + stop_after) * rows_per_step)

    def pack(epoch: int = 0, split: str = "train", fim_rate: float | None = None) -> Pack:
        made = build_pack(
            spec,
            tokens,
            work,
            epoch=epoch,
            split=split,
            fim_rate=fim_rate,
            processes=processes,
            wait=not world.is_first,
        )
        return open_pack(made)

    first = pack()
    check_epochs(spec.train, len(first.rows))
    say(f"epoch 1: {len(first.rows):,} rows; the run needs {needed:,}")
    stream = RowStream([first], is_open=True)
    # What was learned from already must be there before the run can go on.
    epoch = 1
    while len(stream) < _steps_done(run) * rows_per_step:
        stream.append(pack(epoch))
        epoch += 1
    validation = {
        name: RowStream([pack(split="validation", fim_rate=rate)])
        for name, rate in (("left_to_right", 0.0), ("fim", 1.0))
    }

    def fill() -> None:
        error: BaseException | None = None
        try:
            # An epoch's rows differ a little from the first one's: one more than asked may do.
            for number in range(epoch, spec.train.epochs + 1):
                if len(stream) >= needed:
                    break
                stream.append(pack(number))
        except BaseException as caught:  # noqa: BLE001 - handed to whoever waits for the rows
            error = caught
        stream.finish(error)

    threading.Thread(target=fill, name="packing", daemon=True).start()
    try:
        trainer = Trainer(
            spec,
            stream,
            tokens.folder,
            run,
            world,
            validation=validation,
            balance=balance,
            on_step=on_step,
        )
        return trainer.run(stop_after=stop_after, max_seconds=max_seconds)
    finally:
        stream.finish()


def _steps_done(run: Path) -> int:
    checkpoint = latest_checkpoint(run)
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("step-"))


def evaluate(
    spec: Spec,
    model: Path,
    held_out: Artefact | None,
    out: Path,
    *,
    device: str = "cpu",
    processes: int = 2,
    every: int = 1,
    python: str = sys.executable,
    stop_scope: str = "none",
    say: Say = lambda _: None,
) -> list[Result]:
    """Measure a model on everything that the spec names, and write the results.

    Args:
        model: a checkpoint folder, read by the reference decoder, or a GGUF file, which albor-serve
            answers for (bits per byte come from its weights in the reference decoder).
        held_out: folder with validation.jsonl.gz, or None to run only the benchmarks.
        every: take every n-th problem of the benchmarks.
        python: interpreter of the sandbox.
        stop_scope: of the server's infilling answers; only for GGUF files.

    Raises:
        EvaluationError: a measurement would mean nothing.
    """
    if model.suffix == ".gguf":
        with serve_answers(model, stop_scope=stop_scope) as served:
            return _measure(spec, model, served, held_out, out, processes, every, python, say)
    if stop_scope != "none":
        raise EvaluationError(f"{model} is no .gguf file: only albor-serve ends answers by scope")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    answerer = Answerer(model, device=device, dtype=dtype)
    return _measure(spec, model, answerer, held_out, out, processes, every, python, say)


def _measure(
    spec: Spec,
    model: Path,
    source: AnySource,
    held_out: Artefact | None,
    out: Path,
    processes: int,
    every: int,
    python: str,
    say: Say,
) -> list[Result]:
    results: list[Result] = []
    details: dict[str, list[dict[str, Any]]] = {}
    if held_out is not None:
        documents = list(read_documents(held_out.folder / "validation.jsonl.gz"))
        results += bits_per_byte(source, documents, spec.evaluate.held_out_tokens)
        say(f"{results[0].value:.4f} bits for each byte of held-out text")
        if spec.evaluate.fim_examples:
            results += fim_on_held_out(
                source, documents, per_kind=spec.evaluate.fim_examples, seed=spec.seed
            )
    for name in spec.evaluate.benchmarks:
        found, details[name] = run_benchmark(
            source,
            spec.path(spec.data.evaluation),
            name,
            num_samples=spec.evaluate.num_samples,
            temperature=spec.evaluate.temperature,
            seed=spec.seed,
            processes=processes,
            every=every,
            python=python,
        )
        results += found
        say(f"{name}: {found[0].metric} {found[0].value:.3f}")
    config = {
        "n_samples": spec.evaluate.num_samples,
        "temperature": spec.evaluate.temperature,
        "every": every,
        "spec": spec.hash,
        "held_out": None if held_out is None else held_out.key,
    }
    write_results(out, model.stem, results, details, config)
    return results


def reproduce(
    spec: Spec, work: Path, *, world: World, processes: int = 2, say: Say = lambda _: None
) -> dict[str, float]:
    """The whole path; returns the scores. What is there already is not made again.

    Data, tokenizer, tokens, packs, the run's checkpoints, the model and its scores each are a
    folder named by what it was made from. Called again with nothing changed it only reads the
    scores; after an interruption it goes on from the last finished folder or checkpoint.

    Raises:
        TrainingError: the run has not reached its end, or Q4 loses more than 5 % perplexity.
    """
    corpus, tokens = prepare(spec, work, processes=processes)
    say(f"corpus: {corpus.report['train']['files']:,} files; tokens: {tokens.folder.name}")
    # Local sources may change without the spec; their text is in the tokens' key.
    key = content_hash([spec.hash, tokens.key])[:12]
    run = work / f"run-{spec.name}-{key}"
    if _steps_done(run) < spec.train.steps:
        train(spec, tokens, work, run, world, processes=processes, say=say)
    checkpoint = latest_checkpoint(run)
    if checkpoint is None or _steps_done(run) < spec.train.steps:
        raise TrainingError(f"{run} has not reached step {spec.train.steps}: start again")
    model = work / f"model-{spec.name}-{key}"
    if not model.exists():
        export_folder([checkpoint], model)
    gguf = model / f"{spec.name}-q4_0.gguf"
    if not gguf.exists():
        export_gguf(model, gguf)
    say(f"model: {model.name}, Q4_0 {gguf.stat().st_size / 1e6:.1f} MB")

    def score(folder: Path) -> dict[str, object]:
        results = evaluate(spec, model, corpus, folder, processes=processes, say=say)
        scores: dict[str, object] = {f"{r.task} {r.metric}": r.value for r in results}
        full, quantized = _perplexities(spec, model, gguf, corpus)
        scores["q4 perplexity ratio"] = quantized / full
        if quantized >= 1.05 * full:
            raise TrainingError(
                f"Q4_0 has a perplexity of {quantized:.3f}, the model {full:.3f}: more than 5 % is "
                f"lost"
            )
        say(f"albor-serve answers: {serves(gguf)!r}")
        return scores

    inputs = {"spec": spec.hash, "corpus": corpus.key, "model": model.name}
    scores = make(work, "scores", inputs, score)
    say(f"scores: {scores.folder.name}{'' if scores.was_made else ', as before'}")
    return {name: float(value) for name, value in scores.report.items()}


def _perplexities(spec: Spec, model: Path, gguf: Path, corpus: Artefact) -> tuple[float, float]:
    """Perplexity of held-out text with the model's weights, and with those of its GGUF file."""
    documents = list(read_documents(corpus.folder / "validation.jsonl.gz"))
    answerer = Answerer(model)
    limit = min(spec.evaluate.held_out_tokens, 50_000)
    full = bits_per_byte(answerer, documents, limit)[1].value
    stored = open_checkpoint(gguf)
    answerer.model = load_decoder(stored.config, stored.read)
    quantized = bits_per_byte(answerer, documents, limit)[1].value
    return math.exp(full), math.exp(quantized)
