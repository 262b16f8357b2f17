"""From traces to figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from albor_serve.bench.replay.clients.base import Work
from albor_serve.bench.replay.servers import Totals
from albor_serve.bench.replay.user import SceneTrace

__all__ = ["ClientFigures", "figures_of", "percentile"]


NOT_TOLD: Final = Totals(None, None)


@dataclass(slots=True)
class ClientFigures:
    """What a person felt with one client, and what it cost."""

    client: str
    num_scenes: int
    num_keys: int
    """Keystrokes pressed, acceptances included."""
    ghost_ms: list[float] = field(default_factory=list)
    """From each keystroke to new ghost text for the text it made, where it came before the next
    key; text that was on screen already and still fits is not in it."""
    num_with_ghost: int = 0
    """Keystrokes after which ghost text was there before the next key, kept text included."""
    num_type_through: int = 0
    """Keystrokes that agreed with ghost text."""
    num_kept: int = 0
    """Of those: the rest of the text was on screen after the key."""
    percent_saved: float = 0.0
    """Keystrokes that acceptances saved, over those that writing it all takes."""
    num_shown: int = 0
    num_accepted: int = 0
    num_wrong: int = 0
    num_requests: int = 0
    num_cancelled: int = 0
    new_prompt_tokens: list[int] = field(default_factory=list)
    """Prompt tokens computed for each answered request."""
    decoded_tokens: list[int] = field(default_factory=list)
    """Tokens decoded for each answered request."""
    new_prompt_per_key: float | None = None
    """Prompt tokens computed per keystroke, cancelled requests included; None if not known."""
    num_decoded: float | None = None
    percent_decode_wasted: float | None = None
    """Decoded tokens of answers that were never shown."""
    cancel_to_idle_ms: float | None = None
    server_cpu_s: float = 0.0
    client_cpu_s: float = 0.0
    """CPU time of this process, or of the language server where there is one."""
    wall_s: float = 0.0
    """Length of all scenes as the person lived them, skipped idle time included."""
    skipped_s: float = 0.0

    def ghost_percentile(self, percent: float) -> float | None:
        """Of `ghost_ms`; None where nothing was shown."""
        return percentile(self.ghost_ms, percent) if self.ghost_ms else None

    @property
    def percent_covered(self) -> float:
        """Keystrokes after which there was ghost text before the next one."""
        return 100 * self.num_with_ghost / max(self.num_keys, 1)

    @property
    def percent_type_through(self) -> float | None:
        """Of the keystrokes that agreed with ghost text, those that did not lose it."""
        return 100 * self.num_kept / self.num_type_through if self.num_type_through else None

    @property
    def median_new_prompt(self) -> float | None:
        """Median prompt tokens computed for an answered request."""
        return percentile(self.new_prompt_tokens, 50) if self.new_prompt_tokens else None

    @property
    def median_decoded(self) -> float | None:
        """Median tokens decoded for an answered request."""
        return percentile(self.decoded_tokens, 50) if self.decoded_tokens else None


def figures_of(
    client: str,
    traces: Sequence[SceneTrace],
    work: Work,
    before: Totals = NOT_TOLD,
    after: Totals = NOT_TOLD,
) -> ClientFigures:
    """Sum up. `before` and `after` are the server's counters around the scenes."""
    strokes = [stroke for trace in traces for stroke in trace.keystrokes]
    counts: Counter[str] = Counter()
    for trace in traces:
        counts.update(
            keys=trace.num_keys,
            saved=trace.num_keys_saved,
            shown=trace.num_shown,
            accepted=trace.num_accepted,
            wrong=trace.num_wrong,
        )
    figures = ClientFigures(
        client=client,
        num_scenes=len(traces),
        num_keys=len(strokes),
        ghost_ms=[
            (stroke.shown_s - stroke.pressed_s) * 1000
            for stroke in strokes
            if stroke.shown_s is not None and not stroke.is_kept
        ],
        num_with_ghost=sum(stroke.shown_s is not None for stroke in strokes),
        num_type_through=sum(stroke.had_ghost for stroke in strokes),
        num_kept=sum(stroke.is_kept for stroke in strokes),
        percent_saved=100 * counts["saved"] / max(counts["keys"], 1),
        num_shown=counts["shown"],
        num_accepted=counts["accepted"],
        num_wrong=counts["wrong"],
        num_requests=work.num_requests,
        num_cancelled=work.num_cancelled,
        new_prompt_tokens=[answer.num_new_prompt for answer in work.answers],
        decoded_tokens=[answer.num_decoded for answer in work.answers],
        wall_s=sum(trace.seconds for trace in traces),
    )
    _add_costs(figures, work, before, after)
    return figures


def _add_costs(figures: ClientFigures, work: Work, before: Totals, after: Totals) -> None:
    """Fill in what the server's counters tell, or the answers alone if nothing was cancelled."""
    new = _difference(after.num_new_prompt, before.num_new_prompt)
    decoded = _difference(after.num_decoded, before.num_decoded)
    if not figures.num_cancelled:
        new = sum(figures.new_prompt_tokens) if new is None else new
        decoded = sum(a.num_decoded for a in work.answers) if decoded is None else decoded
    if new is not None and figures.num_keys:
        figures.new_prompt_per_key = new / figures.num_keys
    figures.num_decoded = decoded
    if decoded:
        shown = sum(answer.num_decoded for answer in work.answers if answer.is_shown)
        figures.percent_decode_wasted = max(0.0, 100 * (decoded - shown) / decoded)


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before


def percentile(values: Iterable[float], percent: float) -> float:
    """By linear interpolation; `values` must not be empty."""
    ranked = sorted(values)
    at = (len(ranked) - 1) * percent / 100
    low = int(at)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (at - low)
