"""Which models the command line names, and what clients call them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from albor_serve.errors import ConfigError

__all__ = ["NamedModel", "named_models", "parse_bytes"]

_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}$")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model on disk and its names."""

    path: Path | None
    """A .gguf file or a Hugging Face folder; None is the embedded model."""
    name: str
    aliases: tuple[str, ...] = ()


def named_models(
    models: Sequence[str], aliases: Sequence[str], folder: Path | None, embedded_name: str
) -> list[NamedModel]:
    """The models to serve, the default one first.

    Args:
        models: PATH or PATH=NAME. None of them, and no folder, is the embedded model.
        aliases: NAME, for the first model, or NAME=MODEL with a model's name. The first alias
            without a model becomes the first model's name.
        folder: each .gguf file and each Hugging Face folder in it is served as well, by name.
        embedded_name: name of the embedded model.

    Raises:
        ConfigError: a name is empty, not printable or taken, or `folder` holds no model.
    """
    found: list[tuple[Path | None, str]] = [_parse(text) for text in models]
    if folder is not None:
        known = {path.resolve() for path, _ in found if path is not None}
        found += [(path, _stem(path)) for path in _scan(folder) if path.resolve() not in known]
    if not found:
        found = [(None, embedded_name)]
    more: dict[str, list[str]] = {name: [] for _, name in found}
    if len(more) < len(found):
        raise ConfigError("two models have the same name: tell them apart with MODEL=NAME")
    first_names: list[str] = []
    for text in aliases:
        alias, equals, target = text.partition("=")
        if not alias.strip() or not alias.isprintable():
            raise ConfigError("--alias is empty or not printable: give a name such as code")
        if not equals:
            first_names.append(alias)
        elif target in more:
            more[target].append(alias)
        else:
            raise ConfigError(
                f"--alias {alias} is for {target}, which is none of the models: use one of "
                f"{', '.join(more)}"
            )
    named = [NamedModel(path, name, tuple(more[name])) for path, name in found]
    if first_names:
        first = named[0]
        names = tuple(dict.fromkeys((*first_names, first.name, *first.aliases)))
        named[0] = NamedModel(first.path, names[0], names[1:])
    taken = [name for model in named for name in (model.name, *model.aliases)]
    for name in taken:
        if not name.strip() or not name.isprintable() or name == "default":
            raise ConfigError("a model's name is empty, not printable or the word default")
        if taken.count(name) > 1:
            raise ConfigError(f"the name {name} is given to two models: give each its own")
    return named


def parse_bytes(text: str) -> int:
    """A size such as 800M or 1.5G in bytes (powers of ten). Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)b?", text.strip().lower())
    if match is None or not float(match[1]):
        raise ConfigError(f"{text!r} is no size: give one such as 800M or 4G")
    return int(float(match[1]) * _UNITS[match[2]])


def _parse(text: str) -> tuple[Path | None, str]:
    path, equals, name = text.rpartition("=")
    if not equals or Path(text).exists():
        return Path(text), _stem(Path(text))
    if not path or not name:
        raise ConfigError(f"{text!r} is no model: write MODEL or MODEL=NAME")
    return Path(path), name


def _stem(path: Path) -> str:
    name = path.name or path.resolve().name
    return name.removesuffix(".gguf")


def _scan(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise ConfigError(
            f"--models-dir {folder} can't be read ({error.strerror}): name a folder of models"
        ) from None
    models = [
        path
        for path in entries
        if (path.suffix == ".gguf" and path.is_file() and not _LATER_PART.search(path.stem))
        or (path.is_dir() and (path / "config.json").is_file())
    ]
    if not models:
        raise ConfigError(
            f"--models-dir {folder} holds no .gguf file and no Hugging Face folder: put one there"
        )
    return models
