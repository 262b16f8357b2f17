"""What a model's matrices see: activation statistics that quantization minimises error with.

Rounding a matrix by ΔW changes its output by ΔW x, so the mean squared error over some text is
tr(ΔW M ΔWᵀ), where M is the mean of x xᵀ. That M, one for each matrix, is what
quant.quantize_q4_0_calibrated takes. Needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from albor_serve.checkpoint import open_checkpoint
from albor_serve.errors import CheckpointError, ConfigError
from albor_serve.quant import FloatArray

if TYPE_CHECKING:
    from torch import nn

__all__ = ["folder_moments", "input_moments"]

_WINDOW_LEN: Final = 512
_EMBEDDING: Final = "model.embed_tokens.weight"


def folder_moments(
    folder: Path,
    texts: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
    *,
    max_tokens: int = 24_000,
) -> dict[str, FloatArray]:
    """`input_moments` of a checkpoint folder over the beginnings of some texts.

    The result is what convert.convert takes as `importance`.

    Args:
        folder: a Hugging Face checkpoint folder with its tokenizer.json.
        texts: code of the kind the model is for; the first 512 tokens of each are used.
        progress: as for `input_moments`.
        max_tokens: no further text is begun once this many tokens are there.

    Raises ConfigError without any token, CheckpointError for a folder that cannot be used.
    """
    from tokenizers import Tokenizer

    from albor_serve.model import load_decoder

    checkpoint = open_checkpoint(folder)
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from error
    windows: list[list[int]] = []
    for text in texts:
        if sum(map(len, windows)) >= max_tokens:
            break
        windows.append(tokenizer.encode(text, add_special_tokens=False).ids[:_WINDOW_LEN])
    return input_moments(load_decoder(checkpoint.config, checkpoint.read), windows, progress)


def input_moments(
    model: nn.Module,
    windows: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, FloatArray]:
    """Second moments of every linear layer's inputs over some text.

    Layers that are fed the very same tensor (q, k and v; gate and up) share one array. Memory:
    4 bytes times the square of the input width for each distinct input, 16 where it is summed.

    Args:
        model: a decoder called with token ids [1, T]; its modules have Hugging Face names. It is
            run without gradients and is left as it was.
        windows: token ids, one sequence each. Use several tokens for each input channel;
            20,000 do for widths up to 2,000.
        progress: called with (windows done, windows in all).

    Returns:
        For each nn.Linear, by the name of its weight, float32 [in_features, in_features]: the
        mean of x xᵀ. An output head that shares its weights with the embedding is listed under
        the embedding's name, whether it is an nn.Linear or a product in the model's `forward`.

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

    def record(name: str, seen: Any) -> None:
        if latest and latest[0][1] is seen:
            same_as[name] = latest[0][0]
            return
        latest[:] = [(name, seen)]
        x = seen.reshape(-1, seen.shape[-1]).float()
        sums[name] = sums.get(name, 0) + (x.T @ x).double()
        counts[name] = counts.get(name, 0) + len(x)

    def observer(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, inputs: record(name, inputs[0])

    # The head is fed the final norm's output, even where it is no module or is not called as one.
    head = "lm_head.weight" if "lm_head.weight" in names.values() else _EMBEDDING
    final_norm = dict(model.named_modules())["model.norm"]
    hooks = [final_norm.register_forward_hook(lambda _, __, output: record(head, output))]
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and names[id(module.weight)] != head:
            hook = module.register_forward_pre_hook(observer(names[id(module.weight)]))
            hooks.append(hook)
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
