"""What finished runs predict for others: loss = E + A / N^alpha + B / D^beta.

N is the number of parameters, D the training tokens (Hoffmann et al. 2022, arXiv 2203.15556).
Repeated text counts less: D of a run over U unique tokens is U + 15.4 U (1 - exp(-R / 15.4)) with
R = passes - 1 (Muennighoff et al. 2023, arXiv 2305.16264).

With few runs not all five constants can be told apart, so published ones stand in, from two
published fits whose difference is the range that is shown.
"""

from __future__ import annotations

import html
import itertools
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from albor_train.errors import TrainingError
from albor_train.runs import read_log
from albor_train.spec import Spec, load_spec

__all__ = ["Law", "Point", "draw", "effective_tokens", "fit", "read_point", "read_points", "report"]

_DECAY: Final = 15.4
"""Passes after which repeating text has lost most of its use (Muennighoff et al. 2023)."""

_PUBLISHED: Final = {
    "Hoffmann et al. 2022": (406.4, 410.7, 0.34, 0.28),
    "Besiroglu et al. 2024": (482.01, 2085.43, 0.3478, 0.3658),
}
"""A, B (nats for each token of web text), alpha, beta."""

_FREE_POINTS: Final = 7
_FREE_SIZES: Final = 3


@dataclass(frozen=True, slots=True)
class Point:
    """One finished run: its schedule reached its end."""

    name: str
    parameters: float
    tokens: float
    """Trained on, repeats included."""
    unique_tokens: float
    loss: float
    """Held-out loss, in a unit that all points share; bits per byte by convention."""


@dataclass(frozen=True, slots=True)
class Law:
    """A fitted law."""

    source: str
    """Where the constants that were not fitted come from; "fitted" if all were."""
    floor: float
    per_size: float
    per_tokens: float
    alpha: float
    beta: float
    residual: float
    """Root mean square over the points, in the loss's unit."""

    def loss(self, parameters: float, tokens: float) -> float:
        """Predicted loss of a run over `tokens` effective tokens."""
        by_size: float = self.per_size / parameters**self.alpha
        by_tokens: float = self.per_tokens / tokens**self.beta
        return self.floor + by_size + by_tokens


def effective_tokens(tokens: float, unique_tokens: float) -> float:
    """How many fresh tokens `tokens` of a repeated text are worth.

    Raises:
        TrainingError: a count is not positive.
    """
    if tokens <= 0 or unique_tokens <= 0:
        raise TrainingError(f"{tokens:g} tokens of {unique_tokens:g}: both must be positive")
    repeats = tokens / unique_tokens - 1
    if repeats <= 0:
        return tokens
    return unique_tokens * (1 + _DECAY * (1 - math.exp(-repeats / _DECAY)))


def fit(points: Sequence[Point]) -> list[Law]:
    """Laws through the points: one if all constants can be fitted, else one for each published.

    Seven points of three sizes give all five constants; three points of two sizes and two token
    counts give E, A and B; two points only E and a common scale of A and B.

    Raises:
        TrainingError: fewer than two points, or they are too much alike.
    """
    if len({(p.parameters, p.tokens, p.unique_tokens) for p in points}) < 2:
        raise TrainingError(f"{len(points)} different runs can't be fitted: give two at least")
    sizes = np.array([p.parameters for p in points])
    tokens = np.array([effective_tokens(p.tokens, p.unique_tokens) for p in points])
    losses = np.array([p.loss for p in points])
    if len(points) >= _FREE_POINTS and len(set(sizes)) >= _FREE_SIZES <= len(set(tokens)):
        grid = np.arange(0.15, 0.601, 0.01)
        laws = (
            _solve("fitted", losses, sizes**-a, tokens**-b, a, b)
            for a, b in itertools.product(grid, grid)
        )
        return [min(laws, key=lambda law: law.residual)]
    found = []
    can_split = len(points) > 2 and len(set(sizes)) > 1 and len(set(tokens)) > 1
    for source, (per_size, per_tokens, alpha, beta) in _PUBLISHED.items():
        by_size, by_tokens = sizes**-alpha, tokens**-beta
        if can_split:
            found.append(_solve(source, losses, by_size, by_tokens, alpha, beta))
            continue
        term = per_size * by_size + per_tokens * by_tokens
        (floor, scale), residual = _non_negative(np.stack([np.ones_like(term), term], 1), losses)
        law = Law(source, floor, scale * per_size, scale * per_tokens, alpha, beta, residual)
        found.append(law)
    return found


def _solve(
    source: str, losses: Any, by_size: Any, by_tokens: Any, alpha: float, beta: float
) -> Law:
    columns = np.stack([np.ones_like(losses), by_size, by_tokens], 1)
    (floor, per_size, per_tokens), residual = _non_negative(columns, losses)
    return Law(source, floor, per_size, per_tokens, float(alpha), float(beta), residual)


def _non_negative(columns: Any, target: Any) -> tuple[list[float], float]:
    """Least squares with coefficients of at least 0, and the root mean square that is left."""
    count = columns.shape[1]
    best: tuple[list[float], float] = ([0.0] * count, math.inf)
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            part = columns[:, chosen]
            norms = np.linalg.norm(part, axis=0)
            solution = np.linalg.lstsq(part / norms, target, rcond=None)[0] / norms
            if (solution < 0).any():
                continue
            rest = float(np.sqrt(np.mean((part @ solution - target) ** 2)))
            if rest < best[1] - 1e-12:
                whole = [0.0] * count
                for index, value in zip(chosen, solution, strict=True):
                    whole[index] = float(value)
                best = (whole, rest)
    return best


def read_points(paths: Sequence[Path], bytes_per_token: float, unique_tokens: float) -> list[Point]:
    """Points of run folders, and of .json files that hold a list of them.

    Raises:
        TrainingError: one can't be read, or its run has not reached its end.
    """
    points: list[Point] = []
    for path in paths:
        if path.suffix != ".json":
            points.append(read_point(path, bytes_per_token, unique_tokens))
            continue
        try:
            rows = json.loads(path.read_text("utf-8"))["points"]
            points += [
                Point(
                    str(row["name"]),
                    float(row["parameters"]),
                    float(row["tokens"]),
                    float(row["unique_tokens"]),
                    float(row["loss"]),
                )
                for row in rows
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"{path} holds no points ({error!r}): give "
                f'{{"points": [{{name, parameters, tokens, unique_tokens, loss}}]}}'
            ) from error
    return points


def read_point(run: Path, bytes_per_token: float, unique_tokens: float) -> Point:
    """The point of a run folder, its last left-to-right validation loss in bits per byte.

    Args:
        run: folder with spec.json and log.jsonl.
        bytes_per_token: of the run's tokenizer on its validation text.
        unique_tokens: tokens of one pass over its training text.

    Raises:
        TrainingError: the folder is no run, or its schedule has not ended.
    """
    try:
        raw = json.loads((run / "spec.json").read_text("utf-8"))
        lines = read_log(run / "log.jsonl")
    except (OSError, ValueError) as error:
        raise TrainingError(f"{run} is no run's folder: {error}") from error
    spec = _spec_of(raw, run)
    steps = [line for line in lines if line["event"] == "step"]
    losses = [line["left_to_right"] for line in lines if line.get("event") == "validation"]
    if not losses or not steps or steps[-1]["step"] + 1 < spec.train.steps:
        raise TrainingError(
            f"{run} has not reached step {spec.train.steps} with a validation: only finished runs "
            f"can be compared"
        )
    bits = losses[-1] / math.log(2) / bytes_per_token
    tokens = spec.train.steps * spec.train.batch_tokens
    return Point(spec.name, spec.model_config.num_parameters, tokens, unique_tokens, bits)


def _spec_of(raw: dict[str, Any], run: Path) -> Spec:
    plain = {key: value for key, value in raw.items() if key not in ("hash", "folder")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{run.name}.yaml"
        # JSON is YAML; load_spec checks it as any other.
        path.write_text(json.dumps(plain), "utf-8")
        return load_spec(path)


def report(points: Sequence[Point], laws: Sequence[Law], targets: Sequence[Point]) -> str:
    """Markdown: the points beside the laws, the laws, and what they predict for `targets`."""
    lines = [
        "| run | parameters | tokens | unique | loss | by the law |",
        "|---|---|---|---|---|---|",
    ]
    for point in [*points, *targets]:
        predicted = sorted(
            law.loss(point.parameters, effective_tokens(point.tokens, point.unique_tokens))
            for law in laws
        )
        measured = "" if math.isnan(point.loss) else f"{point.loss:.3f}"
        shown = f"{predicted[0]:.3f}"
        if predicted[-1] - predicted[0] > 5e-4:
            shown += f" to {predicted[-1]:.3f}"
        lines.append(
            f"| {point.name} | {point.parameters / 1e6:.1f}M | {point.tokens / 1e6:,.0f}M "
            f"| {point.unique_tokens / 1e6:,.0f}M | {measured} | {shown} |"
        )
    lines.append("")
    lines += [
        f"- {law.source}: loss = {law.floor:.3f} + {law.per_size:.3g} / N^{law.alpha:.2f} + "
        f"{law.per_tokens:.3g} / D^{law.beta:.2f}, residual {law.residual:.4f}"
        for law in laws
    ]
    if laws[0].source != "fitted":
        lines.append(
            f"- exponents{' and A / B' if len(points) < 3 else ''} are published ones: "
            f"{len(points)} runs do not determine them"
        )
    return "\n".join(lines) + "\n"


def draw(points: Sequence[Point], laws: Sequence[Law], targets: Sequence[Point]) -> str:
    """The same as an SVG picture: loss over effective tokens, a line for each size."""
    width, height, left, bottom = 720, 420, 60, 40
    everything = [*points, *targets]
    spent = [effective_tokens(p.tokens, p.unique_tokens) for p in everything]
    x_low, x_high = math.log10(min(spent)) - 0.3, math.log10(max(spent)) + 0.3
    sizes = sorted({p.parameters for p in everything})
    curves = []
    for size in sizes:
        for law in laws:
            xs = np.linspace(x_low, x_high, 60)
            curves.append((size, [(x, law.loss(size, 10**x)) for x in xs]))
    heights = [y for _, curve in curves for _, y in curve]
    heights += [p.loss for p in points]
    y_low, y_high = min(heights) * 0.97, max(heights) * 1.03

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x_low) / (x_high - x_low) * (width - left - 90),
            10 + (y_high - y) / (y_high - y_low) * (height - bottom - 10),
        )

    colours = ("#2563eb", "#dc2626", "#059669", "#9333ea", "#d97706", "#0891b2")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    parts = [f'{head} font-family="sans-serif" font-size="11">']
    parts.append('<rect width="100%" height="100%" fill="#fff"/>')
    for tick in np.linspace(y_low, y_high, 6):
        y = place(x_low, tick)[1]
        parts.append(f'<line x1="{left}" x2="{width - 90}" y1="{y:.1f}" y2="{y:.1f}" ')
        parts.append(f'stroke="#ddd"/><text x="8" y="{y + 4:.1f}">{tick:.3f}</text>')
    for tick in range(math.ceil(x_low), math.floor(x_high) + 1):
        x = place(tick, y_low)[0]
        parts.append(f'<text x="{x:.1f}" y="{height - 22}" text-anchor="middle">1e{tick}</text>')
    parts.append(f'<text x="{left}" y="{height - 6}">effective training tokens</text>')
    for size, curve in curves:
        colour = colours[sizes.index(size) % len(colours)]
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in curve)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        x, y = place(*curve[-1])
        parts.append(
            f'<text x="{x + 4:.1f}" y="{y + 4:.1f}" fill="{colour}">{size / 1e6:.0f}M</text>'
        )
    for point, tokens in zip(everything, spent, strict=True):
        colour = colours[sizes.index(point.parameters) % len(colours)]
        is_target = math.isnan(point.loss)
        loss = laws[0].loss(point.parameters, tokens) if is_target else point.loss
        x, y = place(math.log10(tokens), loss)
        fill = "#fff" if is_target else colour
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{colour}">')
        parts.append(f"<title>{html.escape(point.name)}: {loss:.3f}</title></circle>")
    return "".join([*parts, "</svg>\n"])
