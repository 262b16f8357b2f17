"""Logits to the next token.

Every emitted token takes exactly one random draw, so a seed gives the same text whether tokens
come one by one or several from a verified draft.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from albor_serve.config import SamplingParams
from albor_serve.errors import BackendError

__all__ = ["Sampled", "Sampler", "log_softmax", "top_logprobs"]

Logits = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
TokenIds = npt.NDArray[np.int64]

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Sampled:
    """One chosen token; log-probabilities only where they were asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses tokens for one sequence; holds its random state and token counts."""

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        prompt: Iterable[int] = (),
        banned: Iterable[int] = (),
    ) -> None:
        """`prompt` counts for the repetition penalty; `banned` ids are never chosen."""
        self._params = params
        seed = secrets.randbits(64) if params.seed is None else params.seed & _MASK64
        self._rng = np.random.Generator(np.random.Philox(seed))
        self._banned = np.array(sorted(set(banned)), dtype=np.int64)
        self._bias_ids = np.array([i for i, _ in params.logit_bias], dtype=np.int64)
        self._bias = np.array([b for _, b in params.logit_bias], dtype=np.float32)
        self._has_penalty = bool(params.presence_penalty or params.frequency_penalty)
        self._has_repetition = params.repetition_penalty != 1.0
        self._counts: npt.NDArray[np.int32] | None = None
        self._seen: npt.NDArray[np.bool_] | None = None
        if self._has_penalty:
            self._counts = np.zeros(vocab_size, dtype=np.int32)
        if self._has_repetition:
            self._seen = np.zeros(vocab_size, dtype=np.bool_)
            self._seen[np.fromiter(prompt, dtype=np.int64)] = True
        self._adjusts = bool(
            self._banned.size or self._bias_ids.size or self._has_penalty or self._has_repetition
        )

    def sample(self, logits: Logits, allowed: TokenIds | None = None) -> Sampled:
        """Choose the token after the one that `logits` (float32 [vocab_size]) belongs to.

        `allowed` limits the choice to these ids, at least one. Mutates the random state, not the
        counts: call `accept` with what was really used.

        Raises:
            BackendError: the logits hold no finite maximum.
        """
        adjusted = self._adjust(logits) if self._adjusts else logits
        params = self._params
        if allowed is not None:
            token_id = self._choose(adjusted[allowed], allowed)
        elif params.is_greedy:
            token_id = _finite_argmax(adjusted)
        else:
            token_id = self._choose(adjusted, None)
        if params.num_logprobs is None:
            return Sampled(token_id)
        if allowed is not None:
            # The forced bytes are given: the choice is among the tokens that agree with them.
            given = np.full_like(logits, -np.inf)
            given[allowed] = logits[allowed]
            logprobs = log_softmax(given)
        else:
            logprobs = log_softmax(logits)
        top = top_logprobs(logprobs, params.num_logprobs)
        top = tuple((i, logprob) for i, logprob in top if math.isfinite(logprob))
        return Sampled(token_id, float(logprobs[token_id]), top)

    def accept(self, token_id: int) -> None:
        """Count a token that became part of the answer."""
        if self._counts is not None:
            self._counts[token_id] += 1
        if self._seen is not None:
            self._seen[token_id] = True

    def _adjust(self, logits: Logits) -> Logits:
        params = self._params
        out = logits.copy()
        if self._seen is not None:
            seen = out[self._seen]
            penalty = np.float32(params.repetition_penalty)
            out[self._seen] = np.where(seen > 0, seen / penalty, seen * penalty)
        if self._counts is not None:
            out -= np.float32(params.frequency_penalty) * self._counts
            out -= np.float32(params.presence_penalty) * (self._counts > 0)
        if self._bias_ids.size:
            np.add.at(out, self._bias_ids, self._bias)
        if self._banned.size:
            out[self._banned] = -np.inf
        return out

    def _choose(self, logits: Logits, ids: TokenIds | None) -> int:
        """One draw from `logits` after temperature and filters; `ids` names their tokens."""
        params = self._params
        best = _finite_argmax(logits)
        if params.is_greedy:
            # The lowest id wins a tie, whatever order `ids` has.
            if ids is None:
                return best
            return int(ids[logits == logits[best]].min())
        kept = np.arange(logits.size)
        if 0 < params.top_k < logits.size:
            kept = np.sort(np.argpartition(logits, logits.size - params.top_k)[-params.top_k :])
        scaled = logits[kept].astype(np.float64)
        scaled -= scaled.max()
        probs = np.exp(scaled / params.temperature)
        probs /= probs.sum()
        if params.top_p < 1.0:
            order = np.argsort(-probs, kind="stable")
            num_kept = int(np.searchsorted(np.cumsum(probs[order]), params.top_p)) + 1
            chosen = np.sort(order[:num_kept])
            kept, probs = kept[chosen], probs[chosen]
        if params.min_p > 0.0:
            likely = probs >= params.min_p * probs.max()
            kept, probs = kept[likely], probs[likely]
        cumulative = np.cumsum(probs)
        at = int(np.searchsorted(cumulative, self._rng.random() * cumulative[-1], side="right"))
        index = int(kept[min(at, kept.size - 1)])
        return index if ids is None else int(ids[index])


def log_softmax(logits: Logits) -> Float64Array:
    """Natural-log probabilities, float64, same shape, over the last axis."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def top_logprobs(logprobs: Float64Array, num: int) -> tuple[tuple[int, float], ...]:
    """The `num` most likely (id, log-probability) pairs of one row, most likely first."""
    num = min(num, logprobs.size)
    if num == 0:
        return ()
    top = np.argpartition(logprobs, logprobs.size - num)[-num:]
    ranked = top[np.lexsort((top, -logprobs[top]))]
    return tuple((int(i), float(logprobs[i])) for i in ranked)


def _finite_argmax(logits: Logits) -> int:
    # argmax returns the first NaN where there is one, so one look at the winner finds NaN and
    # both infinities: silent garbage must never become text.
    best = int(logits.argmax())
    if not math.isfinite(float(logits[best])):
        raise BackendError(
            "the model's logits are not finite numbers: the weights are damaged or the device "
            "computed wrongly; convert the checkpoint again or use another backend"
        )
    return best
