"""Files that only llama.cpp understands are loaded by a child first, which may crash alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from albor_serve import trial
from albor_serve.checkpoint import open_gguf_header
from albor_serve.checkpoint.gguf import GgufCheckpoint
from albor_serve.convert import cache_folder
from albor_serve.errors import BackendError, CheckpointError, CheckpointFormatError
from albor_serve.loader import LoadOptions, load_model
from tests.fixtures_foreign import FOREIGN, save_smollm3
from tests.fixtures_tiny import save_gguf, tiny_model

ONE = LoadOptions(num_slots=1, num_threads=1, max_seq_len=64)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder() / "loaded.json"


@dataclass
class Children:
    """The processes that were started; they are real."""

    monkeypatch: pytest.MonkeyPatch
    commands: list[list[str]] = field(default_factory=list)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    code: str | None = None
    """Python that they run instead of what they should."""

    def __post_init__(self) -> None:
        self._real = subprocess.Popen
        self.monkeypatch.setattr(trial.subprocess, "Popen", self._start)

    def __len__(self) -> int:
        return len(self.processes)

    def _start(self, command: list[str], **more: Any) -> subprocess.Popen[bytes]:
        self.commands.append(command)
        if self.code is not None:
            command = [sys.executable, "-c", self.code]
        self.processes.append(self._real(command, **more))
        return self.processes[-1]


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Children:
    return Children(monkeypatch)


def foreign(folder: Path, arch: str = "smollm3", **changes: int) -> Path:
    return save_smollm3(folder / "model.gguf", arch, **changes)


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("smollm3", {"rope__dimension_count": 1 << 31}),  # an assertion
        ("olmo2", {"attention__head_count": 0}),  # a division by zero
    ],
)
def test_a_file_that_ends_llama_cpps_process_is_a_clear_error(
    tmp_path: Path, arch: str, changes: dict[str, int], cache: Path
) -> None:
    path = foreign(tmp_path, arch, **changes)
    for _ in range(2):
        with pytest.raises(CheckpointFormatError, match=r"crashes .* \(SIG[A-Z]+.*\): download"):
            load_model(path, ONE)
    assert not cache.exists()


def test_a_sound_file_is_tried_once(tmp_path: Path, children: Children) -> None:
    path = foreign(tmp_path)
    for _ in range(2):
        load_model(path, ONE).engine.close()
    assert len(children) == 1
    assert children.commands[0][1:3] == ["-P", "-m"]
    # Another file under the same name is not the one that was tried.
    os.utime(path, ns=(1, 1))
    load_model(path, ONE).engine.close()
    assert len(children) == 2


@pytest.mark.parametrize("save", FOREIGN)
def test_every_kind_of_model_runs_in_a_child_first(
    tmp_path: Path, children: Children, save: Callable[[Path], Path]
) -> None:
    attempt(save(tmp_path / "model.gguf"))
    assert len(children) == 1


def test_files_that_albor_checks_itself_need_no_child(tmp_path: Path, children: Children) -> None:
    config, weights = tiny_model("qwen3")
    path = save_gguf(tmp_path / "own.gguf", config, weights)
    load_model(path, ONE).engine.close()
    assert len(children) == 0


def test_what_the_child_says_is_said_again(tmp_path: Path) -> None:
    path = foreign(tmp_path, "bert")
    with pytest.raises((BackendError, CheckpointError)) as caught:
        load_model(path, ONE)
    assert "crash" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "said", ["", "[]", '{"kind": "os", "message": "x"}', '{"kind": 1}', "[" * 9999]
)
def test_a_child_that_babbles_is_an_error_too(
    tmp_path: Path, children: Children, said: str
) -> None:
    children.code = f"print({said!r}); raise SystemExit({trial.FAILED})"
    with pytest.raises(CheckpointFormatError):
        attempt(foreign(tmp_path))


def test_a_child_that_hangs_is_ended(
    tmp_path: Path, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "BASE_S", 0.0)
    monkeypatch.setattr(trial, "BYTES_PER_S", 1e12)
    children.code = "import time; time.sleep(60)"
    with pytest.raises(CheckpointFormatError, match="not loaded within"):
        attempt(foreign(tmp_path))
    assert children.processes[0].returncode is not None


def test_who_no_longer_wants_the_model_ends_the_child(tmp_path: Path, children: Children) -> None:
    def stop(_text: str, _part: float) -> None:
        raise KeyboardInterrupt

    children.code = "import time; time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        attempt(foreign(tmp_path), stop)
    assert children.processes[0].returncode is not None


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import nothing_of_that_name", "could not be tried .* No module named"),
        ("raise SystemExit(7)", "could not be tried .* exit status 7"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "memory runs out"),
    ],
)
def test_what_says_nothing_of_the_file_does_not_blame_it(
    tmp_path: Path, children: Children, cache: Path, code: str, message: str
) -> None:
    children.code = code
    with pytest.raises(BackendError, match=message):
        attempt(foreign(tmp_path))
    assert not cache.exists()


def test_the_assertion_that_failed_is_told(tmp_path: Path, children: Children) -> None:
    children.code = (
        "import os, sys\n"
        "sys.stderr.write('/src/ggml.c:1: GGML_ASSERT(a % (2) == 0) failed\\n')\n"
        "sys.stderr.flush()\n"
        "os.abort()"
    )
    with pytest.raises(CheckpointFormatError, match=r"\(SIGABRT, GGML_ASSERT\(a % \(2\) == 0\)\)"):
        attempt(foreign(tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not keep to this limit")
def test_a_child_takes_no_more_memory_than_it_may() -> None:
    code = "from albor_serve import trial; trial._limit(1 << 30); bytearray(2 << 30)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "MemoryError" in done.stderr


def test_the_child_finds_albor_wherever_the_server_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "albor_serve").mkdir()
    (tmp_path / "albor_serve" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    attempt(foreign(tmp_path))


def test_every_part_of_a_split_model_counts(tmp_path: Path, children: Children) -> None:
    children.code = ""
    config, weights = tiny_model("llama")
    split = {"split.count": 2, "split.no": 0, "split.tensors.count": len(weights)}
    first = save_gguf(tmp_path / "a-00001-of-00002.gguf", config, weights, metadata=split)
    with pytest.raises(CheckpointError, match="with all its parts"):
        attempt(first)
    second = tmp_path / "a-00002-of-00002.gguf"
    for content, num_children in ((b"1", 1), (b"1", 1), (b"22", 2)):
        if not second.exists() or second.read_bytes() != content:
            second.write_bytes(content)
        attempt(first)
        assert len(children) == num_children


@pytest.mark.parametrize("text", ["", "{", "{}", "[1, 2]", '["a"]'])
def test_a_damaged_list_costs_only_time(
    tmp_path: Path, cache: Path, children: Children, text: str
) -> None:
    path = foreign(tmp_path)
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    for _ in range(2):
        load_model(path, ONE).engine.close()
    assert len(children) == 1


def test_without_a_place_to_remember_it_loads_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = foreign(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    load_model(path, ONE).engine.close()


def attempt(path: Path, report: trial.Report = lambda _text, _part: None) -> None:
    trial.try_in_child(GgufCheckpoint(open_gguf_header(path)), report)
