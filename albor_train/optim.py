"""Optimizers, the learning-rate schedule and gradient clipping.

Matrices inside the blocks are updated by Muon (Jordan et al. 2024) with the update scaled to
AdamW's typical size (Liu et al. 2025, "Muon is Scalable"), so that both share one learning rate;
embeddings, head and norms by AdamW (Loshchilov and Hutter 2019). State and updates are float32.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from albor_train.errors import DivergedError
from albor_train.spec import TrainSpec

__all__ = ["GradientClipper", "Optimizer", "global_norm", "learning_rate", "orthogonalize"]


def learning_rate(train: TrainSpec, step: int) -> float:
    """Rate of one step, counted from 0. The last step's is next to `final_lr_share`.

    Linear warm-up from lr / warmup_steps; then WSD (constant, linear fall over the last
    `decay_share`; Hu et al. 2024) or cosine. The schedule always ends at `steps`.
    """
    floor = train.lr * train.final_lr_share
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.schedule == "cosine":
        progress = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
        return floor + (train.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    decay_steps = round(train.decay_share * train.steps)
    left = train.steps - step
    if left >= decay_steps:
        return train.lr
    return floor + (train.lr - floor) * max(0, left) / decay_steps


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Move each matrix towards the nearest one with equal singular values.

    Newton-Schulz iteration with the quintic of Jordan et al. 2024, which ends with singular
    values in about 0.7 to 1.2.

    Args:
        matrices: [K, m, n]; computed in bfloat16 on CUDA, float32 elsewhere.

    Returns:
        float32 [K, m, n].
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    if tall:
        x = x.mT
    return x.float()


OverRows = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
"""(function, rows [K, ...]) to function(rows), perhaps divided over processes."""


def _here(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    return function(rows)


class Optimizer:
    """Muon and AdamW over named float32 parameters, which `step` changes in place.

    Matrices of equal shape are orthogonalized as one stacked tensor. Every matrix outside
    embeddings and head goes to Muon, or everything to AdamW with optimizer "adamw".
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], train: TrainSpec, *, over_rows: OverRows = _here
    ) -> None:
        """Fresh state.

        Args:
            parameters: by name; kept and changed.
            over_rows: does Muon's matrices, each process its share.
        """
        self._parameters = dict(parameters)
        self._train = train
        self._over_rows = over_rows
        self.orthogonalize: Callable[[Tensor], Tensor] = orthogonalize
        """May be replaced by the same function compiled."""
        self.moments: dict[str, Tensor] = {}
        """Optimizer state by "kind.parameter", float32 of the parameter's shape."""
        self._matrices: dict[tuple[int, ...], list[str]] = defaultdict(list)
        # By kind: rate relative to the blocks', and whether weights decay.
        self._others: dict[tuple[float, bool], list[str]] = defaultdict(list)
        for name, tensor in self._parameters.items():
            if train.optimizer == "muon" and tensor.dim() == 2 and "layers." in name:
                self._matrices[tuple(tensor.shape)].append(name)
                self.moments[f"momentum.{name}"] = torch.zeros_like(tensor)
            else:
                is_matrix = tensor.dim() == 2
                scale = 1.0 if is_matrix and "layers." in name else train.embedding_lr_scale
                self._others[scale, is_matrix].append(name)
                self.moments[f"mean.{name}"] = torch.zeros_like(tensor)
                self.moments[f"square.{name}"] = torch.zeros_like(tensor)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, gradients: Mapping[str, Tensor], step: int, lr: float) -> None:
        """One update.

        Args:
            gradients: float32, by parameter name.
            step: number of the step from 0, for AdamW's bias correction.
            lr: this step's learning rate.
        """
        for shape, names in self._matrices.items():
            self._muon(shape, names, gradients, lr)
        for (scale, decays), names in self._others.items():
            self._adamw(names, gradients, step, lr * scale, decays=decays)

    def _muon(
        self, shape: tuple[int, ...], names: list[str], gradients: Mapping[str, Tensor], lr: float
    ) -> None:
        momentum = [self.moments[f"momentum.{name}"] for name in names]
        grads = [gradients[name] for name in names]
        beta = self._train.momentum
        torch._foreach_lerp_(momentum, grads, 1 - beta)
        # Nesterov: look ahead along the momentum.
        ahead = torch._foreach_lerp(grads, momentum, beta)
        updates = self._over_rows(self.orthogonalize, torch.stack(list(ahead)))
        scale = 0.2 * math.sqrt(max(shape))
        targets = [self._parameters[name] for name in names]
        torch._foreach_mul_(targets, 1 - lr * self._train.weight_decay)
        torch._foreach_add_(targets, list(updates.unbind()), alpha=-lr * scale)

    def _adamw(
        self,
        names: list[str],
        gradients: Mapping[str, Tensor],
        step: int,
        rate: float,
        *,
        decays: bool,
    ) -> None:
        low, high = self._train.betas
        means = [self.moments[f"mean.{name}"] for name in names]
        squares = [self.moments[f"square.{name}"] for name in names]
        grads = [gradients[name] for name in names]
        targets = [self._parameters[name] for name in names]
        torch._foreach_lerp_(means, grads, 1 - low)
        torch._foreach_lerp_(squares, torch._foreach_mul(grads, grads), 1 - high)
        if decays:
            torch._foreach_mul_(targets, 1 - rate * self._train.weight_decay)
        roots = torch._foreach_div(squares, 1 - high ** (step + 1))
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, self._train.eps)
        torch._foreach_addcdiv_(targets, means, roots, value=-rate / (1 - low ** (step + 1)))


def global_norm(gradients: Mapping[str, Tensor]) -> Tensor:
    """Euclidean norm over all gradients, float32 []."""
    norms = torch._foreach_norm(list(gradients.values()))
    return torch.linalg.vector_norm(torch.stack(list(norms)))


@dataclass
class GradientClipper:
    """ZClip (Kumar et al. 2025), then a fixed limit.

    Norms far above their running mean are pulled back towards it, so that one bad batch does
    little harm, whatever the scale of the run's gradients. Mutable: `clip` updates the running
    mean and variance.
    """

    max_norm: float
    z_limit: float
    """Standard deviations; 0 leaves only the fixed limit."""
    decay: float = 0.97
    warmup: int = 25
    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def target_norm(self, norm: float) -> float:
        """The norm that gradients of `norm` are scaled to; updates the statistics.

        Raises:
            DivergedError: `norm` is not finite.
        """
        if not math.isfinite(norm):
            raise DivergedError(
                f"the gradient norm is {norm}: lower train.lr or resume from an earlier checkpoint"
            )
        allowed = norm
        if self.count >= self.warmup and self.z_limit > 0:
            deviation = math.sqrt(self.variance)
            z = (norm - self.mean) / deviation if deviation > 0 else 0.0
            if z > self.z_limit:
                allowed = self.mean + self.z_limit**2 / z * deviation
        # Clipped norms enter the statistics, or one spike would widen them for long.
        if self.count < self.warmup:
            self.count += 1
            delta = allowed - self.mean
            self.mean += delta / self.count
            self.variance += (delta * (allowed - self.mean) - self.variance) / self.count
        else:
            delta = allowed - self.mean
            self.mean += (1 - self.decay) * delta
            self.variance = self.decay * (self.variance + (1 - self.decay) * delta**2)
        return min(allowed, self.max_norm)

    def clip(self, gradients: Mapping[str, Tensor]) -> tuple[float, float]:
        """Scale gradients in place; (norm before, norm after)."""
        norm = float(global_norm(gradients))
        target = self.target_norm(norm)
        if target < norm:
            torch._foreach_mul_(list(gradients.values()), target / norm)
        return norm, min(norm, target)
