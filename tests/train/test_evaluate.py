from __future__ import annotations

import dataclasses
import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from albor_train.data import Document
from albor_train.errors import EvaluationError
from albor_train.evaluate.generate import Answerer, Prompt
from albor_train.evaluate.measure import (
    Result,
    bits_per_byte,
    fim_on_held_out,
    run_benchmark,
    self_test,
    table,
    write_results,
)
from albor_train.evaluate.problems import BENCHMARKS, load_problems
from albor_train.evaluate.sandbox import Outcome
from albor_train.evaluate.served import ServedAnswerer, serve_answers
from albor_train.export import export_gguf
from albor_train.runs import save_model_folder
from albor_train.spec import load_spec
from albor_train.tokenizer import train_tokenizer
from albor_train.train import initial_weights
from tests.train.fixtures_train import source_file, write_tiny_spec

PROMPT = "def add_one(x):\n    "
TEST = "def check(candidate):\n    assert candidate(1) == 2\n"


def write_set(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    text = "\n".join(json.dumps(row) for row in rows)
    (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))


def problem(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "task_id": f"T/{number}",
        "prompt": PROMPT,
        "canonical_solution": "return x + 1\n",
        "suffix": "",
        "entry_point": "add_one",
        "test": TEST,
        **changes,
    }


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    spec = load_spec(write_tiny_spec(folder))
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    train_tokenizer((source_file(seed) for seed in range(40)), 512, tokenizer)
    weights = initial_weights(spec.model_config, spec.train, 1)
    generator = torch.Generator().manual_seed(0)
    for tensor in weights.values():  # zero projections would make every prompt alike
        if tensor.dim() == 2:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.15)
    save_model_folder(folder / "model", weights, spec.model_config, tokenizer, dtype=torch.float32)
    return folder / "model"


@pytest.fixture(scope="module")
def answerer(model_folder: Path) -> Answerer:
    return Answerer(model_folder)


def test_answers_of_a_batch_are_those_of_each_alone(answerer: Answerer) -> None:
    prompts = [
        Prompt(tuple(answerer.tokenizer.encode(source_file(i)[: 20 + 37 * i]))) for i in range(5)
    ]
    together = answerer.answer(prompts, max_answer=12)
    alone = [answerer.answer([prompt], max_answer=12)[0] for prompt in prompts]
    assert together == alone
    assert len(set(together)) > 1


def test_answers_begin_with_what_was_typed(answerer: Answerer) -> None:
    ids = tuple(answerer.tokenizer.encode("x = "))
    free = answerer.answer([Prompt(ids)], max_answer=8)[0]
    assert not free.startswith("ze")
    # One token for each typed byte is the most that forcing may need; the rest is the answer.
    seen: list[str] = []

    def is_done(_: int, text: str) -> bool:
        seen.append(text)
        return False

    forced = answerer.answer([Prompt(ids, b"zebra_")], max_answer=14, is_done=is_done)[0]
    assert seen[0] == ""
    assert forced != ""
    by_hand = answerer.tokenizer.encode("zebra_")
    assert len(by_hand) <= 6


def test_bits_per_byte_is_cross_entropy(answerer: Answerer) -> None:
    document = Document("p", "a.py", source_file(1)[:300])
    ids = [0, *answerer.tokenizer.encode(document.text)]
    logits = answerer.model(torch.tensor([ids[:-1]]))[0]
    nats = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
    expected = float(nats) / math.log(2) / len(document.text.encode())
    assert len(ids) < answerer.config.max_seq_len // 2
    result = bits_per_byte(answerer, [document], 1000)[0]
    assert result.value == pytest.approx(expected, rel=1e-5)


def test_bits_per_byte_counts_every_token_of_long_texts(answerer: Answerer) -> None:
    text = "".join(source_file(i) for i in range(3))
    count = len(answerer.tokenizer.encode(text))
    assert count > 2 * answerer.config.max_seq_len
    results = bits_per_byte(answerer, [Document("p", "a.py", text)], 10**6)
    assert results[1].count == count
    # A random model is about as bad as guessing.
    assert results[1].value > 0.5 * math.log(512)


def test_no_text_is_an_error(answerer: Answerer) -> None:
    with pytest.raises(EvaluationError):
        bits_per_byte(answerer, [], 100)


def test_fim_scores_every_span_shape(answerer: Answerer) -> None:
    documents = [Document("p", f"{i}.py", source_file(i)) for i in range(8)]
    first = fim_on_held_out(answerer, documents, per_kind=3, seed=1, max_answer=24)
    again = fim_on_held_out(answerer, documents, per_kind=3, seed=1, max_answer=24)
    assert first == again
    assert {r.task.rpartition("-")[2] for r in first} == {
        "rest_of_line",
        "lines",
        "block",
        "random",
    }
    assert all(0 <= r.value <= 1 and r.count == 3 for r in first)


def test_benchmark_runs_answers(answerer: Answerer, tmp_path: Path) -> None:
    write_set(tmp_path, "HumanEval-SingleLineInfilling", [problem(i) for i in range(3)])
    results, details = run_benchmark(answerer, tmp_path, "infilling-single-line", processes=2)
    assert [r.metric for r in results] == ["pass@1", "exact_match", "edit_similarity"]
    assert len(details) == 3
    assert results[0].value == sum(d["passed"] for d in details) / 3


def test_where_an_answer_ends_is_told_apart_from_what_it_says(
    answerer: Answerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(tmp_path, "HumanEval-MultiLineInfilling", [problem(i) for i in range(2)])
    answers = ["return x + 1\n    and more", "return x\n"]
    monkeypatch.setattr(answerer, "answer", lambda prompts, **_: answers)
    results, _ = run_benchmark(answerer, tmp_path, "infilling-multi-line", processes=1)
    by_metric = {r.metric: r.value for r in results}
    assert by_metric["exact_match"] == 0
    assert by_metric["exact_match_of_as_many_lines"] == 0.5


def test_right_answers_pass(
    answerer: Answerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(tmp_path, "HumanEval", [problem(i) for i in range(2)])

    def right(prompts: list[Prompt], **_: Any) -> list[str]:
        return ["return x + 1\n\ndef other():\n    broken("] * len(prompts)

    monkeypatch.setattr(answerer, "answer", right)
    results, _ = run_benchmark(answerer, tmp_path, "humaneval", num_samples=2, processes=2)
    assert results[0].value == 1.0


def test_broken_sets_fail_loudly(answerer: Answerer, tmp_path: Path) -> None:
    write_set(tmp_path, "HumanEval", [problem(0), problem(1, canonical_solution="return x\n")])
    with pytest.raises(EvaluationError, match="1 of 2 reference answers fail"):
        run_benchmark(answerer, tmp_path, "humaneval")


def test_a_sandbox_that_passes_everything_fails_loudly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def passes(sources: list[str], **_: Any) -> list[Outcome]:
        return [Outcome(True, "passed") for _ in sources]

    monkeypatch.setattr("albor_train.evaluate.measure.run_programs", passes)
    write_set(tmp_path, "HumanEval", [problem(0)])
    with pytest.raises(EvaluationError, match="failing program passes"):
        self_test(load_problems(tmp_path, "humaneval"), "humaneval", processes=1)


def test_blank_answers_fail_loudly(
    answerer: Answerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(tmp_path, "HumanEval", [problem(0)])
    monkeypatch.setattr(answerer, "answer", lambda prompts, **_: [" \n"] * len(prompts))
    with pytest.raises(EvaluationError, match="blank"):
        run_benchmark(answerer, tmp_path, "humaneval")


@pytest.mark.parametrize("name", ["nothing", "mbpp"])
def test_missing_benchmarks_are_errors(tmp_path: Path, name: str) -> None:
    write_set(tmp_path, "HumanEval", [problem(0)])
    with pytest.raises(EvaluationError):
        load_problems(tmp_path, name)


def test_a_missing_field_is_an_error(tmp_path: Path) -> None:
    row = problem(0)
    del row["test"]
    write_set(tmp_path, "HumanEval", [row])
    with pytest.raises(EvaluationError, match="'test'"):
        load_problems(tmp_path, "humaneval")


def test_no_tokenizer_is_an_error(model_folder: Path, tmp_path: Path) -> None:
    for file in model_folder.iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(EvaluationError, match=r"tokenizer\.json"):
        Answerer(tmp_path)


def test_results_have_the_harness_shape(tmp_path: Path) -> None:
    results = [Result("humaneval", "pass@1", 0.25, 0.1, 0.4, 164)]
    write_results(tmp_path / "out", "m", results, {"humaneval": [{"x": 1}]}, {"n_samples": 1})
    data = json.loads((tmp_path / "out/results.json").read_text())
    assert data["humaneval"]["pass@1"] == 0.25
    assert data["config"]["model"] == "m"
    assert "25.0 (10.0 to 40.0; n = 164)" in table({"m": results})


def test_plus_tests_run_with_their_library(
    answerer: Answerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = "import numpy as np\n" + TEST.replace("candidate(1)", "int(np.sum([candidate(1)]))")
    write_set(tmp_path, "HumanEvalPlus-OriginFmt", [problem(0, test=test)])
    monkeypatch.setattr(answerer, "answer", lambda prompts, **_: ["return x + 1\n"])
    results, _ = run_benchmark(answerer, tmp_path, "humaneval-plus", processes=1)
    assert results[0].value == 1.0


def ds1000_problem(number: int, reference: str = "result = x + 1") -> dict[str, Any]:
    context = (
        "def test_execution(solution):\n"
        "    env = {'x': 1}\n    exec(solution, env)\n    assert env['result'] == 2\n"
        "def test_string(solution):\n    assert 'while' not in solution\n"
    )
    return {
        "prompt": "Add one.\n<code>\nx = 1\nBEGIN SOLUTION\n<code>\n",
        "reference_code": reference,
        "metadata": {"library": "Numpy", "problem_id": number},
        "code_context": context,
    }


def test_ds1000_answers_are_given_to_its_own_tests(
    answerer: Answerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        BENCHMARKS, "ds1000", dataclasses.replace(BENCHMARKS["ds1000"], preload=("numpy",))
    )
    rows = [ds1000_problem(n) for n in range(11)] + [ds1000_problem(11, "result = absent.f(x)")]
    torch_row = ds1000_problem(12)
    torch_row["metadata"]["library"] = "Pytorch"
    write_set(tmp_path, "ds1000", [*rows, torch_row])
    answers = ["result = 2\n</code>\nbroken("] * 5 + ["result = 2 # while"] * 6

    monkeypatch.setattr(answerer, "answer", lambda prompts, **_: answers[: len(prompts)])
    results, details = run_benchmark(answerer, tmp_path, "ds1000", processes=2)
    assert results[0].count == 11
    assert results[0].value == 5 / 11
    assert details[-1] == {
        "task_id": "DS-1000/Numpy/11",
        "answer": None,
        "passed": None,
        "reason": "its reference fails here",
    }


def test_too_many_failing_references_are_an_error(
    answerer: Answerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        BENCHMARKS, "ds1000", dataclasses.replace(BENCHMARKS["ds1000"], preload=("numpy",))
    )
    rows = [ds1000_problem(n) for n in range(3)] + [ds1000_problem(3, "raise OSError")]
    write_set(tmp_path, "ds1000", rows)
    with pytest.raises(EvaluationError, match=r"1 of 4 reference answers fail.*numpy"):
        run_benchmark(answerer, tmp_path, "ds1000", processes=2)


def test_a_served_file_answers_as_its_weights_do(model_folder: Path, tmp_path: Path) -> None:
    """The same greedy text over HTTP as from the reference decoder, infilling and plain."""
    gguf = tmp_path / "model.gguf"
    export_gguf(model_folder, gguf, "f32")
    reference = Answerer(model_folder)
    problems = [
        dataclasses.replace(BENCHMARKS["humaneval"].make(problem(0)), prefix=prefix, suffix=suffix)
        for prefix in ("def find_node(x):\n", "value = ")
        for suffix in (None, "\n    return value\n")
    ]
    expected = reference.answer([reference.prompt_of(p, 16) for p in problems], max_answer=16)
    with serve_answers(gguf) as served:
        assert served.config.num_layers == reference.config.num_layers
        prompts = [served.prompt_of(p, 16) for p in problems]
        answers = served.answer(prompts, max_answer=16)
        # The server does not count healed tokens against the answer's length.
        for got, wanted in zip(answers, expected, strict=True):
            assert got.startswith(wanted)
            assert len(wanted) > 10
        # Pieces are as long as the network makes them; none is read after the one that is enough.
        seen: dict[int, list[str]] = {number: [] for number in range(len(prompts))}

        def is_done(number: int, text: str) -> bool:
            seen[number].append(text)
            return len(text) > 3

        cut = served.answer(prompts, max_answer=16, is_done=is_done)
        for number, text in enumerate(cut):
            assert answers[number].startswith(text)
            assert [len(part) > 3 for part in seen[number]].index(True) == len(seen[number]) - 1
            assert seen[number][-1] == text
        text = source_file(1)
        assert served.tokenizer.encode(text) == reference.tokenizer.encode(text)
        documents = [Document("p", "a.py", text)]
        theirs = bits_per_byte(served, documents, 500)[0].value
        assert theirs == pytest.approx(bits_per_byte(reference, documents, 500)[0].value, rel=1e-3)
        by_line = ServedAnswerer(served._base, gguf, stop_scope="line")
        (line,) = by_line.answer([by_line.prompt_of(problems[1], 16)], max_answer=16)
        assert "\n" not in line.strip("\n")
        assert answers[1].lstrip("\n").startswith(line.strip("\n"))
        with pytest.raises(EvaluationError, match="always heals"):
            served.prompt_of(problems[1], 16, heal=False)
        with pytest.raises(EvaluationError, match="refused with 400"):
            served.answer([{"prompt": "x" * 100_000}], max_answer=16)


def test_a_server_that_does_not_start_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with (
        pytest.raises(EvaluationError, match="ended at once"),
        serve_answers(tmp_path / "broken.gguf"),
    ):
        pass
