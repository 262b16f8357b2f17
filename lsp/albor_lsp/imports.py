"""What imported Python names look like where they are defined."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from albor_lsp.ring import Chunk

__all__ = ["ImportIndex"]

MAX_FILE_BYTES: Final = 65_536
MAX_HEAD_CHARS: Final = 8192
"""Imports are looked for in so much of a file's start."""
MAX_NEW_FILES: Final = 2
"""Files read in one call at most; the others wait for the next call."""
MAX_NAMES: Final = 12
MAX_CACHED: Final = 256
_IMPORT: Final = re.compile(
    r"^from[ \t]+(\.*[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n#]+)", re.MULTILINE
)
_DEFINITION: Final = re.compile(
    r"^(?P<lead>[ ]{4}|)(?P<head>(?:async[ ]def|def|class)[ ](?P<name>\w+)[^\n]*?"
    r"(?:\((?:[^()]|\([^()]*\))*\)[^\n:]*)?:)[^\n]*\n"
    r"(?:\s*[rR]?\"\"\"(?P<doc>[^\n\"]*))?",
    re.MULTILINE,
)


class ImportIndex:
    """Signatures and first docstring lines of top-level classes and functions, by file."""

    def __init__(self, root: Path | None) -> None:
        self._root = root
        self._outlines: dict[Path, tuple[tuple[int, int], dict[str, str]]] = {}

    def chunks(self, path: str, text: str) -> tuple[Chunk, ...]:
        """Pieces for the names that `text` imports from the workspace, in order of import."""
        if self._root is None:
            return ()
        num_new = 0
        found: dict[str, list[str]] = {}
        for module, names in _IMPORT.findall(text[:MAX_HEAD_CHARS]):
            file = self._file(path, module)
            if file is None:
                continue
            outline, is_new = self._outline(file, num_new < MAX_NEW_FILES)
            num_new += is_new
            wanted = [part.split()[0] for part in names.strip("()").split(",") if part.split()]
            texts = [outline[name] for name in wanted[:MAX_NAMES] if name in outline]
            if texts:
                name = file.relative_to(self._root).as_posix()
                found.setdefault(name, []).extend(t for t in texts if t not in found.get(name, []))
        return tuple(Chunk(name, "\n".join(texts)) for name, texts in found.items())

    def _file(self, path: str, module: str) -> Path | None:
        assert self._root is not None
        name = module.lstrip(".")
        num_dots = len(module) - len(name)
        parts = name.split(".") if name else []
        if num_dots:
            folder = (self._root / path).parent
            for _ in range(num_dots - 1):
                folder = folder.parent
            starts = [folder]
        else:
            starts = [self._root, self._root / "src"]
        for start in starts:
            base = start.joinpath(*parts)
            for file in (base.with_suffix(".py") if parts else None, base / "__init__.py"):
                if file is not None and file.is_file() and file.is_relative_to(self._root):
                    return file
        return None

    def _outline(self, file: Path, may_read: bool) -> tuple[dict[str, str], bool]:
        try:
            stat = file.stat()
            stamp = (stat.st_mtime_ns, stat.st_size)
            known = self._outlines.get(file)
            if known is not None and known[0] == stamp:
                return known[1], False
            if not may_read or stat.st_size > MAX_FILE_BYTES:
                return (known[1] if known else {}), False
            outline = _outline_of(file.read_text("utf-8", "replace"))
        except OSError:
            return {}, False
        if len(self._outlines) >= MAX_CACHED:
            del self._outlines[next(iter(self._outlines))]
        self._outlines[file] = (stamp, outline)
        return outline, True


def _outline_of(text: str) -> dict[str, str]:
    """Name → signature with the docstring's head; a class with its public methods."""
    outline: dict[str, str] = {}
    owner = ""
    for match in _DEFINITION.finditer(text):
        lead, name, doc = match["lead"], match["name"], (match["doc"] or "").strip()
        entry = lead + match["head"] + (f'\n{lead}    """{doc}"""' if doc else " ...")
        if not lead:
            owner = name if match["head"].startswith("class") else ""
            outline[name] = entry
        elif owner and (not name.startswith("_") or name == "__init__"):
            outline[owner] = outline[owner].removesuffix(" ...") + "\n" + entry
    return outline
