"""Artefacts: folders that know what they were made from, so that nothing is made twice.

`make` runs a step only if no finished folder for the same inputs exists. A folder appears under
its final name only when complete, so an interrupted step leaves nothing half-made.
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from albor_train.errors import DataError
from albor_train.spec import content_hash

__all__ = ["CODE_VERSION", "Artefact", "make", "write_json"]

CODE_VERSION: Final = 1
"""Raise when the same inputs would give a different artefact."""

_LONGEST_WAIT_S: Final = 1200
_RECORD: Final = "artefact.json"


@dataclass(frozen=True, slots=True)
class Artefact:
    """A finished folder."""

    folder: Path
    key: str
    """Hash of the step's name, its inputs and the code version."""
    was_made: bool
    """False where it existed already."""

    @property
    def report(self) -> dict[str, Any]:
        """What the step said about its result."""
        record = json.loads((self.folder / _RECORD).read_text("utf-8"))
        return dict(record["report"])


def write_json(path: Path, value: object) -> None:
    """Write JSON under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", "utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def make(
    work: Path,
    step: str,
    inputs: Mapping[str, object],
    build: Callable[[Path], Mapping[str, object]] | None,
) -> Artefact:
    """The folder `work/step-<hash>`, built by `build` if it isn't there yet.

    Args:
        work: where artefacts lie.
        step: name of the step.
        inputs: everything that the result depends on, JSON-like (hashes of other artefacts too).
        build: fills the empty folder it is given and returns a JSON-like report; None waits up to
            20 minutes for another process to make it.

    Raises:
        DataError: a folder of that name was not made by this function, or none came. What
            `build` raises; nothing is left behind then.
    """
    key = content_hash({"step": step, "inputs": dict(inputs), "code_version": CODE_VERSION})
    folder = work / f"{step}-{key[:12]}"
    if build is None:
        end = time.monotonic() + _LONGEST_WAIT_S
        while not folder.exists():
            if time.monotonic() > end:
                raise DataError(f"{folder} was not made in {_LONGEST_WAIT_S} s: see its maker")
            time.sleep(0.1)
    if folder.exists():
        try:
            record = json.loads((folder / _RECORD).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} holds no finished {step}: remove it") from error
        if record.get("key") != key:
            raise DataError(f"{folder} belongs to other inputs: remove it")
        return Artefact(folder, key, False)
    assert build is not None
    work.mkdir(parents=True, exist_ok=True)
    temporary = work / f".{folder.name}.{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        report = build(temporary)
        record = {
            "step": step,
            "key": key,
            "code_version": CODE_VERSION,
            "inputs": dict(inputs),
            "report": dict(report),
        }
        write_json(temporary / _RECORD, record)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Artefact(folder, key, True)
