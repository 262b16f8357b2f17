"""Drafts for free: guess the next tokens from text that is already there.

Code repeats itself. Where the last few tokens occurred before, what followed them then is a good
guess now (prompt lookup decoding, Saxena 2023). The guess costs nothing, but checking k tokens
costs a step of k + 1 rows, so `DraftPolicy` drafts only where the backend's own measured row
costs and the acceptance seen so far say that it pays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Draft", "DraftPolicy", "RowCosts", "lookup_text", "propose"]

TokenArray = npt.NDArray[np.int32]

MAX_MATCH_LEN = 4
MIN_MATCH_LEN = 2


class RowCosts(Protocol):
    """What one `extend` call costs on this machine."""

    @property
    def prefill_ms_per_token(self) -> float:
        """Milliseconds for each token of a long prompt."""

    def ms(self, rows: int) -> float:
        """Milliseconds of one step with this many rows."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Guessed tokens and how many tokens of context agreed."""

    tokens: tuple[int, ...]
    match_len: int


NO_DRAFT = Draft((), 0)


def propose(history: TokenArray, max_draft_len: int) -> Draft:
    """What followed the latest earlier occurrence of the history's last tokens.

    The longest agreeing context wins, 4 tokens down to 2. `history` is int32 [T].
    """
    size = history.size
    if size <= MIN_MATCH_LEN or max_draft_len <= 0:
        return NO_DRAFT
    # Ends of earlier places where the last two tokens occurred, latest first.
    ends = np.flatnonzero((history[1:-1] == history[-1]) & (history[:-2] == history[-2])) + 2
    if not ends.size:
        return NO_DRAFT
    best_end, best_len = int(ends[-1]), MIN_MATCH_LEN
    for match_len in range(MIN_MATCH_LEN + 1, MAX_MATCH_LEN + 1):
        if match_len >= size:
            break
        ends = ends[ends >= match_len]
        ends = ends[history[ends - match_len] == history[size - match_len]]
        if not ends.size:
            break
        best_end, best_len = int(ends[-1]), match_len
    return Draft(tuple(history[best_end : best_end + max_draft_len].tolist()), best_len)


def lookup_text(prompt: Sequence[int], drafts: Sequence[Sequence[int]]) -> TokenArray:
    """Drafts as history that never was: int32 [T], each after the end of the prompt.

    Put before the real history, `propose` then finds a draft's beginning after the prompt, and
    finds the draft again where the answer has left it and come back.
    """
    tail = prompt[-MAX_MATCH_LEN:]
    return np.array([i for draft in drafts for i in (*tail, *draft)], dtype=np.int32)


class DraftPolicy:
    """Decides how many drafted tokens to verify.

    Keeps, for each match length, how often the first guessed token was right. Guesses that are
    not verified are scored as well (comparing costs nothing), so a policy that has stopped
    drafting starts again when the text turns repetitive. Owned by one engine thread.
    """

    DECAY = 0.98
    """Weight of the past at each new observation: about the last 50 count."""
    MIN_GAIN = 1.1
    """Draft only for an expected speed-up of at least this factor."""
    STEP_WEIGHT = 0.1
    """Weight of each new step in the correction of the calibrated costs."""
    _PRIORS = ((0.35, 4.0), (0.55, 4.0), (0.75, 4.0))
    """(first guess at the acceptance, its weight in observations) for match lengths 2, 3, 4."""

    def __init__(self, costs: RowCosts) -> None:
        self._costs = costs
        self._single_factor = 1.0
        self._several_factor = 1.0
        self._hits = [rate * weight for rate, weight in self._PRIORS]
        self._tries = [weight for _, weight in self._PRIORS]

    def acceptance(self, match_len: int) -> float:
        """Estimated chance that a guessed token is right, given that those before it were."""
        at = match_len - MIN_MATCH_LEN
        return self._hits[at] / self._tries[at]

    def observe(self, draft: Draft, first_was_right: bool) -> None:
        """Score a draft's first token against the token that really came."""
        if not draft.tokens:
            return
        at = draft.match_len - MIN_MATCH_LEN
        self._hits[at] = self._hits[at] * self.DECAY + first_was_right
        self._tries[at] = self._tries[at] * self.DECAY + 1.0

    def observe_step(self, rows: int, ms: float) -> None:
        """Correct the costs by a step that really took `ms`.

        The calibration ran with short contexts and nothing beside it. One row and several rows
        age differently with both, and the choice rests on their ratio.
        """
        factor = ms / self._costs.ms(rows)
        keep = 1.0 - self.STEP_WEIGHT
        if rows == 1:
            self._single_factor = keep * self._single_factor + self.STEP_WEIGHT * factor
        else:
            self._several_factor = keep * self._several_factor + self.STEP_WEIGHT * factor

    def num_to_verify(self, draft: Draft) -> int:
        """How many of the draft's tokens to verify in the next step; 0 means not to draft."""
        if not draft.tokens:
            return 0
        chance = self.acceptance(draft.match_len)
        one_row_ms = self._costs.ms(1) * self._single_factor
        best_num, best_gain = 0, self.MIN_GAIN
        expected, power = 1.0, 1.0
        for num in range(1, len(draft.tokens) + 1):
            power *= chance
            expected += power
            gain = expected * one_row_ms / (self._costs.ms(num + 1) * self._several_factor)
            if gain > best_gain:
                best_num, best_gain = num, gain
        return best_num
