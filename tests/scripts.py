"""Python programs in a process of their own: Triton's interpreter is chosen when kernels are
imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

INTERPRETED: Final[Mapping[str, str]] = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


def run_script(
    script: str,
    *arguments: str,
    environment: Mapping[str, str] = INTERPRETED,
    timeout_s: float = 280,
) -> None:
    """Run a program, by default with Triton's interpreter; it must end with 0."""
    if "TRITON_INTERPRET" in environment:
        script = f"import tests.kernels.interpreted\n{script}"
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
