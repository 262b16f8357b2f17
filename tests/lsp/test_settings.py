"""Settings: names, values, complaints."""

from __future__ import annotations

from pathlib import Path

import pytest
from albor_lsp.settings import Settings, documented, read_settings_file, settings_path, updated


def test_both_spellings_are_taken() -> None:
    settings, complaints = updated(
        Settings(), {"serverUrl": "http://a:1", "max_tokens": 7, "minConfidence": 1, "model": None}
    )
    assert complaints == []
    assert (settings.server_url, settings.max_tokens, settings.model) == ("http://a:1", 7, "")
    assert settings.min_confidence == 1.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"maxTokens": 0}, "must be 1 to 4096"),
        ({"maxTokens": True}, "must be a number"),
        ({"maxTokens": 1.5}, "whole number"),
        ({"enabled": "yes"}, "true or false"),
        ({"serverUrl": 3}, "must be text"),
        ({"disabledLanguages": "python"}, "list of texts"),
        ({"minConfidence": float("nan")}, "must be 0 to 1"),
        ({"colour": "red"}, "unknown setting 'colour'"),
        ([], "object"),
    ],
)
def test_what_is_wrong_is_said_and_left_out(values: object, words: str) -> None:
    settings, complaints = updated(Settings(), values)
    assert settings == Settings()
    assert len(complaints) == 1
    assert words in complaints[0]
    assert "\n" not in complaints[0]


def test_every_setting_has_its_meaning() -> None:
    for name, kind, _default, about in documented():
        assert name[0].islower()
        assert kind in ("boolean", "integer", "number", "string", "list of strings")
        assert about.endswith(".")


def test_the_file(tmp_path: Path) -> None:
    path = tmp_path / "lsp.json"
    assert read_settings_file(path) == (None, [])
    path.write_text('{"maxTokens": 5}')
    assert read_settings_file(path) == ({"maxTokens": 5}, [])
    path.write_text("{")
    values, complaints = read_settings_file(path)
    assert values is None
    assert str(path) in complaints[0]
    assert settings_path({"XDG_CONFIG_HOME": "/x"}) == Path("/x/albor/lsp.json")
    assert settings_path({"ALBOR_LSP_SETTINGS": "/y"}) == Path("/y")
