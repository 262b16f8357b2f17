"""Kernels compiled in processes of their own, for a GPU that is not there."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from albor_serve.kernels.build import Job, KernelBuild
from tests.scripts import run_script

ALL = """
import sys
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from albor_serve.kernels.build import KernelBuild, jobs_of
from albor_serve.kernels.build_worker import _Target
from albor_serve.kernels.decoder import GpuDecoder, plan_for
from albor_serve.kernels.sampling import DeviceSampler
from albor_serve.kernels.synthetic import RandomModel
from albor_serve.config import ModelConfig

class Driver(_Target):
    def get_current_stream(self, device):
        return 0

target = ("cuda", 90, 32)
triton.runtime.driver.set_active(Driver(*target))
triton.knobs.cache.dir = sys.argv[1]
config = ModelConfig("llama", 64, 128, 128, 2, 2, 1, 64, 64, tie_embeddings=True)
weights = RandomModel(config).pack("cpu", 64)
decoder = GpuDecoder(weights, 64)
sampler = DeviceSampler(64, 64, torch.device("cpu"))
plans = [plan_for(weights, num_tokens=1, pdl=True), plan_for(weights, num_tokens=2, pdl=True)]

def launches():
    yield from decoder.launches(plans[0], sampler=sampler)
    yield from decoder.launches(plans[1])

jobs = jobs_of(launches())
first = jobs_of(decoder.launches(plans[0], sampler=sampler))
assert len(first) == 8 and len(jobs) == 14, (len(first), len(jobs))  # the embedding is shared
build = KernelBuild([first, jobs], target, num_processes=2)
assert build.num_jobs == 14
parts = []
build.wait(0, parts.append)
assert build.is_done(0)
assert parts and 0 <= min(parts) <= max(parts) <= 1 and parts == sorted(parts), parts
build.wait(1)
assert build.is_done(1)
build.close()
hits = []
triton.knobs.compilation.listener = lambda **event: hits.append(event["cache_hit"])
for launch in launches():
    launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)
assert hits == [True] * 14, hits
again = KernelBuild([first, jobs], target)
assert again.num_jobs == 0 and again.is_done(1)
again.close()
other = KernelBuild([first], ("cuda", 80, 32), num_processes=1)
assert other.num_jobs == 8, "another GPU's kernels were taken for this one's"
other.close()
other.close()
"""


def test_what_is_launched_later_is_in_the_cache_then(tmp_path: Path) -> None:
    environment = {"TRITON_CACHE_DIR": str(tmp_path)}
    run_script(ALL, str(tmp_path), environment=environment, timeout_s=200)


JOBS = [Job("albor_serve.kernels.phases", f"no_such_kernel_{i}", "{}", "") for i in range(4)]


def test_what_does_not_compile_ends_the_waiting_and_is_tried_again(tmp_path: Path) -> None:
    for _ in range(2):
        build = KernelBuild([JOBS[:3], JOBS], ("cuda", 90, 32), cache=tmp_path, num_processes=2)
        assert build.num_jobs == 4
        build.wait(1)
        assert build.is_done(1)
        build.close()
    assert not list(tmp_path.iterdir())


def test_a_process_that_cannot_be_started_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "no-python"))
    build = KernelBuild([JOBS], ("cuda", 90, 32), cache=tmp_path)
    build.wait(0)
    assert build.is_done(0)
    build.close()


def test_whoever_waits_can_give_up_and_processes_end(tmp_path: Path) -> None:
    def stop(part: float) -> None:
        raise KeyboardInterrupt

    build = KernelBuild([JOBS], ("cuda", 90, 32), cache=tmp_path, num_processes=2)
    with pytest.raises(KeyboardInterrupt):
        build.wait(0, stop)
    started = time.monotonic()
    build.close()
    assert time.monotonic() - started < 5
    assert not build._processes or all(p.poll() is not None for p in build._processes)
