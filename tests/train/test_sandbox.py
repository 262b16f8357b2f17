from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from albor_train.errors import EvaluationError
from albor_train.evaluate.sandbox import Interpreter, run_program, run_programs


def test_a_program_that_ends_has_passed() -> None:
    assert run_program("import math, json, re, collections\nassert math.sqrt(4) == 2").passed


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("assert 1 == 2", "failed: AssertionError"),
        ("def f(:\n  pass", "died"),
        ("raise SystemExit(0)", "failed: SystemExit"),
        ("import os\nos._exit(0)", "died"),
        ("import sys\nsys.exit()", "failed: SystemExit"),
        ("print('passed')\nassert False", "failed: AssertionError"),
        ("x = 'a' * (1 << 33)", "failed: MemoryError"),
        ("import socket\nsocket.socket()", "failed: PermissionError"),
        ("import subprocess\nsubprocess.run(['true'])", "failed: PermissionError"),
        ("import os\nos.system('true')", "failed: PermissionError"),
        ("import os\nos.fork()", "failed: PermissionError"),
        ("import os\nos.kill(os.getppid(), 9)", "failed: PermissionError"),
        ("import ctypes\nctypes.CDLL(None)", "failed: PermissionError"),
        ("open('/tmp/../etc/hostname', 'a')", "failed: PermissionError"),
        ("def f(): return f()\nf()", "failed: RecursionError"),
    ],
)
def test_what_has_not_passed(source: str, reason: str) -> None:
    outcome = run_program(source, seconds=10)
    assert not outcome.passed
    if reason != "died":
        assert outcome.reason == reason


def test_endless_programs_are_stopped() -> None:
    programs = ["while True: pass", "import time\ntime.sleep(60)"]
    with ThreadPoolExecutor(2) as pool:
        for outcome in pool.map(lambda source: run_program(source, seconds=1), programs):
            assert outcome.reason == "timed out"


def test_nothing_outside_the_folder_changes(tmp_path: Path) -> None:
    victim = tmp_path / "file"
    victim.write_text("kept")
    name = repr(str(victim))
    for source in (
        f"open({name}, 'w')",
        f"import os\nos.remove({name})",
        f"import os\nos.rename({name}, 'mine')",
        f"import os\nos.open({name}, os.O_WRONLY | os.O_TRUNC)",
        f"import os\nos.truncate({name}, 0)",
        f"import os\nf = os.open({str(tmp_path)!r}, 0)\nos.remove('file', dir_fd=f)",
        f"import shutil\nshutil.rmtree({str(tmp_path)!r})",
        f"import pathlib\npathlib.Path({name}).write_text('x')",
        f"import os\nos.symlink({name}, 'link')\nopen('link', 'w')",
    ):
        assert not run_program(source).passed, source
    assert victim.read_text() == "kept"
    assert run_program(
        "open('own.txt', 'w').write('x')\nassert open('own.txt').read() == 'x'"
    ).passed


def test_the_environment_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALBOR_SECRET", "x")
    assert os.environ["ALBOR_SECRET"] == "x"
    assert run_program("import os\nassert 'ALBOR_SECRET' not in os.environ").passed


def test_outcomes_keep_their_order() -> None:
    sources = [f"assert {i} % 3" for i in range(9)]
    assert [o.passed for o in run_programs(sources, processes=2)] == [bool(i % 3) for i in range(9)]


def test_libraries_come_only_where_asked() -> None:
    source = "import numpy\nassert numpy.zeros(2).sum() == 0"
    assert run_program(source).reason == "failed: ModuleNotFoundError"
    with_numpy = Interpreter(preload=("numpy",), memory_bytes=4 << 30)
    assert run_program(source, seconds=60, interpreter=with_numpy).passed
    refused = run_program("import os\nos.fork()", seconds=60, interpreter=with_numpy)
    assert refused.reason == "failed: PermissionError"


def test_an_absent_library_or_interpreter_shows() -> None:
    outcome = run_program("pass", interpreter=Interpreter(preload=("no_such_library",)))
    assert not outcome.passed
    with pytest.raises(EvaluationError, match="/no/python can't be started"):
        run_program("pass", interpreter=Interpreter(python="/no/python"))
