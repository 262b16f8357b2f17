"""/metrics in Prometheus' text format, version 0.0.4."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from albor_serve.engine import EngineStats
from albor_serve.histogram import HistogramView

__all__ = ["METRICS_MEDIA_TYPE", "metrics_text"]

METRICS_MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_HISTOGRAMS = (
    ("queue", "queue_seconds", "Wait for a slot."),
    ("first_token", "time_to_first_token_seconds", "From a request to its first token."),
    ("inter_token", "inter_token_seconds", "Pause between tokens, the mean of each answer."),
    ("total", "request_seconds", "From a request to its end, cancelled ones left out."),
    ("cancel", "cancel_seconds", "From a cancel to the free slot."),
    ("new_prompt_tokens", "new_prompt_tokens", "Prompt tokens a request found not cached."),
)


def metrics_text(
    models: Mapping[str, EngineStats],
    num_answers: Mapping[int, int],
    loads: Mapping[str, tuple[bool, int]],
) -> str:
    """The page: each model's engine under its name, and HTTP answers by status.

    `loads` tells of each model whether it is loaded and how often it has been. A model's counters
    start at 0 again when it is loaded anew, as Prometheus expects of counters.
    """
    labelled = [(_label("model", name), stats) for name, stats in models.items()]
    lines = [
        *_series("http_responses_total", "counter", "Answers by HTTP status."),
        *(
            f"albor_http_responses_total{{{_label('status', str(status))}}} {count}"
            for status, count in sorted(num_answers.items())
        ),
        *_series("requests_total", "counter", "Completions by how they ended."),
    ]
    for label, stats in labelled:
        for outcome, count in (
            ("finished", stats.num_finished),
            ("cancelled", stats.num_cancelled),
            ("failed", stats.num_failed),
        ):
            lines.append(f'albor_requests_total{{{label},outcome="{outcome}"}} {count}')
    lines += _series(
        "prompt_tokens_total", "counter", "Prompt tokens read, by where they came from."
    )
    for label, stats in labelled:
        num_new = stats.num_prompt_tokens - stats.num_cached_tokens
        for source, count in (("cached", stats.num_cached_tokens), ("new", num_new)):
            lines.append(f'albor_prompt_tokens_total{{{label},source="{source}"}} {count}')
    for name, kind, text in (
        ("generated_tokens_total", "counter", "Tokens sampled."),
        ("draft_tokens_total", "counter", "Tokens guessed and verified."),
        ("accepted_tokens_total", "counter", "Guessed tokens that the model confirmed."),
        ("stale_tokens_total", "counter", "Tokens computed for requests that were cancelled."),
        ("running", "gauge", "Requests being computed."),
        ("waiting", "gauge", "Requests waiting for a slot."),
        ("slots", "gauge", "Slots."),
    ):
        lines += _series(name, kind, text)
        lines += [f"albor_{name}{{{label}}} {_value(stats, name)}" for label, stats in labelled]
    lines += _series("model_loaded", "gauge", "1 while the model is in memory.")
    for name, (is_loaded, _) in loads.items():
        lines.append(f"albor_model_loaded{{{_label('model', name)}}} {int(is_loaded)}")
    lines += _series("model_loads_total", "counter", "How often the model has been loaded.")
    for name, (_, num_loads) in loads.items():
        lines.append(f"albor_model_loads_total{{{_label('model', name)}}} {num_loads}")
    for key, name, text in _HISTOGRAMS:
        lines += _series(name, "histogram", text)
        for label, stats in labelled:
            lines += _histogram(name, label, stats.histograms[key])
    return "\n".join(lines) + "\n"


def _value(stats: EngineStats, name: str) -> int:
    return {
        "generated_tokens_total": stats.num_new_tokens,
        "draft_tokens_total": stats.num_draft_tokens,
        "accepted_tokens_total": stats.num_accepted,
        "stale_tokens_total": stats.num_stale_tokens,
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "slots": len(stats.slots),
    }[name]


def _series(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP albor_{name} {text}", f"# TYPE albor_{name} {kind}"


def _histogram(name: str, label: str, view: HistogramView) -> Iterator[str]:
    bounds = [*(f"{bound:g}" for bound in view.bounds), "+Inf"]
    for bound, count in zip(bounds, itertools.accumulate(view.counts), strict=True):
        yield f'albor_{name}_bucket{{{label},le="{bound}"}} {count}'
    yield f"albor_{name}_sum{{{label}}} {view.total:.9g}"
    yield f"albor_{name}_count{{{label}}} {sum(view.counts)}"


def _label(name: str, value: str) -> str:
    escaped = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'{name}="{escaped}"'
