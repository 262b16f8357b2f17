"""Files that only llama.cpp understands are loaded by a child first, which may crash alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from albor_serve import trial
from albor_serve.checkpoint import open_gguf_header
from albor_serve.checkpoint.gguf import GgufCheckpoint
from albor_serve.convert import cache_folder
from albor_serve.errors import BackendError, CheckpointError, CheckpointFormatError
from albor_serve.loader import LoadOptions, load_model
from tests.fixtures_tiny import save_gguf, tiny_model

ONE = LoadOptions(num_slots=1, num_threads=1, max_seq_len=64)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # The child finds albor where this process did.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path or os.getcwd() for path in sys.path))
    return cache_folder() / "loaded.json"


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that were run; they are run for real."""
    commands: list[list[str]] = []
    real = subprocess.run

    def run(command: list[str], **more: Any) -> Any:
        commands.append(command)
        return real(command, **more)

    monkeypatch.setattr(trial.subprocess, "run", run)
    return commands


def foreign(folder: Path, arch: str = "smollm3", **changes: int) -> Path:
    """A tiny Llama model that says it is something else."""
    config, weights = tiny_model("llama")
    values: dict[str, Any] = {
        "general.architecture": arch,
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_heads,
        f"{arch}.attention.head_count_kv": config.num_kv_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.dimension_count": config.head_dim,
        f"{arch}.vocab_size": config.vocab_size,
    }
    values |= {f"{arch}.{key.replace('__', '.')}": value for key, value in changes.items()}
    return save_gguf(folder / "model.gguf", config, weights, metadata=values)


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
        with pytest.raises(CheckpointFormatError, match=r"crashes .* \(SIG[A-Z]+\): download"):
            load_model(path, ONE)
    assert not cache.exists()


def test_a_sound_file_is_tried_once(tmp_path: Path, children: list[list[str]]) -> None:
    path = foreign(tmp_path)
    for _ in range(2):
        load_model(path, ONE).engine.close()
    assert len(children) == 1
    assert children[0][1:3] == ["-P", "-m"]
    # Another file under the same name is not the one that was tried.
    os.utime(path, ns=(1, 1))
    load_model(path, ONE).engine.close()
    assert len(children) == 2


def test_files_that_albor_checks_itself_need_no_child(
    tmp_path: Path, children: list[list[str]]
) -> None:
    config, weights = tiny_model("qwen3")
    path = save_gguf(tmp_path / "own.gguf", config, weights)
    load_model(path, ONE).engine.close()
    assert not children


def test_what_the_child_says_is_said_again(tmp_path: Path) -> None:
    path = foreign(tmp_path, "bert")
    with pytest.raises((BackendError, CheckpointError)) as caught:
        load_model(path, ONE)
    assert "crash" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("said", [b"", b"[]", b'{"kind": "os", "message": "x"}', b'{"kind": 1}'])
def test_a_child_that_babbles_is_an_error_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    path = foreign(tmp_path)
    done = subprocess.CompletedProcess([], trial.FAILED, stdout=said)
    monkeypatch.setattr(trial.subprocess, "run", lambda *_args, **_more: done)
    with pytest.raises(CheckpointFormatError):
        trial.try_in_child(GgufCheckpoint(open_gguf_header(path)), lambda _text, _part: None)


def test_a_child_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = foreign(tmp_path)
    monkeypatch.setattr(trial, "BASE_S", 0.0)
    monkeypatch.setattr(trial, "BYTES_PER_S", 1e12)
    with pytest.raises(CheckpointFormatError, match="not loaded within"):
        trial.try_in_child(GgufCheckpoint(open_gguf_header(path)), lambda _text, _part: None)


@pytest.mark.parametrize("text", ["", "{", "{}", "[1, 2]", '["a"]'])
def test_a_damaged_list_costs_only_time(
    tmp_path: Path, cache: Path, children: list[list[str]], text: str
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
