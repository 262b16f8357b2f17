"""albor-bench end to end on a tiny model, and the arithmetic behind its figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from albor_serve.bench.cli import main
from albor_serve.bench.decode import DecodeSettings, EngineFigures, ModelFigures, Stat
from albor_serve.bench.infill import CURSORS, Problem, score_infill
from albor_serve.bench.machine import Machine, describe_machine, read_bandwidth
from albor_serve.bench.report import print_decode
from albor_serve.bench.shapes import SHAPES, shape_gguf
from albor_serve.checkpoint import open_checkpoint
from albor_serve.config import EngineConfig, ModelConfig
from albor_serve.engine import Engine
from albor_serve.fim import TEMPLATES, build_fim_prompt
from tests.api.live import tiny_gguf
from tests.fakes import ByteTokenizer, HashBackend

TINY = ModelConfig("llama", 512, 64, 128, 2, 4, 2, 16, 256, tie_embeddings=True)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shape_gguf("tiny", TINY, tmp_path_factory.mktemp("shapes"))


@pytest.fixture(autouse=True)
def _small_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    # Touching a gigabyte for the first time takes seconds on some virtual machines.
    monkeypatch.setattr("albor_serve.bench.machine.DRAM_BYTES", 1 << 26)


def test_shapes_are_the_ones_promised() -> None:
    assert SHAPES["350m"].num_parameters == 398_509_056
    assert 160e6 < SHAPES["125m"].num_parameters < 170e6
    assert 33e6 < SHAPES["33m"].num_parameters < 34e6


def test_a_shape_is_made_once_and_reads_back(gguf: Path) -> None:
    changed = gguf.stat().st_mtime_ns
    assert shape_gguf("tiny", TINY, gguf.parent) == gguf
    assert gguf.stat().st_mtime_ns == changed
    config = open_checkpoint(gguf).config
    assert config.num_parameters == TINY.num_parameters
    assert [path.name for path in gguf.parent.iterdir()] == [gguf.name]


def test_decode_prints_a_table_and_writes_figures_and_a_plot(
    gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["decode", str(gguf), "--prompt-len", "40", "--new", "8", "--repeats", "2"]
    arguments += ["--threads", "1"]  # others may use the cores
    arguments += ["--peers", "llama-cpp-python", "--http", "--json", str(out), "--plot", str(plot)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "llama-cpp-python" in printed
    assert "% of limit" in printed
    figures = json.loads(out.read_text())
    assert figures["machine"]["dram_gb_per_s"] > 0
    [model] = figures["models"]
    kinds = [engine["kind"] for engine in model["engines"]]
    assert kinds == ["albor-backend", "albor", "albor+drafts", "llama-cpp-python", "albor+http"]
    assert figures["settings"]["command"].startswith("albor-bench decode ")
    assert figures["settings"]["command"] in printed.replace("\n", "")
    for engine in model["engines"]:
        decode = engine["decode_ms"]
        assert 0 < decode["low"] <= decode["median"] <= decode["high"]
        assert engine["prefill_tokens_per_s"]["median"] > 0
        assert engine["rss_bytes"] > 10e6
        assert 0 <= engine["idle_cores"] < 2
    assert model["engines"][0]["build"] == model["engines"][3]["build"] != ""
    assert set(model["rows_ms"]) == {"1", "2", "3", "4", "6", "8", "16", "32"}
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_perplexity_compares_models(
    gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "code.py"
    text.write_text("def f(x):\n    return x\n" * 20)
    assert main(["perplexity", str(gguf), str(gguf), "--text", str(text), "--ctx", "64"]) == 0
    assert "1.0000" in capsys.readouterr().out


def test_infill_scores_cursors_with_and_without_healing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": "def f(x):\n", "suffix": "\n", "canonical_solution": "    return x\n"},
        {"prompt": "a = 1\n", "suffix": "", "canonical_solution": "two\nlines\n"},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    assert main(["infill", str(tiny_gguf(tmp_path)), "--data", str(data)]) == 0
    printed = capsys.readouterr().out
    assert "1 problems" in printed
    assert printed.count("%") == 6


def test_infill_counts_what_is_right() -> None:
    tokenizer = ByteTokenizer()
    backend = HashBackend(tokenizer.vocab_size, num_slots=1)
    engine = Engine(backend, tokenizer, EngineConfig(num_slots=1, max_seq_len=256))
    engine.start()
    try:
        template = TEMPLATES["albor"]
        fim = build_fim_prompt(template, tokenizer, "x\n", "y", max_prompt_len=200, heal=False)
        ids = backend.answer(fim.tokens, 48, tokenizer.eos_token_ids)
        text = tokenizer.decode(ids).decode("utf-8", "replace")
        line = next(line for line in text.split("\n") if line.strip())
        problems = [Problem("x\n", "y", line.rstrip()), Problem("x\n", "y", "never this")]
        scores = score_infill(engine, template, problems, lambda done, total: None)
    finally:
        engine.close()
    assert [score.cursor for score in scores[::2]] == list(CURSORS)
    assert (scores[0].num_right, scores[0].percent) == (1, 50.0)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["decode", "--shapes", "9b"], 2, "no such shape"),
        (["decode", "/nowhere.gguf", "--peers", "none"], 1, "nowhere"),
        (["decode", "--peers", "vllm"], 2, "no such peer"),
        (["decode", "--new", "1"], 2, "--new"),
        (["perplexity", "/nowhere.gguf", "--text", "/nowhere.py"], 2, "cannot read"),
        (["infill", "--data", "/nowhere.jsonl"], 2, "HumanEval-Infilling"),
        (["infill", "--data", __file__], 2, "HumanEval-Infilling"),
        (["infill", "--data", __file__, "--every", "0"], 2, "--every"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    errors = capsys.readouterr().err
    assert says in errors
    assert "\n" not in errors.strip()


def test_an_unknown_plot_format_is_told(gguf: Path, tmp_path: Path) -> None:
    from albor_serve.bench.report import plot_decode
    from albor_serve.errors import ConfigError

    stat = Stat(2.0, 1.0, 3.0)
    engine = EngineFigures("albor", 0.1, stat, stat, stat, stat, 1)
    model = ModelFigures("tiny", 10, 8, 1.0, [engine])
    machine = Machine("cpu", 2, 8.0, "os", "AVX2", 10.0, "abc")
    with pytest.raises(ConfigError, match=r"\.png"):
        plot_decode(tmp_path / "out.xyz", machine, [model])


def test_doubts_are_told_beside_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    stat = Stat(2.0, 1.0, 3.0)
    ours = EngineFigures("albor", 0.1, stat, stat, stat, stat, 1, build="AVX2 AVX512 REPACK")
    other = EngineFigures("llama-server", 0.1, stat, stat, stat, stat, 1, "AVX2", 0.7)
    silent = EngineFigures("llama-server+http", 0.1, stat, stat, stat, stat, 1)
    machine = Machine("cpu", 2, 8.0, "os", "AVX2", 10.0, "abc")
    model = ModelFigures("tiny", 10, 8, 1.0, [ours, other, silent])
    console = Console(width=200)
    model.foreign_cores = Stat(0.05, 0.0, 0.09)
    print_decode(console, machine, [model], DecodeSettings())
    quiet = capsys.readouterr().out
    assert "Other programs" not in quiet
    assert "llama-server was compiled without AVX512, which" in quiet
    assert "llama-server used 0.7 cores while others" in quiet
    assert quiet.count("compiled without") == 1
    model.foreign_cores = Stat(0.8, 0.1, 1.0)
    print_decode(console, machine, [model], DecodeSettings())
    assert "Other programs used 0.8 cores" in capsys.readouterr().out


def test_speed_over_http_is_compared_with_albor_over_http() -> None:
    stat = Stat(2.0, 1.0, 3.0)
    names = ("albor", "albor+http", "llama-server", "llama-server+http")
    engines = [EngineFigures(name, 0.1, stat, stat, stat, stat, 1) for name in names]
    model = ModelFigures("tiny", 10, 8, 1.0, engines)
    assert model.ours("llama-server") is engines[0]
    assert model.ours("llama-server+http") is engines[1]
    assert ModelFigures("tiny", 10, 8, 1.0, engines[:1]).ours("x+http") is None


def test_peers_that_are_not_installed(
    gguf: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("albor_serve.bench.peers.available_peers", lambda: ())
    assert main(["decode", str(gguf), "--peers", "llama-server"]) == 2
    assert "pip install" in capsys.readouterr().err
    arguments = ["decode", str(gguf), "--new", "2", "--prompt-len", "8", "--repeats", "1"]
    assert main([*arguments, "--threads", "1"]) == 0
    assert "left out: llama-server" in capsys.readouterr().err


def test_the_limit_is_the_weights_read_once_at_the_faster_speed() -> None:
    machine = Machine("cpu", 2, 8.0, "os", "AVX2", 10.0, "abc")
    cached = ModelFigures("small", 0, 40_000_000, 40.0)
    large = ModelFigures("large", 0, 40_000_000, 9.0)
    assert cached.floor_ms(machine) == pytest.approx(1.0)
    assert large.floor_ms(machine) == pytest.approx(4.0)


def test_statistics() -> None:
    assert Stat.of([3.0]) == Stat(3.0, 3.0, 3.0)
    assert Stat.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Stat(3.0, 2.0, 4.0)


def test_the_machine_is_described() -> None:
    machine = describe_machine()
    assert machine.num_cores >= 1
    assert machine.memory_gb > 1
    assert machine.cpu
    assert 0.5 < machine.dram_gb_per_s < 5000
    assert read_bandwidth(1 << 20, 1, seconds=0.05) > 1e8
