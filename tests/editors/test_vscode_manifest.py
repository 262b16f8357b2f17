"""The VS Code extension's manifest says what the code and the language server say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from scripts import vscode_settings

ROOT = Path(__file__).parents[2]
EXTENSION = ROOT / "editors" / "vscode"
SOURCES = "\n".join(path.read_text() for path in sorted((EXTENSION / "src").glob("*.ts")))
README = (EXTENSION / "README.md").read_text()


@pytest.fixture(scope="module")
def package() -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((EXTENSION / "package.json").read_text())
    return manifest


def test_settings_are_those_of_the_language_server(package: dict[str, Any]) -> None:
    assert package == vscode_settings.updated(package), "run: python scripts/vscode_settings.py"


def test_every_setting_has_a_meaning_and_a_default(package: dict[str, Any]) -> None:
    for name, value in package["contributes"]["configuration"]["properties"].items():
        assert value.get("description") or value.get("markdownDescription"), name
        assert "default" in value, name


def test_a_folder_can_neither_run_a_program_nor_read_the_key(package: dict[str, Any]) -> None:
    properties = package["contributes"]["configuration"]["properties"]
    for name in ("path", "serverCommand", "apiKey"):
        assert properties[f"albor.{name}"]["scope"] == "machine"


def test_commands_are_registered_contributed_and_in_the_readme(package: dict[str, Any]) -> None:
    contributed = {each["command"] for each in package["contributes"]["commands"]}
    registered = set(re.findall(r'^ {8}"(albor\.\w+)":', SOURCES, re.MULTILINE))
    assert contributed == registered
    for each in package["contributes"]["commands"]:
        assert f"albor: {each['title']}" in README


def test_settings_are_in_the_readme(package: dict[str, Any]) -> None:
    assert vscode_settings.readme_with_table(README, package) == README


def test_no_proposed_api_and_no_telemetry(package: dict[str, Any]) -> None:
    assert "enabledApiProposals" not in package
    assert "telemetry" not in SOURCES.lower()


def test_the_lock_names_no_other_registry() -> None:
    lock = json.loads((EXTENSION / "package-lock.json").read_text())
    for each in lock["packages"].values():
        assert each.get("resolved", "https://registry.npmjs.org/").startswith(
            "https://registry.npmjs.org/"
        )
