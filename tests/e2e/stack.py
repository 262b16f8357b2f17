"""The installed programs, and a folder in which an editor starts from nothing."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

__all__ = ["CODE", "editor", "environment"]

CODE = """def mean(values):
    return sum(values) / len(values)


def median(values):
    ordered = 
"""  # noqa: W291 - the cursor's place


def editor(name: str, variable: str) -> str:
    """Path of an editor: the variable's value, or what is on the PATH; skips without one."""
    path = os.environ.get(variable) or shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed: put it on the PATH or name it in {variable}")
    return path


def environment(home: Path) -> dict[str, str]:
    """An empty home, with albor's programs of this Python first on the PATH."""
    programs = Path(sys.executable).parent
    if not (programs / "albor-lsp").exists():
        pytest.skip(f"albor is not installed beside {sys.executable}: pip install -e .")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("XDG_")}
    runtime = home / "run"
    runtime.mkdir(mode=0o700, exist_ok=True)
    return kept | {
        "HOME": str(home),
        "XDG_RUNTIME_DIR": str(runtime),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }
