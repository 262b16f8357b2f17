"""`albor setup`: what albor writes into editors' folders, and how it takes it back.

Every change is planned first, so that it can be shown before anything is written. What was
written is kept in a list with a digest of each file; taking back removes exactly that, and leaves
alone what a person has changed since.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from albor_lsp.errors import LspError

__all__ = ["Change", "Editor", "SetupError", "apply", "find_editors", "plan", "remove"]

BEGIN: Final = "# >>> albor setup: `albor setup --remove` takes this block away\n"
END: Final = "# <<< albor setup\n"
CODE_PROGRAMS: Final = ("code", "codium", "cursor")


class SetupError(LspError):
    """A file can't be read or written, or is not what it must be."""


@dataclass(frozen=True, slots=True)
class Editor:
    """An editor that is installed.

    Attributes:
        name: as people call it.
        program: its path.
    """

    name: str
    program: str


@dataclass(frozen=True, slots=True)
class Change:
    """One thing to write.

    Attributes:
        editor: for which editor.
        path: the file.
        text: the file's content, or the block that is put at its end.
        is_block: the file has other content too, which stays.
    """

    editor: str
    path: str
    text: str
    is_block: bool = False


@dataclass(frozen=True, slots=True)
class _Written:
    path: str
    digest: str
    is_block: bool
    made_file: bool
    folders: tuple[str, ...]


def find_editors(path: str | None = None) -> list[Editor]:
    """The editors on the PATH, or on another one, that albor knows."""
    known = [("Neovim", "nvim"), ("Helix", "hx"), ("Helix", "helix")]
    known += [("VS Code", program) for program in CODE_PROGRAMS]
    found: dict[str, Editor] = {}
    for name, program in known:
        where = shutil.which(program, path=path)
        if where is not None:
            key = program if name == "VS Code" else name
            found.setdefault(key, Editor(name, where))
    return list(found.values())


def plan(
    editors: list[Editor], variables: Mapping[str, str] | None = None
) -> tuple[list[Change], list[str]]:
    """What to write for these editors, and lines about what a person must do by hand.

    What is there already, unchanged, is not planned again.

    Raises:
        SetupError: a file that is there can't be read.
    """
    environment = os.environ if variables is None else variables
    changes: list[Change] = []
    by_hand: list[str] = []
    for editor in editors:
        if editor.name == "Neovim":
            changes += _neovim(environment)
        elif editor.name == "Helix":
            more, lines = _helix(environment)
            changes += more
            by_hand += lines
        else:
            by_hand.append(
                f"VS Code: run `make vsix` in albor's sources, then "
                f"`{Path(editor.program).name} --install-extension albor.vsix`"
            )
    digests = {each.path: each.digest for each in _read_list(_list_path(environment))}
    for change in changes:
        path = Path(change.path)
        if change.is_block or not path.exists():
            continue
        there = _read(path)
        # Written by an older albor and not touched since: it may be replaced.
        if there != change.text and _digest(there) != digests.get(change.path):
            by_hand.append(f"{change.editor}: {path} is there and not albor's: move it away")
    blocked = {line.split(" is there")[0].partition(": ")[2] for line in by_hand}
    todo = [each for each in changes if each.path not in blocked and not _is_done(each)]
    return todo, by_hand


def apply(changes: list[Change], variables: Mapping[str, str] | None = None) -> None:
    """Write what was planned; what was written before stays in the list.

    Raises:
        SetupError: a file can't be written; what was written until then is in the list.
    """
    environment = os.environ if variables is None else variables
    list_path = _list_path(environment)
    written = {each.path: each for each in _read_list(list_path)}
    for change in changes:
        path = Path(change.path)
        before = written.get(change.path)
        made_file = before.made_file if before else not path.exists()
        try:
            folders = _make_folders(path.parent)
            old = _read(path) if path.exists() and change.is_block else ""
            _write(path, old + change.text)
        except OSError as error:
            raise SetupError(f"{path} can't be written: {error.strerror}") from error
        written[change.path] = _Written(
            change.path,
            _digest(change.text),
            change.is_block,
            made_file,
            tuple(folders) + (before.folders if before else ()),
        )
        _write_list(list_path, list(written.values()))


def remove(variables: Mapping[str, str] | None = None) -> list[str]:
    """Take back everything that the list names; returns a line for each file.

    A file or block that was changed since stays, and stays in the list.

    Raises:
        SetupError: a file can't be read or written.
    """
    environment = os.environ if variables is None else variables
    list_path = _list_path(environment)
    lines: list[str] = []
    kept: list[_Written] = []
    written = _read_list(list_path)
    for each in written:
        path = Path(each.path)
        try:
            lines.append(_take_back(each, path, kept))
        except OSError as error:
            raise SetupError(f"{path} can't be changed: {error.strerror}") from error
    made = {folder for each in written for folder in each.folders}
    for folder in map(Path, sorted(made, key=len, reverse=True)):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    if kept:
        _write_list(list_path, kept)
    else:
        list_path.unlink(missing_ok=True)
    return lines


def _take_back(each: _Written, path: Path, kept: list[_Written]) -> str:
    if not path.exists():
        return f"{path} is gone already"
    text = _read(path)
    if each.is_block:
        head, begin, tail = text.partition(BEGIN)
        body, end, rest = tail.partition(END)
        if not begin or not end or _digest(begin + body + end) != each.digest:
            kept.append(each)
            return f"{path}: albor's block was changed, so it stays"
        if head + rest or not each.made_file:
            _write(path, head + rest)
            return f"{path}: took albor's block away"
    elif _digest(text) != each.digest:
        kept.append(each)
        return f"{path} was changed, so it stays"
    path.unlink()
    return f"removed {path}"


# --- the editors ---


def _neovim(environment: Mapping[str, str]) -> list[Change]:
    data = environment.get("XDG_DATA_HOME") or str(_home(environment) / ".local" / "share")
    target = Path(data) / "nvim" / "site" / "pack" / "albor" / "start" / "albor"
    source = resources.files("albor_nvim")
    names = ["plugin/albor.lua", "doc/albor.txt"]
    names += [
        f"lua/albor/{each.name}"
        for each in source.joinpath("lua/albor").iterdir()
        if each.name.endswith(".lua")
    ]
    return [
        Change("Neovim", str(target / name), source.joinpath(name).read_text("utf-8"))
        for name in sorted(names)
    ]


def _helix(environment: Mapping[str, str]) -> tuple[list[Change], list[str]]:
    path = _config(environment) / "helix" / "languages.toml"
    fragment = resources.files("albor_helix").joinpath("languages.toml").read_text("utf-8")
    code = "".join(line for line in fragment.splitlines(True) if not line.startswith("#"))
    block = f"{BEGIN}{code.strip()}\n{END}"
    there = _read(path) if path.exists() else ""
    if BEGIN in there:
        return [], []
    try:
        values = tomllib.loads(there)
    except tomllib.TOMLDecodeError as error:
        return [], [f"Helix: {path} is not valid TOML ({error}): mend it first"]
    try:
        # Tables written in one line can't be added to below them, and some keys hold no table.
        tomllib.loads(f"{there}\n{block}")
        can_add = True
    except tomllib.TOMLDecodeError:
        can_add = False
    servers, languages = values.get("language-server"), values.get("language")
    if isinstance(servers, dict) and "albor" in servers:
        return [], []
    if not can_add:
        line = (
            f"Helix: albor's lines can't be added at the end of {path}, which has language or "
            "language-server in one line: put in there what editors/helix/languages.toml has"
        )
        return [], [line]
    if any(each.get("name") == "python" for each in languages or []):
        line = (
            f'Helix: {path} has Python\'s list of language servers: add "albor" at its end and '
            'the lines [language-server.albor], command = "albor-lsp"'
        )
        return [], [line]
    # Nothing but the block is ever written, and it starts on a line of its own.
    if there and not there.endswith("\n"):
        return [], [f"Helix: {path} does not end with a line break: add one"]
    return [Change("Helix", str(path), block, is_block=True)], []


def _is_done(change: Change) -> bool:
    path = Path(change.path)
    if not path.exists():
        return False
    return change.text in _read(path) if change.is_block else _read(path) == change.text


# --- files ---


def _home(environment: Mapping[str, str]) -> Path:
    return Path(environment["HOME"]) if environment.get("HOME") else Path.home()


def _config(environment: Mapping[str, str]) -> Path:
    return Path(environment.get("XDG_CONFIG_HOME") or _home(environment) / ".config")


def _list_path(environment: Mapping[str, str]) -> Path:
    state = environment.get("XDG_STATE_HOME") or str(_home(environment) / ".local" / "state")
    return Path(state) / "albor" / "setup.json"


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise SetupError(f"{path} can't be read: {error}") from error


def _write(path: Path, text: str) -> None:
    """In place of the old file, which a link leads to where people keep their dotfiles so."""
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.albor-part")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
        if target.exists():
            shutil.copymode(target, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _make_folders(folder: Path) -> list[str]:
    """Make a folder; returns those that were not there, outermost first."""
    missing = [each for each in [folder, *folder.parents] if not each.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return [str(each) for each in missing]


def _read_list(path: Path) -> list[_Written]:
    if not path.exists():
        return []
    try:
        return [
            _Written(**(each | {"folders": tuple(each["folders"])}))
            for each in json.loads(_read(path))
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise SetupError(f"{path} is damaged ({error}): remove it and albor's files") from error


def _write_list(path: Path, written: list[_Written]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps([asdict(each) for each in written], indent=1) + "\n")
    except OSError as error:
        raise SetupError(f"{path} can't be written: {error.strerror}") from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
