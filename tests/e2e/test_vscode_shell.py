"""The VS Code extension in a real editor, over a language server that follows a script."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("playwright.sync_api")
from tests.e2e.code_server import CodeServer, Window, running, wait_for
from tests.e2e.vscode_fixtures import (
    EXTENSION,
    VSIX,
    browser,
    context,
    marks,
)

__all__ = ["browser", "context"]

pytestmark = marks

WALKTHROUGH = ".gettingStartedContainer"
ADD = "def add(a, b):\n    total = a + b\n    return total"
STATUS = {
    "state": "ready",
    "model": "scripted-1m",
    "latency": {"prefill_ms": 1.25, "decode_ms": 20},
}


class Script:
    """What the language server will say, and what it was asked."""

    def __init__(self, folder: Path) -> None:
        self._path, self._log = folder / "script.json", folder / "log.jsonl"
        self.write()

    @property
    def environment(self) -> dict[str, str]:
        return {"SCRIPT": str(self._path), "LOG": str(self._log)}

    def write(self, **changes: Any) -> None:
        """Start over with the usual answers and these changes."""
        script = {"suggestions": [ADD], "status": STATUS} | changes
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(script))
        new.replace(self._path)
        self._log.write_text("")

    def messages(self, method: str) -> list[dict[str, Any]]:
        """What was asked with `method` since the last `write`."""
        lines = [json.loads(line) for line in self._log.read_text().splitlines()]
        return [line for line in lines if line["method"] == method]

    def pids(self) -> set[int]:
        return {json.loads(line)["pid"] for line in self._log.read_text().splitlines()}


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Script:
    return Script(tmp_path_factory.mktemp("script"))


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory, script: Script) -> Iterator[CodeServer]:
    home = tmp_path_factory.mktemp("home")
    # Where pipx and uv put programs: found without a PATH or a setting.
    program = home / ".local" / "bin" / "albor-lsp"
    program.parent.mkdir(parents=True)
    source = Path(__file__).with_name("scripted_lsp.py").read_text()
    program.write_text(source.replace("/usr/bin/env python3", sys.executable))
    program.chmod(0o755)
    with running(CodeServer(home, [VSIX], script.environment, {})) as server:
        yield server


@pytest.fixture(scope="module")
def shared_window(
    context: Any, editor: CodeServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Window]:
    folder = tmp_path_factory.mktemp("project")
    for name in ("start.py", "notes.md", "start.js"):
        (folder / name).write_text("")
    window = Window(context.new_page(), editor, folder)
    window.page.locator(WALKTHROUGH, has_text="Start with albor").wait_for(timeout=60_000)
    yield window
    window.page.close()


@pytest.fixture
def window(
    shared_window: Window,
    editor: CodeServer,
    script: Script,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> Iterator[Window]:
    """The window with an empty Python file in front."""
    script.write()
    page = shared_window.page
    page.keyboard.press("Escape")
    shared_window.run("View: Close All Editors")
    shared_window.open("start.py")
    shared_window.press("Control+a", "Delete")
    shared_window.set({})
    shared_window.wait_status("ready")
    script.write()
    yield shared_window
    shared_window.screenshot(tmp_path / f"{request.node.name}.png")
    shared_window.press("Escape", "Control+a", "Delete")
    shared_window.save()


def test_first_start_opens_the_walkthrough_and_asks_nobody_else(
    shared_window: Window, script: Script
) -> None:
    assert shared_window.page.locator(WALKTHROUGH).is_visible()
    assert shared_window.notifications() == []
    assert shared_window.strangers == set()
    # No file was opened yet, so nothing was started.
    assert script.pids() == set()


def test_tab_accepts_everything_and_one_undo_takes_it_back(window: Window, script: Script) -> None:
    window.type("def add(")
    window.wait_ghost("a, b):")
    window.press("Tab")
    wait_for(lambda: window.code() == ADD, "accepted text")
    wait_for(lambda: script.messages("workspace/executeCommand"), "word of the acceptance")
    told = script.messages("workspace/executeCommand")[0]["params"]
    assert told["command"] == "scripted.accepted"
    window.press("Control+z")
    wait_for(lambda: window.code() == "def add(", "text before the acceptance")


def test_accepts_by_word_and_by_line(window: Window) -> None:
    window.type("def ad")
    window.wait_ghost("d(a, b):")
    window.press("Control+ArrowRight")
    accepted = wait_for(lambda: window.code() not in ("def ad", "") and window.code(), "a word")
    assert accepted in ("def add", "def add(")
    window.wait_ghost("a, b):")
    window.press("Control+Alt+ArrowRight")
    wait_for(lambda: window.code().rstrip("\n") == "def add(a, b):", "accepted line")
    window.press("Tab")


def test_typing_what_is_suggested_keeps_the_rest(window: Window) -> None:
    window.type("def ")
    window.wait_ghost("add(a, b):")
    for typed in "add(a":
        window.type(typed)
        assert window.ghost() != "" or window.wait_ghost()
    assert window.wait_ghost().startswith(", b):")
    assert window.code() == "def add(a"
    window.type("x")
    wait_for(lambda: window.ghost() == "", "end of the suggestion")


def test_escape_hides_and_the_key_asks_again(window: Window) -> None:
    window.type("def add")
    window.wait_ghost("(a, b)")
    window.press("Escape")
    wait_for(lambda: window.ghost() == "", "end of the suggestion")
    window.press("Alt+\\")
    window.wait_ghost("(a, b)")


def test_cycles_through_several_when_asked(window: Window, script: Script) -> None:
    script.write(suggestions=["def add(a, b):", "def add_all(values):"])
    window.type("def add")
    window.wait_ghost("(a, b):")
    window.press("Alt+]")
    window.wait_ghost("_all(values):")
    window.press("Alt+[")
    window.wait_ghost("(a, b):")
    assert script.messages("textDocument/inlineCompletion")[-1]["params"]["context"] == {
        "triggerKind": 1
    }


def quiet(window: Window, script: Script) -> bool:
    """Type something that has a suggestion: True when nobody was asked and nothing is shown."""
    before = len(script.messages("textDocument/inlineCompletion"))
    window.press("Control+a", "Delete")
    window.type("def add")
    window.page.wait_for_timeout(1000)
    asked = len(script.messages("textDocument/inlineCompletion")) - before
    return asked == 0 and window.ghost() == ""


def test_pause_and_resume(window: Window, script: Script) -> None:
    window.run("albor: Pause or Resume")
    window.wait_status("paused")
    assert quiet(window, script)
    window.run("albor: Pause or Resume")
    window.wait_status("ready")
    window.type("(")
    window.wait_ghost("a, b")


def test_off_and_on_everywhere(window: Window, script: Script, editor: CodeServer) -> None:
    window.run("albor: Turn Suggestions On or Off Everywhere")
    window.wait_status("off for python here")
    assert editor.settings()["albor.enabled"] is False
    assert quiet(window, script)
    window.run("albor: Turn Suggestions On or Off Everywhere")
    window.wait_status("ready")
    assert "albor.enabled" not in editor.settings()
    window.type("(")
    window.wait_ghost("a, b")


def test_off_and_on_for_a_language(window: Window, script: Script, editor: CodeServer) -> None:
    window.run("albor: Turn Suggestions On or Off for This Language")
    window.wait_status("off for python here")
    assert editor.settings()["[python]"] == {"albor.enabled": False}
    assert quiet(window, script)
    window.open("start.js")
    window.wait_status("ready")
    window.type("def add")
    window.wait_ghost("(a, b)")
    window.press("Escape", "Control+z", "Control+z")
    window.press("Control+a", "Delete")
    window.save()
    window.open("start.py")
    window.run("albor: Turn Suggestions On or Off for This Language")
    window.wait_status("ready")


def test_off_and_on_in_a_workspace(window: Window, script: Script, editor: CodeServer) -> None:
    # More than the editor's own merging of settings would do: it would stay on for this language.
    window.set({"[python]": {"albor.enabled": True}})
    window.run("albor: Turn Suggestions On or Off in This Workspace")
    window.wait_status("off for python here")
    saved = json.loads((window.folder / ".vscode" / "settings.json").read_text())
    assert saved == {"albor.enabled": False}
    assert quiet(window, script)
    window.run("albor: Turn Suggestions On or Off in This Workspace")
    window.wait_status("ready")
    shutil.rmtree(window.folder / ".vscode")


def test_prose_is_off_until_it_is_turned_on(window: Window, editor: CodeServer) -> None:
    window.open("notes.md")
    window.wait_status("off for markdown here")
    window.set({"[markdown]": {"albor.enabled": True}})
    window.wait_status("ready")


def test_on_demand_only(window: Window, script: Script, editor: CodeServer) -> None:
    window.set({"albor.automatic": False})
    wait_for(lambda: script.messages("workspace/didChangeConfiguration"), "new settings")
    assert quiet(window, script)
    window.press("Alt+\\")
    window.wait_ghost("(a, b)")


def test_the_server_gets_its_settings_and_none_of_the_extension_s(
    window: Window, script: Script, editor: CodeServer
) -> None:
    window.set({"albor.automatic": False, "albor.enabled": True})
    wait_for(lambda: script.messages(""), "answer to workspace/configuration")
    (given,) = script.messages("")[-1]["result"]
    contributed = json.loads((EXTENSION / "package.json").read_text())["contributes"]
    names = {name.partition(".")[2] for name in contributed["configuration"]["properties"]}
    tops = {name.partition(".")[0] for name in names}
    assert set(given) == tops - {"automatic", "enabled", "path"}


def test_the_menu_holds_everything(window: Window) -> None:
    item = window.page.locator('.statusbar-item[id="albor.albor.albor.status"] a')
    item.click()
    rows = window.page.locator(".quick-input-list .monaco-list-row")
    rows.first.wait_for()
    labels = " ".join(rows.all_text_contents())
    for wanted in ("Pause", "everywhere", "for python", "in this workspace", "Explain", "Log"):
        assert wanted in labels
    window.pick("Pause in this window")
    window.wait_status("paused")
    item.click()
    window.pick("Resume")
    window.wait_status("ready")


def test_each_entry_of_the_menu_does_what_it_says(
    window: Window, editor: CodeServer, script: Script
) -> None:
    def choose(label: str) -> None:
        window.run("albor: Show Menu")
        window.pick(label)

    for place in ("everywhere", "for python", "in this workspace"):
        choose(f"Turn on or off {place}")
        window.wait_status("off for python here")
        choose(f"Turn on or off {place}")
        window.wait_status("ready")
    shutil.rmtree(window.folder / ".vscode", ignore_errors=True)
    choose("Explain the last suggestion")
    assert "# albor.explain" in window.text_of_tab("explanation.md")
    choose("Statistics")
    assert "# albor.stats" in window.text_of_tab("statistics.md")
    choose("Log")
    window.page.locator(".part.panel .view-lines").first.wait_for()
    window.press("Control+j")
    window.open("start.py")
    window.type("d")
    (old,) = wait_for(script.pids, "a message")
    choose("Restart")
    wait_for(lambda: script.pids() - {old}, "another process")
    window.wait_status("ready")
    choose("Settings")
    found = window.page.locator(".settings-editor .setting-item-label", has_text="Automatic")
    found.first.wait_for()
    choose("Walkthrough")
    window.page.locator(WALKTHROUGH, has_text="Start with albor").wait_for()
    window.open("start.py")


def test_commands_of_the_palette(window: Window) -> None:
    window.run("albor: Pause or Resume")
    window.wait_status("paused")
    window.type("def add")
    window.page.wait_for_timeout(500)
    assert window.ghost() == ""
    window.run("albor: Pause or Resume")
    window.wait_status("ready")
    window.run("albor: Suggest Now")
    window.wait_ghost("(a, b)")


def test_each_documented_command_is_in_a_test() -> None:
    """By its title in the palette, by its entry of the menu, or, in an editor, by its key."""
    package = json.loads((EXTENSION / "package.json").read_text())
    tests = Path(__file__).read_text()
    by_key = {
        "albor.acceptWord": "Control+ArrowRight",
        "albor.acceptLine": "Control+Alt+ArrowRight",
    }
    for each in package["contributes"]["commands"]:
        title = f'"albor: {each["title"]}"'
        assert title in tests or by_key.get(each["command"], title) in tests, title


def test_each_setting_reaches_the_server_as_it_was_set(window: Window, script: Script) -> None:
    properties = json.loads((EXTENSION / "package.json").read_text())["contributes"][
        "configuration"
    ]["properties"]
    own = {"albor.automatic", "albor.enabled", "albor.path"}
    wanted = {name: other_than(p) for name, p in properties.items() if name not in own}
    window.set_machine(wanted)
    try:
        short = {name.partition(".")[2]: value for name, value in wanted.items()}

        def is_told() -> bool:
            answers = script.messages("")
            return bool(answers) and answers[-1]["result"] == [short]

        wait_for(is_told, "the settings")
    finally:
        window.set_machine({})


def other_than(schema: dict[str, Any]) -> Any:
    """A valid value that is not the default."""
    default = schema["default"]
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 1
    if isinstance(default, float):
        return default / 2
    return [*default, "more"] if isinstance(default, list) else f"{default}x"


def test_status_shows_model_and_latency(window: Window) -> None:
    window.type("def add")
    window.wait_ghost("(a, b)")
    status = window.wait_status("scripted-1m")
    assert "prefill 1.3 ms, decode 20 ms" in status
    assert " ms |" in status


def test_explanation_and_statistics_are_read_only_pages(window: Window) -> None:
    window.run("albor: Explain the Last Suggestion")
    assert "# albor.explain" in window.text_of_tab("explanation.md")
    window.run("albor: Show Statistics")
    assert "# albor.stats" in window.text_of_tab("statistics.md")


def test_the_log_names_the_program(window: Window) -> None:
    window.run("albor: Show Log")
    panel = window.page.locator(".part.panel .view-lines")
    wait_for(lambda: "albor-lsp" in "".join(panel.all_text_contents()), "the program in the log")
    window.press("Control+j")


def test_example_and_walkthrough(window: Window) -> None:
    window.run("albor: New Python File to Try It In")
    window.page.locator(".tab.active", has_text="Untitled").wait_for()
    assert window.code() == "def is_leap_year(year):\n    "
    window.run("View: Revert and Close Editor")
    window.run("albor: Open the Walkthrough")
    window.page.locator(WALKTHROUGH, has_text="Start with albor").wait_for()
    window.open("start.py")


def test_restart_is_another_process(window: Window, script: Script) -> None:
    window.type("def ")
    wait_for(script.pids, "a message")
    (old,) = script.pids()
    window.run("albor: Restart")
    wait_for(lambda: script.pids() - {old}, "another process")
    window.wait_status("ready")
    wait_for(lambda: not psutil.pid_exists(old), "end of the old process")
    window.type("add")
    window.wait_ghost("(a, b)")


def test_death_is_quiet_and_mended(window: Window, script: Script) -> None:
    window.type("d")
    wait_for(script.pids, "a message")
    (old,) = script.pids()
    psutil.Process(old).kill()
    window.wait_status("starts again")
    window.wait_status("ready")
    assert old not in {m["pid"] for m in script.messages("initialized")}
    window.type("ef add")
    window.wait_ghost("(a, b)")
    assert window.notifications() == []


def test_a_server_that_dies_at_each_start_is_left_longer_and_longer(
    window: Window, script: Script
) -> None:
    script.write(die_on="initialize")
    window.run("albor: Restart")
    window.wait_status("starts again in 2 s")
    window.type("def still_typing():")
    assert window.code() == "def still_typing():"
    assert window.notifications() == []
    script.write()
    window.wait_status("ready")


def test_a_wrong_path_is_told_and_mended(window: Window, editor: CodeServer) -> None:
    window.set_machine({"albor.path": "/no/such/albor-lsp"})
    status = window.wait_status("/no/such/albor-lsp")
    assert "Click to install or choose it" in status
    assert window.notifications() == []
    window.set_machine({})
    window.wait_status("ready")


def test_installing_is_offered_and_done_only_after_a_yes(
    window: Window, editor: CodeServer
) -> None:
    program = editor.home / ".local" / "bin" / "albor-lsp"
    pipx = program.with_name("pipx")
    pipx.write_text(f'#!/bin/sh\necho "$@" > {editor.home}/ran\nmv {program}.away {program}\n')
    pipx.chmod(0o755)
    program.rename(f"{program}.away")
    try:
        window.run("albor: Restart")
        window.wait_status("found neither")
        window.page.locator('.statusbar-item[id="albor.albor.albor.status"] a').click()
        window.pick("Install albor…")
        rows = window.page.locator(".quick-input-list .monaco-list-row")
        rows.filter(has_text=f"{pipx} install albor").wait_for()
        window.press("Escape")
        assert not (editor.home / "ran").exists()
        window.run("albor: Install albor on This Machine")
        window.pick(f"{pipx} install albor")
        wait_for(lambda: not Path(f"{program}.away").exists(), "run of pipx")
        assert (editor.home / "ran").read_text() == "install albor\n"
        window.wait_status("ready")
    finally:
        pipx.unlink()
        if not program.exists():
            Path(f"{program}.away").rename(program)
    window.press("Control+j")


def test_a_huge_file_stays_out_and_the_editor_usable(window: Window, script: Script) -> None:
    """52 MB; files of more than 50 MiB the editor itself keeps from all extensions."""
    line = "value = 'some text that goes on and on'\n"
    (window.folder / "huge.py").write_text(line * 1_300_000)
    script.write()
    window.open("huge.py", anyway=True)
    window.wait_status("larger than 4 million")
    window.type("x = 1")
    window.page.wait_for_timeout(500)
    opened = script.messages("textDocument/didOpen") + script.messages("textDocument/didChange")
    assert [m for m in opened if m["params"]["textDocument"]["uri"].endswith("huge.py")] == []
    window.press("Control+z")
    window.run("File: Revert File")
    (window.folder / "huge.py").unlink()


def test_a_binary_file_and_a_read_only_folder(window: Window) -> None:
    (window.folder / "data.bin").write_bytes(bytes(range(256)) * 64)
    (window.folder / "sealed").mkdir()
    (window.folder / "sealed" / "kept.py").write_text("")
    (window.folder / "sealed" / "kept.py").chmod(0o444)
    (window.folder / "sealed").chmod(0o555)
    window.open("data.bin", anyway=True)
    window.type("x")
    window.page.wait_for_timeout(500)
    assert window.ghost() == ""
    window.press("Control+z")
    window.run("File: Revert File")
    window.run("View: Close Editor")
    window.open("sealed/kept.py")
    window.type("def add")
    window.wait_ghost("(a, b)")
    window.press("Escape")
    window.run("File: Revert File")
    assert window.notifications() == []


def test_two_windows_and_a_workspace_of_two_folders(
    window: Window, context: Any, editor: CodeServer, script: Script, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text("")
    roots = tmp_path / "both.code-workspace"
    roots.write_text(
        json.dumps({"folders": [{"path": str(tmp_path / name)} for name in ("one", "two")]})
    )
    script.write()
    other = Window(context.new_page(), editor, roots)
    other.open(str(tmp_path / "two" / "two.py"))
    other.wait_status("ready")
    other.type("def add")
    other.wait_ghost("(a, b)")
    (hello,) = script.messages("initialize")
    assert [each["name"] for each in hello["params"]["workspaceFolders"]] == ["one", "two"]
    window.page.bring_to_front()
    window.type("def add")
    window.wait_ghost("(a, b)")
    pids = script.pids()
    assert len(pids) == 2
    other.page.close()
