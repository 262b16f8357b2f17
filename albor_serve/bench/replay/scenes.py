"""Edit scenes: real code with a piece missing that somebody is about to write.

The data file is made by `build_scenes`; its sources and licences are in SCENES-NOTICE.md.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

from albor_serve.errors import ConfigError

__all__ = ["KINDS", "Scene", "Source", "load_scenes", "pick_scenes"]

KINDS: Final = ("line", "body", "argument", "mid-line", "condition", "test")
"""Finish a line, write a function's body, add an argument, edit in the middle of a line, fix a
condition, write a test while the code under test is open."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file of a published project."""

    project: str
    version: str
    licence: str
    path: str
    sha256: str
    """Of the file's bytes as published."""
    text: str


@dataclass(frozen=True, slots=True)
class Scene:
    """One edit: at `start` of the file, `old` gives way to `typed`."""

    name: str
    kind: str
    source: Source
    start: int
    """Characters before the cursor."""
    old: str
    """What stands at the cursor and is deleted in one edit before typing; often empty."""
    typed: str
    """What the person writes."""
    open_files: tuple[Source, ...] = ()
    """Other files that are open in the editor."""

    @property
    def before(self) -> str:
        """Text before the cursor at the start."""
        return self.source.text[: self.start]

    @property
    def after(self) -> str:
        """Text after the cursor once `old` is deleted."""
        return self.source.text[self.start + len(self.typed) :]


def load_scenes(path: Path | None = None) -> list[Scene]:
    """All scenes of a data file; None takes the one that ships with albor.

    Raises:
        ConfigError: the file can't be read or is no scene file.
    """
    try:
        if path is None:
            data = resources.files(__package__).joinpath("scenes.json.gz").read_bytes()
        else:
            data = path.read_bytes()
        return _parse(json.loads(gzip.decompress(data)))
    except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"cannot read the scenes in {path or 'scenes.json.gz'} ({type(error).__name__}): "
            f"rebuild them with python -m albor_serve.bench.replay.build_scenes"
        ) from error


def pick_scenes(scenes: Sequence[Scene], count: int | None, seed: int) -> list[Scene]:
    """`count` scenes, all kinds in turn, in a seeded order; None takes all."""
    rng = random.Random(seed)
    queues = {kind: [scene for scene in scenes if scene.kind == kind] for kind in KINDS}
    for queue in queues.values():
        rng.shuffle(queue)
    picked: list[Scene] = []
    while any(queues.values()):
        picked += [queue.pop() for queue in queues.values() if queue]
    return picked[:count]


def _parse(value: dict[str, Any]) -> list[Scene]:
    sources = [Source(**source) for source in value["sources"]]
    return [
        Scene(
            name=scene["name"],
            kind=scene["kind"],
            source=sources[scene["source"]],
            start=scene["start"],
            old=scene["old"],
            typed=scene["typed"],
            open_files=tuple(sources[index] for index in scene["open_files"]),
        )
        for scene in value["scenes"]
    ]
