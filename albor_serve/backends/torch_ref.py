"""The reference backend: plain torch, one sequence after the other. Slow and obviously right."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from albor_serve.backends.base import Aborted, BackendInfo, ExtendStep, LogitRows
from albor_serve.backends.checks import check_fork, check_rewind, check_slot, check_steps
from albor_serve.config import ModelConfig
from albor_serve.errors import BackendError
from albor_serve.model import Decoder, KVCache, load_decoder

__all__ = ["TorchReferenceBackend"]


class TorchReferenceBackend:
    """`Backend` in plain torch on any device; see backends/base.py.

    An abort takes effect before the next layer; the steps before the aborted one are complete
    and the aborted one is undone. The returned arrays are copies.
    """

    def __init__(
        self,
        config: ModelConfig,
        read: Callable[[str], npt.NDArray[np.float32]],
        num_slots: int,
        max_seq_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Read all weights with `read` (Hugging Face name to float32 array) and keep `dtype`."""
        self._model: Decoder | None = load_decoder(config, read, dtype=dtype, device=device)
        self._device = torch.device(device)
        self._caches = [
            KVCache.empty(config, max_seq_len, dtype=dtype, device=device) for _ in range(num_slots)
        ]
        self._abort = threading.Event()
        element_bytes = torch.empty(0, dtype=dtype).element_size()
        kv_elements = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        self._info = BackendInfo(
            name="torch_ref",
            device=str(self._device),
            vocab_size=config.vocab_size,
            num_slots=num_slots,
            max_seq_len=max_seq_len,
            max_batch_len=max(max_seq_len, num_slots),
            weight_bytes=config.num_parameters * element_bytes,
            kv_bytes_per_token=kv_elements * element_bytes,
        )

    @property
    def info(self) -> BackendInfo:
        """What this backend is."""
        return self._info

    @property
    def abort(self) -> threading.Event:
        """The flag that stops the call in flight. It stays set until it is cleared."""
        return self._abort

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def extend(self, steps: Sequence[ExtendStep]) -> list[LogitRows]:
        """Append tokens to caches and return logits; see `Backend.extend`."""
        model = self._open_model()
        check_steps(self._info, self._lengths(), steps)
        self._stop_if_aborted()
        return [self._extend_one(model, step) for step in steps]

    def rewind(self, slot: int, length: int) -> None:
        """Drop the slot's cache beyond its first `length` tokens (0 empties it)."""
        self._open_model()
        check_rewind(self._info, slot, length)
        self._caches[slot].length = min(length, self._caches[slot].length)

    def fork(self, src: int, dst: int, length: int) -> None:
        """Make `dst` hold the first `length` tokens of `src`; what it held before is dropped."""
        self._open_model()
        check_fork(self._info, self._lengths(), src, dst, length)
        for name in ("keys", "values"):
            pairs = zip(
                getattr(self._caches[src], name), getattr(self._caches[dst], name), strict=True
            )
            for ours, theirs in pairs:
                theirs[:, :, :length] = ours[:, :, :length]
        self._caches[dst].length = length

    def length(self, slot: int) -> int:
        """Tokens that the slot's cache holds."""
        self._open_model()
        check_slot(self._info, slot)
        return self._caches[slot].length

    def close(self) -> None:
        """Drop weights and caches. Any later call raises BackendError."""
        self._model = None
        self._caches = []

    def _extend_one(self, model: Decoder, step: ExtendStep) -> LogitRows:
        if not len(step.tokens):
            return np.empty((0, self._info.vocab_size), dtype=np.float32)
        tokens = torch.tensor([list(step.tokens)], dtype=torch.int64, device=self._device)
        hidden = model.hidden(
            tokens, cache=self._caches[step.slot], before_layer=self._stop_if_aborted
        )
        wanted = hidden[0, len(step.tokens) - step.num_rows :]
        rows: LogitRows = model.logits(wanted).float().cpu().numpy()
        return rows

    def _stop_if_aborted(self) -> None:
        if self._abort.is_set():
            raise Aborted

    def _lengths(self) -> list[int]:
        return [cache.length for cache in self._caches]

    def _open_model(self) -> Decoder:
        if self._model is None:
            raise BackendError("the backend is closed: load the model again")
        return self._model
