"""The GPU backend: prompts through torch, tokens through the Triton kernels in CUDA graphs.

A few tokens at a time (decoding, drafts to verify, what was typed since the last prompt) go through
graphs of the fused kernels, which read Q4_0 weights; more go through `albor_serve.model` in
float16, where the matrix products of cuBLAS are at their best, as graphs too (backends/prefill.py).
Both write the same KV cache.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch

from albor_serve.backends.base import Aborted, BackendInfo, ExtendStep, LogitRows
from albor_serve.backends.checks import (
    check_cache_memory,
    check_fork,
    check_rewind,
    check_sizes,
    check_slot,
    check_steps,
)
from albor_serve.backends.device_errors import device_error
from albor_serve.backends.device_run import DeviceRun
from albor_serve.backends.prefill import Prefill
from albor_serve.config import DevicePlan, ModelConfig
from albor_serve.errors import (
    AlborError,
    BackendError,
    DeviceError,
    DeviceLostError,
    DeviceMemoryError,
)
from albor_serve.kernels._triton import HAVE_TRITON, INTERPRET
from albor_serve.kernels.build import KernelBuild, jobs_of
from albor_serve.kernels.decoder import DecodePlan, GpuDecoder, plan_for
from albor_serve.kernels.launch import Launch
from albor_serve.kernels.sampling import DeviceSampler
from albor_serve.kernels.weights import DecodeWeights, check_shape, pack_weights
from albor_serve.model import Decoder, KVCache, load_decoder

if TYPE_CHECKING:
    from albor_serve.checkpoint.gguf import GgufCheckpoint

__all__ = ["CudaBackend", "has_gpu", "unsupported"]

logger = logging.getLogger(__name__)

MAX_BATCH_LEN: Final = 2048
ROWS: Final = (1, 2, 4, 8)
"""Numbers of tokens for which there are graphs; others are padded up to the next."""
MOST_BY_KERNELS: Final = 256
"""Up to so many tokens may go through the kernels, eight at a time: on an H100 eight take 0.11 ms
(33M) to 0.40 ms (350M), while a prompt through torch costs 7 ms for the launches of 8 layers alone.
With graphs of torch's launches it is measured at the start."""
Plan = tuple[int, bool]
"""Rows, and whether the context is long."""
URGENT: Final[tuple[Plan, ...]] = ((1, False), (8, False))
"""Plans that are compiled before the first request; these do for all others' work."""
LATER: Final[tuple[Plan, ...]] = (
    (1, True),
    (4, False),
    (2, False),
    (8, True),
    (4, True),
    (2, True),
)
"""Plans that are compiled while requests are answered already, in this order."""
MOST_OFF: Final = 0.1
"""How far logits of the kernels may be from torch's, in parts of the largest; usually 0.002."""
LONG_CONTEXT: Final = 1024
"""From here on a key-value head's positions are shared by more programs."""
CAPABILITY: Final = (8, 0)

Read = Callable[[str], npt.NDArray[Any]]


def has_gpu() -> bool:
    """Whether torch sees a CUDA GPU and Triton is installed; imports nothing new."""
    return HAVE_TRITON and torch.cuda.is_available()


def unsupported(checkpoint: GgufCheckpoint) -> str | None:
    """Why this backend can't run the model here, in a few words; None if it can."""
    if not HAVE_TRITON:
        return "Triton is not installed (pip install 'albor[gpu]')"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    try:
        if torch.cuda.get_device_capability() < CAPABILITY:
            return f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
    except RuntimeError as error:
        return f"CUDA does not start ({' '.join(str(error).split())[:100]})"
    try:
        config = checkpoint.config
        check_shape(config)
        for layer in range(config.num_layers):
            for part in _MATRICES:
                stored = checkpoint.tensor_format(f"model.layers.{layer}.{part}.weight")
                if stored != "Q4_0":
                    return f"its matrices are {stored}, not Q4_0"
        if checkpoint.tensor_format("model.embed_tokens.weight") != "Q4_0":
            return "its embedding is not Q4_0"
    except AlborError as error:
        return str(error)
    return None


_MATRICES: Final = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


class CudaBackend:
    """`Backend` on one NVIDIA GPU; see backends/base.py.

    Slots are computed one after the other. An abort takes effect before the next layer of a
    prompt, or before the next step.
    """

    def __init__(
        self,
        config: ModelConfig,
        q4_rows: Read,
        read: Read,
        num_slots: int,
        max_seq_len: int,
        progress: Callable[[float], None] | None = None,
        *,
        device: str = "cuda",
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """Load a model's weights, twice: in 4 bits for tokens, in float16 for prompts.

        Args:
            config: its shape.
            q4_rows: gives a matrix by its Hugging Face name as Q4_0 rows, uint8 [rows, row bytes].
            read: gives any tensor as float32.
            num_slots: sequences that are held at once, 1 to 64.
            max_seq_len: tokens that each slot can hold.
            progress: called with 0.0 to 1.0 while kernels are compiled.
            device: "cuda", or "cpu" in Triton's interpreter.
            on_close: called once when the backend is closed, to free what belongs to it.

        Raises:
            BackendError: no GPU, or not enough of its memory. DeviceError: it fails, or does not
            take a kernel.
            ConfigError: a number out of range. UnsupportedModelError: a shape that the kernels do
            not cover.
        """
        check_sizes({"num_slots": (num_slots, 64), "max_seq_len": (max_seq_len, 1 << 20)})
        check_shape(config)
        self._device = torch.device(device)
        if self._device.type == "cuda" and not has_gpu():
            raise BackendError("there is no CUDA GPU here, or no Triton: use --backend cpu")
        self._on_close = on_close
        self._is_closed = False
        self._abort = threading.Event()
        self._failure: DeviceLostError | None = None
        self._build: KernelBuild | None = None
        kv_bytes = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim
        # Padded rows may write a few positions beyond the last token.
        room = (max_seq_len + ROWS[-1] + 7) // 8 * 8
        with self._guard():
            name = torch.cuda.get_device_name() if self._device.type == "cuda" else "interpreter"
            free = torch.cuda.mem_get_info()[0] if self._device.type == "cuda" else None
            check_cache_memory(kv_bytes, num_slots, room, free)
            vectors = {name: read(name) for name in _norms(config)}
            weights = pack_weights(config, q4_rows, vectors, device=self._device, max_seq_len=room)
            self._model: Decoder | None = load_decoder(
                config, read, dtype=torch.float16, device=self._device
            )
            self._info = BackendInfo(
                name="cuda",
                device=name,
                vocab_size=config.vocab_size,
                num_slots=num_slots,
                max_seq_len=max_seq_len,
                max_batch_len=max(MAX_BATCH_LEN, num_slots),
                weight_bytes=weights.bytes_per_token,
                kv_bytes_per_token=kv_bytes,
            )
            kv = (num_slots, config.num_layers, config.num_kv_heads, room, config.head_dim)
            keys = torch.zeros(kv, dtype=torch.float16, device=self._device)
            values = torch.zeros_like(keys)
            self._slots = [
                _Slot(config, weights, room, cache) for cache in zip(keys, values, strict=True)
            ]
            self._prefill: Prefill | None = Prefill(self._model, keys, values)
            self._plans = _plans(weights, self._device)
            # The interpreter takes seconds for what a GPU does in a tenth of a millisecond.
            self._most_by_kernels = MOST_BY_KERNELS if self._device.type == "cuda" else ROWS[-1]
            self._host = _pinned(
                (ROWS[-1], config.vocab_size), torch.float32, self._device.type == "cuda"
            )
            try:
                self._warm_up(progress)
            except BaseException:
                self._stop_build()
                raise

    @classmethod
    def from_gguf(
        cls,
        checkpoint: GgufCheckpoint,
        num_slots: int,
        max_seq_len: int,
        progress: Callable[[float], None] | None = None,
        *,
        on_close: Callable[[], None] | None = None,
    ) -> CudaBackend:
        """Load a GGUF file for which `unsupported` gives None; raises what the constructor does."""

        def q4_rows(name: str) -> npt.NDArray[np.uint8]:
            stored = checkpoint.quantized(name)
            rows: npt.NDArray[np.uint8] = stored.data.reshape(stored.shape[0], -1)
            return rows

        return cls(
            checkpoint.config,
            q4_rows,
            checkpoint.read,
            num_slots,
            max_seq_len,
            progress,
            on_close=on_close,
        )

    @property
    def info(self) -> BackendInfo:
        """What this backend is."""
        return self._info

    @property
    def abort(self) -> threading.Event:
        """The flag that stops the call in flight. It stays set until it is cleared."""
        return self._abort

    @property
    def decode_weights(self) -> DecodeWeights:
        """The packed weights that the kernels read. Raises BackendError once it is closed."""
        self._open()
        return self._slots[0].decoder.weights

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def extend(self, steps: Sequence[ExtendStep]) -> list[LogitRows]:
        """Append tokens to caches and return logits; see `Backend.extend`."""
        model = self._open()
        check_steps(self._info, [slot.length for slot in self._slots], steps)
        self._stop_if_aborted()
        with self._guard():
            return [self._extend_one(model, step) for step in steps]

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def decode(
        self, slot: int, token: int, plan: DevicePlan, on_token: Callable[[int], bool]
    ) -> list[int]:
        """Decode several tokens on the device; see `DeviceDecoder.decode`."""
        self._open()
        check_steps(self._info, [s.length for s in self._slots], [ExtendStep(slot, [token])])
        held = self._slots[slot]
        room = self._info.max_seq_len - held.length
        if plan.max_new_tokens > room:
            raise BackendError(
                f"slot {slot} has room for {room} tokens, not for {plan.max_new_tokens}: ask for "
                "fewer or rewind it"
            )
        self._stop_if_aborted()
        with self._guard():
            run = DeviceRun(
                held.sampler,
                held.sampled_step(self._plan(1, held.length)),
                self._abort.is_set,
                fault=_device_fault if self._device.type == "cuda" else lambda: None,
            )
            held.set_input([token], held.length)
            new: list[int] = []
            try:
                run.start(plan)
                for next_token in run:
                    new.append(next_token)
                    if not on_token(next_token):
                        break
            finally:
                held.length += len(new)
                # What is queued must be over before the mailbox is used again.
                run.stop()
        if run.was_aborted:
            raise Aborted
        return new

    def rewind(self, slot: int, length: int) -> None:
        """Drop the slot's cache beyond its first `length` tokens (0 empties it)."""
        self._open()
        check_rewind(self._info, slot, length)
        self._slots[slot].length = min(length, self._slots[slot].length)

    def fork(self, src: int, dst: int, length: int) -> None:
        """Make `dst` hold the first `length` tokens of `src`; what it held before is dropped."""
        self._open()
        check_fork(self._info, [slot.length for slot in self._slots], src, dst, length)
        if src != dst:
            with self._guard():
                ours, theirs = self._slots[src].decoder, self._slots[dst].decoder
                theirs.keys[:, :, :length] = ours.keys[:, :, :length]
                theirs.values[:, :, :length] = ours.values[:, :, :length]
        self._slots[dst].length = length

    def length(self, slot: int) -> int:
        """Tokens that the slot's cache holds."""
        self._open()
        check_slot(self._info, slot)
        return self._slots[slot].length

    def close(self) -> None:
        """Free the GPU's memory. Any later call raises BackendError.

        Of a GPU that is lost nothing is freed: torch would end the process over it.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._stop_build()
        if self._failure is None:
            self._model = None
            self._prefill = None
            self._slots = []
            self._host = torch.empty(0)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        if self._on_close is not None:
            self._on_close()

    def _extend_one(self, model: Decoder, step: ExtendStep) -> LogitRows:
        slot = self._slots[step.slot]
        count = len(step.tokens)
        if not count:
            return np.empty((0, self._info.vocab_size), dtype=np.float32)
        self._stop_if_aborted()
        if count <= (MOST_BY_KERNELS if step.num_rows > 1 else self._most_by_kernels):
            return self._through_kernels(slot, step)
        if step.num_rows <= 1 and self._prefill is not None:
            return self._in_pieces(self._prefill, slot, step)
        tokens = torch.tensor([list(step.tokens)], dtype=torch.int64, device=self._device)
        cache = slot.cache()
        hidden = model.hidden(tokens, cache=cache, before_layer=self._stop_if_aborted)
        rows: LogitRows
        if step.num_rows:
            rows = model.logits(hidden[0, count - step.num_rows :]).float().cpu().numpy()
        else:
            rows = np.empty((0, self._info.vocab_size), dtype=np.float32)
        slot.length += count
        return rows

    def _in_pieces(self, prefill: Prefill, slot: _Slot, step: ExtendStep) -> LogitRows:
        """A prompt of which at most the last row is wanted."""
        rest = step.tokens
        while len(rest):
            self._stop_if_aborted()
            num = prefill.piece_len(len(rest))
            prefill.run(step.slot, rest[:num], slot.length)
            slot.length += num
            rest = rest[num:]
        rows = self._host[: step.num_rows]
        rows.copy_(prefill.logits[: step.num_rows], non_blocking=True)
        self._probe()
        result: LogitRows = rows.numpy().copy()
        return result

    def _through_kernels(self, slot: _Slot, step: ExtendStep) -> LogitRows:
        """A few tokens through the kernels, eight at a time."""
        count = len(step.tokens)
        first_row = count - step.num_rows
        result: LogitRows = np.empty((step.num_rows, self._info.vocab_size), dtype=np.float32)
        for at in range(0, count, ROWS[-1]):
            if at:
                self._stop_if_aborted()
            part = list(step.tokens[at : at + ROWS[-1]])
            plan = self._plan(len(part), slot.length + at)
            padded = [*part, *[part[-1]] * (plan.num_tokens - len(part))]
            slot.set_input(padded, slot.length + at, at)
            slot.run(plan)
            skip = max(0, first_row - at)
            if skip < len(part):
                logits = self._host[: len(part) - skip]
                logits.copy_(slot.decoder.logits[skip : len(part)], non_blocking=True)
                if self._device.type == "cuda":
                    torch.cuda.synchronize()
                to = at + skip - first_row
                result[to : to + len(logits)] = logits.numpy()
        slot.length += count
        return result

    def _warm_up(self, progress: Callable[[float], None] | None) -> None:
        """Compile the urgent kernels and record the first slot's graphs of them.

        The other kernels are compiled while requests are answered.
        """
        if INTERPRET:
            return  # There is nothing to compile, and a step takes many seconds.
        from triton.runtime import driver

        slot = self._slots[0]
        target = driver.active.get_current_target()
        groups = [URGENT, *((plan,) for plan in LATER)]
        self._build = KernelBuild(
            [jobs_of(slot.launches(*(self._plans[plan] for plan in group))) for group in groups],
            (target.backend, target.arch, target.warp_size),
        )
        self._build.wait(0, progress)
        for plan in (self._plans[key] for key in URGENT):
            slot.set_input([0] * plan.num_tokens, 0)
            slot.run(plan)
            if plan.num_tokens == 1:
                slot.sampled_step(plan)
        self._probe()
        self._capture_prompts()
        self._check()

    def _capture_prompts(self) -> None:
        """Record prompts as graphs and find out from which length on they are the faster way."""
        assert self._prefill is not None
        free = torch.cuda.mem_get_info()[0]
        try:
            self._prefill.capture()
            self._probe()
        except RuntimeError as error:
            typed = device_error(error, self._probe)
            if typed is None or isinstance(typed, DeviceLostError):
                raise
            torch.cuda.empty_cache()
            logger.warning("prompts take some milliseconds more, without CUDA graphs: %s", typed)
            return
        num_mb = (free - torch.cuda.mem_get_info()[0]) / 1e6
        logger.info("%d graphs of prompts take %.0f MB", self._prefill.num_graphs, num_mb)
        slot, plan = self._slots[0], self._plans[ROWS[-1], False]
        piece = [0] * self._prefill.sizes[0]
        whole = self._fastest(lambda prefill: prefill.run(0, piece, 0))
        slot.set_input([0] * plan.num_tokens, 0)
        eight = self._fastest(lambda _: slot.run(plan))
        self._most_by_kernels = min(MOST_BY_KERNELS, max(1, int(whole / eight)) * ROWS[-1])
        logger.info("up to %d tokens go through the kernels", self._most_by_kernels)

    def _fastest(self, call: Callable[[Prefill], None]) -> float:
        """Seconds of the fastest of some calls."""
        assert self._prefill is not None
        best = float("inf")
        for _ in range(10):
            began = time.perf_counter()
            call(self._prefill)
            self._probe()
            best = min(best, time.perf_counter() - began)
        return best

    def _check(self) -> None:
        """Compute eight tokens in both ways. Raises DeviceError where the results differ.

        So a GPU or compiler on which the kernels are wrong is found before it answers anybody.
        """
        assert self._prefill is not None
        tokens = [i * 7919 % self._info.vocab_size for i in range(ROWS[-1])]
        slot = self._slots[0]
        results = []
        for compute in (self._through_kernels, self._by_torch):
            results.append(compute(slot, ExtendStep(0, tokens))[0].copy())
            slot.length = 0
        got, want = results
        off = float(np.abs(got - want).max() / max(float(np.abs(want).max()), 1e-6))
        if not off < MOST_OFF:  # also catches NaN
            raise DeviceError(
                f"the kernels compute wrongly on this GPU ({off:.2g} away from torch's logits): "
                "use --fallback cpu or --backend cpu"
            )

    def _by_torch(self, slot: _Slot, step: ExtendStep) -> LogitRows:
        assert self._prefill is not None
        return self._in_pieces(self._prefill, slot, step)

    def _stop_build(self) -> None:
        if self._build is not None:
            self._build.close()

    def _plan(self, num_tokens: int, length: int) -> DecodePlan:
        """The plan for so many tokens, at most 8, after `length` others.

        Another one does the same work a little slower while the right one's kernels are compiled.
        """
        rows = next(size for size in ROWS if size >= num_tokens)
        wanted = (rows, length > LONG_CONTEXT)
        build = None if wanted in URGENT else self._build
        if build is not None and not build.is_done(1 + LATER.index(wanted)):
            wanted = (1 if rows == 1 else ROWS[-1], False)
        return self._plans[wanted]

    def _stop_if_aborted(self) -> None:
        if self._abort.is_set():
            raise Aborted

    def _open(self) -> Decoder:
        if self._failure is not None:
            raise self._failure
        if self._is_closed or self._model is None:
            raise BackendError("the backend is closed: load the model again")
        return self._model

    def _guard(self) -> _Guard:
        return _Guard(self._failed, self._probe)

    def _failed(self, error: DeviceError) -> None:
        """Remember what can't be mended; make room where that is what lacked."""
        if isinstance(error, DeviceLostError):
            if self._failure is None:
                # torch ends the process where it frees memory of a lost GPU: never do.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
            self._failure = error
        elif isinstance(error, DeviceMemoryError) and self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _probe(self) -> None:
        """Raise if the device has failed."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()


class _Guard:
    """Turns what torch, Triton and CUDA raise into BackendError."""

    def __init__(self, on_error: Callable[[DeviceError], None], probe: Callable[[], None]) -> None:
        self._on_error = on_error
        self._probe = probe

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, Aborted):
            return
        typed = error if isinstance(error, AlborError) else device_error(error, self._probe)
        if isinstance(typed, DeviceError):
            self._on_error(typed)
        if typed is error:
            return
        if typed is not None:
            raise typed from error
        if isinstance(error, RuntimeError):
            reason = " ".join(str(error).split())[:200]
            raise BackendError(f"the GPU backend failed: {reason}") from error


class _Slot:
    """One sequence: its decoder with the KV cache, its graphs, how much of the cache counts."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DecodeWeights,
        room: int,
        cache: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        self.decoder = GpuDecoder(weights, room, cache)
        self.length = 0
        self._num_layers = config.num_layers
        self._graphs: dict[DecodePlan, Any] = {}
        self._sampled: dict[DecodePlan, Any] = {}
        self.sampler = DeviceSampler(config.vocab_size, room, weights.head.device)
        on_gpu = weights.head.device.type == "cuda"
        self._tokens = _pinned((MOST_BY_KERNELS + ROWS[-1],), torch.int32, on_gpu)
        self._uploaded = torch.cuda.Event() if on_gpu else None

    def cache(self) -> KVCache:
        """The same memory as torch's prefill wants it."""
        return KVCache(
            keys=[self.decoder.keys[i][None] for i in range(self._num_layers)],
            values=[self.decoder.values[i][None] for i in range(self._num_layers)],
            length=self.length,
        )

    def set_input(self, tokens: Sequence[int], length: int, at: int = 0) -> None:
        """The next step's tokens, after `length` others.

        The host's copy lies `at` its place until it is on the device: steps that are queued one
        after the other need different places, of which 0 comes first.
        """
        if at == 0 and self._uploaded is not None:
            self._uploaded.synchronize()
        end = at + len(tokens)
        self._tokens[at:end] = torch.tensor(tokens, dtype=torch.int32)
        self.decoder.tokens[: len(tokens)].copy_(self._tokens[at:end], non_blocking=True)
        self.decoder.position.fill_(length)
        if self._uploaded is not None:
            self._uploaded.record()

    def run(self, plan: DecodePlan) -> None:
        """One step, as a graph where there is a GPU."""
        if INTERPRET:
            self.decoder.step(plan)
            return
        graph = self._graphs.get(plan)
        if graph is None:
            graph = self.decoder.capture(plan, feedback=False, store_logits=True)
            self._graphs[plan] = graph
        graph.replay()

    def launches(self, *plans: DecodePlan) -> Iterator[Launch]:
        """What `run` and `sampled_step` launch, for compiling it beforehand."""
        for plan in plans:
            yield from self.decoder.launches(
                plan, sampler=self.sampler if plan.num_tokens == 1 else None
            )

    def sampled_step(self, plan: DecodePlan) -> Callable[[], None]:
        """Queues one step of one token that the sampler ends and feeds back."""
        if INTERPRET:
            return lambda: self.decoder.step(plan, sampler=self.sampler)
        graph = self._sampled.get(plan)
        if graph is None:
            graph = self.decoder.capture(plan, feedback=False, sampler=self.sampler)
            self._sampled[plan] = graph
        replay: Callable[[], None] = graph.replay
        return replay


def _device_fault() -> None:
    """Raise what the device has failed with since the last call, if it has."""
    torch.cuda.current_stream().query()


def _plans(weights: DecodeWeights, device: torch.device) -> dict[tuple[int, bool], DecodePlan]:
    """A plan for each number of rows and for short and long contexts."""
    pdl = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    plans = {}
    for rows in ROWS:
        plan = plan_for(weights, num_tokens=rows, pdl=pdl)
        plans[rows, False] = plan
        plans[rows, True] = plan_for(weights, num_tokens=rows, pdl=pdl, num_parts=16)
    return plans


def _pinned(shape: tuple[int, ...], dtype: torch.dtype, on_gpu: bool) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, pin_memory=on_gpu)


def _norms(config: ModelConfig) -> list[str]:
    names = ["model.norm.weight"]
    for i in range(config.num_layers):
        prefix = f"model.layers.{i}."
        names += [f"{prefix}input_layernorm.weight", f"{prefix}post_attention_layernorm.weight"]
        if config.qk_norm:
            names += [f"{prefix}self_attn.{n}_norm.weight" for n in "qk"]
    return names
