"""bench/worker.py: each engine answers the commands it is given, until its input ends."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from albor_serve.bench import worker
from albor_serve.bench.shapes import shape_gguf
from albor_serve.bench.worker import enabled_features
from albor_serve.config import ModelConfig
from albor_serve.errors import AlborError, ConfigError

TINY = ModelConfig("llama", 512, 64, 128, 2, 4, 2, 16, 256, tie_embeddings=True)
OPTIONS = json.dumps({"context": 128, "threads": 1})
PROMPT = [(37 * i) % 240 + 10 for i in range(40)]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shape_gguf("tiny", TINY, tmp_path_factory.mktemp("shapes"))


def ask(
    kind: str, path: Path, commands: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, Any]]:
    """Its greeting and its answers."""
    lines, out = "".join(json.dumps(each) + "\n" for each in commands), io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    monkeypatch.setattr(sys, "stdout", out)
    made, make = [], worker.KINDS[kind]

    def keep(*arguments: Any) -> Any:
        made.append(make(*arguments))
        return made[0]

    monkeypatch.setitem(worker.KINDS, kind, keep)  # type: ignore[arg-type]
    try:
        assert worker.main([kind, str(path), OPTIONS]) == 0
    finally:
        monkeypatch.undo()
        # A worker's process ends with its engine.
        for each in made:
            for part in ("_engine", "_backend", "_llama"):
                if hasattr(each, part):
                    getattr(each, part).close()
    return [json.loads(line) for line in out.getvalue().splitlines()]


def generate(tokens: list[int], new: int, *, fresh: bool) -> dict[str, Any]:
    return {"what": "generate", "tokens": tokens, "new": new, "fresh": fresh}


@pytest.mark.parametrize(
    "kind", ["albor", "albor+drafts", "albor-backend", "llama-cpp-python", "llama-cpp-python-loop"]
)
def test_every_engine_makes_the_tokens_that_it_is_asked_for(
    kind: str, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = [generate(PROMPT, 12, fresh=True), generate(PROMPT, 1, fresh=False)]
    hello, long, short = ask(kind, gguf, commands, monkeypatch)
    assert hello["load_s"] > 0
    assert isinstance(hello["build"], str)
    assert long["num_tokens"] == 12
    assert long["first_token_ms"] > 0
    assert long["decode_ms"] > 0
    assert (short["num_tokens"], short["decode_ms"]) == (1, 0.0)


def test_the_backend_alone_also_times_rows_and_knows_the_words(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = [
        {"what": "rows", "counts": [1, 4], "context_len": 20},
        {"what": "tokenize", "text": "ab"},
        generate(PROMPT, 3, fresh=False),
    ]
    _, rows, tokens, run = ask("albor-backend", gguf, commands, monkeypatch)
    assert set(rows["rows"]) == {"1", "4"}
    assert min(rows["rows"].values()) > 0
    assert len(tokens["tokens"]) == 2
    assert run["num_tokens"] == 3


def test_what_an_engine_cannot_do_is_an_error(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="unknown measurement 'rows'"):
        ask("albor", gguf, [{"what": "rows", "counts": [1], "context_len": 1}], monkeypatch)
    with pytest.raises(AlborError):
        ask("albor", gguf, [generate([9999], 5, fresh=False)], monkeypatch)


def test_llama_server_tells_its_address_and_ends_with_its_input(gguf: Path) -> None:
    pytest.importorskip("xllamacpp")
    commands = [{"what": "address"}, generate(PROMPT, 4, fresh=True)]
    result = subprocess.run(
        [sys.executable, "-m", "albor_serve.bench.worker", worker.PRESET, str(gguf), OPTIONS],
        input="".join(json.dumps(each) + "\n" for each in commands),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert result.returncode == 0, result.stderr
    hello, address, run = lines
    assert hello["build"]
    assert address["address"].startswith("127.0.0.1:")
    assert run["num_tokens"] == 4


def test_features_are_read_from_llama_cpps_line() -> None:
    assert enabled_features(b"CPU : AVX = 1 | AVX512 = 0 | REPACK = 1 | ") == "AVX REPACK"
    assert enabled_features("") == ""
