"""Settings: each with its meaning at its field.

They come, later ones winning, from a file (`settings_path`), from the client's
initializationOptions and from `workspace/configuration`, section "albor". Names are spelled in
camelCase as editors do, or as the fields are here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from albor_lsp.errors import SettingsError

__all__ = ["Settings", "documented", "read_settings_file", "settings_path", "updated"]

_MAX_MS: Final = 3_600_000


def _setting(
    default: Any, about: str, *, least: float | None = None, most: float | None = None
) -> Any:
    return field(default=default, metadata={"about": about, "least": least, "most": most})


@dataclass(frozen=True, slots=True)
class Settings:
    """What a person can choose."""

    enabled: bool = _setting(True, "Suggest code.")
    disabled_languages: tuple[str, ...] = _setting(
        (), 'Language ids that get no suggestions by themselves, such as "markdown".'
    )
    server_url: str = _setting(
        "",
        "Completion server: http://host:port or unix:/path. Empty: the one that ALBOR_SERVER_URL "
        "names, else one that runs on this machine, else one is started.",
    )
    api_key: str = _setting(
        "", "Key for the server. Empty: the one in the variable ALBOR_API_KEY, if any."
    )
    model: str = _setting(
        "", "Model to ask for, where the server has several. Empty: its first one."
    )
    start_server: bool = _setting(True, "Start albor-serve where no server is found.")
    server_command: tuple[str, ...] = _setting(
        ("albor-serve",),
        "Program and arguments of the server to start, such as a model file after the program.",
    )
    prefix_lines: int = _setting(
        128,
        "Lines before the cursor that the model reads, and up to 63 more.",
        least=1,
        most=10_000,
    )
    suffix_lines: int = _setting(
        32, "Lines after the cursor that the model reads, and up to 63 more.", least=1, most=10_000
    )
    other_files: bool = _setting(True, "Let the model read pieces of other files of the project.")
    other_files_tokens: int = _setting(
        512, "Size of the pieces of other files in tokens, at most.", least=0, most=100_000
    )
    max_tokens: int = _setting(96, "Length of a suggestion in tokens, at most.", least=1, most=4096)
    multiline: bool = _setting(True, "Suggest several lines where a new statement or block begins.")
    min_confidence: float = _setting(
        0.3,
        "A suggestion ends before its first token that is less likely than this; 0 shows all.",
        least=0,
        most=1,
    )
    debounce_ms: int = _setting(
        -1,
        "Milliseconds without a key before a suggestion is asked for; -1 adapts to the server, "
        "which is 0 where it is fast.",
        least=-1,
        most=10_000,
    )
    first_token_budget_ms: int = _setting(
        80,
        "Context is cut so that the server needs about so long to read what it has not read yet; "
        "0 never cuts. Servers other than albor-serve ignore it.",
        least=0,
        most=_MAX_MS,
    )
    deadline_ms: int = _setting(
        1000,
        "After so long an answer ends with what there is. Servers other than albor-serve ignore "
        "it.",
        least=1,
        most=_MAX_MS,
    )
    timeout_ms: int = _setting(
        20_000, "A server that has not answered by then counts as down.", least=100, most=_MAX_MS
    )
    warm_up: bool = _setting(
        True, "Let the server read the text around the cursor when it changes or the cursor moves."
    )
    prefetch: bool = _setting(
        True, "Ask at each change, without waiting for the editor's own question."
    )
    look_ahead: bool = _setting(
        True,
        "While a suggestion is shown, compute the one that follows its acceptance, and those where "
        "the person may turn off it.",
    )
    type_through: bool = _setting(
        True, "Keep a suggestion, or join one that is being computed, while typing agrees with it."
    )
    drafts: bool = _setting(
        True, "Tell the server the last suggestion, which may speed up the next one."
    )
    statistics: bool = _setting(
        True, "Count suggestions on this machine, for albor-lsp stats. Nothing is sent anywhere."
    )


def documented() -> list[tuple[str, str, Any, str]]:
    """(name, type, default, meaning) of every setting, as docs and editors show them."""
    return [
        (_camel(each.name), _kind(each), _as_json(each.default), each.metadata["about"])
        for each in fields(Settings)
    ]


def updated(settings: Settings, values: object) -> tuple[Settings, list[str]]:
    """Settings with `values` put in, and a line for each value that could not be.

    Values of null are left alone: editors send them for what is not set. A known key with a wrong
    value keeps its old one.
    """
    if values is None:
        return settings, []
    if not isinstance(values, Mapping):
        return settings, ["settings must be an object of names and values"]
    by_name = {each.name: each for each in fields(Settings)}
    by_name |= {_camel(name): each for name, each in tuple(by_name.items())}
    good: dict[str, Any] = {}
    complaints = []
    for name, value in values.items():
        known = by_name.get(name)
        if known is None:
            complaints.append(f"unknown setting {str(name)[:60]!r}: see docs/lsp.md for the names")
        elif value is not None:
            try:
                good[known.name] = _checked(known, value)
            except SettingsError as error:
                complaints.append(str(error))
    return replace(settings, **good), complaints


def settings_path(environment: Mapping[str, str] | None = None) -> Path:
    """The file of settings that hold for every editor."""
    variables = os.environ if environment is None else environment
    if "ALBOR_LSP_SETTINGS" in variables:
        return Path(variables["ALBOR_LSP_SETTINGS"])
    base = variables.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "albor" / "lsp.json"


def read_settings_file(path: Path) -> tuple[object, list[str]]:
    """The values in a JSON file, and what is wrong with it; nothing where there is none."""
    try:
        return json.loads(path.read_text("utf-8")), []
    except FileNotFoundError:
        return None, []
    except (OSError, ValueError) as error:
        return None, [f"{path} can't be read: {error}"]


def _checked(known: Field[Any], value: Any) -> Any:
    name, default = _camel(known.name), known.default
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise SettingsError(f"{name} is {value!r:.60}: it must be true or false")
        return value
    if isinstance(default, int | float):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SettingsError(f"{name} is {value!r:.60}: it must be a number")
        if isinstance(default, int) and value != int(value):
            raise SettingsError(f"{name} is {value!r:.60}: it must be a whole number")
        least, most = known.metadata["least"], known.metadata["most"]
        if not least <= value <= most:
            raise SettingsError(f"{name} is {value!r:.60}: it must be {least} to {most}")
        return type(default)(value)
    if isinstance(default, str):
        if not isinstance(value, str):
            raise SettingsError(f"{name} is {value!r:.60}: it must be text")
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        raise SettingsError(f"{name} is {value!r:.60}: it must be a list of texts")
    return tuple(value)


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.title() for part in rest)


def _kind(each: Field[Any]) -> str:
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string"}
    return kinds.get(type(each.default), "list of strings")


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
