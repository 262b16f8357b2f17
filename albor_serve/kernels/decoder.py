"""Launches decode steps: owns the activation buffers and the KV cache of one sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from albor_serve.errors import ConfigError
from albor_serve.kernels import phases
from albor_serve.kernels._triton import INTERPRET, require_triton
from albor_serve.kernels.launch import Launch
from albor_serve.kernels.layout import TILE_COLS, TILE_ROWS
from albor_serve.kernels.sampling import DeviceSampler
from albor_serve.kernels.weights import DecodeWeights

__all__ = ["DecodePlan", "GpuDecoder", "plan_for", "record"]


NO_CANDIDATE: Final = 0xFFFFFF
"""A `steps.candidate` of token 0: what feedback reads before any step has written a best."""

_MAX_SPLITS: Final = 64


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _divisor_up_to(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`."""
    return next(i for i in range(min(n, most), 0, -1) if n % i == 0)


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Numbers that the kernels are compiled for."""

    num_tokens: int
    """M: tokens computed at once, 1 to 8."""
    num_splits: int
    """S: programs that share one key-value head's cached positions."""
    positions: int
    """P: positions of one attention tile, for several tokens."""
    rows_per_lane: int
    """NR: positions that a lane holds at a time, for one token."""
    bands_gate_up: int
    warps_qkv: int
    warps_attention: int
    warps_output: int
    warps_gate_up: int
    warps_down: int
    warps_head: int
    prefetch: bool
    """Whether kernels bring the weights of later ones to the cache."""
    stream: bool
    """Whether the weights exceed the cache, so that keeping them there would only evict others."""
    pdl: bool
    asm: bool


def plan_for(
    weights: DecodeWeights,
    *,
    num_tokens: int = 1,
    num_parts: int = 8,
    num_programs: int = 128,
    cache_bytes: int = 40 << 20,
    pdl: bool = False,
) -> DecodePlan:
    """A plan that spreads each step over about `num_programs` programs.

    `num_parts` is how many parts a head's positions are cut into, the new token being one.

    Raises:
        ConfigError: num_tokens is not 1 to 8.
    """
    if not 1 <= num_tokens <= 8:
        raise ConfigError(f"num_tokens is {num_tokens}: the kernels compute 1 to 8 at once")
    config = weights.config
    gate_bands = config.intermediate_size // 8
    group = _power_of_two(config.num_heads // config.num_kv_heads)
    # For one token each warp has one head and a part of the program's positions.
    warps_attention = min(16, max(8, group)) if num_tokens == 1 else 4
    return DecodePlan(
        num_tokens=num_tokens,
        num_splits=max(1, num_parts - 1) if num_tokens == 1 else num_parts,
        positions=64,
        rows_per_lane=4,
        bands_gate_up=_divisor_up_to(gate_bands, max(1, min(4, gate_bands // num_programs) // 2)),
        warps_qkv=4 if num_tokens == 1 else 8,
        warps_attention=warps_attention,
        warps_output=4 if num_tokens == 1 else 8,
        warps_gate_up=4 if num_tokens == 1 else 8,
        warps_down=16 if num_tokens == 1 else 8,
        warps_head=8,
        prefetch=weights.bytes_per_token > cache_bytes,
        stream=weights.bytes_per_token > cache_bytes,
        pdl=pdl,
        asm=not INTERPRET,
    )


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> Launch:
    return Launch(kernel, grid, arguments, options)


def record(
    step: Callable[[], None], position: Tensor, steps: Callable[[], None] | None = None
) -> Any:
    """Run `step` once, to compile its kernels, and record `steps` (or `step`) as a CUDA graph.

    `position` is left as it was.
    """
    before = position.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        position.copy_(before)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (steps or step)()
    return graph


class GpuDecoder:
    """One sequence's decode steps as separate kernels.

    Buffers belong to this object; `step` writes them. Not safe for several threads.
    """

    def __init__(
        self,
        weights: DecodeWeights,
        max_seq_len: int,
        cache: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Allocate.

        Args:
            weights: on the device.
            max_seq_len: positions of the cache.
            cache: memory for `keys` and `values`; None allocates it.
        """
        require_triton()
        if max_seq_len > weights.cos.shape[0]:
            raise ConfigError(
                f"max_seq_len is {max_seq_len}, but the rotation tables end at "
                f"{weights.cos.shape[0]}: pack the weights for a longer sequence"
            )
        self.weights = weights
        self.max_seq_len = max_seq_len
        c, device = weights.config, weights.head.device
        kv = (c.num_layers, c.num_kv_heads, max_seq_len, c.head_dim)
        if cache is None:
            cache = (
                torch.zeros(kv, dtype=torch.float16, device=device),
                torch.zeros(kv, dtype=torch.float16, device=device),
            )
        self.keys, self.values = cache
        """float16 [L, H_kv, max_seq_len, D]; finite numbers where nothing is cached yet."""
        self.position = torch.zeros(1, dtype=torch.int32, device=device)
        """int32 [1]: tokens in the cache before the step."""
        self.tokens = torch.zeros(8, dtype=torch.int32, device=device)
        """int32 [8]: the step's tokens, where they are not fed back."""
        self.out_tokens = torch.zeros(max_seq_len + 1, dtype=torch.int32, device=device)
        """int32 [max_seq_len + 1]: token of each position, as fed back."""
        self.logits = torch.zeros(8, c.vocab_size, dtype=torch.float32, device=device)
        bands = c.hidden_size // TILE_ROWS
        self._h = torch.zeros(2, 8, c.hidden_size, dtype=torch.float32, device=device)
        self._x = torch.zeros(2, 8, c.hidden_size, dtype=torch.float16, device=device)
        self._sums = torch.zeros(2, 8, bands, dtype=torch.float32, device=device)
        self._inverse = torch.zeros(2, 8, dtype=torch.float32, device=device)
        self._rope = torch.zeros(8, c.head_dim, dtype=torch.float32, device=device)
        q_rows = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        self._qkv = torch.zeros(8, q_rows, dtype=torch.float32, device=device)
        heads = _MAX_SPLITS * 8 * c.num_heads
        self._attention = torch.zeros(heads * c.head_dim, dtype=torch.float16, device=device)
        self._lse = torch.zeros(heads * 4, dtype=torch.float32, device=device)
        self._act = torch.zeros(8, c.intermediate_size, dtype=torch.float16, device=device)
        self.best = torch.full((1024, 8), NO_CANDIDATE, dtype=torch.int64, device=device)
        """int64 [programs, 8]: each head program's best token (`steps.candidate`)."""

    def step(
        self,
        plan: DecodePlan,
        *,
        feedback: bool = False,
        store_logits: bool = True,
        sampler: DeviceSampler | None = None,
    ) -> None:
        """Launch one step of plan.num_tokens tokens.

        Reads `tokens` and `position`, or with `feedback` takes the last step's best token and
        first moves `position` on by one. Writes keys, values, `logits` and `best`. A `sampler`
        (for one token, without `feedback`) then chooses the next token and writes it to `tokens`.

        Raises:
            What Triton raises where a kernel can't be compiled or launched
            (backends/device_errors.py names it).
        """
        launches = self.launches(
            plan, feedback=feedback, store_logits=store_logits, sampler=sampler
        )
        for launch in launches:
            launch.run()

    def launches(
        self,
        plan: DecodePlan,
        *,
        feedback: bool = False,
        store_logits: bool = True,
        sampler: DeviceSampler | None = None,
    ) -> Iterator[Launch]:
        """The launches of one `step`, in order."""
        store_logits = store_logits or sampler is not None
        yield from self._launches(plan, feedback=feedback, store_logits=store_logits)
        if sampler is not None:
            yield sampler.launch(
                self.logits, self.best, self.tokens, self.position, self._head_programs(plan),
                pdl=plan.pdl,
            )  # fmt: skip

    def _launches(
        self, plan: DecodePlan, *, feedback: bool, store_logits: bool
    ) -> Iterator[Launch]:
        w, c = self.weights, self.weights.config
        tokens = plan.num_tokens
        padded = _power_of_two(tokens)
        d, ff, q_size = c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim
        kt, kt_o, kt_ff = d // TILE_COLS, q_size // TILE_COLS, ff // TILE_COLS
        qkv_rows = q_size + 2 * c.num_kv_heads * c.head_dim
        bands = d // TILE_ROWS
        head_bands = -(-c.vocab_size // TILE_ROWS)
        head_programs = self._head_programs(plan)
        h, x, sums, inverse = self._h, self._x, self._sums, self._inverse
        words = x.view(torch.int32)

        def launch(num_warps: int) -> dict[str, Any]:
            options: dict[str, Any] = {"PDL": plan.pdl, "num_warps": num_warps, "num_stages": 1}
            if plan.pdl:
                options["launch_pdl"] = True
            return options

        def gemv(num_warps: int) -> dict[str, Any]:
            return {
                "M": tokens,
                "PB": bands,
                "STREAM": plan.stream,
                "ASM": plan.asm,
                "W": num_warps,
                **launch(num_warps),
            }

        # Residual stream and its norm's pieces: [0] enters attention, [1] the feed-forward part.
        yield _launch(
            phases.embed_kernel, (1 if feedback else tokens,),
            w.embedding, w.attention_gain[0], self.best, self.tokens, self.position,
            self.out_tokens, w.cos, w.sin, h[0], x[0], sums[0], inverse[1], self._rope,
            head_programs, c.rms_norm_eps, KT=kt, KB=_power_of_two(d),
            NK=_power_of_two(head_programs), D=c.head_dim, PB=bands, PBP=_power_of_two(bands),
            FEEDBACK=feedback, **launch(8),
        )  # fmt: skip

        def lines(matrix: Tensor, like: Tensor) -> int:
            """How many lines of a matrix to prefetch: as many as `like` has in every layer."""
            return min(matrix.nbytes, like.nbytes) // 128 if plan.prefetch else 0

        for i in range(c.num_layers):
            last = i + 1 == c.num_layers
            # What comes after the last layer is the head, as many lines as the next layer's.
            later = w.head if last else w.qkv[i + 1]
            after = w.head[w.qkv[i].numel() :] if last else w.output[i + 1]
            yield _launch(
                phases.qkv_kernel, (qkv_rows // TILE_ROWS,),
                w.qkv[i], words[0], sums[0], inverse[1], inverse[0], self._qkv, w.gate_up[i],
                c.rms_norm_eps, N=qkv_rows, KT=kt, NEXT=lines(w.gate_up[i], w.gate_up[i]),
                MP=padded, **gemv(plan.warps_qkv),
            )  # fmt: skip
            attention, num_parts = self._attention_launch(i, plan, launch(plan.warps_attention))
            yield attention
            yield _launch(
                phases.output_kernel, (bands,),
                w.output[i], self._attention.view(torch.int32), self._lse, h[0], h[1],
                w.feed_forward_gain[i], inverse[0], x[1], sums[1], later, N=d, KT=kt_o,
                NEXT=lines(later, w.qkv[i]), MP=padded, H=c.num_heads, D=c.head_dim, S=num_parts,
                **gemv(plan.warps_output),
            )  # fmt: skip
            gate_bands = plan.bands_gate_up
            yield _launch(
                phases.gate_up_kernel, (ff // 8 // gate_bands,),
                w.gate_up[i], words[1], sums[1], inverse[0], inverse[1], self._act, after,
                c.rms_norm_eps, F=ff, KT=kt, NB=gate_bands, NEXT=lines(after, w.output[i]),
                MP=padded, **gemv(plan.warps_gate_up),
            )  # fmt: skip
            yield _launch(
                phases.feed_forward_kernel, (bands,),
                w.down[i], self._act.view(torch.int32), h[1], h[0],
                w.final_gain if last else w.attention_gain[i + 1], inverse[1], x[0], sums[0], N=d,
                KT=kt_ff, MP=padded, **gemv(plan.warps_down),
            )  # fmt: skip
        yield _launch(
            phases.head_kernel, (head_programs,),
            w.head, words[0], sums[0], inverse[1], self.logits, self.best,
            c.rms_norm_eps, head_bands, V=c.vocab_size, KT=kt, STORE=store_logits,
            **gemv(plan.warps_head),
        )  # fmt: skip

    def _head_programs(self, plan: DecodePlan) -> int:
        return -(-self.weights.config.vocab_size // (TILE_ROWS * plan.warps_head))

    def _attention_launch(
        self, layer: int, plan: DecodePlan, launch: dict[str, Any]
    ) -> tuple[Launch, int]:
        """(one layer's attention, the number of partial outputs it leaves)."""
        w, c = self.weights, self.weights.config
        group = _power_of_two(c.num_heads // c.num_kv_heads)
        query_rows = max(group, plan.warps_attention)
        num_parts = plan.num_splits
        if plan.num_tokens == 1:
            # Without assembly the parts of a program stay apart.
            num_parts = 1 + plan.num_splits * (1 if plan.asm else query_rows // group)
        if num_parts > _MAX_SPLITS:
            raise ConfigError(
                f"the plan cuts a head's positions into {num_parts} parts: {_MAX_SPLITS} at most"
            )
        buffers = (
            self._qkv, self.keys[layer], self.values[layer], self._rope, w.query_gain[layer],
            w.key_gain[layer], self._attention, self._lse, self.position, self.max_seq_len,
            c.rms_norm_eps,
        )  # fmt: skip
        shape: dict[str, Any] = {
            "H": c.num_heads,
            "HKV": c.num_kv_heads,
            "D": c.head_dim,
            "GP": group,
            "S": plan.num_splits,
            "QK_NORM": c.qk_norm,
        }
        if plan.num_tokens > 1:
            rows = max(16, _power_of_two(plan.num_tokens) * group)
            several = _launch(
                phases.attention_kernel, (c.num_kv_heads, plan.num_splits), *buffers,
                M=plan.num_tokens, RP=rows, P=plan.positions, **shape, **launch,
            )  # fmt: skip
            return several, num_parts
        one = _launch(
            phases.attention_one_kernel, (c.num_kv_heads, plan.num_splits + 1), *buffers[:-2],
            w.down[layer], *buffers[-2:], QH=query_rows, RL=512 // c.head_dim,
            NR=plan.rows_per_lane, NEXT=w.down[layer].nbytes // 128 if plan.prefetch else 0,
            ASM=plan.asm, W=plan.warps_attention, **shape, **launch,
        )  # fmt: skip
        return one, num_parts

    def capture(
        self,
        plan: DecodePlan,
        *,
        feedback: bool,
        num_steps: int = 1,
        store_logits: bool = False,
        sampler: DeviceSampler | None = None,
    ) -> Any:
        """Record `num_steps` steps in a CUDA graph; compiles on the way. Returns the graph.

        The caches and the position are left as they were but for the steps' own writes.
        """

        def steps(count: int) -> None:
            for _ in range(count):
                self.step(plan, feedback=feedback, store_logits=store_logits, sampler=sampler)

        return record(lambda: steps(1), self.position, lambda: steps(num_steps))

    def set_cache(self, keys: list[Tensor], values: list[Tensor], length: int) -> None:
        """Copy the first `length` positions of each layer's [H_kv, >= length, D] into the cache."""
        for i, (k, v) in enumerate(zip(keys, values, strict=True)):
            self.keys[i, :, :length] = k[:, :length]
            self.values[i, :, :length] = v[:, :length]
        self.position.fill_(length)
