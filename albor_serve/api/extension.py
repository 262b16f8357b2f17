"""albor's own fields on answers: where the time went, what was left out, why an answer ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from albor_serve.api.completion import Answer

__all__ = ["answer_extension", "choice_extension"]


def answer_extension(answers: Sequence[Answer]) -> dict[str, Any]:
    """The top-level "albor" object of a finished answer.

    Of several choices, times are the longest's and counts of sampled tokens are sums.
    """
    timings = [answer.timings for answer in answers if answer.timings is not None]
    first_token_ms = [each.first_token_ms for each in timings if each.first_token_ms is not None]
    extension: dict[str, Any] = {
        "timings": {
            "queue_ms": _longest([each.queue_ms for each in timings]),
            "prefill_ms": _longest([each.prefill_ms for each in timings]),
            "first_token_ms": _longest(first_token_ms) if first_token_ms else None,
            "decode_ms": _longest([each.decode_ms for each in timings]),
            "total_ms": _longest([each.total_ms for each in timings]),
            "num_prompt_tokens": max((each.num_prompt_tokens for each in timings), default=0),
            "num_cached_tokens": max((each.num_cached_tokens for each in timings), default=0),
            "num_new_tokens": sum(each.num_new_tokens for each in timings),
            "num_draft_tokens": sum(each.num_draft_tokens for each in timings),
            "num_accepted": sum(each.num_accepted for each in timings),
        }
    }
    fim = answers[0].job.fim
    if fim is not None:
        extension["fim"] = {
            "num_prefix_dropped": fim.num_prefix_dropped,
            "num_suffix_dropped": fim.num_suffix_dropped,
            "num_context_dropped": fim.num_context_dropped,
        }
    return extension


def choice_extension(answer: Answer) -> dict[str, Any]:
    """The "albor" object of one finished choice."""
    confidence = answer.confidence
    return {
        "confidence": None if confidence is None else round(confidence, 4),
        "stopped_by": answer.stopped_by,
    }


def _longest(values: Sequence[float]) -> float:
    return round(max(values, default=0.0), 3)
