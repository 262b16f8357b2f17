"""What imported names look like is found in the workspace, and only there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from albor_lsp import imports
from albor_lsp.imports import ImportIndex

SHAPES = '''
import os


class Shape(Base):
    """Something drawn."""

    def __init__(self, name: str) -> None:
        self.name = name

    def area(self, scale: float = f(1)) -> float:
        """Square metres."""
        return 0.0

    def _hidden(self):
        pass


async def draw(
    shape: Shape,
    where: tuple[int, int],
) -> None:
    pass


def plain(x): return x
'''


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in {
        "app/__init__.py": "def top():\n    pass\n",
        "app/shapes.py": SHAPES,
        "app/deep/inner.py": "x = 1\n",
        "src/lib/tools.py": 'def tool(a):\n    """Helps."""\n',
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_names_come_with_signature_and_the_head_of_their_text(root: Path) -> None:
    [chunk] = ImportIndex(root).chunks("main.py", "from app.shapes import Shape, draw, missing\n")
    assert chunk.path == "app/shapes.py"
    assert (
        chunk.text.splitlines()
        == [
            "class Shape(Base):",
            '    """Something drawn."""',
            "    def __init__(self, name: str) -> None: ...",
            "    def area(self, scale: float = f(1)) -> float:",
            '        """Square metres."""',
            "async def draw(",
            "    shape: Shape,",
            "    where: tuple[int, int],",
            ") -> None: ...",
        ]
        or "_hidden" not in chunk.text
    )


@pytest.mark.parametrize(
    ("path", "line", "found"),
    [
        ("main.py", "from app import top", "app/__init__.py"),
        ("app/x.py", "from .shapes import draw", "app/shapes.py"),
        ("app/x.py", "from . import top", "app/__init__.py"),
        (
            "app/deep/inner.py",
            "from ..shapes import (\n    draw as d,\n    Shape,\n)",
            "app/shapes.py",
        ),
        ("app/deep/inner.py", "from .. import top", "app/__init__.py"),
        ("main.py", "from lib.tools import tool", "src/lib/tools.py"),
        ("main.py", "from app.shapes import nothing", None),
        ("main.py", "from numpy import array", None),
        ("main.py", "from ..outside import x", None),
        ("main.py", "import app.shapes", None),
        ("main.py", "x = 1  # from app import top", None),
    ],
)
def test_modules_are_found_as_python_finds_them(
    root: Path, path: str, line: str, found: str | None
) -> None:
    (root.parent / "outside.py").write_text("def x():\n    pass\n")
    chunks = ImportIndex(root).chunks(path, f"{line}\n")
    assert [chunk.path for chunk in chunks] == ([found] if found else [])


def test_names_of_one_file_are_told_once_and_in_order(root: Path) -> None:
    lines = ["app.shapes import draw", "lib.tools import tool", ".app.shapes import plain, draw"]
    text = "".join(f"from {line}\n" for line in lines)
    chunks = ImportIndex(root).chunks("main.py", text)
    assert [chunk.path for chunk in chunks] == ["app/shapes.py", "src/lib/tools.py"]
    assert chunks[0].text.count("async def draw") == 1
    assert "def plain(x):" in chunks[0].text


def test_a_call_reads_few_files_and_the_next_ones_the_rest(root: Path) -> None:
    for number in range(5):
        (root / f"m{number}.py").write_text(f"def f{number}():\n    pass\n")
    text = "".join(f"from m{number} import f{number}\n" for number in range(5))
    index = ImportIndex(root)
    counts = [len(index.chunks("main.py", text)) for _ in range(4)]
    assert counts == [imports.MAX_NEW_FILES, 2 * imports.MAX_NEW_FILES, 5, 5]


def test_a_changed_file_is_read_again_and_a_deleted_one_forgotten(root: Path) -> None:
    index, path = ImportIndex(root), root / "app" / "shapes.py"
    line = "from app.shapes import draw\n"
    assert "where" in index.chunks("main.py", line)[0].text
    path.write_text("def draw(canvas):\n    pass\n")
    os.utime(path, (1, 1))
    assert index.chunks("main.py", line)[0].text == "def draw(canvas): ..."
    path.unlink()
    assert index.chunks("main.py", line) == ()


def test_large_files_are_left_out_and_memory_is_bounded(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "large.py").write_text("def f():\n    pass\n" + "#" * imports.MAX_FILE_BYTES)
    index = ImportIndex(root)
    assert index.chunks("main.py", "from large import f\n") == ()
    monkeypatch.setattr(imports, "MAX_CACHED", 3)
    for number in range(6):
        (root / f"m{number}.py").write_text(f"def f{number}():\n    pass\n")
        assert index.chunks("main.py", f"from m{number} import f{number}\n")
    assert len(index._outlines) == 3


def test_without_a_workspace_nothing_is_read() -> None:
    assert ImportIndex(None).chunks("/etc/x.py", "from .passwd import x\n") == ()
