"""albor-bench gpu without a GPU: arguments, rows, children that fail, the peers' arithmetic."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from albor_serve.bench.cli import main
from albor_serve.bench.gpu import GPU_PEERS, GpuJob, child_command, llama_rows, run_gpu
from albor_serve.bench.gpu_rows import GpuReport, GpuRow
from albor_serve.errors import ConfigError

GOOD_CHILD = """
import json, sys
engine = sys.argv[1]
print("a library says hello")
if engine == "machine":
    machine = {"gpu": "fake", "torch": "1", "triton": "2", "bytes_per_s": 1e12}
    print(json.dumps({"machine": machine}))
elif engine == "gguf":
    print("/model.gguf")
else:
    us = {"albor": 100.0, "torch-bf16": 700.0}[engine]
    for context in (128, 512):
        row = {"engine": engine, "what": "token", "context": context, "us": us}
        row["read_bytes"] = 50_000_000
        print(json.dumps({"row": row}), flush=True)
"""


def _report(path: Path | None = None) -> tuple[GpuReport, list[str]]:
    lines: list[str] = []
    return GpuReport("33m", "albor-bench gpu", path, lines.append), lines


def _script(source: str):  # type: ignore[no-untyped-def]
    return lambda engine, _job: [sys.executable, "-c", source, engine]


def test_rows_come_with_their_part_of_the_bandwidth_and_ratios(tmp_path: Path) -> None:
    report, lines = _report(tmp_path / "out.json")
    is_whole = run_gpu(
        GpuJob(), report, peers=["torch-bf16"], max_seconds=60, command=_script(GOOD_CHILD)
    )
    assert is_whole
    assert [row.engine for row in report.rows] == ["albor"] * 2 + ["torch-bf16"] * 2
    # 50 MB at 1 TB/s take 50 µs, half of the 100 that were measured.
    assert report.rows[0].percent(report.bytes_per_s) == pytest.approx(50)
    assert report.ratios() == ["torch-bf16: 7.0 x at 128, 7.0 x at 512 tokens of context"]
    assert any("100.0 µs" in line and " 50" in line for line in lines)
    saved = json.loads((tmp_path / "out.json").read_text())
    assert [row["percent"] for row in saved["rows"]] == pytest.approx([50, 50, 50 / 7, 50 / 7])
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_a_child_that_dies_keeps_its_rows_and_says_why() -> None:
    report, _ = _report()
    died = GOOD_CHILD + "\nif engine == 'albor': sys.exit('the GPU fell off')"
    assert not run_gpu(
        GpuJob(), report, peers=["torch-bf16"], max_seconds=60, command=_script(died)
    )
    ours = [row for row in report.rows if row.engine == "albor"]
    assert [row.us for row in ours] == [100.0, 100.0, None]
    assert ours[-1].note == "ended with 1: the GPU fell off"
    assert report.rows[-1] == GpuRow("torch-bf16", "token", 512, us=700.0, read_bytes=50_000_000)


def test_a_child_that_hangs_is_ended_and_what_it_started_too(tmp_path: Path) -> None:
    report, _ = _report()
    alive = tmp_path / "alive"
    source = f"""
import subprocess, sys, time
loop = "import time, pathlib\\nwhile True: pathlib.Path({str(alive)!r}).touch(); time.sleep(0.05)"
if sys.argv[1] == "albor":
    subprocess.Popen([sys.executable, "-c", loop])
    time.sleep(600)
"""
    started = time.monotonic()
    run_gpu(GpuJob(), report, peers=["torch-int4"], max_seconds=3, command=_script(source))
    assert time.monotonic() - started < 15
    assert report.rows[0].note.startswith("ended after")
    # Its time is up, so that the peer has none.
    assert report.rows[-1].what == "not begun"
    alive.unlink(missing_ok=True)
    time.sleep(0.3)
    assert not alive.exists()


def test_llama_bench_is_read_line_by_line(tmp_path: Path) -> None:
    lines = [
        {"n_prompt": 512, "n_gen": 0, "n_depth": 0, "avg_ts": 51200.0, "flash_attn": 1},
        {"n_prompt": 0, "n_gen": 32, "n_depth": 512, "avg_ts": 1000.0, "flash_attn": 0},
    ]
    program = tmp_path / "llama-bench"
    body = "\n".join(f"echo '{json.dumps(line | {'backends': 'CUDA'})}'" for line in lines)
    program.write_text(f'#!/bin/sh\n[ "$2" = /model.gguf ] || exit 3\n{body}\n')
    program.chmod(0o755)
    report, _ = _report()
    child = _script(GOOD_CHILD.replace('print("a library says hello")', ""))
    run_gpu(
        GpuJob(), report, peers=["llama.cpp"], max_seconds=60, llama_bench=program, command=child
    )
    prompt, token = report.rows[-2:]
    assert prompt.rows == 512
    assert prompt.us == pytest.approx(10_000)
    assert token.context == 512
    assert token.us == pytest.approx(1000)
    assert "no flash" in token.note
    assert "no flash" not in prompt.note
    assert report.ratios() == ["llama.cpp: 10.0 x at 512 tokens of context"]
    on_cpu = llama_rows(json.dumps(lines[1] | {"backends": "CPU"}))
    assert on_cpu[0].us is None
    assert "without CUDA" in on_cpu[0].note
    assert llama_rows("warning: something") == llama_rows('{"a": 1}') == llama_rows('{"a') == []


@pytest.mark.parametrize("program", [None, Path("/nonexistent/llama-bench")])
def test_a_missing_llama_bench_is_a_row(program: Path | None) -> None:
    report, _ = _report()
    run_gpu(
        GpuJob(), report, peers=["llama.cpp"], max_seconds=60, llama_bench=program,
        command=_script(GOOD_CHILD.replace('print("a library says hello")', "")),
    )  # fmt: skip
    assert report.rows[-1].us is None
    expected = "name a llama-bench" if program is None else "can't be started"
    assert expected in report.rows[-1].note


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "vllm"], "no such peer: vllm"),
        (["--contexts", "0"], "--contexts is '0': give numbers from 1"),
        (["--rows", "1,x"], "--rows is '1,x'"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--max-seconds", "nan"], "--max-seconds is nan"),
        (["--model", "/nonexistent.gguf"], "there is no file /nonexistent.gguf"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_job_reaches_its_child_whole() -> None:
    job = GpuJob("33m", None, (1, 2), (3,), (4,), (5,), 6)
    *_, engine, text = child_command("albor", job)
    assert engine == "albor"
    assert GpuJob.from_json(text) == job


def test_without_a_gpu_every_engine_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = tmp_path / "out.json"
    assert main(["gpu", "--shape", "33m", "--peers", "torch-bf16", "--json", str(out)]) == 1
    rows = json.loads(out.read_text())["rows"]
    assert [row["engine"] for row in rows] == ["machine", "albor", "torch-bf16"]
    assert all("no CUDA GPU" in row["note"] for row in rows)
    assert capsys.readouterr().out.count("failed") == 3


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    report, _ = _report(tmp_path / "nowhere" / "out.json")
    with pytest.raises(ConfigError, match="cannot write"):
        report.add(GpuRow("albor", "token", us=1.0))


def test_a_plot_shows_tokens(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report, _ = _report()
    report.set_machine({"gpu": "fake", "bytes_per_s": 1e12})
    report.add(GpuRow("albor", "token", 512, us=100.0, read_bytes=1_000_000))
    report.add(GpuRow("torch-int4", "token", 512, us=300.0))
    report.plot(tmp_path / "out.svg")
    assert (tmp_path / "out.svg").read_text().startswith("<?xml")
    with pytest.raises(ConfigError, match=r"use \.png or \.svg"):
        report.plot(tmp_path / "out.doc")


def test_all_peers_are_measured_by_default() -> None:
    assert GPU_PEERS == ("torch-bf16", "torch-int4", "llama.cpp", "transformers")
