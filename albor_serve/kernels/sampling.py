# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,assignment,misc,no-redef"
"""The next token, chosen on the device, so that decoding does not wait for the host.

The rules are those of `albor_serve.sampler`: repetition, frequency and presence penalties and
logit_bias, then temperature, top_k, top_p, min_p, then one draw. Tokens as likely as the last one
that top_k or top_p keeps are kept as well.

The draw is a race (Gumbel-max trick, Gumbel 1954): token i gets the score s_i / T - ln(e_i), e_i
exponentially distributed, and the highest wins. The noise is Philox (Salmon et al. 2011) of the
seed, the number of the draw and i: it depends on nothing else.

The device speaks to the host through two places in pinned host memory. `mailbox` int32
[max_new + 1]: the tokens in order, then -2 minus a reason; -1 where nothing has come yet. `cancel`
int32 [1]: not 0 asks the device to stop; it looks once a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from albor_serve.config import MAX_DEVICE_STOPS, DevicePlan
from albor_serve.errors import ConfigError
from albor_serve.kernels._triton import jit, tl
from albor_serve.kernels.launch import Launch
from albor_serve.kernels.steps import candidate, candidate_index

__all__ = [
    "BUDGET",
    "CANCELLED",
    "NOTHING_YET",
    "NOT_FINITE",
    "STOP_TOKEN",
    "DeviceSampler",
    "choose_kernel",
    "reference_probs",
]

STOP_TOKEN: Final = 1
"""Reason: the last token is a stop token."""
BUDGET: Final = 2
"""Reason: max_new_tokens have come."""
CANCELLED: Final = 3
"""Reason: the host asked for it; the token of that step is not in the mailbox."""
NOT_FINITE: Final = 4
"""Reason: no logit is a finite number, or one is NaN or infinite."""
NOTHING_YET: Final = -1

# Words of the control buffer; the first six are float32.
_TEMPERATURE, _TOP_P, _MIN_P, _REPETITION, _FREQUENCY, _PRESENCE = range(6)
_TOP_K, _SEED, _SEED_HIGH, _MAX_NEW, _ADJUSTS, _STATUS, _NUM_NEW = range(6, 13)
_STOPS: Final = 16
_WORDS: Final = _STOPS + MAX_DEVICE_STOPS
_BLOCK: Final = 8192
NUM_WARPS: Final = 16


def reference_probs(
    logits: Tensor, plan: DevicePlan, *, counts: Tensor | None = None, seen: Tensor | None = None
) -> Tensor:
    """The distribution that a token is drawn from: float64 [V]; one 1.0 if the plan is greedy.

    Args:
        logits: [V], any float type.
        plan: the rules.
        counts: int [V], how often each token was generated; None for never.
        seen: bool [V], which tokens the repetition penalty applies to besides generated ones.
    """
    rules = plan.sampling
    s = logits.double().clone()
    counts = torch.zeros(s.shape, dtype=torch.int64) if counts is None else counts
    present = counts > 0 if seen is None else (counts > 0) | seen
    repetition = rules.repetition_penalty
    s = torch.where(present, torch.where(s > 0, s / repetition, s * repetition), s)
    s = s - rules.frequency_penalty * counts - rules.presence_penalty * (counts > 0)
    for token_id, bias in rules.logit_bias:
        s[token_id] += bias
    s[list(plan.banned)] = -torch.inf
    if rules.is_greedy:
        probs = torch.zeros_like(s)
        probs[s.argmax()] = 1.0
        return probs
    if 0 < rules.top_k < s.numel():
        s = torch.where(s >= s.topk(rules.top_k).values[-1], s, -torch.inf)
    probs = (s / rules.temperature).softmax(0)
    if rules.top_p < 1.0:
        ranked = probs.sort(descending=True).values
        num_below = int((ranked.cumsum(0) < rules.top_p).sum())
        probs = torch.where(probs >= ranked[min(num_below, s.numel() - 1)], probs, 0.0)
    probs = torch.where(probs >= rules.min_p * probs.max(), probs, 0.0)
    return probs / probs.sum()


@jit()
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@jit()
def _order(x):
    """Int64 that sort as the float32 do."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@jit()
def _load_scores(scores_ptr, start, V: tl.constexpr, BLOCK: tl.constexpr):
    at = start + tl.arange(0, BLOCK)
    return tl.load(scores_ptr + at, mask=at < V, other=-float("inf"))


@jit()
def _weight_from(scores_ptr, key, best, inverse, COUNT: tl.constexpr, V: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """How many scores are not below `key`, or with COUNT false their unnormalised mass."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        s = _load_scores(scores_ptr, start, V, BLOCK)
        if COUNT:
            each = 1.0
        else:
            each = tl.exp((s - best) * inverse)
        total += tl.where((_order(s) >= key) & (s > -float("inf")), each, 0.0)
    return tl.sum(total, axis=0)


@jit()
def _threshold(scores_ptr, low, high, goal, best, inverse, COUNT: tl.constexpr, V: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """The largest key from low to high whose `_weight_from` reaches the goal, by bisection."""
    while low < high:
        middle = (low + high + 1) >> 1
        weight = _weight_from(scores_ptr, middle, best, inverse, COUNT, V, BLOCK)
        low = tl.where(weight >= goal, middle, low)
        # Fewer steps where a key between two scores is as good as the score itself.
        high = tl.where(weight > goal, high, tl.where(weight == goal, middle, middle - 1))
    return low


@jit()
def _adjust(logits_ptr, bias_ptr, counts_ptr, control_ptr, scores_ptr, V: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """Write the scores after penalties and bias; returns the best `candidate`."""
    repetition = _float(tl.load(control_ptr + 3))
    frequency = _float(tl.load(control_ptr + 4))
    presence = _float(tl.load(control_ptr + 5))
    adjusts = tl.load(control_ptr + 10)
    best = tl.full([BLOCK], -(1 << 63), tl.int64)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        ok = at < V
        s = tl.load(logits_ptr + at, mask=ok, other=-float("inf"))
        if adjusts != 0:
            word = tl.load(counts_ptr + at, mask=ok, other=0)
            penalised = tl.where(s > 0.0, s / repetition, s * repetition)
            s = tl.where(word != 0, penalised, s)
            s -= frequency * (word >> 1).to(tl.float32)
            s -= tl.where(word > 1, presence, 0.0)
            s += tl.load(bias_ptr + at, mask=ok, other=0.0)
        tl.store(scores_ptr + at, s, mask=ok)
        best = tl.maximum(best, tl.where(ok, candidate(s, at), -(1 << 63)))
    tl.debug_barrier()
    return tl.max(best, axis=0)


@jit()
def _draw(scores_ptr, control_ptr, best_key, draw, V: tl.constexpr, BLOCK: tl.constexpr):
    """The winner's `candidate` among the scores that the filters keep."""
    inverse = 1.0 / _float(tl.load(control_ptr))
    top_p = _float(tl.load(control_ptr + 1))
    min_p = _float(tl.load(control_ptr + 2))
    top_k = tl.load(control_ptr + 6)
    seed = tl.load(control_ptr + 7).to(tl.int64) & 0xFFFFFFFF
    seed |= tl.load(control_ptr + 8).to(tl.int64) << 32
    high = best_key >> 32
    bits = high.to(tl.int32)
    best = _float(bits ^ ((bits >> 31) & 0x7FFFFFFF))
    low = high * 0 - (1 << 31)
    if (top_k > 0) & (top_k < V):
        low = _threshold(scores_ptr, low, high, top_k.to(tl.float32), best, inverse, True, V,
                         BLOCK)  # fmt: skip
    if top_p < 1.0:
        total = _weight_from(scores_ptr, low, best, inverse, False, V, BLOCK)
        low = _threshold(scores_ptr, low, high, top_p * total, best, inverse, False, V, BLOCK)
    if min_p > 0.0:
        low = tl.maximum(low, _order(best + tl.log(min_p) / inverse))
        low = tl.minimum(low, high)
    winner = tl.full([BLOCK], -(1 << 63), tl.int64)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        s = _load_scores(scores_ptr, start, V, BLOCK)
        zero = (at * 0).to(tl.uint32)
        random, _b, _c, _d = tl.philox(seed, at.to(tl.uint32), zero + draw.to(tl.uint32), zero,
                                       zero)  # fmt: skip
        # Uniform in (0, 1], fine-grained near 0, where the winners are.
        u = tl.maximum((random >> 1).to(tl.float32) * (1.0 / (1 << 31)), 1.0 / (1 << 32))
        e = tl.where(u < 1.0e-3, u + 0.5 * u * u, -tl.log(tl.maximum(1.0 - u, 1.0e-9)))
        score = (s - best) * inverse - tl.log(e)
        kept = (_order(s) >= low) & (s > -float("inf"))
        winner = tl.maximum(winner, tl.where(kept, candidate(score, at), -(1 << 63)))
    return tl.max(winner, axis=0)


@jit()
def choose_kernel(logits_ptr, keys_ptr, bias_ptr, counts_ptr, scores_ptr, control_ptr, mailbox_ptr,
                  cancel_ptr, tokens_ptr, pos_ptr, num_keys, V: tl.constexpr, NK: tl.constexpr,
                  BLOCK: tl.constexpr, NS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Choose the next token and make it the next step's input; one program.

    Reads the head's logits [V] and keys [NK, 8]. While the status is 0: appends the token to the
    mailbox, counts it, writes tokens[0] and moves pos on by one. After the end it does nothing, so
    that steps which are queued already repeat the last one and harm nobody.
    """
    # Host memory is a microsecond away: ask early.
    cancelled = tl.load(cancel_ptr, volatile=True)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    status = tl.load(control_ptr + 11)
    num_new = tl.load(control_ptr + 12)
    if (status == 0) & (cancelled != 0):
        tl.store(control_ptr + 11, 3)
        tl.store(mailbox_ptr + num_new, -5)
    elif status == 0:
        greedy = (_float(tl.load(control_ptr)) == 0.0) | (tl.load(control_ptr + 6) == 1)
        adjusts = tl.load(control_ptr + 10)
        if greedy & (adjusts == 0):
            rows = tl.arange(0, NK)
            keys = tl.load(keys_ptr + rows * 8, mask=rows < num_keys, other=-(1 << 63))
            best = tl.max(keys, axis=0)
        else:
            best = _adjust(logits_ptr, bias_ptr, counts_ptr, control_ptr, scores_ptr, V, BLOCK)
        high = best >> 32
        if (high >= 0x7F800000) | (high <= -0x7F800001):
            tl.store(control_ptr + 11, 4)
            tl.store(mailbox_ptr + num_new, -6)
        else:
            if greedy == 0:
                best = _draw(scores_ptr, control_ptr, best, num_new, V, BLOCK)
            token = candidate_index(best)
            stops = tl.load(control_ptr + 16 + tl.arange(0, NS))
            is_stop = tl.max((stops == token).to(tl.int32), axis=0)
            if adjusts != 0:
                tl.store(counts_ptr + token, tl.load(counts_ptr + token) + 2)
            tl.store(tokens_ptr, token)
            tl.store(pos_ptr, tl.load(pos_ptr) + 1)
            tl.store(control_ptr + 12, num_new + 1)
            tl.store(mailbox_ptr + num_new, token)
            if is_stop != 0:
                tl.store(control_ptr + 11, 1)
                tl.store(mailbox_ptr + num_new + 1, -3)
            elif num_new + 1 >= tl.load(control_ptr + 9):
                tl.store(control_ptr + 11, 2)
                tl.store(mailbox_ptr + num_new + 1, -4)


@dataclass(slots=True)
class DeviceSampler:
    """Buffers of `choose_kernel` for one sequence, and its launcher.

    The device mutates them; `begin` and `ask_to_stop` are for the host.
    """

    vocab_size: int
    max_new_tokens: int
    device: torch.device
    mailbox: Tensor = field(init=False)
    """int32 [max_new_tokens + 1], in host memory that the device can reach."""
    cancel: Tensor = field(init=False)
    """int32 [1], in host memory that the device can reach."""
    _control: Tensor = field(init=False)
    _host_control: Tensor = field(init=False)
    _bias: Tensor = field(init=False)
    _counts: Tensor = field(init=False)
    _scores: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Allocate; raises what torch raises when memory is short."""
        pin = self.device.type == "cuda"
        size = self.vocab_size
        self.mailbox = torch.full((self.max_new_tokens + 1,), NOTHING_YET, dtype=torch.int32)
        self.cancel = torch.zeros(1, dtype=torch.int32)
        self._host_control = torch.zeros(_WORDS, dtype=torch.int32)
        if pin:
            self.mailbox = self.mailbox.pin_memory()
            self.cancel = self.cancel.pin_memory()
            self._host_control = self._host_control.pin_memory()
        self._control = torch.zeros(_WORDS, dtype=torch.int32, device=self.device)
        self._bias = torch.zeros(size, dtype=torch.float32, device=self.device)
        # Twice the count of generated tokens, plus 1 if the prompt has the token.
        self._counts = torch.zeros(size, dtype=torch.int32, device=self.device)
        self._scores = torch.zeros(size, dtype=torch.float32, device=self.device)

    def begin(self, plan: DevicePlan) -> None:
        """Take a plan for the steps that follow. Nothing of an earlier plan may still run.

        Raises:
            ConfigError: more tokens or stop tokens than there is room for.
        """
        if not 1 <= plan.max_new_tokens <= self.max_new_tokens:
            raise ConfigError(
                f"max_new_tokens is {plan.max_new_tokens}: the device decodes 1 to "
                f"{self.max_new_tokens} at once"
            )
        if len(plan.stop_token_ids) > MAX_DEVICE_STOPS:
            raise ConfigError(
                f"there are {len(plan.stop_token_ids)} stop tokens: the device looks for "
                f"{MAX_DEVICE_STOPS} at most"
            )
        rules = plan.sampling
        self.mailbox[: plan.max_new_tokens + 1] = NOTHING_YET
        self.cancel.zero_()
        words = self._host_control
        words.zero_()
        words[:6].view(torch.float32).copy_(
            torch.tensor([
                rules.temperature, rules.top_p, rules.min_p, rules.repetition_penalty,
                rules.frequency_penalty, rules.presence_penalty,
            ])
        )  # fmt: skip
        words[_TOP_K] = rules.top_k
        words[_SEED] = _signed(plan.seed)
        words[_SEED_HIGH] = _signed(plan.seed >> 32)
        words[_MAX_NEW] = plan.max_new_tokens
        words[_ADJUSTS] = int(plan.adjusts)
        words[_STOPS:] = -1
        stops = torch.tensor(plan.stop_token_ids, dtype=torch.int32)
        words[_STOPS : _STOPS + stops.numel()] = stops
        self._control.copy_(words, non_blocking=True)
        if plan.adjusts:
            self._bias.zero_()
            self._counts.zero_()
            if rules.repetition_penalty != 1.0:
                self._counts[self._indices(plan.prompt)] = 1
            for token_id, count in plan.counts:
                self._counts[token_id] += 2 * count
            biases = torch.tensor([b for _, b in rules.logit_bias], dtype=torch.float32)
            ids = self._indices([i for i, _ in rules.logit_bias])
            self._bias.index_add_(0, ids, biases.to(self.device))
            self._bias[self._indices(plan.banned)] = -torch.inf

    def _indices(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64).to(self.device)

    def ask_to_stop(self) -> None:
        """Make the next step end the run; from any thread."""
        self.cancel.fill_(1)

    def choose(
        self,
        logits: Tensor,
        keys: Tensor,
        tokens: Tensor,
        position: Tensor,
        num_keys: int,
        *,
        pdl: bool,
    ) -> None:
        """Launch `choose_kernel` after a step; see `launch`."""
        self.launch(logits, keys, tokens, position, num_keys, pdl=pdl).run()

    def launch(
        self,
        logits: Tensor,
        keys: Tensor,
        tokens: Tensor,
        position: Tensor,
        num_keys: int,
        *,
        pdl: bool,
    ) -> Launch:
        """`choose_kernel` for what a step leaves.

        Args:
            logits: float32 [8, V], row 0 counts.
            keys: int64 [programs, 8], the head's `candidate`s, of which `num_keys` rows count.
            tokens: int32 [8]; tokens[0] is written.
            position: int32 [1]; moved on by one.
        """
        arguments = (
            logits, keys, self._bias, self._counts, self._scores, self._control, self.mailbox,
            self.cancel, tokens, position, num_keys,
        )  # fmt: skip
        options: dict[str, Any] = {
            "V": self.vocab_size,
            "NK": 1 << (num_keys - 1).bit_length(),
            "BLOCK": min(_BLOCK, 1 << (self.vocab_size - 1).bit_length()),
            "NS": MAX_DEVICE_STOPS,
            "PDL": pdl,
            "num_warps": NUM_WARPS,
            "num_stages": 1,
        }
        if pdl:
            options["launch_pdl"] = True
        return Launch(choose_kernel, (1,), arguments, options)


def _signed(word: int) -> int:
    """The low 32 bits as a signed number."""
    return (word & 0xFFFFFFFF) - ((word & 0x80000000) << 1)
