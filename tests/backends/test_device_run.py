"""The host's side of decoding on a device, with a device that is a few lines of Python."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest

torch = pytest.importorskip("torch")

from albor_serve.backends.device_run import AHEAD, DeviceRun  # noqa: E402
from albor_serve.config import DevicePlan, SamplingParams  # noqa: E402
from albor_serve.errors import BackendError, DeviceLostError  # noqa: E402
from albor_serve.kernels.sampling import DeviceSampler  # noqa: E402


class Device:
    """Writes 10, 11, 12, ... as `choose_kernel` would; `late` steps finish one by one, later."""

    def __init__(self, stop: int = -1, *, late: bool = False, end: int | None = None) -> None:
        self.sampler = DeviceSampler(64, 32, torch.device("cpu"))
        self.stop, self.late, self.end = stop, late, end
        self.num_queued = self.num_done = self.num_new = 0
        self.is_over = False
        self.max_new = 0

    def queue(self) -> None:
        self.num_queued += 1
        if not self.late:
            self.work()

    def work(self) -> None:
        if self.num_done == self.num_queued:
            return
        self.num_done += 1
        box = self.sampler.mailbox
        if self.is_over:
            return
        if int(self.sampler.cancel[0]) or (self.end is not None and self.num_new == 2):
            box[self.num_new] = -5 if self.end is None else self.end
            self.is_over = True
            return
        token = 10 + self.num_new
        box[self.num_new] = token
        self.num_new += 1
        if token == self.stop or self.num_new == self.max_new:
            box[self.num_new] = -3 if token == self.stop else -4
            self.is_over = True

    def run(self, max_new: int, is_aborted: Callable[[], bool] = lambda: False) -> DeviceRun:
        ticks = count()

        def clock() -> float:
            self.work()
            return float(next(ticks))

        run = DeviceRun(self.sampler, self.queue, is_aborted, clock=clock)
        self.max_new = max_new
        stops = (self.stop,) if self.stop >= 0 else ()
        run.start(DevicePlan(SamplingParams(temperature=0.0), max_new, stop_token_ids=stops))
        return run


@pytest.mark.parametrize("late", [False, True])
def test_all_tokens_come_in_order_and_no_more_steps_are_queued_than_needed(late: bool) -> None:
    device = Device(late=late)
    run = device.run(7)
    seen = []
    for token in run:
        seen.append(token)
        assert device.num_queued <= len(seen) + AHEAD
    run.stop()
    assert seen == list(range(10, 17))
    assert device.num_queued == 7


@pytest.mark.parametrize("late", [False, True])
def test_a_stop_token_ends_the_run(late: bool) -> None:
    device = Device(stop=12, late=late)
    run = device.run(20)
    assert list(run) == [10, 11, 12]
    run.stop()
    assert int(device.sampler.mailbox[3]) == -3


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("stop", [-1, 11, 12])
def test_a_run_that_is_left_early_writes_nothing_afterwards(late: bool, stop: int) -> None:
    device = Device(stop=stop, late=late)
    run = device.run(20)
    for token in run:
        if token == 11:
            break
    run.stop()
    before = device.sampler.mailbox.tolist()
    while device.num_done < device.num_queued:
        device.work()
    assert device.sampler.mailbox.tolist() == before


def test_an_abort_ends_the_run_and_what_comes_after_it_is_dropped() -> None:
    device = Device(late=True)
    seen: list[int] = []
    run = device.run(20, is_aborted=lambda: len(seen) == 2)
    for token in run:
        seen.append(token)  # noqa: PERF402 - the abort looks at it
    assert seen == [10, 11]
    assert run.was_aborted
    run.stop()
    assert device.is_over or device.num_done == device.num_queued


def test_logits_that_are_not_finite_are_an_error() -> None:
    run = Device(end=-6).run(9)
    with pytest.raises(BackendError, match="not finite"):
        list(run)
    run.stop()


def test_a_device_that_stands_still_is_an_error() -> None:
    sampler = DeviceSampler(64, 32, torch.device("cpu"))
    ticks = count()
    run = DeviceRun(sampler, lambda: None, lambda: False, clock=lambda: float(next(ticks)))
    run.start(DevicePlan(SamplingParams(), 4))
    with pytest.raises(DeviceLostError, match="not answered for 30 s"):
        list(run)
    before = next(ticks)
    run.stop()
    assert next(ticks) == before + 1, "it was waited for once more"


def test_a_fault_of_the_device_is_found_while_waiting() -> None:
    def fault() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    sampler = DeviceSampler(64, 32, torch.device("cpu"))
    ticks = count()
    run = DeviceRun(
        sampler, lambda: None, lambda: False, fault=fault, clock=lambda: float(next(ticks))
    )
    run.start(DevicePlan(SamplingParams(), 4))
    with pytest.raises(RuntimeError, match="illegal"):
        list(run)
