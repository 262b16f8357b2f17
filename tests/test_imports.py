"""What may be imported by what, and what the core install must not need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "lsp"), os.environ.get("PYTHONPATH", "")])
ENVIRONMENT = os.environ | {"PYTHONPATH": PATHS}
SERVING = ("albor_serve.cli", "albor_serve.engine", "albor_serve.api.app", "albor_serve.convert")


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=ENVIRONMENT,
    )
    return result.stdout


def test_imports_point_one_way() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT
    )
    assert result.returncode == 0, result.stdout


def test_serving_imports_no_torch() -> None:
    modules = ", ".join(SERVING)
    heavy = "{'torch', 'triton', 'transformers'}"
    code = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    assert run(code).strip() == "[]"


def test_a_start_waits_for_no_module_that_only_other_files_need() -> None:
    others = "{'gguf', 'yaml', 'albor_serve.convert', 'albor_serve.trial', 'importlib.metadata'}"
    code = f"import sys, albor_serve.loader; print(sorted({others} & set(sys.modules)))"
    assert run(code).strip() == "[]"


def test_the_language_server_imports_little() -> None:
    heavy = "{'torch', 'numpy', 'pydantic', 'albor_serve', 'pygls', 'lsprotocol', 'httpx'}"
    code = f"import sys, albor_lsp.cli; print(sorted({heavy} & set(sys.modules)))"
    assert run(code).strip() == "[]"


def test_core_works_where_torch_cannot_be_imported() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['triton'] = None\n"
        "from albor_serve.cli import main\n"
        "try: main(['--version'])\n"
        "except SystemExit as end: print('exit', end.code)"
    )
    assert run(code).strip().endswith("exit 0")
