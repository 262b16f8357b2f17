"""The training loop.

Weights live twice: in float32, where the optimizer changes them, and in the compute dtype, where
the model reads them. Gradients of all micro-batches are summed in float32, over processes too,
and each is scaled by the step's number of targets, so the sum does not depend on how a batch is
cut up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from albor_serve.config import ModelConfig
from albor_serve.model import Decoder
from albor_train.artefact import write_json
from albor_train.attention import attention_for, prepare_mask, sdpa_by
from albor_train.batches import Batch, RowStream
from albor_train.errors import DivergedError, TrainingError
from albor_train.fused import FusedDecoder, by_original_name
from albor_train.loss import chunk_loss, chunked_cross_entropy
from albor_train.optim import GradientClipper, Optimizer, learning_rate
from albor_train.runs import (
    Log,
    TrainingState,
    latest_checkpoint,
    load_state,
    save_state,
)
from albor_train.spec import AttentionKind, Spec, TrainSpec, to_plain
from albor_train.world import World, proportional_shares

__all__ = [
    "StepRecord",
    "Trainer",
    "flops_per_token",
    "initial_weights",
    "peak_flops",
    "validation_loss",
]

PEAK_FLOPS: Final = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}
"""Dense bf16 peak by a part of the device's name."""

_DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did; a line of the log."""

    step: int
    """From 0."""
    loss: float
    """Mean nats for each target token."""
    lr: float
    """The rate that was applied."""
    grad_norm: float
    clipped_norm: float
    tokens: int
    """Targets learned from so far, this run's earlier parts included."""
    row: int
    """Rows consumed so far: the data position."""
    seconds: float
    tokens_per_s: float
    mfu: float
    """Share of the devices' peak; 0 where the peak is not known."""
    memory_bytes: int
    """Peak of the device's allocator; 0 on a CPU."""


def initial_weights(config: ModelConfig, train: TrainSpec, seed: int) -> dict[str, Tensor]:
    """Fresh float32 weights on the CPU, the same for a seed wherever they go.

    Normal with `init_std`; norms one; biases zero; with `zero_init_outputs`, the projections into
    the residual stream zero, so that each block starts as the identity.
    """
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Decoder(config).named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            weights[name] = torch.ones(shape)
        elif name.endswith(".bias"):
            weights[name] = torch.zeros(shape)
        else:
            weight = torch.randn(shape, generator=generator) * train.init_std
            if train.zero_init_outputs and name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
            weights[name] = weight
    return weights


def flops_per_token(config: ModelConfig) -> float:
    """Floating-point operations of forward and backward for each token, attention left out.

    Six for each weight that is multiplied; the embedding look-up is not.
    """
    d = config.hidden_size
    matmul = config.num_parameters - (0 if config.tie_embeddings else config.vocab_size * d)
    return 6.0 * matmul


class Trainer:
    """One run. Owns weights, optimizer and log; `run` advances it.

    Resumes from the newest checkpoint of `run_folder` if there is one.
    """

    def __init__(
        self,
        spec: Spec,
        stream: RowStream,
        tokenizer: Path,
        run_folder: Path,
        world: World,
        *,
        validation: Mapping[str, RowStream] | None = None,
        balance: bool = False,
        on_step: Callable[[StepRecord], None] | None = None,
        compile_mode: str | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            stream: training rows.
            tokenizer: folder whose tokenizer goes into checkpoints.
            validation: rows to measure the loss on, by name.
            balance: give faster processes more micro-batches.
            on_step: called on the first process after each step.
            compile_mode: torch.compile's mode where the spec compiles.

        Raises:
            TrainingError: the folder holds another spec's run, or its packs are others.
            SpecError: the data does not last for the steps.
        """
        self._spec, self._train = spec, spec.train
        self._stream, self._tokenizer, self._run = stream, tokenizer, run_folder
        self._world, self._validation = world, dict(validation or {})
        self._balance, self._on_step = balance, on_step
        self._config = spec.model_config
        self._rows_per_step = self._train.batch_tokens // self._train.sequence_len
        if stream.sequence_len != self._train.sequence_len:
            raise TrainingError(
                f"the packs have rows of {stream.sequence_len} tokens, the spec asks for "
                f"{self._train.sequence_len}: pack again"
            )
        self.step = 0
        self._tokens_seen = 0
        self._loss_mean: float | None = None
        self._bad_steps = 0
        self._clipper = GradientClipper(self._train.max_grad_norm, self._train.zclip_z)
        weights = initial_weights(self._config, self._train, spec.seed)
        state = None
        checkpoint = latest_checkpoint(run_folder)
        if checkpoint is not None:
            state = load_state(checkpoint)
            self._check_same_run(state)
            # In the model's order: sums over parameters depend on it in their last bit.
            weights = {name: state.weights[name] for name in weights}
        self.weights = {name: tensor.to(world.device) for name, tensor in weights.items()}
        """The float32 weights, by Hugging Face name. The optimizer changes them in place."""
        self.optimizer = Optimizer(self.weights, self._train, over_rows=world.over_rows)
        """Its moments are part of a checkpoint."""
        self.ema = (
            {name: tensor.clone() for name, tensor in self.weights.items()}
            if self._train.ema > 0
            else {}
        )
        if state is not None:
            self._restore(state)
        self._model = _make_model(self._config, self._train, world.device)
        # One tensor under all gradients, so that processes sum them without gathering them first.
        self._flat_gradient, self._gradients = self._flat_tensors()
        # Gradients of a later micro-batch are widened first: adding lists of two dtypes is slow.
        self._flat_addend, self._addends = self._flat_gradient, self._gradients
        if self._train.dtype != "float32":
            self._flat_addend, self._addends = self._flat_tensors()
        self._publish()
        positions = torch.arange(self._train.sequence_len, device=world.device)
        like = self._model.model.embed_tokens.weight
        # Made once: they are the same in each pass.
        self._rotations = self._model.rotations(positions, like)
        self._hidden = _hidden_function(self._model, self._train.attention)
        self._chunk_loss = chunk_loss
        if self._train.compile:
            self._hidden = torch.compile(self._hidden, mode=compile_mode)
            self._chunk_loss = torch.compile(chunk_loss, mode=compile_mode)
        num_micro = self._rows_per_step // self._train.micro_batch_rows
        self._shares = proportional_shares(num_micro, [1.0] * world.size)
        self._peak = peak_flops(world.device) * world.size
        self._last_step = 0
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: tuple[tuple[int, int, int], Future[list[Batch]]] | None = None

    def run(
        self, *, stop_after: int | None = None, max_seconds: float | None = None
    ) -> list[StepRecord]:
        """Train to the end of the spec, or until a limit; then save a checkpoint.

        Args:
            stop_after: most steps to do now.
            max_seconds: begin no step after so long.

        Returns:
            A record of each step done now.

        Raises:
            DivergedError: loss or gradients are not finite, or the loss stays far above its mean.
                The last checkpoint is older than the trouble.
            DataError: the rows are used up.
        """
        began = time.perf_counter()
        last = self._train.steps
        if stop_after is not None:
            last = min(last, self.step + stop_after)
        log = None
        if self._world.is_first:
            self._run.mkdir(parents=True, exist_ok=True)
            write_json(self._run / "spec.json", {"hash": self._spec.hash, **to_plain(self._spec)})
            log = Log(self._run / "log.jsonl", self.step)
        records: list[StepRecord] = []
        self._last_step = last
        self._reader = ThreadPoolExecutor(1)
        try:
            while self.step < last:
                spent = time.perf_counter() - began
                # Every process must decide alike, so the first one's clock counts.
                if max_seconds is not None and self._world.gather(spent)[0] > max_seconds:
                    break
                record = self._one_step(log)
                records.append(record)
                if log is not None:
                    log.write({"event": "step", **asdict(record)})
                    if self._on_step is not None:
                        self._on_step(record)
                if self._validation and self.step % self._train.validate_every == 0:
                    self._validate(log)
                if self.step % self._train.checkpoint_every == 0:
                    self._save()
            if records and self._validation and self.step % self._train.validate_every:
                self._validate(log)
            if records and self.step % self._train.checkpoint_every:
                self._save()
        finally:
            self._reader.shutdown(wait=False, cancel_futures=True)
            self._reader = self._ahead = None
            if log is not None:
                log.close()
        return records

    def backward(self, step: int) -> tuple[float, int]:
        """Sum the gradients of a step's rows, all processes' included, into `gradients`.

        Returns:
            (mean loss, targets) of the step.
        """
        batches = self._batches_of(step)
        num_targets = round(sum(self._world.gather(sum(b.num_targets for b in batches))))
        attended = sum(self._world.gather(float(sum(b.num_attended for b in batches))))
        self._attended = attended
        total = torch.zeros((), dtype=torch.float32, device=self._world.device)
        parameters = dict(self._model.named_parameters())
        for number, batch in enumerate(batches):
            loss = self._loss(batch.to(self._world.device)) / max(1, num_targets)
            loss.backward()
            total += loss.detach()
            new = by_original_name({n: p.grad for n, p in parameters.items()}, self._config)
            self._add([new[name] for name in self._gradients], is_first=number == 0)
            for parameter in parameters.values():
                parameter.grad = None
        self._world.sum_([self._flat_gradient, total])
        return float(total), num_targets

    def _flat_tensors(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Zeros for all weights in one tensor, and views of it by the weights' names."""
        sizes = [t.numel() for t in self.weights.values()]
        flat = torch.zeros(sum(sizes), device=self._world.device)
        views = zip(self.weights.items(), flat.split(sizes), strict=True)
        return flat, {name: part.view_as(weight) for (name, weight), part in views}

    def _add(self, new: list[Tensor], *, is_first: bool) -> None:
        """Add a micro-batch's gradients to the step's; the first overwrites the last step's sums,
        which is a pass less than clearing them."""
        if is_first:
            torch._foreach_copy_(list(self._gradients.values()), new)
        elif self._flat_addend is self._flat_gradient:
            torch._foreach_add_(list(self._gradients.values()), new)
        else:
            torch._foreach_copy_(list(self._addends.values()), new)
            self._flat_gradient += self._flat_addend

    def _batches_of(self, step: int) -> list[Batch]:
        """This process's micro-batches of a step; the next step's are read meanwhile."""
        wanted = (step, self._shares[self._world.rank], sum(self._shares[: self._world.rank]))
        ahead, self._ahead = self._ahead, None
        batches = ahead[1].result() if ahead is not None and ahead[0] == wanted else None
        if batches is None:
            batches = self._read(*wanted)
        if step + 1 < self._last_step and self._reader is not None:
            following = (step + 1, *wanted[1:])
            self._ahead = (following, self._reader.submit(self._read, *following))
        return batches

    def _read(self, step: int, count: int, skip: int) -> list[Batch]:
        rows = self._train.micro_batch_rows
        first = step * self._rows_per_step + rows * skip
        return [self._stream.batch(first + number * rows, rows) for number in range(count)]

    @property
    def gradients(self) -> Mapping[str, Tensor]:
        """What `backward` summed last, float32."""
        return self._gradients

    def validate(self) -> dict[str, float]:
        """Mean loss in nats for each token, by name of the validation rows."""
        limit = self._train.validation_tokens
        return {
            name: validation_loss(self._loss, stream, limit, self._world, self._train)
            for name, stream in self._validation.items()
        }

    def _loss(self, batch: Batch) -> Tensor:
        """Sum of the losses of a batch on the device."""
        mask = prepare_mask(self._train.attention, batch.documents, self._world.device)
        with sdpa_by(self._train.sdpa, self._world.device):
            hidden = self._hidden(batch.tokens, mask, self._rotations)
        head = self._model.model.embed_tokens.weight
        if not self._config.tie_embeddings:
            head = self._model.lm_head.weight
        return chunked_cross_entropy(
            hidden.flatten(0, 1),
            head,
            batch.targets.flatten(),
            self._train.loss_chunk_tokens,
            self._chunk_loss,
        )

    def advance(self, rows_of_step: int, *, on_update: Callable[[float], None]) -> StepRecord:
        """One step on the rows of step `rows_of_step`, without log, validation or checkpoint.

        For measurements: `on_update` gets the milliseconds from the last gradient to new weights.
        The following step's rows are read meanwhile, as in a run.
        """
        self.step = rows_of_step
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1)
        rows_at_hand = len(self._stream) // self._rows_per_step
        self._last_step = min(rows_of_step + 2, rows_at_hand)
        return self._one_step(None, on_update)

    def _one_step(
        self, log: Log | None, on_update: Callable[[float], None] | None = None
    ) -> StepRecord:
        began = time.perf_counter()
        loss, num_targets = self.backward(self.step)
        compute_seconds = time.perf_counter() - began
        self._check_loss(loss, log)
        rate = learning_rate(self._train, self.step)
        norm, clipped = self._clip(log)
        self.optimizer.step(self._gradients, self.step, rate)
        if self.ema:
            names = list(self.ema)
            torch._foreach_lerp_(
                [self.ema[name] for name in names],
                [self.weights[name] for name in names],
                1 - self._train.ema,
            )
        self._publish()
        self.step += 1
        self._tokens_seen += num_targets
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        if on_update is not None:
            # `backward` ends by reading the loss, which waits for the device.
            on_update(1e3 * (seconds - compute_seconds))
        if self._balance and self.step % 20 == 0:
            mine = self._shares[self._world.rank] / compute_seconds
            self._shares = proportional_shares(sum(self._shares), self._world.gather(mine))
        row_tokens = self._rows_per_step * self._train.sequence_len
        flops = flops_per_token(self._config) * row_tokens
        width = self._config.num_heads * self._config.head_dim
        flops += 12.0 * self._config.num_layers * width * self._attended
        return StepRecord(
            step=self.step - 1,
            loss=loss,
            lr=rate,
            grad_norm=norm,
            clipped_norm=clipped,
            tokens=self._tokens_seen,
            row=self.step * self._rows_per_step,
            seconds=seconds,
            tokens_per_s=row_tokens / seconds,
            mfu=flops / seconds / self._peak if self._peak else 0.0,
            memory_bytes=_peak_memory(self._world.device),
        )

    def _clip(self, log: Log | None) -> tuple[float, float]:
        try:
            return self._clipper.clip(self._gradients)
        except DivergedError as error:
            self._note_end(log, str(error))
            raise

    def _check_loss(self, loss: float, log: Log | None) -> None:
        reason = ""
        if not math.isfinite(loss):
            reason = f"the loss of step {self.step} is {loss}"
        elif self._loss_mean is not None and self.step > self._train.warmup_steps:
            is_spike = loss > self._train.spike_factor * self._loss_mean
            self._bad_steps = self._bad_steps + 1 if is_spike else 0
            if self._bad_steps >= self._train.spike_patience:
                reason = (
                    f"the loss has been above {self._train.spike_factor:g} times its mean of "
                    f"{self._loss_mean:.3f} for {self._bad_steps} steps, up to step {self.step}"
                )
        if reason:
            self._note_end(log, reason)
            raise DivergedError(f"{reason}: lower train.lr or resume from an earlier checkpoint")
        if self._loss_mean is None:
            self._loss_mean = loss
        elif self._bad_steps == 0:
            self._loss_mean += 0.02 * (loss - self._loss_mean)

    def _note_end(self, log: Log | None, reason: str) -> None:
        if log is not None:
            log.write({"event": "stopped", "step": self.step, "reason": reason})

    def _validate(self, log: Log | None) -> None:
        losses = self.validate()
        if log is not None:
            log.write({"event": "validation", "step": self.step - 1, **losses})

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _publish(self) -> None:
        """Copy the float32 weights into the model."""
        parameters = by_original_name(dict(self._model.named_parameters()), self._config)
        torch._foreach_copy_(list(parameters.values()), [self.weights[name] for name in parameters])

    def _save(self) -> None:
        self._check_ranks()
        if self._world.is_first:
            facts = {
                "spec": self._spec.hash,
                "packs": self._stream.keys(self.step * self._rows_per_step),
                "tokens_seen": self._tokens_seen,
                "loss_mean": self._loss_mean,
                "bad_steps": self._bad_steps,
                "clipper": asdict(self._clipper),
                "rows_used": self.step * self._rows_per_step,
            }
            state = TrainingState(
                self.step,
                self.weights,
                self.optimizer.moments,
                self.ema,
                facts,
                torch.get_rng_state(),
            )
            keep = self._train.keep_checkpoints
            save_state(self._run, state, self._config, self._tokenizer, keep)
        self._world.wait()

    def _check_ranks(self) -> None:
        """Weights must be the same on every process."""
        mine = float(sum(t.double().sum() + t.double().abs().sum() for t in self.weights.values()))
        every = self._world.gather(mine)
        if any(value != every[0] for value in every):
            raise TrainingError(f"step {self.step}: the processes' weights differ: not saved")

    def _check_same_run(self, state: TrainingState) -> None:
        if state.facts["spec"] != self._spec.hash:
            raise TrainingError(f"{self._run} was begun with another spec: give another run folder")
        if self._stream.keys(state.step * self._rows_per_step) != list(state.facts["packs"]):
            raise TrainingError(
                f"{self._run} was begun with other data: give its packs first, in their order"
            )

    def _restore(self, state: TrainingState) -> None:
        facts = state.facts
        self.step = state.step
        self._tokens_seen = int(facts["tokens_seen"])
        self._loss_mean = facts["loss_mean"]
        self._bad_steps = int(facts["bad_steps"])
        self._clipper = GradientClipper(**facts["clipper"])
        for name, moment in self.optimizer.moments.items():
            moment.copy_(state.moments[name])
        for name, average in self.ema.items():
            average.copy_(state.ema[name])
        torch.set_rng_state(state.rng)


def validation_loss(
    loss: Callable[[Batch], Tensor],
    stream: RowStream,
    max_tokens: int,
    world: World,
    train: TrainSpec,
) -> float:
    """Mean loss over the first `max_tokens` of a stream, split over the processes."""
    rows = min(len(stream), max(1, max_tokens // stream.sequence_len))
    total, count = 0.0, 0
    with torch.no_grad():
        starts = range(0, rows, train.micro_batch_rows)
        for start in starts[world.rank :: world.size]:
            batch = stream.batch(start, min(train.micro_batch_rows, rows - start))
            total += float(loss(batch.to(world.device)))
            count += batch.num_targets
    total, count = sum(world.gather(total)), round(sum(world.gather(float(count))))
    return total / max(1, count)


def _make_model(config: ModelConfig, train: TrainSpec, device: torch.device) -> Decoder:
    with torch.device("meta"):
        model = (
            FusedDecoder(config, own_kernels=train.own_kernels, fp8=train.fp8)
            if train.fused_projections
            else Decoder(config)
        )
    model.to(_DTYPES[train.dtype])
    model.to_empty(device=device).requires_grad_()
    return model


Hidden = Callable[[Tensor, Any, tuple[Tensor, Tensor]], Tensor]


def _hidden_function(model: Decoder, kind: AttentionKind) -> Hidden:
    def hidden(tokens: Tensor, mask: Any, rotations: tuple[Tensor, Tensor]) -> Tensor:
        out: Tensor = model.hidden(tokens, attend=attention_for(kind, mask), rotations=rotations)
        return out

    return hidden


def peak_flops(device: torch.device) -> float:
    """Dense bfloat16 operations a second of a device; 0 where they are not known."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), 0.0)


def _peak_memory(device: torch.device) -> int:
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0
