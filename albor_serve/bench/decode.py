"""albor-bench decode: how fast tokens come, beside the peers, in one interleaved run."""

from __future__ import annotations

import contextlib
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from albor_serve.bench.load import LoadMeter
from albor_serve.bench.machine import Machine, read_bandwidth
from albor_serve.bench.peers import HTTP_SUFFIX, Peer, PeerOptions, Worker, open_peer
from albor_serve.checkpoint.gguf_header import GgufHeader, open_gguf_header

__all__ = ["DecodeSettings", "EngineFigures", "ModelFigures", "Stat", "measure_model"]

ROW_COUNTS: Final = (1, 2, 3, 4, 6, 8, 16, 32)
BARE: Final = "albor-backend"
"""The backend without the engine: always measured, for it alone tells the cost of k rows."""


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """What to measure."""

    prompt_len: int = 512
    num_new: int = 64
    repeats: int = 5
    threads: int = 1
    kinds: tuple[str, ...] = ("albor", "albor+drafts", "llama-server", "llama-cpp-python")
    llama_server: str | None = None
    """A llama-server program; None takes the one inside xllamacpp."""
    command: str = ""
    """What was typed, so that others can repeat it."""


@dataclass(frozen=True, slots=True)
class Stat:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Stat:
        """Of at least one value."""
        ranked = sorted(values)
        if len(ranked) == 1:
            return cls(ranked[0], ranked[0], ranked[0])
        low, median, high = statistics.quantiles(ranked, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(slots=True)
class EngineFigures:
    """One engine's results on one model."""

    kind: str
    load_s: float
    decode_ms: Stat
    prefill_tokens_per_s: Stat
    cold_first_token_ms: Stat
    cached_first_token_ms: Stat
    """A prompt whose all tokens but one are in the cache."""
    rss_bytes: int
    build: str = ""
    """Instruction sets that its llama.cpp was compiled for; "" where it doesn't tell."""
    idle_cores: float = 0.0
    """CPU time it used while others had their turn, over that time: engines that spin while they
    wait take it from the one that is measured."""


@dataclass(slots=True)
class ModelFigures:
    """All results on one model."""

    name: str
    file_bytes: int
    weight_bytes: int
    """Bytes that decoding one token reads."""
    cache_gb_per_s: float
    """Measured read bandwidth for a buffer of this size; above DRAM's if a cache holds it."""
    engines: list[EngineFigures] = field(default_factory=list)
    rows_ms: dict[int, float] = field(default_factory=dict)
    foreign_cores: Stat | None = None
    """CPU time that other programs took during a round, over its time; None where unknown."""

    def floor_ms(self, machine: Machine) -> float:
        """Least time a token can take: its weights read once, at the faster of both speeds."""
        best = max(self.cache_gb_per_s, machine.dram_gb_per_s)
        return self.weight_bytes / best / 1e6

    def figures(self, kind: str) -> EngineFigures | None:
        """Results of one engine, if it was measured."""
        return next((engine for engine in self.engines if engine.kind == kind), None)

    def ours(self, kind: str) -> EngineFigures | None:
        """What `kind` is compared with: albor, asked in the same way."""
        return self.figures("albor" + (HTTP_SUFFIX if kind.endswith(HTTP_SUFFIX) else ""))


def measure_model(
    path: Path,
    name: str,
    settings: DecodeSettings,
    progress: Callable[[str, float], None],
) -> ModelFigures:
    """Run all engines on one GGUF file, taking turns.

    Raises:
        AlborError: the file or an engine can't be used.
    """
    header = open_gguf_header(path)
    weight_bytes = sum(tensor.num_bytes for tensor in header.tensors.values())
    figures = ModelFigures(
        name=name,
        file_bytes=header.num_bytes,
        weight_bytes=weight_bytes,
        cache_gb_per_s=read_bandwidth(weight_bytes, settings.threads) / 1e9,
    )
    context = settings.prompt_len + settings.num_new + 64
    options = PeerOptions(
        context, settings.threads, Path(settings.llama_server) if settings.llama_server else None
    )
    with contextlib.ExitStack() as stack:
        peers: list[Peer] = []
        for at, kind in enumerate((BARE, *settings.kinds)):
            progress(f"{name}: loading {kind}", at / (len(settings.kinds) + 1))
            peers.append(stack.enter_context(open_peer(kind, path, options)))
        bare = peers[0]
        assert isinstance(bare, Worker)
        tokens = _prompt(bare, header, settings.prompt_len)
        for peer in peers:
            peer.generate(tokens, 8, fresh=True)  # warm-up
        samples: dict[str, list[_Round]] = {peer.kind: [] for peer in peers}
        meter = LoadMeter(peers)
        for repeat in range(settings.repeats):
            for peer in peers:
                progress(f"{name}: {peer.kind}", repeat / settings.repeats)
                with meter.turn(peer):
                    samples[peer.kind].append(_one_round(peer, tokens, settings))
        for peer in peers:
            figures.engines.append(_summary(peer, samples[peer.kind], len(tokens), meter))
        if meter.foreign_cores:
            figures.foreign_cores = Stat.of(meter.foreign_cores)
        progress(f"{name}: rows", 0.9)
        counts = [count for count in ROW_COUNTS if count < settings.num_new + 64]
        figures.rows_ms = bare.rows(counts, settings.prompt_len)
    return figures


def _prompt(bare: Worker, header: GgufHeader, prompt_len: int) -> list[int]:
    """Real code for a trained model, so that drafts are as good as in life; random ids for one
    with random weights, whose vocabulary has no words."""
    if not header.metadata.string("general.name", "").startswith("random-"):
        # This package's own source: code that no model was trained on.
        text = "".join(path.read_text() for path in sorted(Path(__file__).parent.glob("*.py")))
        tokens = bare.tokenize(text)
        if len(tokens) >= prompt_len:
            return tokens[:prompt_len]
    vocab_size = len(header.metadata.raw_strings("tokenizer.ggml.tokens"))
    rng = random.Random(0)
    return [rng.randrange(vocab_size // 4, vocab_size) for _ in range(prompt_len)]


@dataclass(frozen=True, slots=True)
class _Round:
    cold_first_token_ms: float
    decode_ms: float
    cached_first_token_ms: float
    """With all but one prompt token cached."""


def _one_round(peer: Peer, tokens: list[int], settings: DecodeSettings) -> _Round:
    run = peer.generate(tokens, settings.num_new, fresh=True)
    peer.generate(tokens[:-1], 1, fresh=False)
    cached = peer.generate(tokens, 1, fresh=False)
    return _Round(run.first_token_ms, run.decode_ms, cached.first_token_ms)


def _summary(
    peer: Peer, rounds: Sequence[_Round], prompt_len: int, meter: LoadMeter
) -> EngineFigures:
    cold = [each.cold_first_token_ms for each in rounds]
    return EngineFigures(
        kind=peer.kind,
        load_s=peer.load_s,
        decode_ms=Stat.of([each.decode_ms for each in rounds]),
        prefill_tokens_per_s=Stat.of([prompt_len * 1000 / ms for ms in cold]),
        cold_first_token_ms=Stat.of(cold),
        cached_first_token_ms=Stat.of([each.cached_first_token_ms for each in rounds]),
        rss_bytes=peer.rss_bytes(),
        build=peer.build,
        idle_cores=meter.idle_cores(peer),
    )
