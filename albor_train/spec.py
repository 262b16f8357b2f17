"""The spec: one YAML file from which a model can be made again.

`load_spec` checks every field and the sums between them (`check_spec`); `plan_lines` in plan.py
prints what would happen. Nothing here reads data, touches a GPU or writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sysconfig
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from albor_serve.config import Architecture, ModelConfig, RopeConfig
from albor_train.errors import SpecError

__all__ = [
    "DataSpec",
    "EvaluateSpec",
    "FilterSpec",
    "FimSpec",
    "FolderSource",
    "ModelSpec",
    "Spec",
    "TokenizerSpec",
    "TrainSpec",
    "content_hash",
    "load_spec",
]

Schedule = Literal["wsd", "cosine"]
Optimizer = Literal["muon", "adamw"]
AttentionKind = Literal["causal", "document_mask", "document_flex", "document_varlen"]
SdpaBackend = Literal["any", "cudnn", "flash"]
SpanKind = Literal["rest_of_line", "lines", "block", "random"]


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A folder of Python files on this machine, taken as one project."""

    path: str
    project: str
    licence: str
    """SPDX name; it must be permissive."""
    version: str = "local"
    exclude: tuple[str, ...] = ()
    """Folders left out, by name."""


@dataclass(frozen=True, slots=True)
class FilterSpec:
    """Which files are worth learning from. Sizes in bytes, shares 0 to 1."""

    min_bytes: int = 200
    max_bytes: int = 400_000
    max_line_len: int = 1000
    max_mean_line_len: float = 100.0
    min_letters: float = 0.25
    """Share of letters among all characters."""
    min_entropy: float = 3.0
    max_entropy: float = 6.0
    """Bits for each character, over the file's own distribution."""
    needs_definition: bool = True
    """Keep only files that define a function or a class."""
    max_test_share: float = 1.0
    """Most of a project's kept bytes that may come from its tests."""


@dataclass(frozen=True, slots=True)
class DataSpec:
    """Where the text comes from and how it is cleaned."""

    lock: str = ""
    """YAML file of pinned packages (see sources.py), relative to the spec; empty for none."""
    folders: tuple[FolderSource, ...] = ()
    held_out: tuple[str, ...] = ()
    """Projects kept for validation; none of their text is trained on."""
    evaluation: str = ""
    """Folder of evaluation sets to decontaminate against, relative to the spec; empty for none."""
    filters: FilterSpec = field(default_factory=FilterSpec)
    near_duplicate: float = 0.7
    """Drop a file whose MinHash similarity with a kept one reaches this; 1 drops only copies."""
    ngram_len: int = 13
    """Words in a row shared with an evaluation set that make a file contaminated."""
    min_name_len: int = 12
    """Function names of evaluation sets at least this long also mark a file."""


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """Byte-level BPE with Qwen2's pre-tokenizer."""

    vocab_size: int = 16_384
    sample_bytes: int = 200_000_000
    """Training text taken evenly from the corpus to learn the merges from."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shape of the decoder; see albor_serve.config.ModelConfig."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    architecture: Architecture = "qwen3"
    max_seq_len: int = 2048
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = True

    def config(self, vocab_size: int) -> ModelConfig:
        """The decoder's configuration for a vocabulary of this size."""
        return ModelConfig(
            architecture=self.architecture,
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_seq_len=self.max_seq_len,
            rms_norm_eps=self.rms_norm_eps,
            rope=RopeConfig(theta=self.rope_theta),
            qkv_bias=self.architecture == "qwen2",
            qk_norm=self.architecture == "qwen3",
            tie_embeddings=self.tie_embeddings,
            bos_token_id=0,
            eos_token_ids=(0,),
        )


@dataclass(frozen=True, slots=True)
class FimSpec:
    """Which documents are turned inside out, and how. Shares 0 to 1."""

    rate: float = 0.6
    """Share of chunks that become fill-in-the-middle examples."""
    spm_share: float = 0.7
    """Of those, the share with the suffix first (albor's template); the rest is PSM."""
    spans: dict[SpanKind, float] = field(
        default_factory=lambda: {"rest_of_line": 0.4, "lines": 0.25, "block": 0.15, "random": 0.2}
    )
    """Weights of the span shapes."""
    boundary_share: float = 0.1
    """Of the SPM examples, the share with a token boundary at the cursor."""
    context_share: float = 0.15
    """Share of chunks preceded by text of a related file of the same project."""
    chunk_chars: int = 5_600
    """Longest chunk of a file, in characters; files are cut at line starts."""


@dataclass(frozen=True, slots=True)
class TrainSpec:
    """The run. Lengths in tokens."""

    steps: int
    epochs: int
    batch_tokens: int
    """Tokens of one optimizer step over all devices."""
    micro_batch_rows: int
    """Rows of `sequence_len` tokens in one forward pass of one device."""
    sequence_len: int = 2048
    lr: float = 2.5e-3
    """Peak learning rate; Muon's updates are scaled to the size of AdamW's."""
    warmup_steps: int = 150
    schedule: Schedule = "wsd"
    decay_share: float = 0.55
    """WSD: last part of the run in which the rate falls linearly to `final_lr_share`."""
    final_lr_share: float = 0.0
    horizon: int = 0
    """Step at which the schedule ends; 0 means `steps`, and nothing else may be written down."""
    optimizer: Optimizer = "muon"
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    embedding_lr_scale: float = 1.0
    """Learning rate of embeddings, head and norms relative to `lr`."""
    max_grad_norm: float = 1.0
    zclip_z: float = 2.5
    """Gradient norms this many standard deviations above their mean are pulled back; 0 for off."""
    ema: float = 0.0
    """Decay of the averaged weights; 0 for none."""
    init_std: float = 0.02
    zero_init_outputs: bool = True
    """Start the projections back into the residual stream at zero."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    compile: bool = True
    attention: AttentionKind = "document_varlen"
    fused_projections: bool = False
    """One product for query, key and value and one for gate and up; checkpoints are the same."""
    own_kernels: bool = False
    """SwiGLU and heads by operators of ours; only with `fused_projections`."""
    fp8: bool = False
    """The blocks' forward products in eight bits, for speed; only with `fused_projections`."""
    sdpa: SdpaBackend = "any"
    """Library that computes `causal` attention; with "any" torch chooses."""
    loss_chunk_tokens: int = 8192
    """Rows of logits that exist at one time."""
    spike_factor: float = 2.0
    """Stop when the loss exceeds its running mean by this factor..."""
    spike_patience: int = 20
    """...for so many steps in a row."""
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    validate_every: int = 250
    validation_tokens: int = 1_000_000


@dataclass(frozen=True, slots=True)
class EvaluateSpec:
    """What is measured at the end."""

    held_out_tokens: int = 4_000_000
    fim_examples: int = 400
    """Held-out spans of each shape."""
    benchmarks: tuple[str, ...] = ("humaneval", "infilling-single-line", "mbpp")
    num_samples: int = 1
    temperature: float = 0.0


@dataclass(frozen=True, slots=True)
class Spec:
    """One artefact."""

    name: str
    seed: int
    data: DataSpec
    tokenizer: TokenizerSpec
    model: ModelSpec
    fim: FimSpec
    train: TrainSpec
    evaluate: EvaluateSpec = field(default_factory=EvaluateSpec)
    folder: str = field(default=".", metadata={"internal": True})
    """Where the spec's relative paths start from; not part of its hash."""

    @property
    def model_config(self) -> ModelConfig:
        """The decoder that is trained."""
        return self.model.config(self.tokenizer.vocab_size)

    def path(self, relative: str) -> Path:
        """A path of the spec, from its folder; "{stdlib}" is the running Python's library."""
        stdlib = sysconfig.get_paths()["stdlib"]
        return Path(self.folder) / relative.replace("{stdlib}", stdlib)

    def part_hash(self, *parts: str) -> str:
        """Hash of the named parts, for the artefacts that depend on them only."""
        return content_hash({part: to_plain(getattr(self, part)) for part in parts})

    @property
    def hash(self) -> str:
        """Hash of everything but `folder`."""
        names = [item.name for item in dataclasses.fields(self) if item.name != "folder"]
        return self.part_hash(*names)


def content_hash(value: object) -> str:
    """SHA-256 of a JSON-like value, the same whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def to_plain(value: Any) -> Any:
    """Dataclasses to dicts and tuples to lists, for hashing and for files."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def load_spec(path: Path) -> Spec:
    """Read and check a spec.

    Raises:
        SpecError: the file can't be read, has an unknown or missing field, a value of the wrong
            type, or sums that don't add up.
    """
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise SpecError(f"{path} is no readable YAML file: {reason}") from error
    if not isinstance(raw, dict):
        raise SpecError(f"{path} holds a {type(raw).__name__}: a spec is a mapping of fields")
    if "folder" in raw:
        raise SpecError(f"{path}: unknown field 'folder'")
    spec = _build(Spec, {**raw, "folder": str(path.parent)}, path.name)
    check_spec(spec)
    return spec


T = TypeVar("T")


def _build(cls: type[T], raw: object, where: str) -> T:
    """A dataclass from a mapping, each value checked against its annotation."""
    if not isinstance(raw, dict):
        raise SpecError(f"{where} is {raw!r}: it must be a mapping of fields")
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(str(key) for key in raw if key not in fields)
    if unknown:
        raise SpecError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(fields)}")
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, item in fields.items():
        if name in raw:
            values[name] = _value(hints[name], raw[name], f"{where}: {name}")
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise SpecError(f"{where}: field {name!r} is missing")
    return cls(**values)


def _value(hint: Any, raw: object, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, raw, where)
    if origin is Literal:
        if raw not in args:
            raise SpecError(f"{where} is {raw!r}: it must be one of {', '.join(map(str, args))}")
        return raw
    if origin is tuple:
        if not isinstance(raw, list):
            raise SpecError(f"{where} is {raw!r}: it must be a list")
        if args[-1] is Ellipsis:
            return tuple(_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(raw))
        if len(raw) != len(args):
            raise SpecError(f"{where} has {len(raw)} values: it must have {len(args)}")
        return tuple(_value(kind, item, where) for kind, item in zip(args, raw, strict=True))
    if origin is dict:
        if not isinstance(raw, dict):
            raise SpecError(f"{where} is {raw!r}: it must be a mapping")
        return {
            _value(args[0], key, where): _value(args[1], item, f"{where}.{key}")
            for key, item in raw.items()
        }
    if isinstance(hint, types.UnionType):
        raise SpecError(f"{where}: unions are not supported")
    # YAML 1.1 reads "1e-3" as text; a number is what was meant.
    if hint is float and isinstance(raw, (int, float, str)) and not isinstance(raw, bool):
        try:
            number = float(raw)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    elif isinstance(raw, hint) and not (hint is int and isinstance(raw, bool)):
        return raw
    raise SpecError(f"{where} is {raw!r}: it must be of type {hint.__name__}")


_SHARES = {
    "fim": ("rate", "spm_share", "boundary_share", "context_share"),
    "train": ("decay_share", "final_lr_share"),
}
_POSITIVE = {
    "train": (
        "steps",
        "epochs",
        "batch_tokens",
        "micro_batch_rows",
        "sequence_len",
        "lr",
        "max_grad_norm",
        "loss_chunk_tokens",
        "spike_patience",
        "checkpoint_every",
        "keep_checkpoints",
        "validate_every",
        "validation_tokens",
    ),
    "tokenizer": ("vocab_size", "sample_bytes"),
    "fim": ("chunk_chars",),
    "data": ("ngram_len", "min_name_len"),
}


def check_spec(spec: Spec) -> None:
    """The rules between fields that decide whether a run can do what it says.

    Raises:
        SpecError: naming the value, the rule and the remedy.
    """
    if not spec.name or any(c in spec.name for c in "/\\ \0") or spec.name.startswith("."):
        raise SpecError(f"name is {spec.name!r}: it becomes a folder, so use letters and dashes")
    for part, names in _POSITIVE.items():
        for name in names:
            value = getattr(getattr(spec, part), name)
            if value <= 0:
                raise SpecError(f"{part}.{name} is {value}: it must be positive")
    for part, names in _SHARES.items():
        for name in names:
            value = getattr(getattr(spec, part), name)
            if not 0 <= value <= 1:
                raise SpecError(f"{part}.{name} is {value}: it must be 0 to 1")
    if not spec.data.lock and not spec.data.folders:
        raise SpecError("data has neither lock nor folders: there is nothing to train on")
    if not 0 < spec.data.near_duplicate <= 1:
        raise SpecError(f"data.near_duplicate is {spec.data.near_duplicate}: it must be 0 to 1")
    if spec.fim.rate > 0 and sum(spec.fim.spans.values()) <= 0:
        raise SpecError("fim.spans has no positive weight: give at least one shape some")
    if not 512 <= spec.tokenizer.vocab_size <= 65_536:
        raise SpecError(
            f"tokenizer.vocab_size is {spec.tokenizer.vocab_size}: ids are stored in 16 bits and "
            f"bytes, specials and indentation need 512, so it must be 512 to 65536"
        )
    _ = spec.model_config  # raises ConfigError for a shape that cannot be
    _check_train(spec)


def _check_train(spec: Spec) -> None:
    train = spec.train
    if train.sequence_len > spec.model.max_seq_len:
        raise SpecError(
            f"train.sequence_len is {train.sequence_len}, but the model's max_seq_len is "
            f"{spec.model.max_seq_len}: raise the latter"
        )
    row_tokens = train.sequence_len * train.micro_batch_rows
    if train.batch_tokens % row_tokens:
        raise SpecError(
            f"train.batch_tokens is {train.batch_tokens}: it must be a multiple of "
            f"micro_batch_rows x sequence_len = {row_tokens}"
        )
    if train.horizon not in (0, train.steps):
        raise SpecError(
            f"train.horizon is {train.horizon}, but the run has {train.steps} steps: a schedule "
            f"must end where the run ends (leave horizon out)"
        )
    if train.warmup_steps > max(1, train.steps // 10):
        raise SpecError(
            f"train.warmup_steps is {train.warmup_steps}: it may be at most a tenth of "
            f"{train.steps} steps"
        )
    if train.warmup_steps < 0:
        raise SpecError(f"train.warmup_steps is {train.warmup_steps}: it can't be negative")
    decay_start = train.steps - round(train.decay_share * train.steps)
    if train.schedule == "wsd" and decay_start < train.warmup_steps:
        raise SpecError(
            f"train.decay_share is {train.decay_share}: the decay would begin at step "
            f"{decay_start}, before the warm-up ends at {train.warmup_steps}"
        )
    for name in ("own_kernels", "fp8"):
        if getattr(train, name) and not train.fused_projections:
            raise SpecError(f"train.{name} is true: it needs fused_projections, set that too")
    if train.sdpa != "any" and train.attention != "causal":
        raise SpecError(
            f"train.sdpa is {train.sdpa}: it chooses who computes causal attention, but "
            f"train.attention is {train.attention}"
        )
    if not 0 <= train.ema < 1:
        raise SpecError(f"train.ema is {train.ema}: it must be 0 to below 1")
    if train.spike_factor <= 1:
        raise SpecError(f"train.spike_factor is {train.spike_factor}: it must be above 1")


def check_epochs(train: TrainSpec, epoch_rows: int) -> None:
    """Whether the data lasts for the run: epochs x steps of one epoch >= steps.

    Args:
        train: the run.
        epoch_rows: packed rows of one epoch.

    Raises:
        SpecError: it doesn't.
    """
    rows = train.batch_tokens // train.sequence_len
    available = train.epochs * epoch_rows // rows
    if available < train.steps:
        raise SpecError(
            f"train.steps is {train.steps}, but {train.epochs} epochs of {epoch_rows} rows are "
            f"only {available} steps of {rows} rows: lower steps, or raise epochs or the data"
        )
