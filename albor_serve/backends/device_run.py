"""The host's side of decoding on a device: keeps steps queued, collects tokens, ends the run.

Each step decodes one token, chooses the next and feeds it back without the host. The host keeps
`AHEAD` steps queued beyond the tokens that it has seen, so that the device never waits for it, and
reads tokens from the mailbox as the device writes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Final

from albor_serve.backends.device_errors import lost
from albor_serve.config import DevicePlan
from albor_serve.errors import BackendError
from albor_serve.kernels.sampling import NOT_FINITE, NOTHING_YET, DeviceSampler

__all__ = ["AHEAD", "DeviceRun"]

AHEAD: Final = 4
"""Steps queued beyond the last token seen: a step takes about as long as queueing one."""
_CHECK_EVERY_S: Final = 0.02
_FAILED: Final = -1
_PATIENCE_S: Final = 30.0
"""A step takes microseconds; first use of a graph may take longer."""


class DeviceRun:
    """One run of a sampler; iterate over it for the tokens, then call `stop`."""

    def __init__(
        self,
        sampler: DeviceSampler,
        step: Callable[[], None],
        is_aborted: Callable[[], bool],
        *,
        fault: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        sampler: chooses the tokens, as the last thing of each step.
        step: queues one step.
        is_aborted: looked at while waiting; ends the iteration.
        fault: raises if the device has failed; called while no token comes.
        """
        self._sampler = sampler
        self._step = step
        self._is_aborted = is_aborted
        self._fault = fault
        self._clock = clock
        self._max_new = 0
        self._stops: frozenset[int] = frozenset()
        self._end_is_near = False
        self._num_queued = 0
        self._num_seen = 0
        self._reason = 0
        self.was_aborted = False
        """Whether `is_aborted` ended the run."""

    def start(self, plan: DevicePlan) -> None:
        """Hand the plan to the device. Raises ConfigError if it does not fit."""
        self._sampler.begin(plan)
        self._max_new = plan.max_new_tokens
        self._stops = frozenset(plan.stop_token_ids)

    def __iter__(self) -> Iterator[int]:
        """The tokens, each as soon as it is seen.

        Raises:
            BackendError: its logits are not finite. DeviceLostError: the device stands still.
            What `fault` raises.
        """
        while not self._reason:
            while self._num_queued < min(self._num_seen + AHEAD, self._max_new):
                self._queue()
            word = self._wait()
            if word is None:
                self.was_aborted = True
                return
            if word < 0:
                self._end(word)
            else:
                self._see(word)
                yield word

    def stop(self) -> None:
        """End the run early if need be; returns once no step will write to the mailbox again.

        Returns at once if the device has failed.

        Raises:
            DeviceLostError: the device stands still. What `fault` raises.
        """
        if self._num_seen < self._num_queued:
            self._sampler.ask_to_stop()
        while not self._reason and (self._num_seen < self._num_queued or self._end_is_near):
            word = self._wait(until_done=True)
            if word is None or word < 0:
                self._end(word or 0)
            else:
                self._see(word)

    def _see(self, token: int) -> None:
        self._num_seen += 1
        # Then the device also writes why it ended; the mailbox may be used again only after that.
        self._end_is_near = token in self._stops or self._num_seen == self._max_new

    def _queue(self) -> None:
        self._step()
        self._num_queued += 1

    def _wait(self, *, until_done: bool = False) -> int | None:
        """The mailbox's next word; None if the run was aborted first."""
        mailbox, at = self._sampler.mailbox, self._num_seen
        started = checked = self._clock()
        while (word := int(mailbox[at])) == NOTHING_YET:
            if not until_done and self._is_aborted():
                return None
            now = self._clock()
            if now - checked > _CHECK_EVERY_S:
                self._check()
                checked = now
            if now - started > _PATIENCE_S:
                self._reason = _FAILED
                raise lost(f"it has not answered for {_PATIENCE_S:.0f} s")
        return None if self._is_aborted() and not until_done else word

    def _check(self) -> None:
        try:
            self._fault()
        except BaseException:
            self._reason = _FAILED
            raise

    def _end(self, word: int) -> None:
        self._reason = -2 - word
        if self._reason == NOT_FINITE:
            raise BackendError(
                "the model's logits are not finite numbers: the weights are damaged or the device "
                "computed wrongly; convert the checkpoint again or use another backend"
            )
