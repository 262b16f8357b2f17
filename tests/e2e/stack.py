"""The installed programs, and a folder in which an editor starts from nothing."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Final

import pytest

__all__ = ["CODE", "ROOT", "editor", "environment"]

ROOT: Final = Path(__file__).resolve().parents[2]
MAINS: Final = {
    "albor": "albor_lsp.albor_cli",
    "albor-lsp": "albor_lsp.cli",
    "albor-serve": "albor_serve.cli",
}
DATA: Final = {
    "albor_helix": "editors/helix",
    "albor_models": "models",
    "albor_nvim": "editors/nvim",
}

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
    """Variables for an empty home, with this source tree's programs first on the PATH."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("XDG_", "ALBOR_", "PYTHON"))
    }
    runtime = home / "run"
    runtime.mkdir(mode=0o700, exist_ok=True)
    return kept | {
        "HOME": str(home),
        "XDG_RUNTIME_DIR": str(runtime),
        "PATH": f"{_programs(home)}{os.pathsep}{os.environ['PATH']}",
    }


def _programs(home: Path) -> Path:
    """Write the programs that an installation has; they need no installation."""
    folder, packages = home / "bin", home / "packages"
    if folder.exists():
        return folder
    folder.mkdir()
    packages.mkdir()
    for name, where in DATA.items():
        (packages / name).symlink_to(ROOT / where, target_is_directory=True)
    paths = [str(ROOT / "lsp"), str(ROOT), str(packages)]
    for name, module in MAINS.items():
        path = folder / name
        path.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path[:0] = {paths!r}\n"
            f"from {module} import main\nsys.exit(main())\n"
        )
        path.chmod(0o755)
    return folder
