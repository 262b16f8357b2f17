"""Names on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from albor_serve.errors import ConfigError
from albor_serve.model_args import NamedModel, named_models, parse_bytes


def test_no_model_is_the_embedded_one() -> None:
    assert named_models([], [], None, "albor") == [NamedModel(None, "albor")]
    assert named_models([], ["code", "x"], None, "albor") == [
        NamedModel(None, "code", ("x", "albor"))
    ]


def test_models_with_names_and_aliases() -> None:
    assert named_models(["dir/a.gguf", "b.gguf=text"], ["a=b2", "big=text"][1:], None, "") == [
        NamedModel(Path("dir/a.gguf"), "a"),
        NamedModel(Path("b.gguf"), "text", ("big",)),
    ]


def test_a_path_may_hold_an_equals_sign(tmp_path: Path) -> None:
    path = tmp_path / "a=b.gguf"
    path.touch()
    assert named_models([str(path)], [], None, "")[0] == NamedModel(path, "a=b")
    assert named_models([f"{path}=c"], [], None, "")[0] == NamedModel(path, "c")


def test_a_folder_of_models(tmp_path: Path) -> None:
    for name in ("b.gguf", "a.gguf", "big-00001-of-00002.gguf", "big-00002-of-00002.gguf", "x.txt"):
        (tmp_path / name).touch()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").touch()
    (tmp_path / "other").mkdir()
    found = named_models([str(tmp_path / "b.gguf") + "=first"], ["h=hf"], tmp_path, "")
    names = [model.name for model in found]
    assert names == ["first", "a", "big-00001-of-00002", "hf"]
    assert found[3].aliases == ("h",)


@pytest.mark.parametrize(
    ("models", "aliases"),
    [
        (["x/a.gguf", "y/a.gguf"], []),
        (["a.gguf=default"], []),
        (["a.gguf="], []),
        (["=a"], []),
        (["a.gguf"], ["b=c"]),
        (["a.gguf"], [""]),
        (["a.gguf", "b.gguf"], ["x=a", "x=b"]),
        (["a.gguf", "b.gguf"], ["b"]),
        (["a.gguf=\n"], []),
    ],
)
def test_names_that_cannot_work(models: list[str], aliases: list[str]) -> None:
    with pytest.raises(ConfigError):
        named_models(models, aliases, None, "")


def test_folders_that_cannot_work(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError):
            named_models([], [], folder, "")


def test_sizes() -> None:
    assert parse_bytes("800M") == parse_bytes("800mb") == 800_000_000
    assert parse_bytes("1.5G") == 1_500_000_000
    assert parse_bytes("12") == 12
    for text in ("", "0", "-1G", "x", "1T", "1e400"):
        with pytest.raises(ConfigError):
            parse_bytes(text)
