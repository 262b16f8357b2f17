"""The GPU backend's own work, with torch on the CPU in the place of kernels and graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from albor_serve.backends import cuda  # noqa: E402
from albor_serve.backends.base import Aborted, ExtendStep  # noqa: E402
from albor_serve.backends.cuda import CudaBackend  # noqa: E402
from albor_serve.backends.torch_ref import TorchReferenceBackend  # noqa: E402
from albor_serve.bench.shapes import shape_gguf  # noqa: E402
from albor_serve.checkpoint.gguf import open_gguf_checkpoint  # noqa: E402
from albor_serve.config import DevicePlan, ModelConfig, SamplingParams  # noqa: E402
from albor_serve.errors import BackendError, ConfigError  # noqa: E402
from albor_serve.kernels.synthetic import RandomModel  # noqa: E402
from albor_serve.model import load_decoder  # noqa: E402
from tests.backends.cuda_rules import check  # noqa: E402
from tests.backends.fake_gpu import GreedySampler, TorchDecoder  # noqa: E402
from tests.fixtures_tiny import save_gguf, tiny_model  # noqa: E402

SHAPE = ModelConfig("qwen3", 64, 128, 128, 2, 2, 1, 64, 400, qk_norm=True, tie_embeddings=True)
GREEDY = SamplingParams(temperature=0.0)

Make = Callable[..., CudaBackend]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[TorchDecoder]:
    """The decoders that backends made from now on have, one for each slot."""
    made: list[TorchDecoder] = []

    def decoder(weights: Any, room: int, cache: Any) -> TorchDecoder:
        model = load_decoder(weights.config, RandomModel(weights.config).read, dtype=torch.float16)
        made.append(TorchDecoder(model, weights, cache))
        return made[-1]

    monkeypatch.setattr(cuda, "GpuDecoder", decoder)
    monkeypatch.setattr(cuda, "DeviceSampler", GreedySampler)
    monkeypatch.setattr(cuda, "INTERPRET", False)
    # It compiles and records, for which a device is needed.
    monkeypatch.setattr(CudaBackend, "_warm_up", lambda *_: None)
    return made


@pytest.fixture
def make(fakes: list[TorchDecoder]) -> Iterator[Make]:
    opened: list[CudaBackend] = []

    def start(num_slots: int = 1, max_seq_len: int = 300, **options: Any) -> CudaBackend:
        model = RandomModel(SHAPE)
        backend = CudaBackend(
            SHAPE, model.q4_rows, model.read, num_slots, max_seq_len, device="cpu", **options
        )
        backend._most_by_kernels = cuda.MOST_BY_KERNELS  # as on a GPU
        opened.append(backend)
        return backend

    yield start
    for backend in opened:
        backend.close()


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, SHAPE.vocab_size, count)]


def test_the_rules_hold(fakes: list[TorchDecoder]) -> None:
    check("cpu")


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 17, 256, 257, 299])
@pytest.mark.parametrize("logits_for", ["all", "last", "none"])
def test_prompts_of_any_length_have_the_logits_of_the_reference(
    make: Make, count: int, logits_for: Any
) -> None:
    ours = make()
    plain = TorchReferenceBackend(SHAPE, RandomModel(SHAPE).read, 1, 300)
    for part in (tokens(count), tokens(1, seed=1)):
        step = ExtendStep(0, part, logits_for)
        got, want = ours.extend([step])[0], plain.extend([step])[0]
        assert got.shape == want.shape
        assert not got.size or np.abs(got - want).max() < 0.03
    assert ours.length(0) == count + 1


def test_graphs_are_recorded_once_for_each_slot(make: Make, fakes: list[TorchDecoder]) -> None:
    backend = make(2)
    for slot in (0, 1):
        for _ in range(3):
            backend.extend([ExtendStep(slot, tokens(3), "all")])
        backend.decode(slot, 1, DevicePlan(GREEDY, 2), lambda _: True)
        assert [graph.plan.num_tokens for graph in fakes[slot].graphs] == [4, 1]
        assert [graph.num_replays for graph in fakes[slot].graphs] == [3, 2]


def test_long_contexts_have_plans_that_share_them_out_among_more_programs(
    make: Make, fakes: list[TorchDecoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = make()
    monkeypatch.setattr(cuda, "LONG_CONTEXT", 20)
    used = {id(graph): graph.num_replays for graph in fakes[0].graphs}

    def plans() -> list[tuple[int, int]]:
        new = [g for g in fakes[0].graphs if g.num_replays > used.get(id(g), 0)]
        used.update({id(graph): graph.num_replays for graph in fakes[0].graphs})
        return sorted((g.plan.num_tokens, g.plan.num_splits) for g in new)

    backend.extend([ExtendStep(0, tokens(32), "none")])
    # Positions 0, 8 and 16, then 24, which is beyond.
    assert plans() == [(8, 8), (8, 16)]
    backend.decode(0, 1, DevicePlan(GREEDY, 1), lambda _: True)
    [(rows, splits)] = plans()
    backend.rewind(0, 4)
    backend.decode(0, 1, DevicePlan(GREEDY, 1), lambda _: True)
    assert plans() == [(rows, splits // 2)]


def test_an_abort_ends_a_prompt_between_its_parts_and_keeps_none_of_it(
    make: Make, fakes: list[TorchDecoder]
) -> None:
    backend = make()
    backend.extend([ExtendStep(0, tokens(5))])
    step, done = fakes[0].step, list[int]()

    def abort_in_the_second(*args: Any, **kwargs: Any) -> None:
        done.append(1)
        if len(done) == 2:
            backend.abort.set()
        step(*args, **kwargs)

    fakes[0].step = abort_in_the_second  # type: ignore[method-assign]
    with pytest.raises(Aborted):
        backend.extend([ExtendStep(0, tokens(40))])
    assert len(done) == 2
    assert backend.length(0) == 5
    backend.abort.clear()
    assert len(backend.extend([ExtendStep(0, tokens(40), "all")])[0]) == 40


def test_an_abort_while_decoding_keeps_the_tokens_that_were_told(make: Make) -> None:
    backend = make()
    backend.extend([ExtendStep(0, tokens(5))])
    told: list[int] = []

    def on_token(token: int) -> bool:
        told.append(token)
        if len(told) == 3:
            backend.abort.set()
        return True

    with pytest.raises(Aborted):
        backend.decode(0, 1, DevicePlan(GREEDY, 50), on_token)
    assert len(told) == 3
    assert backend.length(0) == 8
    with pytest.raises(Aborted):
        backend.decode(0, 1, DevicePlan(GREEDY, 5), on_token)
    backend.abort.clear()
    assert len(backend.decode(0, told[-1], DevicePlan(GREEDY, 5), lambda _: True)) == 5


def test_decoding_ends_at_a_stop_token_and_refuses_more_than_there_is_room_for(make: Make) -> None:
    backend = make(max_seq_len=20)
    backend.extend([ExtendStep(0, tokens(10))])
    new = backend.decode(0, 1, DevicePlan(GREEDY, 6), lambda _: True)
    backend.rewind(0, 10)
    plan = DevicePlan(GREEDY, 6, stop_token_ids=(new[2],))
    assert backend.decode(0, 1, plan, lambda _: True) == new[: new.index(new[2]) + 1]
    with pytest.raises(BackendError, match="has room for"):
        backend.decode(0, 1, DevicePlan(GREEDY, 11), lambda _: True)
    with pytest.raises(BackendError, match="no slot 3"):
        backend.decode(3, 1, DevicePlan(GREEDY, 1), lambda _: True)


def test_a_listener_that_fails_leaves_the_backend_usable(make: Make) -> None:
    backend = make()
    backend.extend([ExtendStep(0, tokens(5))])

    def fail(_token: int) -> bool:
        raise KeyError("listener")

    with pytest.raises(KeyError):
        backend.decode(0, 1, DevicePlan(GREEDY, 9), fail)
    assert backend.length(0) == 6
    assert len(backend.decode(0, 1, DevicePlan(GREEDY, 9), lambda _: True)) == 9


def test_memory_that_runs_out_in_a_request_does_not_end_the_backend(
    make: Make, fakes: list[TorchDecoder]
) -> None:
    backend = make()
    fakes[0].fault = torch.cuda.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(BackendError, match="lower --slots or --ctx"):
        backend.extend([ExtendStep(0, [1])])
    fakes[0].fault = None
    assert backend.length(0) == 0
    assert len(backend.extend([ExtendStep(0, [1])])[0]) == 1


def test_no_tokens_no_rows_and_a_fork_onto_itself(make: Make) -> None:
    backend = make()
    assert backend.extend([ExtendStep(0, [], "all")])[0].shape == (0, SHAPE.vocab_size)
    backend.extend([ExtendStep(0, tokens(9))])
    backend.fork(0, 0, 4)
    assert backend.length(0) == 4
    assert backend.decode_weights.config is SHAPE
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        _ = backend.decode_weights


def test_sizes_out_of_range_are_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match="num_slots is 65"):
        make(65)
    with pytest.raises(ConfigError, match="max_seq_len is 0"):
        make(1, 0)


def test_a_file_in_4_bits_is_read_as_the_reference_reads_it(
    tmp_path: Path, fakes: list[TorchDecoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnCpu(CudaBackend):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs, device="cpu")

    config = ModelConfig("llama", 300, 128, 128, 1, 2, 1, 64, 64, tie_embeddings=True)
    checkpoint = open_gguf_checkpoint(shape_gguf("small", config, tmp_path))
    model = load_decoder(config, checkpoint.read, dtype=torch.float16)
    monkeypatch.setattr(cuda, "GpuDecoder", lambda w, room, cache: TorchDecoder(model, w, cache))
    ours = OnCpu.from_gguf(checkpoint, 1, 40)
    plain = TorchReferenceBackend(config, checkpoint.read, 1, 40)
    for count in (20, 3):
        step = ExtendStep(0, tokens(count), "all")
        got, want = ours.extend([step])[0], plain.extend([step])[0]
        assert np.abs(got - want).max() < 0.03
    assert ours.info.weight_bytes > 0
    ours.close()


def test_files_that_are_not_in_4_bits_are_told_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "HAVE_TRITON", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    config = ModelConfig("llama", 300, 128, 128, 1, 2, 1, 64, 64, tie_embeddings=True)
    checkpoint = open_gguf_checkpoint(shape_gguf("good", config, tmp_path))
    assert cuda.unsupported(checkpoint) is None
    sizes = {"hidden_size": 128, "num_heads": 2, "num_kv_heads": 1, "head_dim": 64}
    path = save_gguf(tmp_path / "f32.gguf", *tiny_model("llama", **sizes))
    assert cuda.unsupported(open_gguf_checkpoint(path)) == "its matrices are F32, not Q4_0"
    path = save_gguf(tmp_path / "tiny.gguf", *tiny_model("llama"))
    assert "multiple of 128" in (cuda.unsupported(open_gguf_checkpoint(path)) or "")
    monkeypatch.setattr(
        type(checkpoint), "tensor_format", lambda _, name: "Q8_0" if "embed" in name else "Q4_0"
    )
    assert cuda.unsupported(checkpoint) == "its embedding is not Q4_0"
