"""albor-bench infill: how often the missing line is completed exactly, with and without healing.

Takes a file in the format of HumanEval-Infilling (Bavarian et al. 2022): JSON lines with
`task_id`, `prompt`, `suffix` and `canonical_solution`.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from albor_serve.config import SamplingParams
from albor_serve.engine import Engine, Ticket
from albor_serve.errors import ConfigError
from albor_serve.fim import ExtraFile, FimTemplate, build_fim_prompt
from albor_serve.sequence import Delta, Event, Failed, Finished, GenerateRequest

__all__ = ["CURSORS", "InfillScore", "Problem", "read_problems", "score_infill"]

MAX_NEW_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Problem:
    """Code with a line missing."""

    prefix: str
    suffix: str
    line: str
    """The line, its indentation included, without its end."""


@dataclass(frozen=True, slots=True)
class InfillScore:
    """Exact matches at one cursor position."""

    cursor: str
    is_healed: bool
    num_right: int
    num_problems: int

    @property
    def percent(self) -> float:
        """Share of exact matches."""
        return 100 * self.num_right / max(self.num_problems, 1)


def _at_line_start(problem: Problem) -> tuple[str, str]:
    return problem.prefix, problem.line


def _after_indentation(problem: Problem) -> tuple[str, str]:
    size = len(problem.line) - len(problem.line.lstrip())
    return problem.prefix + problem.line[:size], problem.line[size:]


def _in_mid_line(problem: Problem) -> tuple[str, str]:
    """Half of the line's text is typed, usually a part of a word."""
    size = len(problem.line) - len(problem.line.lstrip())
    size += (len(problem.line) - size) // 2
    return problem.prefix + problem.line[:size], problem.line[size:]


CURSORS = {
    "line start": _at_line_start,
    "after indentation": _after_indentation,
    "mid-line": _in_mid_line,
}
"""Where the cursor stands: (text before it, what should come) of a problem."""


def read_problems(path: Path, every: int = 1) -> list[Problem]:
    """Every `every`-th problem of a .jsonl or .jsonl.gz file whose solution is one line.

    Raises:
        ConfigError: the file can't be read or has another format.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
        return [
            Problem(row["prompt"], row["suffix"], row["canonical_solution"].rstrip("\n"))
            for row in rows[::every]
            if "\n" not in row["canonical_solution"].rstrip("\n")
        ]
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} can't be read as HumanEval-Infilling ({type(error).__name__}): give a "
            f".jsonl or .jsonl.gz file with prompt, suffix and canonical_solution"
        ) from error


def score_infill(
    engine: Engine,
    template: FimTemplate,
    problems: Sequence[Problem],
    progress: Callable[[int, int], None],
    *,
    path: str | None = None,
    extra: Sequence[ExtraFile] = (),
) -> list[InfillScore]:
    """Greedy completion of each problem at each cursor, with and without healing.

    `path` and `extra` show what the file's path and other files before it do to the answers.
    """
    scores: list[InfillScore] = []
    total = len(CURSORS) * 2 * len(problems)
    for name, place in CURSORS.items():
        for heal in (False, True):
            num_right = 0
            for at, problem in enumerate(problems):
                before, wanted = place(problem)
                text = _complete(
                    engine, template, before, problem.suffix, heal=heal, path=path, extra=extra
                )
                num_right += _first_line(text) == wanted.rstrip()
                done = len(scores) * len(problems) + at + 1
                progress(done, total)
            scores.append(InfillScore(name, heal, num_right, len(problems)))
    return scores


def _first_line(text: str) -> str:
    """The first line that is not blank; a model may start with line ends of its own."""
    return next((line.rstrip() for line in text.split("\n") if line.strip()), "")


def _complete(
    engine: Engine,
    template: FimTemplate,
    before: str,
    after: str,
    *,
    heal: bool,
    path: str | None,
    extra: Sequence[ExtraFile],
) -> str:
    limit = engine.max_seq_len - MAX_NEW_TOKENS
    prompt = build_fim_prompt(
        template,
        engine.tokenizer,
        before,
        after,
        max_prompt_len=limit,
        heal=heal,
        path=path,
        extra=extra,
    )
    parts: list[str] = []
    ends: list[Event] = []
    done = threading.Event()

    def receive(event: Event) -> None:
        if isinstance(event, Delta):
            parts.append(event.text)
            # One whole line is enough.
            if "\n" in "".join(parts).lstrip("\n"):
                ticket_ready.wait()
                tickets[0].cancel()
        elif isinstance(event, Finished | Failed):
            ends.append(event)
            done.set()

    request = GenerateRequest(
        prompt.tokens,
        MAX_NEW_TOKENS,
        SamplingParams(temperature=0.0),
        forced_bytes=prompt.forced_bytes,
    )
    tickets: list[Ticket] = []
    ticket_ready = threading.Event()
    tickets.append(engine.submit(request, receive))
    ticket_ready.set()
    done.wait()
    if isinstance(ends[0], Failed):
        raise ends[0].error
    return "".join(parts)
