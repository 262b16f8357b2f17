"""Benchmarks as problems with a prompt and a test.

HumanEval (Chen et al. 2021), HumanEval-Infilling (Bavarian et al. 2022), MBPP (Austin et al.
2021), the longer tests of HumanEval+ and MBPP+ (Liu et al. 2023), DS-1000 (Lai et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from albor_train.decontaminate import evaluation_texts
from albor_train.errors import EvaluationError

__all__ = ["BENCHMARKS", "Benchmark", "Problem", "load_problems"]

HUMANEVAL_STOPS: Final = ("\nclass ", "\ndef ", "\n#", "\n@", "\nprint(", "\nif ", "\n```")
DS1000_STOPS: Final = ("</code>", "# SOLUTION END")
MBPP_STOPS: Final = ("\nclass ", "\nassert ", '\n"""', "\nprint(", "\nif ", "\n```")


@dataclass(frozen=True, slots=True)
class Problem:
    """One task."""

    task_id: str
    prefix: str
    suffix: str | None
    """Code after the gap, or None where the answer ends the program."""
    reference: str
    """The canonical answer."""
    stops: tuple[str, ...]
    """The answer ends before the first of these."""
    max_lines: int
    """The answer ends after so many lines; 0 for no limit."""
    head: str
    """What precedes the program's text when it is run."""
    test: str
    """What follows it."""
    runs_answer_as: str = ""
    """Name that the test knows the answer by as a string; empty where the answer is run as code."""

    def program(self, answer: str) -> str:
        """The program to run for an answer; it raises if the answer is wrong."""
        if self.runs_answer_as:
            return f"{self.head}\n{self.runs_answer_as} = {answer!r}\n{self.test}\n"
        shown = "" if self.head else self.prefix
        return f"{self.head}{shown}{answer}{self.suffix or ''}\n{self.test}\n"

    def cut(self, answer: str) -> str:
        """The answer up to its first stop or last allowed line."""
        ends = [place for stop in self.stops if (place := answer.find(stop)) >= 0]
        answer = answer[: min(ends)] if ends else answer
        if self.max_lines:
            answer = "".join(answer.splitlines(keepends=True)[: self.max_lines])
        return answer


def _humaneval(raw: dict[str, Any]) -> Problem:
    return Problem(
        raw["task_id"],
        raw["prompt"],
        None,
        raw["canonical_solution"],
        HUMANEVAL_STOPS,
        0,
        "",
        f"{raw['test']}\ncheck({raw['entry_point']})",
    )


def _infilling(raw: dict[str, Any], max_lines: int) -> Problem:
    return Problem(
        raw["task_id"],
        raw["prompt"],
        raw["suffix"],
        raw["canonical_solution"],
        (),
        max_lines,
        "",
        f"{raw['test']}\ncheck({raw['entry_point']})",
    )


def _mbpp(raw: dict[str, Any]) -> Problem:
    tests = "\n".join(raw["test_list"])
    prompt = f'"""\n{raw["text"]}\n{tests}\n"""\n'
    code = raw["code"].replace("\r\n", "\n")
    setup = raw.get("test_setup_code") or ""
    return Problem(
        f"MBPP/{raw['task_id']}", prompt, None, code, MBPP_STOPS, 0, "\n", f"{setup}\n{tests}"
    )


def _mbpp_plus(raw: dict[str, Any]) -> Problem:
    # The prompt is MBPP's own form; the tests are more.
    tests = "\n".join(raw["test_list"])
    prompt = f'"""\n{raw["prompt"]}\n{tests}\n"""\n'
    task_id = f"MBPP/{raw['task_id']}"
    return Problem(task_id, prompt, None, raw["code"], MBPP_STOPS, 0, "\n", raw["test"])


def _ds1000(raw: dict[str, Any]) -> Problem:
    checks = ["test_execution(answer)"]
    if "def test_string(" in raw["code_context"]:
        checks.append("test_string(answer)")
    meta = raw["metadata"]
    return Problem(
        f"DS-1000/{meta['library']}/{meta['problem_id']}",
        raw["prompt"],
        None,
        raw["reference_code"],
        DS1000_STOPS,
        0,
        raw["code_context"],
        "\n".join(checks),
        runs_answer_as="answer",
    )


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A file of problems."""

    file: str
    make: Callable[[dict[str, Any]], Problem]
    keep: Callable[[dict[str, Any]], bool] = lambda _: True
    known_bad: frozenset[str] = frozenset()
    """Problems whose own reference fails: counted, but left out of the self-test."""
    preload: tuple[str, ...] = ()
    """Libraries that the tests need."""
    seconds: float = 10.0
    """For one program."""
    memory_bytes: int = 1 << 30
    needed_share: float = 1.0
    """Share of the references that must pass. Below 1, those that fail (a library of another
    release, no network) are named in the answers' file and left out of the score."""


BENCHMARKS: Final = {
    "humaneval": Benchmark("HumanEval", _humaneval),
    "infilling-single-line": Benchmark(
        "HumanEval-SingleLineInfilling", lambda raw: _infilling(raw, 1)
    ),
    "infilling-multi-line": Benchmark(
        "HumanEval-MultiLineInfilling", lambda raw: _infilling(raw, 0)
    ),
    "infilling-random-span": Benchmark(
        "HumanEval-RandomSpanInfilling", lambda raw: _infilling(raw, 0)
    ),
    # Tasks 11 to 510 are MBPP's test split.
    "mbpp": Benchmark(
        "mbpp",
        _mbpp,
        lambda raw: 11 <= int(raw["task_id"]) <= 510,
        frozenset({"MBPP/367"}),
    ),
    # The reference of HumanEval/32 has another signature than its longer tests.
    "humaneval-plus": Benchmark(
        "HumanEvalPlus-OriginFmt",
        _humaneval,
        known_bad=frozenset({"HumanEval/32"}),
        preload=("numpy",),
        seconds=60.0,
        memory_bytes=4 << 30,
    ),
    "mbpp-plus": Benchmark(
        "MbppPlus-OriginFmt", _mbpp_plus, preload=("numpy",), seconds=60.0, memory_bytes=4 << 30
    ),
    # Problems of torch and TensorFlow need those, and are left out.
    "ds1000": Benchmark(
        "ds1000",
        _ds1000,
        lambda raw: raw["metadata"]["library"] not in ("Pytorch", "Tensorflow"),
        preload=("numpy", "pandas", "scipy.stats", "sklearn", "matplotlib.pyplot"),
        seconds=60.0,
        memory_bytes=4 << 30,
        needed_share=0.9,
    ),
}
"""Benchmarks by the name that specs use."""


def load_problems(folder: Path, name: str, *, every: int = 1) -> list[Problem]:
    """Problems of a benchmark, or every n-th of them.

    Raises:
        EvaluationError: the name is unknown, the file is missing or empty, or a field is missing.
    """
    if name not in BENCHMARKS:
        raise EvaluationError(f"{name!r} is no benchmark: take one of {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    try:
        rows = [
            raw
            for file, raw in evaluation_texts(folder)
            if file == benchmark.file and benchmark.keep(raw)
        ]
        problems = [benchmark.make(raw) for raw in rows][::every]
    except KeyError as error:
        raise EvaluationError(f"{benchmark.file} in {folder} has no field {error}") from error
    if not problems:
        raise EvaluationError(f"{folder} holds no {benchmark.file}.jsonl.gz: {name} can't be run")
    return problems
