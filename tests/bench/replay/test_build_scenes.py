"""Scenes are cut from wheels: the same ones each time, from permissive packages alone."""

from __future__ import annotations

import ast
import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from albor_serve.bench.replay import build_scenes
from albor_serve.bench.replay.build_scenes import build, main
from albor_serve.bench.replay.scenes import KINDS, load_scenes
from albor_serve.errors import ConfigError

CODE = '''
def area_{n}(sizes, flag, largest):
    """Area of all {n}."""
    total = sum(sizes) + len(sizes) * 2 + max(sizes, default={n})
    if flag is not None and total > largest:
        print("total", total, sep=", ", end="")
    kept = flag.pop(sizes, total) + [flag]
    return sorted(kept)[0] + total * len(kept)

'''
TEST = """
from demo.mod{n} import area_{n}


def test_area_of_three_sizes_{n}():
    sizes = [1, 2, 3]
    assert area_{n}(sizes, None, 10) == {n}
    assert area_{n}(sizes[::-1], None, 10) == {n}
"""


def wheel(folder: Path, name: str, licence: str = "License-Expression: MIT") -> None:
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        head = f"Metadata-Version: 2.4\nName: {name}\n{licence}\n\nLicense: GPL\n"
        archive.writestr(f"{name}-1.0.dist-info/METADATA", head)
        for n in range(8):
            text = "".join(CODE.format(n=f"{n}{part}") for part in range(1, 21))
            archive.writestr(f"{name}/mod{n}.py", text)
            tests = "".join(TEST.format(n=f"{n}{part}") for part in range(1, 21))
            archive.writestr(f"{name}/tests/test_mod{n}.py", tests)
        archive.writestr(f"{name}/empty/", "")
        archive.writestr(f"{name}/broken.py", "def (" * 2000)
        archive.writestr(f"{name}/latin.py", ("# é\n" * 2000).encode("latin-1"))
        archive.writestr(f"{name}/windows.py", CODE.format(n=1).replace("\n", "\r\n") * 20)
        archive.writestr(f"{name}/small.py", "x = 1\n")
        archive.writestr(f"{name}/tests/test_nothing.py", TEST.format(n=1) * 20)


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel(folder, "networkx")
    wheel(folder, "demo", "Classifier: License :: OSI Approved :: BSD License")
    return folder


def test_scenes_are_of_every_kind_and_read_back(archives: Path, tmp_path: Path) -> None:
    scenes = build(archives, tmp_path)
    kinds = [scene.kind for scene in scenes if scene.source.project == "demo"]
    assert kinds == list(KINDS[:-1])
    tests = [scene for scene in scenes if scene.kind == "test"]
    assert len(tests) == 6
    for scene in tests:
        [module] = scene.open_files
        assert Path(scene.source.path).name == f"test_{Path(module.path).name}"
        assert scene.source.project == "networkx"
    for scene in scenes:
        assert Path(scene.source.path).name.startswith(("mod", "test_mod"))
        assert scene.before + scene.typed + scene.after == scene.source.text
        ast.parse(scene.source.text)
    assert list(load_scenes(tmp_path / "scenes.json.gz")) == scenes
    notice = (tmp_path / "SCENES-NOTICE.md").read_text()
    for scene in scenes:
        digest = hashlib.sha256(scene.source.text.encode()).hexdigest()
        assert f"| {scene.source.path} | {digest} |" in notice


def test_the_same_wheels_give_the_same_file(archives: Path, tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        build(archives, tmp_path / name)
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == [
            "SCENES-NOTICE.md",
            "scenes.json.gz",
        ]
        files.append((tmp_path / name / "scenes.json.gz").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("licence", ["License: GPL-3.0-only", "Summary: MIT"])
def test_a_package_that_is_not_permissive_is_refused_and_nothing_written(
    archives: Path, tmp_path: Path, licence: str
) -> None:
    wheel(archives, "copyleft", licence)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ConfigError, match=r"copyleft 1\.0 is not known to be permissive"):
        build(archives, out)
    assert list(out.iterdir()) == []


def test_the_pinned_wheels_are_asked_for_and_no_source(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(command: list[str], *, check: bool) -> None:
        assert check
        asked.append(command)
        folder = Path(command[command.index("-d") + 1])
        for path in archives.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(subprocess, "run", download)
    assert main([str(tmp_path)]) == 0
    assert load_scenes(tmp_path / "scenes.json.gz")
    [command] = asked
    assert "--only-binary=:all:" in command
    assert "--no-deps" in command
    assert all("==" in pin for pin in command[command.index("-d") + 2 :])
    assert set(build_scenes.WHEELS) <= set(command)
