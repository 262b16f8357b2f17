"""Answers from a checkpoint, many prompts at a time, by the reference decoder.

Prompts of a batch are padded on the left; rotary positions are relative, so only the mask knows.
Healed prompts (albor_serve.fim) force the first tokens to begin with the bytes that were typed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from albor_serve.checkpoint import open_checkpoint
from albor_serve.config import ModelConfig
from albor_serve.fim import FimTemplate, build_fim_prompt, detect_template
from albor_serve.model import Attend, Decoder, KVCache, load_decoder
from albor_serve.tokenizer import JsonTokenizer, Tokenizer
from albor_train.errors import EvaluationError
from albor_train.evaluate.problems import Problem

__all__ = ["Answerer", "AnySource", "Encoder", "Prompt"]

_NEVER: Final = float("-inf")


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens, and the bytes that the answer must begin with."""

    tokens: tuple[int, ...]
    forced: bytes = b""


class Encoder(Protocol):
    """What measurements need of a tokenizer."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""


class AnySource(Protocol):
    """What measurements need of a model: `Answerer`, or a server (see served.py)."""

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""

    @property
    def model(self) -> Decoder:
        """The weights, for likelihoods."""

    @property
    def tokenizer(self) -> Encoder:
        """Texts to tokens."""

    def prompt_of(self, problem: Problem, max_answer: int, *, heal: bool = True) -> Any:
        """What `answer` takes for a problem."""

    def answer(
        self,
        prompts: Sequence[Any],
        *,
        max_answer: int,
        temperature: float = 0.0,
        seed: int = 0,
        is_done: Callable[[int, str], bool] = ...,
    ) -> list[str]:
        """An answer for each prompt."""


class Answerer:
    """A loaded checkpoint that answers prompts."""

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
        layout: str = "spm",
    ) -> None:
        """Load a checkpoint folder.

        Args:
            layout: "spm" or "psm", for models that know both.

        Raises:
            CheckpointError: the folder can't be read.
            EvaluationError: its tokenizer does not fit its model.
        """
        checkpoint = open_checkpoint(folder)
        self.config = checkpoint.config
        self.tokenizer: Tokenizer = _open_tokenizer(folder)
        if self.tokenizer.vocab_size > self.config.vocab_size:
            raise EvaluationError(
                f"{folder}: the tokenizer has {self.tokenizer.vocab_size} tokens, the model "
                f"{self.config.vocab_size}: they do not belong together"
            )
        self.model: Decoder = load_decoder(self.config, checkpoint.read, dtype=dtype, device=device)
        self.template: FimTemplate | None = detect_template(self.tokenizer, layout_hint=layout)
        self._device, self._batch_size = device, batch_size
        count = self.tokenizer.vocab_size
        self._bytes = [self.tokenizer.token_bytes(number) for number in range(count)]

    def prompt_of(self, problem: Problem, max_answer: int, *, heal: bool = True) -> Prompt:
        """The tokens of a problem's prompt.

        Raises:
            EvaluationError: it has a suffix, but the model knows no fill-in-the-middle.
        """
        room = self.config.max_seq_len - max_answer
        if problem.suffix is None:
            return Prompt(tuple(self.tokenizer.encode(problem.prefix)[-room:]))
        if self.template is None:
            raise EvaluationError(
                f"{problem.task_id} has code after the gap, but the model knows no "
                f"fill-in-the-middle: leave infilling out"
            )
        made = build_fim_prompt(
            self.template,
            self.tokenizer,
            problem.prefix,
            problem.suffix,
            max_prompt_len=room,
            heal=heal,
        )
        return Prompt(made.tokens, made.forced_bytes)

    def answer(
        self,
        prompts: Sequence[Prompt],
        *,
        max_answer: int,
        temperature: float = 0.0,
        seed: int = 0,
        is_done: Callable[[int, str], bool] = lambda _index, _text: False,
    ) -> list[str]:
        """An answer for each prompt, the forced bytes left out; greedy at temperature 0.

        Args:
            is_done: (prompt's index, text so far): whether what follows no longer matters.

        Raises:
            EvaluationError: a prompt leaves no room for an answer.
        """
        for prompt in prompts:
            if not prompt.tokens or len(prompt.tokens) + max_answer > self.config.max_seq_len:
                raise EvaluationError(
                    f"a prompt of {len(prompt.tokens)} tokens and an answer of {max_answer} do "
                    f"not fit {self.config.max_seq_len}: shorten one"
                )
        # Equal lengths together, so that little is padded.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))
        answers = [""] * len(prompts)
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, len(order), self._batch_size):
            members = order[start : start + self._batch_size]
            done = self._batch(
                [prompts[i] for i in members],
                max_answer,
                temperature,
                generator,
                [lambda text, i=i: is_done(i, text) for i in members],
            )
            for index, text in zip(members, done, strict=True):
                answers[index] = text
        return answers

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _batch(
        self,
        prompts: Sequence[Prompt],
        max_answer: int,
        temperature: float,
        generator: torch.Generator,
        is_done: Sequence[Callable[[str], bool]],
    ) -> list[str]:
        longest = max(len(prompt.tokens) for prompt in prompts)
        padding = torch.tensor([longest - len(prompt.tokens) for prompt in prompts])
        tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt.tokens) :] = torch.tensor(prompt.tokens)
        cache = KVCache.empty(
            self.config,
            longest + max_answer,
            batch_size=len(prompts),
            dtype=next(self.model.parameters()).dtype,
            device=self._device,
        )
        attend = _padded_attention(padding.to(self._device))
        made: list[bytes] = [b""] * len(prompts)
        running = [True] * len(prompts)
        step = tokens.to(self._device)
        for _ in range(max_answer):
            hidden = self.model.hidden(step, cache=cache, attend=attend)
            logits = self.model.logits(hidden[:, -1]).float().cpu()
            logits = logits[:, : len(self._bytes)]
            for row, prompt in enumerate(prompts):
                self._force(logits[row], prompt.forced[len(made[row]) :])
            if temperature > 0:
                probs = functional.softmax(logits / temperature, dim=-1)
                chosen = torch.multinomial(probs, 1, generator=generator).squeeze(1)
            else:
                chosen = logits.argmax(-1)
            for row, number in enumerate(chosen.tolist()):
                if not running[row]:
                    continue
                if number in self.tokenizer.eos_token_ids:
                    running[row] = False
                    continue
                made[row] += self._bytes[number]
                if is_done[row](_text(made[row], prompts[row].forced)):
                    running[row] = False
            if not any(running):
                break
            step = chosen[:, None].to(self._device)
        return [_text(data, p.forced) for data, p in zip(made, prompts, strict=True)]

    def _force(self, logits: Tensor, forced: bytes) -> None:
        """Leave only tokens that begin with `forced` or are a beginning of it. In place."""
        if not forced:
            return
        allowed = [
            number
            for number, piece in enumerate(self._bytes)
            if piece and (piece.startswith(forced) or forced.startswith(piece))
        ]
        mask = torch.full_like(logits, _NEVER)
        mask[allowed] = 0.0
        logits += mask


def _open_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path} can't be read: {error}") from error
    return JsonTokenizer(text)


def _text(data: bytes, forced: bytes) -> str:
    """What the answer adds to the text before the cursor."""
    return data[len(forced) :].decode("utf-8", "replace")


def _padded_attention(padding: Tensor) -> Attend:
    """Causal attention that skips the first `padding` [B] positions of each row."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        num_new, num_all = q.shape[2], k.shape[2]
        column = torch.arange(num_all, device=q.device)[None, None, :]
        row = torch.arange(num_all - num_new, num_all, device=q.device)[None, :, None]
        visible = (column <= row) & (column >= padding[:, None, None])
        # Padding sees itself: a row that sees nothing would be NaN and spread.
        visible = visible | (column == row)
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=visible[:, None], enable_gqa=q.shape[1] != k.shape[1]
        )

    return attend
