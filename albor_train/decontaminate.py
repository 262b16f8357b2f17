"""Keep evaluation problems out of the training text.

A file is contaminated if it shares a run of `ngram_len` words with a problem's prompt, solution
or test, or defines a function whose name is long enough to be a problem's own.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from albor_train.errors import DataError

__all__ = ["EvaluationIndex", "evaluation_texts"]

_WORD = re.compile(r"[A-Za-z0-9]+")
_DEFINITION = re.compile(r"^[ \t]*(?:async[ \t]+)?def[ \t]+(\w+)", re.MULTILINE)
_TEXT_FIELDS: Final = ("prompt", "canonical_solution", "text", "code", "reference_code")
_NAME_FIELDS: Final = ("prompt", "canonical_solution", "code")


@dataclass(frozen=True, slots=True)
class EvaluationIndex:
    """What must not occur in training text."""

    ngram_len: int
    ngrams: dict[bytes, str]
    """Digest of each run of words, and the set that it comes from."""
    names: dict[str, str]
    """Function names, and the set that they come from."""

    @classmethod
    def of_folder(cls, folder: Path, ngram_len: int, min_name_len: int) -> EvaluationIndex:
        """Index of every *.jsonl.gz and *.json.gz file of a folder."""
        ngrams: dict[bytes, str] = {}
        names: dict[str, str] = {}
        for set_name, problem in evaluation_texts(folder):
            for field in _TEXT_FIELDS:
                for digest in _digests(str(problem.get(field) or ""), ngram_len):
                    ngrams.setdefault(digest, set_name)
            for field in _NAME_FIELDS:
                for name in _DEFINITION.findall(str(problem.get(field) or "")):
                    if len(name) >= min_name_len and "_" in name.strip("_"):
                        names.setdefault(name, set_name)
        return cls(ngram_len, ngrams, names)

    @classmethod
    def empty(cls) -> EvaluationIndex:
        """Nothing to keep out."""
        return cls(1 << 30, {}, {})

    def find(self, text: str) -> str | None:
        """Which set contaminates a text ("ngram: SET" or "name: SET"), or None."""
        for name in _DEFINITION.findall(text):
            if name in self.names:
                return f"name: {self.names[name]}"
        if self.ngrams:
            for digest in _digests(text, self.ngram_len):
                if digest in self.ngrams:
                    return f"ngram: {self.ngrams[digest]}"
        return None


def evaluation_texts(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(set, problem) for each problem in a folder's *.jsonl.gz and *.json.gz files.

    Raises:
        DataError: there are none, or one can't be read.
    """
    files = sorted(folder.glob("*.json*.gz"))
    if not files:
        raise DataError(f"{folder} holds no *.jsonl.gz: give the folder of evaluation sets")
    for path in files:
        name = path.name.split(".")[0]
        try:
            text = gzip.decompress(path.read_bytes()).decode("utf-8")
            if path.name.endswith(".json.gz"):
                problems = json.loads(text)
            else:
                problems = [json.loads(line) for line in text.splitlines() if line.strip()]
        except (OSError, EOFError, ValueError) as error:
            raise DataError(f"{path} can't be read: {error}") from error
        for problem in problems:
            yield name, problem


def _digests(text: str, ngram_len: int) -> Iterator[bytes]:
    words = _WORD.findall(text.lower())
    for i in range(len(words) - ngram_len + 1):
        run = " ".join(words[i : i + ngram_len])
        # Runs of digits and single letters (tables, matrices) are no sign of copying.
        if len(run) >= 3 * ngram_len:
            yield hashlib.blake2b(run.encode(), digest_size=8).digest()
