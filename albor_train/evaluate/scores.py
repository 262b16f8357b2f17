"""Scores: pass@k, exact match, edit similarity."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from albor_train.errors import EvaluationError

__all__ = ["bootstrap_interval", "edit_similarity", "pass_at_k"]


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Chance that one of k samples drawn without replacement passes (Chen et al. 2021).

    Raises:
        EvaluationError: fewer than k samples, or more passed than were drawn.
    """
    if not 0 < k <= num_samples or not 0 <= num_passed <= num_samples:
        raise EvaluationError(
            f"pass@{k} of {num_passed} passed among {num_samples} samples is not defined"
        )
    failed = num_samples - num_passed
    if failed < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / n for n in range(failed + 1, num_samples + 1))


def edit_similarity(a: str, b: str) -> float:
    """1 - Levenshtein distance / length of the longer; 1 for two empty texts."""
    if a == b:
        return 1.0
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return 1.0 - row[-1] / len(a)


def bootstrap_interval(
    values: Sequence[float], *, seed: int = 0, draws: int = 1000
) -> tuple[float, float]:
    """95 % interval of the mean, by resampling problems."""
    if not values:
        raise EvaluationError("no values to take an interval of")
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws) - 1]
