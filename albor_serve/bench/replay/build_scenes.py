"""Rebuild scenes.json.gz: fetch the pinned packages, cut scenes out of them, check licences.

Run as `python -m albor_serve.bench.replay.build_scenes`; it calls `pip download --no-deps`. No
package here is in the training data: each is either held out of it or not among its sources.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import io
import json
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from albor_serve.bench.replay.scenes import KINDS, Scene, Source
from albor_serve.errors import ConfigError

__all__ = ["build", "cut_scenes", "main"]

WHEELS: Final = (
    *("apispec==6.10.1", "boltons==26.2.0", "cachetools==8.0.1", "cattrs==26.2.1"),
    *("flask==3.1.3", "httpx==0.28.1", "humanize==4.17.0", "jinja2==3.1.6"),
    *("marshmallow==4.4.0", "networkx==3.6.1", "questionary==2.1.1", "rich==15.0.0"),
    *("structlog==26.1.0", "tenacity==9.2.1"),
)
PERMISSIVE: Final = re.compile(r"\b(MIT|BSD|Apache|ISC)\b", re.IGNORECASE)
SEED: Final = 4
MIN_BYTES: Final = 2_500
MAX_BYTES: Final = 40_000
MAX_TYPED: Final = 280
"""Longer edits would let single scenes decide the figures."""


@dataclass(frozen=True, slots=True)
class _Package:
    name: str
    version: str
    licence: str
    files: dict[str, bytes]


def main(arguments: Sequence[str]) -> int:
    """Write the data file and its notice to the folder named, or beside this module."""
    folder = Path(arguments[0]) if arguments else Path(__file__).parent
    with tempfile.TemporaryDirectory() as download:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, "--quiet", "-d", download, *WHEELS], check=True)
        build(Path(download), folder)
    return 0


def build(archives: Path, folder: Path) -> list[Scene]:
    """Cut scenes from the wheels of a folder; writes two files.

    Raises:
        ConfigError: a package's licence is not known to be permissive.
    """
    rng = random.Random(SEED)
    packages = [_read_wheel(path) for path in sorted(archives.rglob("*.whl"))]
    scenes: list[Scene] = []
    for package in packages:
        scenes += cut_scenes(_sources(package), rng)
    # The only one whose wheel holds its tests.
    networkx = next(package for package in packages if package.name == "networkx")
    scenes += _test_scenes(networkx, rng)
    _write(scenes, folder)
    return scenes


def cut_scenes(sources: Sequence[Source], rng: random.Random) -> list[Scene]:
    """At most one scene of each kind but "test" from a project's files, each of another file."""
    order = list(sources)
    rng.shuffle(order)
    scenes = []
    used: set[str] = set()
    for kind in KINDS[:-1]:
        for source in order:
            if source.path in used:
                continue
            found = list(_candidates(kind, source))
            if found:
                start, old, typed = rng.choice(found)
                name = f"{source.project}-{kind}"
                scenes.append(Scene(name, kind, source, start, old, typed))
                used.add(source.path)
                break
    return scenes


def _candidates(kind: str, source: Source) -> Iterator[tuple[int, str, str]]:
    """(start, old, typed) of every place that fits."""
    tree = ast.parse(source.text)
    offsets = _LineOffsets(source.text)
    for node in ast.walk(tree):
        match kind, node:
            case "line", ast.Assign() | ast.Return() | ast.Expr(value=ast.Call()) | ast.AugAssign():
                if node.lineno == node.end_lineno:
                    start, end = offsets.span(node)
                    # The person has typed a third of it already.
                    cut = start + max(2, (end - start) // 3)
                    if 15 <= end - cut <= 80:
                        yield cut, "", source.text[cut:end]
            case "body" | "test", ast.FunctionDef():
                body = node.body
                if kind == "body" and len(body) > 1 and isinstance(body[0], ast.Expr):
                    body = body[1:]
                first = offsets.start(body[0])
                end = offsets.span(body[-1])[1]
                is_test = node.name.startswith("test_")
                own_line = source.text[:first].rpartition("\n")[2].isspace()
                if own_line and 60 <= end - first <= MAX_TYPED and is_test == (kind == "test"):
                    yield first, "", source.text[first:end]
            case "argument", ast.Call() if len(node.args) + len(node.keywords) >= 2:
                last = max([*node.args, *(k.value for k in node.keywords)], key=offsets.end)
                before = [n for n in [*node.args, *(k.value for k in node.keywords)] if n != last]
                start, end = max(map(offsets.end, before)), offsets.end(last)
                typed = source.text[start:end]
                if "\n" not in typed and 8 <= len(typed) <= 50:
                    yield start, "", typed
            case "mid-line", ast.Call(func=ast.Attribute()):
                start, end = offsets.span(node)
                rest = source.text[end:].partition("\n")[0]
                if "\n" not in source.text[start:end] and 10 <= end - start <= 50 and len(rest) > 3:
                    yield start, "", source.text[start:end]
            case "condition", ast.If(test=ast.Compare() | ast.BoolOp() | ast.UnaryOp()):
                start, end = offsets.span(node.test)
                typed = source.text[start:end]
                old = _wrong_condition(typed)
                if "\n" not in typed and 10 <= len(typed) <= 70 and old != typed:
                    yield start, old, typed


def _wrong_condition(condition: str) -> str:
    """A condition somebody would have to fix."""
    for right, wrong in (
        (" is not ", " is "),
        (" and ", " or "),
        (" not in ", " in "),
        (" == ", " != "),
        (" >= ", " > "),
        (" < ", " <= "),
        (" > ", " >= "),
        ("not ", ""),
        (" is ", " is not "),
        (" in ", " not in "),
    ):
        if right in condition:
            return condition.replace(right, wrong, 1)
    return condition


class _LineOffsets:
    """From ast's positions (lines and UTF-8 bytes) to characters."""

    def __init__(self, text: str) -> None:
        self._lines = text.split("\n")
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line) + 1)

    def start(self, node: ast.stmt | ast.expr) -> int:
        """First character of a node."""
        return self._at(node.lineno, node.col_offset)

    def end(self, node: ast.stmt | ast.expr) -> int:
        """After its last character."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self._at(node.end_lineno, node.end_col_offset)

    def span(self, node: ast.stmt | ast.expr) -> tuple[int, int]:
        """Both."""
        return self.start(node), self.end(node)

    def _at(self, line: int, column: int) -> int:
        before = self._lines[line - 1].encode()[:column].decode()
        return self._starts[line - 1] + len(before)


def _test_scenes(package: _Package, rng: random.Random) -> list[Scene]:
    """Up to six tests, each with the module that its file's name tells."""
    modules = {Path(source.path).name: source for source in _sources(package)}
    files = package.files.items()
    tests = {path: data for path, data in files if Path(path).name.startswith("test_")}
    scenes: list[Scene] = []
    order = sorted(tests)
    rng.shuffle(order)
    for path in order:
        module = modules.get(Path(path).name.removeprefix("test_"))
        source = _source(package, path, tests[path])
        if module is None or source is None:
            continue
        found = list(_candidates("test", source))
        if found:
            start, old, typed = rng.choice(found)
            name = f"{package.name}-test-{len(scenes) + 1}"
            scenes.append(Scene(name, "test", source, start, old, typed, (module,)))
        if len(scenes) == 6:
            break
    return scenes


def _sources(package: _Package) -> list[Source]:
    """Modules fit for scenes, tests left out."""
    found = []
    for path, data in sorted(package.files.items()):
        source = None if "/test" in path else _source(package, path, data)
        if source is not None:
            found.append(source)
    return found


def _source(package: _Package, path: str, data: bytes) -> Source | None:
    """A file as a source, or None where it doesn't fit."""
    if not path.endswith(".py") or not MIN_BYTES <= len(data) <= MAX_BYTES:
        return None
    try:
        text = data.decode()
        ast.parse(text)
    except (UnicodeDecodeError, SyntaxError):
        return None
    if "\r" in text or "\f" in text:
        return None
    digest = hashlib.sha256(data).hexdigest()
    return Source(package.name, package.version, package.licence, path, digest, text)


def _read_wheel(path: Path) -> _Package:
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if name[-1] != "/"}
    [metadata] = [data for name, data in files.items() if name.endswith(".dist-info/METADATA")]
    head = metadata.decode().partition("\n\n")[0]
    told = re.findall(
        r"^(?:License-Expression|License|Classifier: License ::[^\n]*::): ?(.*)$",
        head,
        re.MULTILINE,
    )
    told += re.findall(r"^Classifier: License :: OSI Approved :: (.*)$", head, re.MULTILINE)
    licence = next((line for line in told if PERMISSIVE.search(line)), None)
    name, version = path.name.split("-")[:2]
    if licence is None:
        raise ConfigError(f"the licence of {name} {version} is not known to be permissive")
    return _Package(name, version, licence, files)


def _write(scenes: Sequence[Scene], folder: Path) -> None:
    sources: list[Source] = []
    for scene in scenes:
        sources += [s for s in (scene.source, *scene.open_files) if s not in sources]
    value: dict[str, Any] = {
        "sources": [asdict(source) for source in sources],
        "scenes": [
            {
                "name": scene.name,
                "kind": scene.kind,
                "source": sources.index(scene.source),
                "start": scene.start,
                "old": scene.old,
                "typed": scene.typed,
                "open_files": [sources.index(source) for source in scene.open_files],
            }
            for scene in scenes
        ],
    }
    packed = io.BytesIO()
    # No time stamp: the same archives give the same file.
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=9, mtime=0) as stream:
        stream.write(json.dumps(value, ensure_ascii=False).encode())
    for name, data in (
        ("scenes.json.gz", packed.getvalue()),
        ("SCENES-NOTICE.md", _notice(sources).encode()),
    ):
        temporary = folder / f".{name}.tmp"
        try:
            temporary.write_bytes(data)
            temporary.replace(folder / name)
        finally:
            temporary.unlink(missing_ok=True)


def _notice(sources: Sequence[Source]) -> str:
    lines = [
        "# Sources of the edit scenes",
        "",
        "scenes.json.gz quotes these files, unchanged, for benchmarking only. Each remains",
        "under its own licence, with the copyright of its project's authors.",
        "",
        "| project | version | licence | file | SHA-256 |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| [{s.project}](https://pypi.org/project/{s.project}/{s.version}/) | {s.version} | "
        f"{s.licence} | {s.path} | {s.sha256} |"
        for s in sorted(sources, key=lambda source: (source.project, source.path))
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
