"""A GPU by torch on the CPU: what the backend asks of decoder, graphs and sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from albor_serve.config import DevicePlan, ModelConfig
from albor_serve.kernels.decoder import DecodePlan
from albor_serve.kernels.sampling import DeviceSampler
from albor_serve.kernels.weights import DecodeWeights
from albor_serve.model import Decoder, KVCache


class Graph:
    """Steps that were recorded; counts how often they ran."""

    def __init__(self, plan: DecodePlan, run: Callable[[], None]) -> None:
        self.plan, self._run, self.num_replays = plan, run, 0

    def replay(self) -> None:
        self.num_replays += 1
        self._run()


class GreedySampler(DeviceSampler):
    """The best token, with `choose_kernel`'s words in the mailbox."""

    __slots__ = ("is_over", "num_new", "plan")

    def begin(self, plan: DevicePlan) -> None:
        DeviceSampler.begin(self, plan)
        self.plan, self.num_new, self.is_over = plan, 0, False

    def choose(
        self, logits: Tensor, keys: Tensor, tokens: Tensor, position: Tensor, *_: int, **__: Any
    ) -> None:
        if self.is_over:
            return
        if int(self.cancel[0]):
            self.mailbox[self.num_new] = -5
            self.is_over = True
            return
        token = int(logits[0].argmax())
        tokens[0] = token
        position += 1
        self.mailbox[self.num_new] = token
        self.num_new += 1
        is_stop = token in self.plan.stop_token_ids
        if is_stop or self.num_new == self.plan.max_new_tokens:
            self.is_over = True
            self.mailbox[self.num_new] = -3 if is_stop else -4


class TorchDecoder:
    """`GpuDecoder` by the plain model: the same buffers, and padded rows are written, too."""

    def __init__(
        self, model: Decoder, weights: DecodeWeights, cache: tuple[Tensor, Tensor]
    ) -> None:
        c: ModelConfig = weights.config
        self.weights = weights
        self.keys, self.values = cache
        self.position = torch.zeros(1, dtype=torch.int32)
        self.tokens = torch.zeros(8, dtype=torch.int32)
        self.logits = torch.zeros(8, c.vocab_size)
        self.best = torch.zeros(1, 8, dtype=torch.int64)
        self.graphs: list[Graph] = []
        self.fault: Exception | None = None
        """Raised by the next step."""
        self._model = model

    def step(self, plan: DecodePlan, *, sampler: DeviceSampler | None = None) -> None:
        if self.fault is not None:
            raise self.fault
        layers = range(len(self.keys))
        cache = KVCache(
            [self.keys[i][None] for i in layers],
            [self.values[i][None] for i in layers],
            int(self.position),
        )
        tokens = self.tokens[: plan.num_tokens].long()[None]
        with torch.inference_mode():
            hidden = self._model.hidden(tokens, cache=cache)
            self.logits[: plan.num_tokens] = self._model.logits(hidden)[0].float()
        if sampler is not None:
            sampler.choose(self.logits, self.best, self.tokens, self.position, 1, pdl=False)

    def launches(self, *_: object, **__: object) -> Iterator[Any]:
        """Nothing has to be compiled."""
        return iter(())

    def capture(
        self,
        plan: DecodePlan,
        *,
        feedback: bool,
        store_logits: bool = False,
        sampler: DeviceSampler | None = None,
    ) -> Graph:
        assert not feedback
        assert store_logits or sampler is not None
        graph = Graph(plan, lambda: self.step(plan, sampler=sampler))
        self.graphs.append(graph)
        return graph
