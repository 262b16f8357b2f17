"""Answers from a running albor-serve: the quantized file, kernels and healing as shipped."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from albor_serve.checkpoint import open_checkpoint
from albor_serve.model import Decoder, load_decoder
from albor_train.errors import EvaluationError
from albor_train.evaluate.problems import Problem
from albor_train.serving import open_post, post, running_server

__all__ = ["ServedAnswerer", "ServedPrompt", "serve_answers"]

ServedPrompt = dict[str, Any]
"""The fields of a completion request that say what to complete."""


class _ServedTokenizer:
    """The server's tokenizer."""

    def __init__(self, base: str, eos_token_ids: frozenset[int]) -> None:
        self._base = base
        self.eos_token_ids = eos_token_ids

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return list(post(f"{self._base}/tokenize", {"content": text})["tokens"])


class ServedAnswerer:
    """What `Answerer` does, by HTTP. Infilling prompts are built, fitted and healed there."""

    def __init__(
        self, base: str, path: Path, *, parallel: int = 4, stop_scope: str = "none"
    ) -> None:
        """Ask the server at `base`, which serves `path`.

        Args:
            parallel: requests at a time.
            stop_scope: where the server ends infilling answers at the latest: "none" measures the
                model by itself, "line", "block" or "scope" what editors show.

        Raises:
            CheckpointError: the file can't be read.
        """
        self._base, self._parallel, self._stop_scope = base, parallel, stop_scope
        self._checkpoint = open_checkpoint(path)
        self.config = self._checkpoint.config
        self.tokenizer = _ServedTokenizer(base, frozenset(self.config.eos_token_ids))

    @cached_property
    def model(self) -> Decoder:
        """The file's weights in the reference decoder: servers give no likelihood of a text."""
        return load_decoder(self.config, self._checkpoint.read)

    def prompt_of(self, problem: Problem, max_answer: int, *, heal: bool = True) -> ServedPrompt:
        """The request of a problem's prompt.

        Raises:
            EvaluationError: `heal` is False; the server always heals.
        """
        if not heal:
            raise EvaluationError("the server always heals: measure the folder without healing")
        if problem.suffix is not None:
            scope = {"albor": {"stop_scope": self._stop_scope}}
            return {"prompt": problem.prefix, "suffix": problem.suffix, **scope}
        room = self.config.max_seq_len - max_answer
        return {"prompt": self.tokenizer.encode(problem.prefix)[-room:]}

    def answer(
        self,
        prompts: Sequence[ServedPrompt],
        *,
        max_answer: int,
        temperature: float = 0.0,
        seed: int = 0,
        is_done: Callable[[int, str], bool] = lambda _index, _text: False,
    ) -> list[str]:
        """An answer for each prompt; see `Answerer.answer`.

        Raises:
            EvaluationError: the server refuses a prompt or breaks off.
        """

        def one(index: int) -> str:
            body = {
                **prompts[index],
                "max_tokens": max_answer,
                "temperature": temperature,
                "seed": seed + index,
                "stream": True,
            }
            text = ""
            for piece in _stream(f"{self._base}/v1/completions", body):
                text += piece
                if is_done(index, text):
                    break
            return text

        with ThreadPoolExecutor(self._parallel) as pool:
            return list(pool.map(one, range(len(prompts))))


def _stream(url: str, body: object) -> Iterator[str]:
    """The pieces of one answer. Closing the iterator early cancels the request."""
    is_whole = False
    with open_post(url, body) as reply:
        for line in reply:
            data = line.strip().removeprefix(b"data: ")
            if data == b"[DONE]":
                is_whole = True
                break
            if not line.startswith(b"data: "):
                continue
            event = json.loads(data)
            if "error" in event:
                raise EvaluationError(f"the server broke off: {event['error'].get('message')}")
            for choice in event["choices"]:
                yield str(choice["text"])
    if not is_whole:
        raise EvaluationError("the server broke off in the middle of an answer")


@contextlib.contextmanager
def serve_answers(path: Path, *, stop_scope: str = "none") -> Iterator[ServedAnswerer]:
    """A server on a model file for as long as the context lasts; see `ServedAnswerer`.

    Raises:
        EvaluationError: it does not start.
    """
    with running_server(path) as base:
        yield ServedAnswerer(base, path, stop_scope=stop_scope)
