"""Documents to rows of tokens.

Two steps. `build_tokens` writes the training text as plain ids in compressed shards, which are
small enough to be moved to a machine with a GPU. `build_pack` makes one epoch of them: it cuts
documents into chunks, turns a share of them into fill-in-the-middle examples, tokenizes again,
and fills rows. Every example lies whole in one row.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import lzma
import multiprocessing
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from albor_serve.fim import Segment
from albor_train.artefact import Artefact, make
from albor_train.data import Document, Progress, read_documents
from albor_train.errors import DataError
from albor_train.fim import choose_span, context_segments, example_segments, split_chunks
from albor_train.spec import FimSpec, Spec, to_plain
from albor_train.tokenizer import END_OF_TEXT, FIM_PAD, TrainingTokenizer, train_tokenizer

__all__ = [
    "Pack",
    "build_pack",
    "build_tokenizer",
    "build_tokens",
    "open_pack",
    "open_tokens",
    "read_token_shard",
]

Ids = npt.NDArray[np.uint16]

_BATCH: Final = 128
"""Documents of one task of a worker."""
_RELATED_CHARS: Final = 2_000
_SHARD_FORMAT: Final = 1


def build_tokenizer(spec: Spec, corpus: Artefact, work: Path) -> Artefact:
    """The tokenizer of a spec, learned from a sample spread evenly over the training text."""

    def build(folder: Path) -> dict[str, object]:
        path = corpus.folder / "train.jsonl.gz"
        total = int(corpus.report["train"]["bytes"])
        keep = min(1.0, spec.tokenizer.sample_bytes / max(1, total))

        def sample() -> Iterator[str]:
            owed = 0.0
            for document in read_documents(path):
                owed += keep
                if owed >= 1.0 - 1e-9:
                    owed -= 1.0
                    yield document.text

        train_tokenizer(sample(), spec.tokenizer.vocab_size, folder)
        tokenizer = TrainingTokenizer(folder)
        num_bytes = num_tokens = 0
        for document in read_documents(corpus.folder / "validation.jsonl.gz"):
            num_bytes += len(document.text.encode("utf-8"))
            num_tokens += len(tokenizer.encode(document.text))
        return {"held_out_bytes_per_token": num_bytes / max(1, num_tokens)}

    inputs = {"corpus": corpus.key, "tokenizer": to_plain(spec.tokenizer)}
    return make(work, "tokenizer", inputs, build)


def build_tokens(
    corpus: Artefact,
    tokenizer: Artefact,
    work: Path,
    *,
    max_shard_bytes: int,
    progress: Progress | None = None,
) -> Artefact:
    """Both splits as plain ids: train-NN.tok.xz of at most `max_shard_bytes`, validation.tok.xz.

    The folder holds tokenizer.json too, so that nothing else is needed to train. Documents are
    spread over the shards, so that each is a fair sample.
    """

    def build(folder: Path) -> dict[str, object]:
        encoder = TrainingTokenizer(tokenizer.folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((tokenizer.folder / name).read_bytes())
        (folder / "DATA_CARD.md").write_bytes((corpus.folder / "DATA_CARD.md").read_bytes())
        validation = list(_encoded(corpus.folder / "validation.jsonl.gz", encoder))
        _write_shard(folder / "validation.tok.xz", validation)
        train = list(_encoded(corpus.folder / "train.jsonl.gz", encoder, progress))
        num_tokens = sum(len(ids) for _, ids in train)
        # Neighbours stay together (they give each other context): whole runs of 256 documents.
        runs = [train[start : start + 256] for start in range(0, len(train), 256)]
        random.Random(0).shuffle(runs)
        num_shards = max(1, -(-int(num_tokens * 0.60) // max_shard_bytes))
        while True:
            shards: dict[str, int] = {}
            too_large = False
            for number in range(num_shards):
                part = [item for run in runs[number::num_shards] for item in run]
                path = folder / f"train-{number:02d}.tok.xz"
                _write_shard(path, part)
                shards[path.name] = sum(len(ids) for _, ids in part)
                too_large = path.stat().st_size > max_shard_bytes
                if too_large:
                    break
            if not too_large:
                break
            for path in folder.glob("train-*.tok.xz"):
                path.unlink()
            if num_shards >= len(runs):
                raise DataError(f"one document does not fit into {max_shard_bytes} bytes")
            num_shards += 1
        return {
            "train_tokens": num_tokens,
            "train_documents": len(train),
            "validation_tokens": sum(len(ids) for _, ids in validation),
            "shards": shards,
        }

    inputs = {
        "corpus": corpus.key,
        "tokenizer": tokenizer.key,
        "max_shard_bytes": max_shard_bytes,
        "format": _SHARD_FORMAT,
    }
    return make(work, "tokens", inputs, build)


def open_tokens(folder: Path) -> Artefact:
    """A folder of token shards, perhaps copied from elsewhere with some of its shards.

    Raises:
        DataError: it is none.
    """
    try:
        record = json.loads((folder / "artefact.json").read_text("utf-8"))
        if record["step"] != "tokens":
            raise DataError(f"{folder} holds {record['step']}: give a folder of token shards")
        return Artefact(folder, str(record["key"]), False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is no folder of token shards: {error}") from error


def _encoded(
    path: Path, tokenizer: TrainingTokenizer, progress: Progress | None = None
) -> Iterator[tuple[Document, Ids]]:
    """Documents with their ids; the text itself is left out."""
    batch: list[Document] = []
    done = 0

    def flush() -> Iterator[tuple[Document, Ids]]:
        nonlocal done
        encoded = tokenizer.encode_batch([document.text for document in batch])
        for document, ids in zip(batch, encoded, strict=True):
            yield Document(document.project, document.path, ""), np.array(ids, dtype=np.uint16)
        done += len(batch)
        if progress is not None:
            progress("documents tokenized", done, 0)
        batch.clear()

    for document in read_documents(path):
        batch.append(document)
        if len(batch) == 256:
            yield from flush()
    yield from flush()


def _write_shard(path: Path, documents: Sequence[tuple[Document, Ids]]) -> None:
    """A header line of JSON, then all ids, little-endian; xz over both."""
    header = {
        "format": _SHARD_FORMAT,
        "documents": [[d.project, d.path, len(ids)] for d, ids in documents],
    }
    with lzma.open(path, "wb", preset=9 | lzma.PRESET_EXTREME) as file:
        file.write(json.dumps(header, separators=(",", ":")).encode() + b"\n")
        for _, ids in documents:
            file.write(ids.astype("<u2").tobytes())


def read_token_shard(path: Path) -> Iterator[tuple[str, str, Ids]]:
    """(project, path, ids) of each document of a shard.

    Raises:
        DataError: the shard is damaged.
    """
    try:
        with lzma.open(path, "rb") as file:
            header = json.loads(file.readline())
            if header["format"] != _SHARD_FORMAT:
                raise DataError(f"{path} has format {header['format']}: make it anew")
            for project, name, length in header["documents"]:
                data = file.read(2 * length)
                if len(data) != 2 * length:
                    raise DataError(f"{path} ends early: copy it again")
                yield project, name, np.frombuffer(data, dtype="<u2").astype(np.uint16)
            if file.read(1):
                raise DataError(f"{path} is longer than it says: copy it again")
    except (OSError, EOFError, ValueError, KeyError, TypeError, lzma.LZMAError) as error:
        raise DataError(f"{path} is damaged: {error}") from error


@dataclass(frozen=True, slots=True)
class Pack:
    """Rows of one epoch, on disk."""

    folder: Path
    key: str
    rows: npt.NDArray[np.uint16]
    """[num_rows, sequence_len], memory-mapped; documents end with end-of-text, rows in padding."""
    end_id: int
    pad_id: int
    num_tokens: int
    """Without padding."""


def open_pack(artefact: Artefact) -> Pack:
    """Map a pack's rows into memory.

    Raises:
        DataError: the file's length is not what the record says.
    """
    report = artefact.report
    shape = (int(report["num_rows"]), int(report["sequence_len"]))
    path = artefact.folder / "rows.u16"
    if path.stat().st_size != 2 * shape[0] * shape[1]:
        raise DataError(f"{path} has a wrong length: remove its folder")
    rows = np.memmap(path, dtype="<u2", mode="r", shape=shape)
    return Pack(
        artefact.folder,
        artefact.key,
        rows,
        int(report["end_id"]),
        int(report["pad_id"]),
        int(report["num_tokens"]),
    )


@dataclass(frozen=True, slots=True)
class _Task:
    """Some documents to make examples of, for a worker."""

    documents: tuple[tuple[str, str, Ids], ...]
    """(project, path, ids)"""
    before: tuple[tuple[str, str, Ids], ...]
    """Documents that come before them, for context."""
    tokenizer: Path
    spec: FimSpec
    sequence_len: int
    seed: str


def build_pack(
    spec: Spec,
    tokens: Artefact,
    work: Path,
    *,
    epoch: int = 0,
    split: str = "train",
    shards: Sequence[str] | None = None,
    fim_rate: float | None = None,
    processes: int = 1,
    progress: Progress | None = None,
    wait: bool = False,
) -> Artefact:
    """One epoch of rows; deterministic in the spec's seed, the epoch and the shards.

    Args:
        tokens: folder of `build_tokens`.
        epoch: another number draws other chunks, spans and an other order.
        split: "train" or "validation".
        shards: names of the shards to use; None for all of the split.
        fim_rate: overrides the spec's share of fill-in-the-middle examples.
        processes: workers; the result does not depend on it.
        wait: let another process make it.
    """
    if shards is None:
        shards = sorted(path.name for path in tokens.folder.glob(f"{split}*.tok.xz"))
    paths = [tokens.folder / name for name in shards]
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        raise DataError(f"{tokens.folder} has no shard {(missing or [split])[0]}: copy it there")
    rate = spec.fim.rate if fim_rate is None else fim_rate
    fim = {**to_plain(spec.fim), "rate": rate}
    inputs = {
        "tokens": tokens.key,
        "shards": list(shards),
        "fim": fim,
        "epoch": epoch,
        "seed": spec.seed,
        "sequence_len": spec.train.sequence_len,
    }
    fim_spec = FimSpec(**{**fim, "rate": rate})

    def build(folder: Path) -> dict[str, object]:
        tasks = _tasks(paths, tokens.folder, fim_spec, spec, epoch)
        examples: list[Ids] = []
        with _Mapper(processes) as mapper:
            for number, part in enumerate(mapper.map(_make_examples, tasks)):
                examples += part
                if progress is not None:
                    progress("documents packed", (number + 1) * _BATCH, 0)
        if not examples:
            raise DataError(f"the shards {', '.join(shards)} hold no text")
        return _write_rows(examples, spec, tokens, folder, epoch)

    return make(work, f"pack-{split}", inputs, None if wait else build)


class _Mapper:
    """Map in this process, or over worker processes with results in order."""

    def __init__(self, processes: int) -> None:
        self._pool = multiprocessing.get_context("spawn").Pool(processes) if processes > 1 else None

    def __enter__(self) -> _Mapper:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()

    def map(self, function: Callable[[Any], Any], items: Iterator[Any]) -> Iterator[Any]:
        return map(function, items) if self._pool is None else self._pool.imap(function, items)


def _tasks(
    paths: Sequence[Path], tokenizer: Path, fim: FimSpec, spec: Spec, epoch: int
) -> Iterator[_Task]:
    for path in paths:
        documents = list(read_token_shard(path))
        for start in range(0, len(documents), _BATCH):
            yield _Task(
                tuple(documents[start : start + _BATCH]),
                tuple(documents[max(0, start - 4) : start]),
                tokenizer,
                fim,
                spec.train.sequence_len,
                f"{spec.seed}/{epoch}",
            )


def _make_examples(task: _Task) -> list[Ids]:
    """Examples of some documents, in order. Runs in a worker."""
    tokenizer = TrainingTokenizer(task.tokenizer)
    made: list[Ids] = []
    known = [*task.before]
    for project, path, ids in task.documents:
        digest = hashlib.sha256(f"{task.seed}/{project}/{path}".encode()).digest()
        rng = random.Random(digest)
        text = tokenizer.decode(ids.tolist())
        neighbours = [item for item in known[-4:] if item[0] == project]
        for chunk in split_chunks(text, task.spec.chunk_chars, rng):
            made += _examples_of(chunk, project, path, neighbours, tokenizer, task, rng)
        known.append((project, path, ids))
    return made


def _examples_of(
    chunk: str,
    project: str,
    path: str,
    neighbours: Sequence[tuple[str, str, Ids]],
    tokenizer: TrainingTokenizer,
    task: _Task,
    rng: random.Random,
) -> list[Ids]:
    """One example of a chunk, or of its halves if it is too long for a row."""
    context: list[Segment] = []
    if neighbours and rng.random() < task.spec.context_share:
        _, other_path, other_ids = rng.choice(neighbours)
        other = tokenizer.decode(other_ids.tolist()[: _RELATED_CHARS // 2])
        cut = other[:_RELATED_CHARS].rfind("\n") + 1
        if cut:
            context = context_segments(project, path, [(other_path, other[:cut])])
    body = [Segment(chunk, False), Segment(END_OF_TEXT, True)]
    if rng.random() < task.spec.rate:
        span = choose_span(chunk, rng, task.spec.spans)
        if span is not None:
            body = example_segments(chunk, span, task.spec, rng)
    for segments in ([*context, *body], body):
        ids = _encode(segments, tokenizer)
        if len(ids) <= task.sequence_len:
            return [ids]
    halves = split_chunks(chunk, max(1, len(chunk) // 2), rng)
    if len(halves) < 2:
        return []  # one line longer than a row
    return [
        ids
        for half in halves
        for ids in _examples_of(half, project, path, (), tokenizer, task, rng)
    ]


def _encode(segments: Sequence[Segment], tokenizer: TrainingTokenizer) -> Ids:
    ids: list[int] = []
    for segment in segments:
        if segment.is_control:
            ids.append(tokenizer.special(segment.text))
        elif segment.text:
            ids += tokenizer.encode(segment.text)
    return np.array(ids, dtype=np.uint16)


def _write_rows(
    examples: list[Ids], spec: Spec, tokens: Artefact, folder: Path, epoch: int
) -> dict[str, object]:
    """Best-fit decreasing into rows, which are then shuffled."""
    tokenizer = TrainingTokenizer(tokens.folder)
    end_id, pad_id = tokenizer.special(END_OF_TEXT), tokenizer.special(FIM_PAD)
    length = spec.train.sequence_len
    rng = np.random.default_rng([spec.seed, epoch])
    order = rng.permutation(len(examples))
    # Stable, so that examples of one length keep their random order.
    order = order[np.argsort([-len(examples[i]) for i in order], kind="stable")]
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (room, bin), sorted
    for index in order.tolist():
        size = len(examples[index])
        place = bisect.bisect_left(open_bins, (size, -1))
        if place < len(open_bins):
            room, number = open_bins.pop(place)
        else:
            room, number = length, len(bins)
            bins.append([])
        bins[number].append(index)
        if room - size >= 16:  # nothing shorter is worth a place
            bisect.insort(open_bins, (room - size, number))
    row_order = rng.permutation(len(bins))
    rows = np.memmap(folder / "rows.u16", dtype="<u2", mode="w+", shape=(len(bins), length))
    for row, number in enumerate(row_order.tolist()):
        members = bins[number]
        rng.shuffle(members)
        flat = np.concatenate([examples[i] for i in members])
        rows[row, : len(flat)] = flat
        rows[row, len(flat) :] = pad_id
    rows.flush()
    num_tokens = sum(len(ids) for ids in examples)
    lengths = tokenizer.token_lengths()
    num_bytes = sum(int(lengths[ids].sum()) for ids in examples)
    return {
        "num_bytes": num_bytes,
        "num_rows": len(bins),
        "num_examples": len(examples),
        "num_tokens": num_tokens,
        "padding_share": 1 - num_tokens / (len(bins) * length),
        "sequence_len": length,
        "end_id": end_id,
        "pad_id": pad_id,
    }
