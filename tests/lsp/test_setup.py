"""albor setup writes what it showed and takes back exactly that."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from albor_lsp import albor_cli
from albor_lsp.setup import BEGIN, Editor, SetupError, apply, find_editors, plan, remove
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

HELIX = Editor("Helix", "/usr/bin/hx")
NEOVIM = Editor("Neovim", "/usr/bin/nvim")
BOTH = [NEOVIM, HELIX]


def variables(home: Path) -> dict[str, str]:
    return {"HOME": str(home)}


def tree(home: Path) -> dict[str, bytes | None]:
    """Every path below, with the content of files."""
    return {
        str(each.relative_to(home)): each.read_bytes() if each.is_file() else None
        for each in home.rglob("*")
        if each.relative_to(home).parts[:3] != (".local", "state", "albor")
        and str(each.relative_to(home)) not in (".local", ".local/state")
    }


def languages(home: Path) -> Path:
    return home / ".config" / "helix" / "languages.toml"


def program(folder: Path, name: str, prints: str = "") -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{prints}'\n")
    path.chmod(0o755)


def test_nothing_is_written_by_planning(tmp_path: Path) -> None:
    changes, by_hand = plan(BOTH, variables(tmp_path))
    assert {each.editor for each in changes} == {"Neovim", "Helix"}
    assert not by_hand
    assert not list(tmp_path.iterdir())


def test_what_is_written_is_what_was_planned_and_a_second_time_nothing(tmp_path: Path) -> None:
    changes, _ = plan(BOTH, variables(tmp_path))
    apply(changes, variables(tmp_path))
    for change in changes:
        assert Path(change.path).read_text() == change.text
    values = tomllib.loads(languages(tmp_path).read_text())
    assert values["language-server"]["albor"]["command"] == "albor-lsp"
    assert values["language"][0]["language-servers"][-1] == "albor"
    assert plan(BOTH, variables(tmp_path)) == ([], [])


def test_removing_leaves_no_trace(tmp_path: Path) -> None:
    apply(plan(BOTH, variables(tmp_path))[0], variables(tmp_path))
    remove(variables(tmp_path))
    assert not tree(tmp_path)
    assert remove(variables(tmp_path)) == []


comments = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20)


@given(lines=st.lists(comments, max_size=4), ending=st.sampled_from(["\n", "\r\n"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_a_file_that_was_there_gets_its_bytes_back(
    tmp_path: Path, lines: list[str], ending: str
) -> None:
    home = tmp_path / os.urandom(4).hex()
    path = languages(home)
    path.parent.mkdir(parents=True)
    path.write_bytes("".join(f"# {line}{ending}" for line in lines).encode())
    before = tree(home)
    changes, by_hand = plan(BOTH, variables(home))
    assert not by_hand
    apply(changes, variables(home))
    assert path.read_bytes().startswith(before[".config/helix/languages.toml"] or b"")
    remove(variables(home))
    assert tree(home) == before


def test_text_that_was_added_around_the_block_stays(tmp_path: Path) -> None:
    apply(plan([HELIX], variables(tmp_path))[0], variables(tmp_path))
    path = languages(tmp_path)
    path.write_text(f"# mine\n{path.read_text()}# too\n")
    remove(variables(tmp_path))
    assert path.read_text() == "# mine\n# too\n"


def test_what_a_person_changed_stays(tmp_path: Path) -> None:
    apply(plan(BOTH, variables(tmp_path))[0], variables(tmp_path))
    block = languages(tmp_path)
    block.write_text(block.read_text().replace('"ty", ', ""))
    [lua] = tmp_path.rglob("plugin/albor.lua")
    lua.write_text("-- mine\n")
    lines = remove(variables(tmp_path))
    assert sum("so it stays" in line for line in lines) == 2
    assert lua.read_text() == "-- mine\n"
    assert BEGIN in block.read_text()


def test_a_newer_version_replaces_what_an_older_one_wrote(tmp_path: Path) -> None:
    changes, _ = plan([NEOVIM], variables(tmp_path))
    old = [
        replace(each, text="-- as it was before\n") if "plugin/albor.lua" in each.path else each
        for each in changes
    ]
    apply(old, variables(tmp_path))
    [lua] = tmp_path.rglob("plugin/albor.lua")
    [change], by_hand = plan([NEOVIM], variables(tmp_path))
    assert not by_hand
    apply([change], variables(tmp_path))
    assert lua.read_text() == change.text
    remove(variables(tmp_path))
    assert not tree(tmp_path)


def test_a_second_setup_does_not_overwrite_what_a_person_changed(tmp_path: Path) -> None:
    apply(plan([NEOVIM], variables(tmp_path))[0], variables(tmp_path))
    [lua] = tmp_path.rglob("plugin/albor.lua")
    lua.write_text("-- mine\n")
    changes, [line] = plan([NEOVIM], variables(tmp_path))
    assert str(lua) in line
    apply(changes, variables(tmp_path))
    assert lua.read_text() == "-- mine\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('[[language]]\nname = "python"\n', "Python's list"),
        ('language-server = { pylsp = { command = "pylsp" } }\n', "can't be added at the end"),
        ('language = [ { name = "rust" } ]\n', "can't be added at the end"),
        ("language = 3\n", "can't be added at the end"),
        ("not toml", "not valid TOML"),
        ("x = 1", "does not end with a line break"),
    ],
)
def test_a_file_that_it_could_spoil_is_left_to_the_person(
    tmp_path: Path, content: str, reason: str
) -> None:
    path = languages(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    changes, [line] = plan([HELIX], variables(tmp_path))
    assert not changes
    assert reason in line


def test_a_foreign_file_in_its_place_is_not_overwritten(tmp_path: Path) -> None:
    changes, _ = plan([NEOVIM], variables(tmp_path))
    foreign = Path(changes[0].path)
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    todo, [line] = plan([NEOVIM], variables(tmp_path))
    assert str(foreign) in line
    assert str(foreign) not in {each.path for each in todo}


def test_a_linked_configuration_stays_a_link(tmp_path: Path) -> None:
    dotfiles = tmp_path / "dotfiles.toml"
    dotfiles.write_text("# mine\n")
    languages(tmp_path).parent.mkdir(parents=True)
    languages(tmp_path).symlink_to(dotfiles)
    apply(plan([HELIX], variables(tmp_path))[0], variables(tmp_path))
    assert BEGIN in dotfiles.read_text()
    remove(variables(tmp_path))
    assert languages(tmp_path).is_symlink()
    assert dotfiles.read_text() == "# mine\n"


def test_a_damaged_list_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / ".local" / "state" / "albor" / "setup.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(SetupError, match="is damaged"):
        remove(variables(tmp_path))


def test_editors_are_found_on_the_path(tmp_path: Path) -> None:
    for name in ("nvim", "hx", "helix", "codium"):
        program(tmp_path, name)
    names = [(each.name, Path(each.program).name) for each in find_editors(str(tmp_path))]
    assert names == [("Neovim", "nvim"), ("Helix", "hx"), ("VS Code", "codium")]
    assert "codium --install-extension" in plan(find_editors(str(tmp_path)))[1][0]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and a PATH with Helix alone."""
    programs = tmp_path / "bin"
    programs.mkdir()
    program(programs, "hx", "helix 25.07.1")
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("CONFIG", "DATA", "STATE"):
        monkeypatch.delenv(f"XDG_{name}_HOME", raising=False)
    return tmp_path / "home"


@pytest.mark.parametrize(("answer", "writes"), [("y\n", True), ("n\n", False), ("", False)])
def test_it_asks_before_it_writes(
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: str,
    writes: bool,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    assert albor_cli.main(["setup"]) == 0
    shown = capsys.readouterr().out
    assert str(languages(machine)) in shown
    assert 'command = "albor-lsp"' in shown
    assert languages(machine).exists() == writes


def test_yes_and_remove(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert albor_cli.main(["setup", "--yes"]) == 0
    assert languages(machine).exists()
    assert albor_cli.main(["setup", "--remove"]) == 0
    assert not languages(machine).exists()
    assert albor_cli.main(["setup", "--remove"]) == 0
    assert "nothing that setup wrote" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_one_line(
    machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (machine / ".config").parent.mkdir(parents=True)
    (machine / ".config").write_text("a file, no folder")
    assert albor_cli.main(["setup", "--yes"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("albor: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["setup", "--nonsense"]])
def test_wrong_usage_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert albor_cli.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_imports_little() -> None:
    code = "import sys, albor_lsp.albor_cli; print([m for m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = json.loads(result.stdout.replace("'", '"'))
    assert not {"torch", "numpy", "asyncio", "albor_serve"} & set(loaded)
