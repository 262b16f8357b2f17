"""The tokenizer inside a GGUF file: the same ids and bytes as tokenizer.json."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from albor_serve.backends.llamacpp import LlamaCppBackend
from albor_serve.backends.llamacpp_tokenizer import (
    LlamaCppTokenizer,
    choose_tokenizer,
    split_long_runs,
)
from albor_serve.errors import BackendError, RequestError
from albor_serve.tokenizer import JsonTokenizer, Tokenizer, well_formed
from tests.fixtures_tiny import SPECIALS, save_gguf, tiny_model, tiny_tokenizer_json

RUN = st.integers(0, 3) | st.integers(990, 2500)

HARD_TEXTS = [
    "",
    " ",
    "\x00",
    "a\x00b\x00\x00",
    " " * 128,
    " " * 127 + "x",
    " " * 400,
    "\t" * 300 + "\n" * 300,
    "a\r\nb\r\n\r\n  c\r",
    "😀👨‍👩‍👧‍👦🇪🇺",
    "e\u0301 a\u0308\u0323 \u1e9b\u0323",
    "x\u00a0y\u2003z\u3000\u2028\u2029\ufeff",
    "don't I'LL we've 'Re",
    "1234567 ٣٤٥ ²³ Ⅷ ½",
    "if(x>=1&&y!=2){return!z;}//ok",
    "<|fim_prefix|><|endoftext|></s><0x0A>▁",
    "a" * 1000,
    "é" * 500,
    "( )" * 2000,
]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCppBackend]:
    folder = tmp_path_factory.mktemp("gguf")
    config, weights = tiny_model("qwen3", vocab_size=640)
    backend = LlamaCppBackend.load(save_gguf(folder / "m.gguf", config, weights), 1, 32, 1)
    try:
        yield backend
    finally:
        backend.close()


@pytest.fixture(scope="module")
def gguf(backend: LlamaCppBackend) -> LlamaCppTokenizer:
    return backend.tokenizer


@pytest.fixture(scope="module")
def peer() -> JsonTokenizer:
    return JsonTokenizer(tiny_tokenizer_json(), bos_token_id=0, vocab_size=640)


def test_is_a_tokenizer_with_the_facts_of_the_file(
    gguf: LlamaCppTokenizer, peer: JsonTokenizer
) -> None:
    assert isinstance(gguf, Tokenizer)
    assert gguf.vocab_size == 640
    assert gguf.bos_token_id == 0
    assert not gguf.adds_bos
    assert gguf.eos_token_ids == peer.eos_token_ids


@pytest.mark.parametrize("parse_special", [False, True])
@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_texts(
    gguf: LlamaCppTokenizer, peer: JsonTokenizer, text: str, parse_special: bool
) -> None:
    ids = gguf.encode(text, parse_special=parse_special)
    assert ids == peer.encode(text, parse_special=parse_special)
    assert gguf.decode(ids) == peer.decode(ids)
    if not parse_special:
        assert gguf.decode(ids) == text.encode()


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.text()
    | st.text(alphabet=" \t\r\nab1.('é\u0301")
    | st.text(alphabet=st.characters(categories=["Lo", "Mn", "Nd", "Zs", "So", "Cs", "Cf"]))
)
def test_random_unicode(gguf: LlamaCppTokenizer, peer: JsonTokenizer, text: str) -> None:
    ids = gguf.encode(text)
    assert ids == peer.encode(text)
    assert gguf.decode(ids) == well_formed(text).encode()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", " ", "é", "你", "😀", "(", "x y"]), RUN)))
def test_long_runs_are_cut_between_characters(parts: list[tuple[str, int]]) -> None:
    data = "".join(text * count for text, count in parts).encode()
    pieces = split_long_runs(data)
    assert b"".join(pieces) == data
    for piece in pieces:
        text = piece.decode()  # raises in the middle of a character
        longest = max((len(run) for run in re.findall(r"\w+|\s+|[^\w\s]+", text)), default=0)
        assert longest < 2000


@pytest.mark.parametrize(
    "text", ["a" * 3000, " " * 3000, "é😀" * 900, "<|fim_prefix|>" + "b" * 2500]
)
def test_long_runs_come_back(gguf: LlamaCppTokenizer, text: str) -> None:
    assert gguf.decode(gguf.encode(text)) == text.encode()


@pytest.mark.parametrize("pre", ["deepseek-coder", "seed-coder", "falcon"])
def test_hostile_runs_do_not_end_the_process(tmp_path: Path, pre: str) -> None:
    config, weights = tiny_model("llama")
    path = save_gguf(tmp_path / "m.gguf", config, weights, metadata={"tokenizer.ggml.pre": pre})
    program = f"""
from albor_serve.backends.llamacpp import LlamaCppBackend
backend = LlamaCppBackend.load({str(path)!r}, 1, 32, 1)
for text in ("a", " ", "(", "\\n", "1", chr(0x4F60), chr(0x1F600)):
    ids = backend.tokenizer.encode(text * 50_000)
    assert backend.tokenizer.decode(ids) == (text * 50_000).encode()
print("sound")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, cwd=Path.cwd(), timeout=120
    )
    assert (done.returncode, done.stdout) == (0, b"sound\n"), done.stderr


def test_every_token_has_the_same_bytes(gguf: LlamaCppTokenizer, peer: JsonTokenizer) -> None:
    for token_id in range(512):
        assert gguf.token_bytes(token_id) == peer.token_bytes(token_id)
    assert max(len(gguf.token_bytes(i)) for i in range(512)) == 128


def test_token_longer_than_the_first_buffer(tmp_path: Path) -> None:
    data = json.loads(tiny_tokenizer_json())
    merged = "Ġ" * 128
    merges = [["Ġ" * n, "Ġ" * n] for n in (128, 256)]
    for left, right in merges:
        data["model"]["vocab"][left + right] = len(data["model"]["vocab"])
        data["model"]["merges"].append([left, right])
    assert merged in data["model"]["vocab"]
    config, weights = tiny_model("llama", vocab_size=514)
    path = save_gguf(tmp_path / "m.gguf", config, weights, tokenizer_json=json.dumps(data))
    backend = LlamaCppBackend.load(path, 1, 32, 1)
    try:
        assert backend.tokenizer.token_bytes(513) == b" " * 512
        assert backend.tokenizer.encode(" " * 512) == [513]
    finally:
        backend.close()


def test_special_ids(gguf: LlamaCppTokenizer) -> None:
    for spelling, token_id in SPECIALS.items():
        assert gguf.special_id(spelling) == token_id
    for other in ("", "def", " ", "<|fim_prefix|> ", "<|fim_prefix|><|fim_prefix|>", "\ud800"):
        assert gguf.special_id(other) is None


def test_ids_outside_the_vocabulary(gguf: LlamaCppTokenizer) -> None:
    for token_id in (-1, 640):
        with pytest.raises(RequestError, match="use 0 to 639"):
            gguf.token_bytes(token_id)
    with pytest.raises(RequestError, match="outside the vocabulary"):
        gguf.decode([20, 1 << 40])


def test_closing_while_threads_encode(tmp_path: Path) -> None:
    config, weights = tiny_model("qwen2")
    backend = LlamaCppBackend.load(save_gguf(tmp_path / "m.gguf", config, weights), 1, 32, 1)
    tokenizer = backend.tokenizer
    text = "def f(x):\n    return x\n" * 100
    expected = tokenizer.encode(text)
    outcomes: list[str] = []
    started = threading.Barrier(4)

    def work() -> None:
        started.wait()
        try:
            while tokenizer.encode(text) == expected:
                pass
            outcomes.append("wrong")
        except BackendError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    started.wait()
    backend.close()
    for thread in threads:
        thread.join()
    assert outcomes == ["the model is closed: load it again"] * 3
    with pytest.raises(BackendError, match="closed"):
        tokenizer.token_bytes(3)
    with pytest.raises(BackendError, match="closed"):
        tokenizer.special_id("<|fim_prefix|>")
    assert tokenizer.vocab_size == 512


class TestChooseTokenizer:
    def load(self, tmp_path: Path, pre: str) -> LlamaCppBackend:
        config, weights = tiny_model("qwen3")
        return LlamaCppBackend.load(
            save_gguf(tmp_path / "m.gguf", config, weights, metadata={"tokenizer.ggml.pre": pre}),
            1,
            32,
            1,
        )

    def choice(self, tmp_path: Path, pre: str, text: str | None) -> str:
        path = tmp_path / "tokenizer.json"
        if text is not None:
            path.write_text(text)
        backend = self.load(tmp_path, pre)
        try:
            return type(choose_tokenizer(backend.tokenizer, path)).__name__
        finally:
            backend.close()

    def test_same_ids(self, tmp_path: Path) -> None:
        assert self.choice(tmp_path, "qwen2", tiny_tokenizer_json()) == "LlamaCppTokenizer"

    def test_other_ids(self, tmp_path: Path) -> None:
        assert self.choice(tmp_path, "gpt-2", tiny_tokenizer_json()) == "JsonTokenizer"

    def test_unicode_normalization_is_noticed(self, tmp_path: Path) -> None:
        data = json.loads(tiny_tokenizer_json()) | {"normalizer": {"type": "NFC"}}
        assert self.choice(tmp_path, "qwen2", json.dumps(data)) == "JsonTokenizer"

    def test_none(self, tmp_path: Path) -> None:
        assert self.choice(tmp_path, "gpt-2", None) == "LlamaCppTokenizer"

    def test_damaged(self, tmp_path: Path) -> None:
        assert self.choice(tmp_path, "gpt-2", "{}") == "LlamaCppTokenizer"

    def test_of_another_model(self, tmp_path: Path) -> None:
        data = json.loads(tiny_tokenizer_json())
        vocab = data["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        assert self.choice(tmp_path, "gpt-2", json.dumps(data)) == "LlamaCppTokenizer"
