"""docs/lsp.md says what the code does."""

from __future__ import annotations

import json
from pathlib import Path

from albor_lsp.fim_dialects import FAMILIES, family_of
from albor_lsp.server import COMMANDS
from albor_lsp.settings import documented

PAGE = (Path(__file__).parents[2] / "docs" / "lsp.md").read_text("utf-8")


def test_every_setting_is_on_the_page_and_no_other() -> None:
    rows = [
        f"| `{n}` | {kind} | `{json.dumps(d)}` | {about} |" for n, kind, d, about in documented()
    ]
    table = PAGE.split("## Settings")[1].split("## Commands")[0]
    assert [line for line in table.splitlines() if line.startswith("| `")] == rows


def test_every_command_is_on_the_page_and_no_other() -> None:
    table = PAGE.split("## Commands")[1].split("## Status")[0]
    rows = [f"| `{name}` | {about} |" for name, about in COMMANDS.items()]
    assert [line for line in table.splitlines() if line.startswith("| `")] == rows


def test_families_are_told_by_the_models_name() -> None:
    for name, family in (
        ("Qwen/Qwen2.5-Coder-1.5B", "qwen"),
        ("deepseek-coder-6.7b-base", "deepseek"),
        ("bigcode/starcoder2-3b", "starcoder"),
        ("codellama:7b-code", "codellama"),
        ("google/codegemma-2b", "codegemma"),
    ):
        found = family_of(name)
        assert found is not None
        assert found.name == family
    assert family_of("poet") is None
    assert len({each.name for each in FAMILIES}) == len(FAMILIES)
