"""What a model's matrices see: activation statistics that quantization minimises error with.

Rounding a matrix by ΔW changes its output by ΔW x, so the mean squared error over some text is
tr(ΔW M ΔWᵀ), where M is the mean of x xᵀ. That M, one for each matrix, is what
quant.quantize_q4_0_calibrated takes. Needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from albor_serve.errors import ConfigError
from albor_serve.quant import FloatArray

if TYPE_CHECKING:
    from torch import nn

__all__ = ["input_moments"]


def input_moments(
    model: nn.Module,
    windows: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, FloatArray]:
    """Second moments of every linear layer's inputs over some text.

    Layers that are fed the very same tensor (q, k and v; gate and up) share one array. Memory:
    4 bytes times the square of the input width for each distinct input, 16 where it is summed.

    Args:
        model: a decoder called with token ids [1, T]; its parameters have Hugging Face names. It
            is run without gradients and is left as it was.
        windows: token ids, one sequence each. Use several tokens for each input channel;
            20,000 do for widths up to 2,000.
        progress: called with (windows done, windows in all).

    Returns:
        For each nn.Linear, by the name of its weight, float32 [in_features, in_features]: the
        mean of x xᵀ. An output head that shares its weights with the embedding is listed under
        the embedding's name.

    Raises ConfigError if there is no token to run.
    """
    import torch

    if not any(windows):
        raise ConfigError("calibration has no tokens: give text files with some code")
    sums: dict[str, Any] = {}
    counts: dict[str, int] = {}
    same_as: dict[str, str] = {}
    latest: list[tuple[str, Any]] = []
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def observer(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def observe(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if latest and latest[0][1] is inputs[0]:
                same_as[name] = latest[0][0]
                return
            latest[:] = [(name, inputs[0])]
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            sums[name] = sums.get(name, 0) + (x.T @ x).double()
            counts[name] = counts.get(name, 0) + len(x)

        return observe

    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    hooks = [
        module.register_forward_pre_hook(observer(names[id(module.weight)])) for module in linears
    ]
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            for done, window in enumerate(windows):
                if window:
                    model(torch.tensor([list(window)], device=device))
                if progress is not None:
                    progress(done + 1, len(windows))
    finally:
        for hook in hooks:
            hook.remove()
    means = {
        name: np.asarray((total / counts[name]).float().cpu(), dtype=np.float32)
        for name, total in sums.items()
    }
    return means | {name: means[source] for name, source in same_as.items()}
