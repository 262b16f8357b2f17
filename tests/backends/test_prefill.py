"""Prompts in pieces: the same numbers as in one call, whatever the pieces."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from albor_serve.backends import prefill as prefill_module  # noqa: E402
from albor_serve.backends.prefill import Prefill  # noqa: E402
from albor_serve.config import ModelConfig  # noqa: E402
from albor_serve.errors import ConfigError  # noqa: E402
from albor_serve.model import Decoder, KVCache, load_decoder  # noqa: E402
from tests.fixtures_tiny import reader, tiny_model  # noqa: E402

ROOM = 72


class Pair:
    """Pieces into slots beside a cache of its own for each slot."""

    def __init__(self, architecture: str, sizes: tuple[int, ...]) -> None:
        config, weights = tiny_model(architecture, seed=5)  # type: ignore[arg-type]
        self.config: ModelConfig = config
        self.model: Decoder = load_decoder(config, reader(weights))
        shape = (2, config.num_layers, config.num_kv_heads, ROOM, config.head_dim)
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)
        self.prefill = Prefill(self.model, self.keys, self.values, sizes)
        self.plain = [KVCache.empty(config, ROOM) for _ in range(2)]
        self.rng = np.random.default_rng(0)

    def both(self, slot: int, num: int) -> None:
        """Append and compare logits and what the caches hold."""
        cache = self.plain[slot]
        tokens = [int(t) for t in self.rng.integers(0, self.config.vocab_size, num)]
        length = cache.length
        for at in range(0, num, step := self.prefill.sizes[-1]):
            assert self.prefill.piece_len(num - at) == min(step, num - at)
            self.prefill.run(slot, tokens[at : at + step], length + at)
        with torch.no_grad():
            want = self.model(torch.tensor([tokens]), cache=cache)[0, -1:]
        assert torch.allclose(self.prefill.logits, want, atol=2e-4)
        for layer in range(self.config.num_layers):
            for ours, theirs in ((self.keys, cache.keys), (self.values, cache.values)):
                end = cache.length
                got = ours[slot, layer, :, :end]
                assert torch.allclose(got, theirs[layer][0, :, :end], atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("sizes", [(4, 16), (64,), (1, 2, 3, 5)])
def test_pieces_give_what_one_call_gives(
    architecture: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill_module, "LEAST_EXTENT", 8)
    pair = Pair(architecture, sizes)
    for slot, num in ((0, 5), (1, 17), (0, 16), (1, 1), (0, 40), (1, 44), (0, 10)):
        pair.both(slot, num)
    assert [cache.length for cache in pair.plain] == [ROOM - 1, 62]
    pair.plain[0].length = 3  # rewound: what lay beyond is stale, not wrong
    pair.both(0, 21)
    pair.both(1, 9)
    assert pair.prefill.num_graphs == 0


def test_padding_touches_nothing_that_counts() -> None:
    pair = Pair("qwen3", (64,))
    pair.both(1, 30)
    before = pair.keys.clone()
    pair.both(0, 60)
    pair.prefill.run(0, [1, 2], 68)  # 64 rows, of which most have no place
    assert torch.equal(pair.keys[1], before[1])
    kept = pair.plain[0].keys[0][0, :, :60]
    assert torch.allclose(pair.keys[0, 0, :, :60], kept, atol=1e-4)
    assert torch.isfinite(pair.keys).all()
    assert torch.isfinite(pair.values).all()


def test_the_same_launches_serve_every_slot_and_position() -> None:
    """What is recorded once must depend on nothing that only the host knows."""
    pair = Pair("llama", (8,))
    seen = []
    compute = pair.prefill._compute

    def spy(size: int, extent: int) -> None:
        seen.append((size, extent))
        compute(size, extent)

    pair.prefill._compute = spy  # type: ignore[method-assign]
    for slot, num in itertools.product((0, 1), (3, 8, 5)):
        pair.both(slot, num)
    assert set(seen) == {(8, ROOM)}


@pytest.mark.parametrize(("num", "length"), [(0, 0), (17, 0), (16, ROOM - 16), (1, ROOM - 1)])
def test_a_piece_that_does_not_fit_is_refused(num: int, length: int) -> None:
    pair = Pair("llama", (4, 16))
    with pytest.raises(ConfigError, match="a piece of"):
        pair.prefill.run(0, [1] * num, length)


@pytest.mark.parametrize("sizes", [(), (8, 4), (4, 4), (0, 4)])
def test_sizes_must_ascend(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="must be above 0 and ascend"):
        Pair("llama", sizes)


@pytest.mark.gpu
def test_graphs_give_what_launches_give() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    config, weights = tiny_model("qwen3", seed=5)
    model = load_decoder(config, reader(weights), dtype=torch.float16, device="cuda")
    shape = (2, config.num_layers, config.num_kv_heads, 256, config.head_dim)
    results = []
    for is_recorded in (False, True):
        keys, values = (torch.zeros(shape, dtype=torch.float16, device="cuda") for _ in range(2))
        prefill = Prefill(model, keys, values, (16, 64))
        if is_recorded:
            prefill.capture()
            assert prefill.num_graphs == 2
        rows = []
        for slot, length, num in ((0, 0, 64), (1, 0, 20), (0, 64, 5), (1, 20, 64), (0, 69, 64)):
            prefill.run(slot, [(slot + length + i) % config.vocab_size for i in range(num)], length)
            rows.append(prefill.logits.cpu())
        results.append(torch.cat(rows))
    assert torch.equal(*results)
