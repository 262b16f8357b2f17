"""Peers of albor-bench gpu that run in torch: a plain compiled decode loop, and transformers.

The plain loop is what torch's own fast paths give: one token at a time, a static cache,
torch.compile with CUDA graphs (mode reduce-overhead), weights in bfloat16 or in 4 bits through
torch's built-in weight-only product. All weights are random: speed does not depend on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from albor_serve.bench.gpu import GpuJob
from albor_serve.bench.gpu_rows import GpuRow
from albor_serve.bench.gpu_timing import Put, attempt, device_us, host_us
from albor_serve.config import ModelConfig
from albor_serve.errors import ConfigError
from albor_serve.model import Decoder, rotate

__all__ = ["Int4Linear", "PlainLoop", "int4_groups", "measure_torch"]

GROUP: Final = 32
_INNER_TILES: Final = 8
_NEW: Final = 33


def measure_torch(engine: str, job: GpuJob, config: ModelConfig, put: Put) -> None:
    """Rows of "torch-bf16", "torch-int4" or "transformers".

    Raises:
        ConfigError: another name.
    """
    if engine in ("torch-bf16", "torch-int4"):
        with torch.inference_mode():
            _measure_loop(engine, job, config, put)
    elif engine == "transformers":
        _measure_transformers(job, config, put)
    else:
        raise ConfigError(f"no such engine: {engine}")


class Int4Linear(nn.Module):  # type: ignore[misc]
    """A product with weights of 4 bits in groups of 32, by torch's own CUDA kernel."""

    def __init__(self, weight: Tensor) -> None:
        """Pack `weight`, [N, K] on a GPU; N is a multiple of 8 and K of 128."""
        super().__init__()
        codes, scales, offsets = int4_groups(weight)
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
        packed = torch._convert_weight_to_int4pack(pairs, _INNER_TILES)
        self.register_buffer("packed", packed)
        both = torch.stack([scales, offsets], dim=-1).transpose(0, 1).contiguous()
        self.register_buffer("scales", both.to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N], bfloat16."""
        flat = x.reshape(-1, x.shape[-1])
        out = torch._weight_int4pack_mm(flat, self.packed, GROUP, self.scales)
        return out.reshape(*x.shape[:-1], -1)


def int4_groups(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 to 15, int32 [N, K], and for each group scale and offset, float32 [N, K / 32].

    A weight is (code - 8) * scale + offset.
    """
    groups = weight.float().reshape(weight.shape[0], -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / 15).clamp_min(1e-8)
    codes = ((groups - low[..., None]) / scales[..., None]).round().clamp(0, 15)
    return codes.to(torch.int32).reshape(weight.shape), scales, low + 8 * scales


class PlainLoop(nn.Module):  # type: ignore[misc]
    """One token in, the best next one out; positions and cache live in buffers.

    Not the decoder's own `hidden`, whose cache grows: compiled graphs want fixed shapes.
    """

    def __init__(
        self, config: ModelConfig, max_seq_len: int, dtype: torch.dtype, device: str, int4: bool
    ) -> None:
        super().__init__()
        self.config = config
        with torch.device(device):
            self.decoder = Decoder(config).to(dtype).eval().requires_grad_(False)
            kv = (config.num_layers, 1, config.num_kv_heads, max_seq_len, config.head_dim)
            self.register_buffer("keys", torch.zeros(kv, dtype=dtype))
            self.register_buffer("values", torch.zeros(kv, dtype=dtype))
            self.register_buffer("columns", torch.arange(max_seq_len))
            self.register_buffer("token", torch.zeros(1, 1, dtype=torch.int64))
            self.register_buffer("position", torch.zeros(1, dtype=torch.int64))
            cos, sin = self.decoder.rotations(self.columns, self.decoder.model.norm.weight)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        for name, parameter in self.decoder.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 1 / math.sqrt(parameter.shape[1]))
            elif not name.endswith("norm.weight"):
                parameter.zero_()
        head = self.decoder.model.embed_tokens if config.tie_embeddings else self.decoder.lm_head
        # Query, key and value in one product, and gate and up in another: the usual fusions.
        make: Callable[[Tensor], nn.Module] = Int4Linear if int4 else _plain
        layers = self.decoder.model.layers
        self.qkv = nn.ModuleList(
            make(torch.cat([getattr(e.self_attn, f"{n}_proj").weight for n in "qkv"]))
            for e in layers
        )
        self.output = nn.ModuleList(make(e.self_attn.o_proj.weight) for e in layers)
        self.gate_up = nn.ModuleList(
            make(torch.cat([e.mlp.gate_proj.weight, e.mlp.up_proj.weight])) for e in layers
        )
        self.down = nn.ModuleList(make(e.mlp.down_proj.weight) for e in layers)
        self.head = make(head.weight)

    def logits(self) -> Tensor:
        """Of the token in `token`, whose key and value are written at `position`. [1, 1, V]."""
        c = self.config
        at = self.position
        x = self.decoder.model.embed_tokens(self.token)
        cos, sin = self.cos.index_select(2, at), self.sin.index_select(2, at)
        mask = (self.columns <= at)[None, None, None]
        sizes = [n * c.head_dim for n in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
        for i, layer in enumerate(self.decoder.model.layers):
            parts = self.qkv[i](layer.input_layernorm(x)).split(sizes, dim=-1)
            q, k, v = (y.view(1, 1, -1, c.head_dim) for y in parts)
            if c.qk_norm:
                q, k = layer.self_attn.q_norm(q), layer.self_attn.k_norm(k)
            q, k = rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin)
            self.keys[i].index_copy_(2, at, k)
            self.values[i].index_copy_(2, at, v.transpose(1, 2))
            out = functional.scaled_dot_product_attention(
                q,
                self.keys[i],
                self.values[i],
                attn_mask=mask,
                enable_gqa=c.num_heads != c.num_kv_heads,
            )
            x = x + self.output[i](out.transpose(1, 2).reshape(1, 1, -1))
            gate, up = self.gate_up[i](layer.post_attention_layernorm(x)).chunk(2, dim=-1)
            x = x + self.down[i](functional.silu(gate) * up)
        return self.head(self.decoder.model.norm(x))

    def step(self) -> None:
        """One token: the best next one replaces `token`, and `position` moves on."""
        best = self.logits().argmax(-1)
        self.token.copy_(best)
        self.position.add_(1)


def _plain(weight: Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _measure_loop(engine: str, job: GpuJob, config: ModelConfig, put: Put) -> None:
    int4 = engine == "torch-int4"
    kind = "torch's int4 product, groups of 32, head too" if int4 else "bfloat16"
    for context in job.contexts:

        def row(context: int = context) -> GpuRow:
            torch._dynamo.reset()
            # A cache of just this length: the mask hides what is beyond, but it is read.
            loop = PlainLoop(config, context + 64, torch.bfloat16, "cuda", int4)
            step = torch.compile(loop.step, fullgraph=True, dynamic=False)
            for _ in range(2):
                step()
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                for _ in range(8):
                    step()

            def place() -> None:
                loop.position.fill_(context)

            us = device_us(graph.replay, job.repeats, place) / 8
            note = f"{kind}, torch.compile, CUDA graph of 8 tokens"
            return GpuRow(engine, "token, compiled, graph", context, us=us, note=note)

        attempt(put, row, GpuRow(engine, "token, compiled, graph", context))


def _measure_transformers(job: GpuJob, config: ModelConfig, put: Put) -> None:
    """`generate` with a static cache, which it compiles by itself: as its users call it."""
    import transformers

    kind = "qwen3" if config.qk_norm else "llama"
    theirs: Any = transformers.AutoConfig.for_model(
        kind,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_seq_len,
        tie_word_embeddings=config.tie_embeddings,
        # No token ends the text early.
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(theirs, dtype=torch.bfloat16)
    model = model.to("cuda").eval()
    version = f"transformers {transformers.__version__}, bfloat16, static cache"
    for context in job.contexts:

        def row(context: int = context) -> GpuRow:
            prompt = torch.randint(0, config.vocab_size, (1, context), device="cuda")

            def generate(count: int) -> None:
                options = {"do_sample": False, "cache_implementation": "static"}
                with torch.inference_mode():
                    out = model.generate(
                        prompt,
                        attention_mask=torch.ones_like(prompt),
                        max_new_tokens=count,
                        **options,
                    )
                torch.cuda.synchronize()
                if out.shape[1] != context + count:
                    raise ConfigError(f"{out.shape[1] - context} tokens came, not {count}")

            def nothing() -> None:
                return None

            # The longer one first: the shorter one then finds its cache and what was compiled.
            many = host_us(lambda: generate(_NEW), 5, nothing)
            one = host_us(lambda: generate(1), 5, nothing)
            us = (many - one) / (_NEW - 1)
            # Which devices and caches it compiles for is its own choice.
            is_compiled = getattr(model, "_compiled_call", None) is not None
            note = f"{version}, {'compiled' if is_compiled else 'not compiled'}"
            return GpuRow("transformers", "token, generate", context, us=us, note=note)

        attempt(put, row, GpuRow("transformers", "token, generate", context))
