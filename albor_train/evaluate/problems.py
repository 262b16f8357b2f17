"""Benchmarks: HumanEval, HumanEval-Infilling and MBPP, as problems with a prompt and a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from albor_train.decontaminate import evaluation_texts
from albor_train.errors import EvaluationError

__all__ = ["BENCHMARKS", "Problem", "load_problems"]

HUMANEVAL_STOPS: Final = ("\nclass ", "\ndef ", "\n#", "\n@", "\nprint(", "\nif ", "\n```")
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

    def program(self, answer: str) -> str:
        """The program to run for an answer; it raises if the answer is wrong."""
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


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A file of problems."""

    file: str
    make: Callable[[dict[str, Any]], Problem]
    keep: Callable[[dict[str, Any]], bool] = lambda _: True
    known_bad: frozenset[str] = frozenset()
    """Problems whose own reference fails: counted, but left out of the self-test."""


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
