"""The measurements of a model, and the files that they are written to."""

from __future__ import annotations

import hashlib
import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn import functional

from albor_train.artefact import write_json
from albor_train.data import Document
from albor_train.errors import EvaluationError
from albor_train.evaluate.generate import AnySource
from albor_train.evaluate.problems import BENCHMARKS, Benchmark, Problem, load_problems
from albor_train.evaluate.sandbox import Interpreter, run_programs
from albor_train.evaluate.scores import bootstrap_interval, edit_similarity, pass_at_k
from albor_train.fim import choose_span, split_chunks
from albor_train.spec import SpanKind

__all__ = [
    "Result",
    "bits_per_byte",
    "fim_on_held_out",
    "run_benchmark",
    "self_test",
    "table",
    "write_results",
]

_ANSWER_TOKENS: Final = {"infilling-single-line": 64, "infilling-multi-line": 192}
_DEFAULT_ANSWER_TOKENS: Final = 320
_SHOWN_FAILURES: Final = 5


@dataclass(frozen=True, slots=True)
class Result:
    """One score with its 95 % interval."""

    task: str
    metric: str
    value: float
    low: float
    high: float
    count: int
    """Problems, spans or documents."""


def bits_per_byte(
    answerer: AnySource, documents: Sequence[Document], max_tokens: int
) -> list[Result]:
    """Bits for each UTF-8 byte of held-out text, and nats for each token, left to right.

    Long documents are cut into windows of half the context with the half before as context.
    Documents are taken in an order of chance, always the same, so that fewer than all are a fair
    sample of every project.

    Raises:
        EvaluationError: there is no text.
    """
    documents = sorted(documents, key=_by_chance)
    length = answerer.config.max_seq_len
    nats = tokens_done = 0.0
    bits: list[float] = []
    num_bytes_all = 0
    end = min(answerer.tokenizer.eos_token_ids, default=0)
    for document in documents:
        ids = [end, *answerer.tokenizer.encode(document.text)]
        total = 0.0
        start = 0
        while start < len(ids) - 1:
            window = ids[max(0, start - length // 2) : start + length // 2]
            new = min(len(ids), start + length // 2) - start
            total += _nats(answerer, window, new if start else new - 1)
            start += length // 2
        num_bytes = len(document.text.encode("utf-8", "replace"))
        nats += total
        tokens_done += len(ids) - 1
        num_bytes_all += num_bytes
        bits.append(total / math.log(2) / max(1, num_bytes))
        if tokens_done >= max_tokens:
            break
    if not num_bytes_all:
        raise EvaluationError("the held-out text is empty: give some documents")
    low, high = bootstrap_interval(bits)
    value = nats / math.log(2) / num_bytes_all
    mean = nats / tokens_done
    return [
        Result("held-out", "bits_per_byte", value, low, high, len(bits)),
        Result("held-out", "nats_per_token", mean, mean, mean, int(tokens_done)),
    ]


def _by_chance(document: Document) -> bytes:
    return hashlib.sha256(f"{document.project}/{document.path}".encode()).digest()


@torch.no_grad()  # type: ignore[untyped-decorator]
def _nats(answerer: AnySource, window: list[int], count: int) -> float:
    """Sum of -log p of the last `count` tokens of a window."""
    device = next(answerer.model.parameters()).device
    tokens = torch.tensor([window], device=device)
    logits = answerer.model(tokens[:, :-1]).float()[0]
    losses = functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
    return float(losses[-count:].double().sum()) if count else 0.0


def fim_on_held_out(
    answerer: AnySource,
    documents: Sequence[Document],
    *,
    per_kind: int,
    seed: int,
    heal: bool = True,
    max_answer: int = 128,
) -> list[Result]:
    """Exact match and edit similarity of middles, by span shape; greedy.

    The spans come from `choose_span`, the same on every run of a seed. Blank and long middles
    are left out. Compared without trailing blanks.

    Raises:
        EvaluationError: the model knows no fill-in-the-middle, or too few spans are found.
    """
    kinds: tuple[SpanKind, ...] = ("rest_of_line", "lines", "block", "random")
    results: list[Result] = []
    for kind in kinds:
        spans = _held_out_spans(answerer, documents, kind, per_kind, seed, max_answer)
        prompts = [answerer.prompt_of(problem, max_answer, heal=heal) for problem in spans]

        def is_done(index: int, text: str, spans: list[Problem] = spans) -> bool:
            # Only as much as the reference has lines can match.
            return text.count("\n") > spans[index].reference.count("\n")

        answers = answerer.answer(prompts, max_answer=max_answer, is_done=is_done)
        exact: list[float] = []
        similar: list[float] = []
        for problem, answer in zip(spans, answers, strict=True):
            cut = _first_lines(answer, problem.reference)
            exact.append(float(cut == problem.reference.rstrip()))
            similar.append(edit_similarity(cut, problem.reference.rstrip()))
        for metric, values in (("exact_match", exact), ("edit_similarity", similar)):
            results.append(_result(f"held-out-fim-{kind}", metric, values))
    return results


def _held_out_spans(
    answerer: AnySource,
    documents: Sequence[Document],
    kind: SpanKind,
    count: int,
    seed: int,
    max_answer: int,
) -> list[Problem]:
    found: list[Problem] = []
    documents = sorted(documents, key=_by_chance)
    for turn in range(8):
        for document in documents:
            digest = hashlib.sha256(f"{seed}/{turn}/{kind}/{document.path}".encode()).digest()
            rng = random.Random(digest)
            chunk = rng.choice(split_chunks(document.text, 4_000, rng))
            span = choose_span(chunk, rng, {kind: 1.0})
            if span is None or span.kind != kind:
                continue
            middle = chunk[span.start : span.end]
            if not middle.strip() or len(answerer.tokenizer.encode(middle)) > max_answer - 8:
                continue
            prefix, suffix = chunk[: span.start], chunk[span.end :]
            found.append(
                Problem(
                    f"{document.project}/{document.path}#{turn}",
                    prefix,
                    suffix,
                    middle,
                    (),
                    0,
                    "",
                    "",
                )
            )
            if len(found) == count:
                return found
    raise EvaluationError(
        f"only {len(found)} of {count} spans of kind {kind} were found: lower "
        f"evaluate.fim_examples or give more held-out text"
    )


def self_test(
    problems: Sequence[Problem], name: str, *, processes: int, python: str = sys.executable
) -> frozenset[str]:
    """Run every reference answer: all must pass, or the scores would mean nothing.

    Returns:
        Ids of problems that can't be scored here, where the benchmark allows some.

    Raises:
        EvaluationError: one fails (or too many of a benchmark that allows some), or a program
            that must fail passes.
    """
    benchmark = BENCHMARKS.get(name, Benchmark("", _no_problem))
    problems = [problem for problem in problems if problem.task_id not in benchmark.known_bad]
    sources = [problem.program(problem.reference) for problem in problems]
    interpreter = _interpreter(benchmark, python)
    seconds = 3 * benchmark.seconds
    outcomes = list(
        run_programs(sources, processes=processes, seconds=seconds, interpreter=interpreter)
    )
    failed = [
        f"{problem.task_id} ({outcome.reason})"
        for problem, outcome in zip(problems, outcomes, strict=True)
        if not outcome.passed
    ]
    if len(failed) > (1 - benchmark.needed_share) * len(problems):
        raise EvaluationError(
            f"{name}: {len(failed)} of {len(problems)} reference answers fail, such as "
            f"{', '.join(failed[:_SHOWN_FAILURES])}: the set, the sandbox or its libraries "
            f"({', '.join(benchmark.preload) or 'none'}) are broken"
        )
    failing = [f"{problem.program(problem.reference)}\nassert False" for problem in problems[:4]]
    if any(
        outcome.passed
        for outcome in run_programs(
            failing, processes=processes, seconds=seconds, interpreter=interpreter
        )
    ):
        raise EvaluationError(f"{name}: a failing program passes: the sandbox is broken")
    return frozenset(
        problem.task_id
        for problem, outcome in zip(problems, outcomes, strict=True)
        if not outcome.passed
    )


def _interpreter(benchmark: Benchmark, python: str) -> Interpreter:
    return Interpreter(python, benchmark.preload, benchmark.memory_bytes)


def _no_problem(raw: dict[str, Any]) -> Problem:
    raise EvaluationError(f"{raw} belongs to no benchmark")


def run_benchmark(
    answerer: AnySource,
    folder: Path,
    name: str,
    *,
    num_samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    processes: int = 2,
    every: int = 1,
    heal: bool = True,
    python: str = sys.executable,
) -> tuple[list[Result], list[dict[str, Any]]]:
    """Answer a benchmark's problems, run them, and score.

    Args:
        every: take every n-th problem.
        python: interpreter of the sandbox, for benchmarks whose tests need libraries.

    Returns:
        pass@1 (and @10, @100 where there are enough samples), for infilling exact match too; and
        each problem's answers with their outcomes.

    Raises:
        EvaluationError: the reference answers don't pass, or no answer holds any text.
    """
    problems = load_problems(folder, name, every=every)
    unfit = self_test(problems, name, processes=processes, python=python)
    problems = [problem for problem in problems if problem.task_id not in unfit]
    limit = _ANSWER_TOKENS.get(name, _DEFAULT_ANSWER_TOKENS)
    limit = min(limit, answerer.config.max_seq_len // 2)
    prompts = [
        answerer.prompt_of(p, limit, heal=heal) for p in problems for _ in range(num_samples)
    ]
    repeated = [problem for problem in problems for _ in range(num_samples)]

    def is_done(index: int, text: str) -> bool:
        problem = repeated[index]
        return len(problem.cut(text + "\0")) <= len(text)

    answers = answerer.answer(
        prompts, max_answer=limit, temperature=temperature, seed=seed, is_done=is_done
    )
    answers = [problem.cut(answer) for problem, answer in zip(repeated, answers, strict=True)]
    if not any(answer.strip() for answer in answers):
        raise EvaluationError(f"{name}: every answer is blank: the model or its prompt is broken")
    sources = [problem.program(answer) for problem, answer in zip(repeated, answers, strict=True)]
    outcomes = list(
        run_programs(
            sources,
            processes=processes,
            seconds=BENCHMARKS[name].seconds,
            interpreter=_interpreter(BENCHMARKS[name], python),
        )
    )
    by_task: dict[str, list[int]] = defaultdict(list)
    for index, problem in enumerate(repeated):
        by_task[problem.task_id].append(index)
    results: list[Result] = []
    for k in (1, 10, 100):
        if k <= num_samples:
            values = [
                pass_at_k(len(rows), sum(outcomes[i].passed for i in rows), k)
                for rows in by_task.values()
            ]
            results.append(_result(name, f"pass@{k}", values))
    if problems[0].suffix is not None:
        pairs = list(zip(repeated, answers, strict=True))
        exact = [float(a.rstrip() == p.reference.rstrip()) for p, a in pairs]
        results.append(_result(name, "exact_match", exact))
        if not problems[0].max_lines:
            # What the model knows, apart from where it ends.
            begins = [float(_first_lines(a, p.reference) == p.reference.rstrip()) for p, a in pairs]
            results.append(_result(name, "exact_match_of_as_many_lines", begins))
        similar = [edit_similarity(a.rstrip(), p.reference.rstrip()) for p, a in pairs]
        results.append(_result(name, "edit_similarity", similar))
    details = [
        {
            "task_id": problem.task_id,
            "answer": answer,
            "passed": outcome.passed,
            "reason": outcome.reason,
        }
        for problem, answer, outcome in zip(repeated, answers, outcomes, strict=True)
    ]
    details += [
        {"task_id": task_id, "answer": None, "passed": None, "reason": "its reference fails here"}
        for task_id in sorted(unfit)
    ]
    return results, details


def _first_lines(answer: str, reference: str) -> str:
    """As many lines of the answer as the reference has, without trailing blanks."""
    lines = reference.rstrip().count("\n") + 1
    return "\n".join(answer.split("\n")[:lines]).rstrip()


def _result(task: str, metric: str, values: Sequence[float]) -> Result:
    low, high = bootstrap_interval(values)
    return Result(task, metric, sum(values) / len(values), low, high, len(values))


def table(columns: Mapping[str, Sequence[Result]]) -> str:
    """A Markdown table: a row for each score, a column for each model."""
    names = list(columns)
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for name, results in columns.items():
        for r in results:
            share = r.metric not in ("bits_per_byte", "nats_per_token")
            show: Callable[[float], str] = (
                (lambda x: f"{100 * x:.1f}") if share else (lambda x: f"{x:.4f}")
            )
            text = f"{show(r.value)} ({show(r.low)} to {show(r.high)}; n = {r.count})"
            cells.setdefault((r.task, r.metric), {})[name] = text
    lines = [f"| task | metric | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    lines += [
        f"| {task} | {metric} | {' | '.join(row.get(name, '') for name in names)} |"
        for (task, metric), row in cells.items()
    ]
    return "\n".join(lines) + "\n"


def write_results(
    out: Path,
    model: str,
    results: Sequence[Result],
    details: Mapping[str, Sequence[Mapping[str, Any]]],
    config: Mapping[str, object],
) -> None:
    """results.json in the shape of bigcode-evaluation-harness, and each benchmark's answers.

    The harness has {task: {metric: value}, "config": {...}}; the intervals go beside it.
    """
    out.mkdir(parents=True, exist_ok=True)
    metrics: dict[str, Any] = defaultdict(dict)
    for result in results:
        metrics[result.task][result.metric] = result.value
    settings = {"model": model, **config}
    write_json(out / "results.json", {**metrics, "config": settings})
    write_json(out / "intervals.json", [asdict(result) for result in results])
    for name, rows in details.items():
        write_json(out / f"answers-{name}.json", list(rows))
    (out / "results.md").write_text(table({model: results}), "utf-8")
