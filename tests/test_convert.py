"""convert.py: reports, the cache and its hash, concurrent starts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from albor_serve import convert as convert_module
from albor_serve.checkpoint import open_checkpoint, open_gguf_header
from albor_serve.convert import cache_folder, cached_gguf, convert
from albor_serve.errors import CheckpointError, CheckpointFormatError
from tests.fixtures_checkpoint import save_tiny_model

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint folder with a model card; not changed by tests."""
    folder = tmp_path_factory.mktemp("source") / "tiny-model"
    folder.mkdir()
    save_tiny_model(folder, "qwen3", "bfloat16")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Tiny\n")
    return folder


def test_reports_what_it_made(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    report = convert(source, out, "q4_0")
    assert report.out_bytes == out.stat().st_size
    assert report.num_weights == open_checkpoint(source).config.num_parameters
    assert 0.05 < report.relative_error < 0.12
    assert 4.5 < report.bits_per_weight < 16
    meta = open_gguf_header(out).metadata
    assert (meta["general.name"], meta["general.license"]) == ("tiny-model", "apache-2.0")
    exact = convert(source, tmp_path / "f32.gguf", "f32")
    assert exact.relative_error == 0


def test_converts_a_gguf_file_but_not_onto_itself(source: Path, tmp_path: Path) -> None:
    first = tmp_path / "first.gguf"
    convert(source, first, "f16")
    assert convert(first, tmp_path / "second.gguf", "q8_0").relative_error < 0.02
    with pytest.raises(CheckpointError, match="itself"):
        convert(first, first, "q8_0")


def test_needs_a_tokenizer(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        convert(copy, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_second_start_neither_converts_nor_reads_the_weights(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cached_gguf(source, folder=tmp_path)
    assert open_checkpoint(first).config == open_checkpoint(source).config

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("must not be called")

    monkeypatch.setattr(convert_module, "convert", forbidden)
    opened: list[str] = []
    true_open = Path.open

    def watch(self: Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(self.name)
        return true_open(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", watch)
    assert cached_gguf(source, folder=tmp_path) == first
    assert "model.safetensors" not in opened


def test_the_name_follows_the_content(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = cached_gguf(source, folder=cache)
    copy = tmp_path / "elsewhere"
    shutil.copytree(source, copy)
    assert cached_gguf(copy, folder=cache) == first
    assert cached_gguf(source, "q8_0", folder=cache) != first
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | {"rms_norm_eps": 1e-4}))
    changed = cached_gguf(copy, folder=cache)
    assert changed != first
    assert open_checkpoint(changed).config.rms_norm_eps == 1e-4
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert cached_gguf(copy, folder=cache) not in (first, changed)


def test_a_damaged_cache_is_mended(source: Path, tmp_path: Path) -> None:
    path = cached_gguf(source, folder=tmp_path)
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    for memo in tmp_path.glob("*.json"):
        memo.write_text("{not json")
    stale = tmp_path / f".{path.name}.1-dead.tmp"
    stale.write_bytes(b"left by a killed process")
    assert cached_gguf(source, folder=tmp_path) == path
    assert path.read_bytes() == good
    assert not stale.exists()


def test_concurrent_starts_convert_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def counted(src: Path, *args: Any, **kwargs: Any) -> Any:
        calls.append(src)
        return convert(src, *args, **kwargs)

    monkeypatch.setattr(convert_module, "convert", counted)
    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(cached_gguf(source, folder=tmp_path)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == 1
    assert len(results) == 4
    assert len(calls) == 1


def test_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "albor" / "gguf"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "albor" / "gguf"


def test_errors_name_the_remedy(source: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CheckpointError, match="XDG_CACHE_HOME"):
        cached_gguf(source, folder=blocked / "cache")
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    (copy / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointFormatError):
        cached_gguf(copy, folder=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.gguf"))
    assert not list((tmp_path / "cache").glob(".*"))


def test_importing_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None; "
        "import albor_serve.convert, albor_serve.calibration, albor_serve.checkpoint.writer"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": "."})
