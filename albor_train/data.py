"""Sources to corpus: clean, deduplicated, decontaminated documents, split by project.

Two passes, so that memory stays small and the result does not depend on timing. First each
project is read and filtered on its own, in parallel, into a part file with a signature for each
document. Then one process walks the parts in the order of their names and decides what to drop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from albor_train.artefact import Artefact, make
from albor_train.decontaminate import EvaluationIndex
from albor_train.errors import DataError
from albor_train.filters import clean, is_test
from albor_train.minhash import NearDuplicates, signature
from albor_train.sources import (
    Package,
    fetch,
    project_name,
    python_files_of_folder,
    python_files_of_wheel,
    read_lock,
)
from albor_train.spec import DataSpec, FolderSource, Spec, content_hash, to_plain

__all__ = ["Document", "build_corpus", "build_held_out", "corpus_inputs", "read_documents"]

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""

_LEVEL: Final = 3


@dataclass(frozen=True, slots=True)
class Document:
    """One file."""

    project: str
    path: str
    text: str


@dataclass(frozen=True, slots=True)
class _Job:
    """One project to read, for a worker process."""

    source: Package | FolderSource
    folder: Path | None
    spec: DataSpec
    cache: Path
    part: Path
    index: EvaluationIndex | None


@dataclass(frozen=True, slots=True)
class _Part:
    """What a worker found."""

    project: str
    part: Path
    num_bytes_raw: int
    dropped: dict[str, int]
    num_scrubbed: int
    digests: list[bytes]
    signatures: list[np.ndarray[Any, np.dtype[np.uint32]]]
    sizes: list[int]
    tests: list[bool]


def corpus_inputs(spec: Spec) -> dict[str, object]:
    """What the corpus depends on: the spec's data part, the lock, the local files' content."""
    inputs: dict[str, object] = {"data": to_plain(spec.data)}
    if spec.data.lock:
        inputs["lock"] = [to_plain(package) for package in read_lock(spec.path(spec.data.lock))]
    folders = {}
    for source in spec.data.folders:
        digest = hashlib.sha256()
        limit = 2 * spec.data.filters.max_bytes
        for path, data in python_files_of_folder(source, spec.path(source.path), limit):
            digest.update(f"{path}\0{len(data)}\0".encode())
            digest.update(data)
        folders[source.project] = digest.hexdigest()
    inputs["folders"] = folders
    if spec.data.evaluation:
        files = sorted(spec.path(spec.data.evaluation).glob("*.json*.gz"))
        if not files:
            raise DataError(f"{spec.path(spec.data.evaluation)} holds no *.jsonl.gz")
        inputs["evaluation"] = {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files
        }
    return inputs


def build_corpus(
    spec: Spec, work: Path, *, processes: int = 1, progress: Progress | None = None
) -> Artefact:
    """The corpus of a spec: train.jsonl.gz, validation.jsonl.gz, DATA_CARD.md, and statistics.

    Wheels are kept in `work/packages`. The result does not depend on `processes`.

    Raises:
        DataError: a source can't be had, or nothing is left of it all.
    """
    inputs = corpus_inputs(spec)
    return make(
        work,
        "corpus",
        inputs,
        lambda folder: _build(spec, work / "packages", folder, processes, progress),
    )


def build_held_out(
    spec: Spec, work: Path, *, processes: int = 1, progress: Progress | None = None
) -> Artefact:
    """Only validation.jsonl.gz, byte for byte the corpus's own, from the held-out projects alone.

    Held-out projects are chosen before all others, so the rest has no influence on them; measuring
    a model needs a few megabytes of packages instead of the whole corpus.

    Raises:
        DataError: a source can't be had, or nothing is held out.
    """
    names = set(map(project_name, spec.data.held_out))
    folders = tuple(s for s in spec.data.folders if project_name(s.project) in names)
    only = dataclasses.replace(spec, data=dataclasses.replace(spec.data, folders=folders))
    inputs = corpus_inputs(only)
    if only.data.lock:
        inputs["lock"] = [row for row in _plain_rows(inputs["lock"]) if row["name"] in names]
    return make(
        work,
        "held-out",
        inputs,
        lambda folder: _build(
            only, work / "packages", folder, processes, progress, only_held_out=True
        ),
    )


def _plain_rows(value: object) -> list[dict[str, object]]:
    assert isinstance(value, list)
    return value


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of a *.jsonl.gz file, in order.

    Raises:
        DataError: the file is damaged.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8", errors="surrogatepass") as file:
            for line in file:
                yield Document(**json.loads(line))
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error}") from error


def _build(
    spec: Spec,
    cache: Path,
    out: Path,
    processes: int,
    progress: Progress | None,
    *,
    only_held_out: bool = False,
) -> dict[str, object]:
    parts_folder = out / "parts"
    parts_folder.mkdir()
    index = None
    if spec.data.evaluation:
        index = EvaluationIndex.of_folder(
            spec.path(spec.data.evaluation), spec.data.ngram_len, spec.data.min_name_len
        )
    jobs = _jobs(spec, cache, parts_folder, index)
    if only_held_out:
        held_out = set(map(project_name, spec.data.held_out))
        jobs = [job for job in jobs if _project_of(job) in held_out]
    parts: list[_Part] = []
    with multiprocessing.get_context("spawn").Pool(processes) if processes > 1 else _Here() as pool:
        for part in pool.imap(_read_project, jobs):
            parts.append(part)
            if progress is not None:
                progress("projects read", len(parts), len(jobs))
    report = _select(spec, parts, out, needs="validation" if only_held_out else "train")
    shutil.rmtree(parts_folder)
    card = data_card(spec, report)
    (out / "DATA_CARD.md").write_text(card, "utf-8")
    return report


def _project_of(job: _Job) -> str:
    source = job.source
    return source.name if isinstance(source, Package) else project_name(source.project)


class _Here:
    """A pool of one: this process."""

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def imap(self, function: Callable[[_Job], _Part], jobs: list[_Job]) -> Iterator[_Part]:
        return map(function, jobs)


def _jobs(spec: Spec, cache: Path, parts: Path, index: EvaluationIndex | None) -> list[_Job]:
    sources: list[tuple[str, Package | FolderSource]] = [
        (project_name(source.project), source) for source in spec.data.folders
    ]
    if spec.data.lock:
        packages = read_lock(spec.path(spec.data.lock))
        sources += [(package.name, package) for package in packages]
    names = [name for name, _ in sources]
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise DataError(f"{doubled[0]} is both a package and a folder: keep one")
    missing = sorted(set(map(project_name, spec.data.held_out)) - set(names))
    if missing:
        raise DataError(f"held-out project {missing[0]!r} is not among the sources: add it")
    return [
        _Job(
            source=source,
            folder=spec.path(source.path) if isinstance(source, FolderSource) else None,
            spec=spec.data,
            cache=cache,
            part=parts / f"{name}.jsonl.gz",
            index=index,
        )
        for name, source in sorted(sources, key=lambda item: item[0])
    ]


def _read_project(job: _Job) -> _Part:
    """Filter one project into its part file. Runs in a worker."""
    limit = 2 * job.spec.filters.max_bytes
    if isinstance(job.source, FolderSource):
        assert job.folder is not None
        project = project_name(job.source.project)
        files = python_files_of_folder(job.source, job.folder, limit)
    else:
        project = job.source.name
        files = python_files_of_wheel(fetch(job.source, job.cache), limit)
    dropped: Counter[str] = Counter()
    part = _Part(project, job.part, 0, {}, 0, [], [], [], [])
    num_raw = num_scrubbed = 0
    with gzip.open(job.part, "wt", encoding="utf-8", compresslevel=1) as out:
        for path, data in files:
            num_raw += len(data)
            result = clean(data, job.spec.filters)
            if isinstance(result, str):
                dropped[result] += 1
                continue
            text, scrubbed = result
            found = job.index.find(text) if job.index is not None else None
            if found is not None:
                dropped[f"contaminated, {found}"] += 1
                continue
            num_scrubbed += scrubbed
            json.dump({"project": project, "path": path, "text": text}, out)
            out.write("\n")
            part.digests.append(hashlib.sha256(" ".join(text.split()).encode()).digest())
            part.signatures.append(signature(text))
            part.sizes.append(len(text.encode("utf-8")))
            part.tests.append(is_test(path))
    return _Part(
        project,
        job.part,
        num_raw,
        dict(dropped),
        num_scrubbed,
        part.digests,
        part.signatures,
        part.sizes,
        part.tests,
    )


def _select(
    spec: Spec, parts: list[_Part], out: Path, *, needs: str = "train"
) -> dict[str, object]:
    """Drop duplicates across projects and write the two splits."""
    held_out = set(map(project_name, spec.data.held_out))
    seen: set[bytes] = set()
    near = NearDuplicates(spec.data.near_duplicate)
    dropped: Counter[str] = Counter()
    totals = {split: Counter[str]() for split in ("train", "validation")}
    projects: dict[str, dict[str, object]] = {}
    with (
        _gzip_writer(out / "train.jsonl.gz") as train,
        _gzip_writer(out / "validation.jsonl.gz") as validation,
    ):
        # Held-out projects first: what they share with others is dropped from training.
        for part in sorted(parts, key=lambda item: (item.project not in held_out, item.project)):
            split = "validation" if part.project in held_out else "train"
            file = validation if split == "validation" else train
            kept = Counter[str]()
            tests_allowed = spec.data.filters.max_test_share * sum(part.sizes)
            dropped.update(part.dropped)
            with gzip.open(part.part, "rt", encoding="utf-8") as lines:
                rows = zip(
                    lines, part.digests, part.signatures, part.sizes, part.tests, strict=True
                )
                for line, digest, sketch, size, test in rows:
                    if digest in seen:
                        dropped["copy"] += 1
                        continue
                    if test and kept["test_bytes"] + size > tests_allowed:
                        dropped["over the share of tests"] += 1
                        continue
                    if spec.data.near_duplicate < 1 and not near.add(sketch):
                        dropped["near-duplicate"] += 1
                        continue
                    seen.add(digest)
                    file.write(line)
                    kept["files"] += 1
                    kept["bytes"] += size
                    kept["test_bytes"] += size if test else 0
            totals[split].update(kept)
            projects[part.project] = {
                "split": split,
                "raw_bytes": part.num_bytes_raw,
                "scrubbed": part.num_scrubbed,
                **kept,
            }
    if not totals[needs]["files"]:
        reasons = ", ".join(f"{name} {count}" for name, count in dropped.most_common(3))
        raise DataError(f"no file is left for the {needs} split ({reasons}): loosen the filters")
    return {
        "train": dict(totals["train"]),
        "validation": dict(totals["validation"]),
        "dropped": dict(sorted(dropped.items())),
        "projects": projects,
    }


@contextlib.contextmanager
def _gzip_writer(path: Path) -> Iterator[IO[str]]:
    # No time stamp and no name inside: the same documents give the same bytes.
    with (
        path.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", compresslevel=_LEVEL, fileobj=raw, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8") as text,
    ):
        yield text


def data_card(spec: Spec, report: dict[str, Any]) -> str:
    """A page about the corpus: sources with licences, sizes, what was dropped and why."""
    licences: dict[str, tuple[str, str]] = {
        project_name(source.project): (source.version, source.licence)
        for source in spec.data.folders
    }
    if spec.data.lock:
        for package in read_lock(spec.path(spec.data.lock)):
            licences[package.name] = (package.version, package.licence)
    lines = [
        f"# Corpus of {spec.name}",
        "",
        (
            "Python files of permissively licensed packages, filtered, deduplicated, free of the "
            "evaluation sets by the rules below."
        ),
        "",
        "| split | files | MB | of it tests |",
        "|---|---|---|---|",
    ]
    for split in ("train", "validation"):
        part = report[split]
        share = part.get("test_bytes", 0) / max(1, part.get("bytes", 0))
        lines.append(
            f"| {split} | {part.get('files', 0):,} | {part.get('bytes', 0) / 1e6:.1f} "
            f"| {share:.0%} |"
        )
    lines += ["", "| dropped because | files |", "|---|---|"]
    lines += [f"| {reason} | {count:,} |" for reason, count in report["dropped"].items()]
    lines += ["", f"Rules: `{content_hash(to_plain(spec.data))[:12]}`", ""]
    lines += [f"- {key}: {value}" for key, value in to_plain(spec.data.filters).items()]
    lines += [
        f"- near-duplicate from MinHash similarity {spec.data.near_duplicate}",
        (
            f"- contaminated: {spec.data.ngram_len} words in a row, or a function name of at least "
            f"{spec.data.min_name_len} characters, shared with an evaluation set"
        ),
        "",
        "| project | version | licence | split | raw MB | kept MB | files |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, part in report["projects"].items():
        version, licence = licences[name]
        lines.append(
            f"| {name} | {version} | {licence} | {part['split']} | {part['raw_bytes'] / 1e6:.1f} "
            f"| {part.get('bytes', 0) / 1e6:.1f} | {part.get('files', 0):,} |"
        )
    return "\n".join(lines) + "\n"
