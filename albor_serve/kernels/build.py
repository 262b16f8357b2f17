"""Compiles kernels in processes of their own, the most urgent first, into Triton's cache on disk.

Triton compiles a kernel when it is first launched, one after the other, 0.6 to 2 s each. About half
of that holds Python's lock, so threads help little (measured: two give 1.4 times the speed of one).
Whoever launches a kernel afterwards finds it in the cache. All this is only haste: what a process
could not compile is compiled where it is launched, and an error is reported there.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from albor_serve.kernels._triton import require_triton
from albor_serve.kernels.launch import Launch

__all__ = ["Job", "KernelBuild", "fix_hashes", "jobs_of"]

MOST_PROCESSES: Final = 16
"""Each takes about 150 MB."""
PATIENCE_S: Final = 300.0
_LOOK_EVERY_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Job:
    """A kernel to compile."""

    module: str
    name: str
    specialization: str
    """Argument types, constants and options, as Triton writes them."""
    source_hash: str
    """Of the kernel's source and of all that it calls."""


def jobs_of(launches: Iterable[Launch]) -> list[Job]:
    """The kernels that launches need and this process has not compiled yet, each once.

    Nothing is compiled or launched, no argument is read.
    """
    require_triton()
    import triton

    fix_hashes()
    found: dict[Job, None] = {}

    def instead_of_compiling(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:  # noqa: A002
        if not compile["is_warmup"]:
            return False  # another thread launches something
        source = fn.jit_function.cache_key
        found[Job(fn.module, fn.name, compile["specialization_data"], source)] = None
        return True

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = instead_of_compiling
        for launch in launches:
            launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)
    return list(found)


def fix_hashes() -> None:
    """Hash the kernels' sources in a fixed order.

    A Triton 3.6 kernel's hash, which its cache goes by, also depends on which kernels were hashed
    before, since they share functions.
    """
    from albor_serve.kernels import phases

    for name in phases.__all__:
        getattr(phases, name).cache_key  # noqa: B018 - it is computed when it is first read


class KernelBuild:
    """Groups of kernels being compiled, the first group first. Close it in the end."""

    def __init__(
        self,
        groups: Sequence[Sequence[Job]],
        target: tuple[str, int, int],
        *,
        cache: Path | None = None,
        num_processes: int | None = None,
    ) -> None:
        """Start compiling.

        Args:
            groups: what is needed at the same time; a job counts for the first group it is in.
            target: Triton's name of the kind of device, compute capability times ten, warp size.
            cache: Triton's folder of compiled kernels; None takes Triton's own.
            num_processes: at once; None takes as many as there are processors.
        """
        import triton

        self._cache = Path(triton.knobs.cache.dir) if cache is None else cache
        self._target = target
        self._lock = threading.Lock()
        self._todo: deque[tuple[int, Job]] = deque()
        self._stamps = [self._stamp(triton.__version__, jobs) for jobs in groups]
        self._left = [0] * len(groups)
        self._has_failed = [False] * len(groups)
        self._done = [threading.Event() for _ in groups]
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._is_closed = False
        seen: set[Job] = set()
        for number, jobs in enumerate(groups):
            if not self._stamps[number].exists():
                new = [job for job in jobs if job not in seen]
                self._todo.extend((number, job) for job in new)
                self._left[number] = len(new)
            seen.update(jobs)
            if not self._left[number]:
                self._done[number].set()
        self.num_jobs = len(self._todo)
        """Kernels that were not in the cache yet."""
        if num_processes is None:
            num_processes = min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
        self._threads = [
            threading.Thread(target=self._work, name="albor-compile", daemon=True)
            for _ in range(min(num_processes, self.num_jobs))
        ]
        self._num_working = len(self._threads)
        for thread in self._threads:
            thread.start()

    def is_done(self, group: int) -> bool:
        """Whether this group and all before it are compiled, or will not be."""
        return all(event.is_set() for event in self._done[: group + 1])

    def wait(self, group: int, progress: Callable[[float], None] | None = None) -> None:
        """Return once `is_done(group)`, or after some minutes.

        Args:
            group: its number.
            progress: called on this thread with 0.0 to 1.0 now and then; what it raises is raised.
        """
        end = time.monotonic() + PATIENCE_S
        total = max(1, sum(self._left[: group + 1]))
        for event in self._done[: group + 1]:
            while not event.is_set() and time.monotonic() < end:
                if progress is not None:
                    progress(1 - sum(self._left[: group + 1]) / total)
                event.wait(_LOOK_EVERY_S)

    def close(self) -> None:
        """End what still runs. Harmless when called again."""
        with self._lock:
            self._is_closed = True
            self._todo.clear()
            for process in self._processes:
                process.kill()
        for thread in self._threads:
            thread.join()

    def _stamp(self, version: str, jobs: Sequence[Job]) -> Path:
        """A file that says that these jobs' kernels are in the cache; it goes with the cache."""
        text = repr((version, self._target, [(j.name, j.specialization, j.source_hash)
                                             for j in jobs]))  # fmt: skip
        return self._cache / f"albor-{hashlib.sha256(text.encode()).hexdigest()[:32]}"

    def _work(self) -> None:
        """One process and its jobs, on a thread of its own."""
        process = None
        try:
            process = self._start()
            while (entry := self._next()) is not None:
                number, job = entry
                is_compiled = process is not None and self._compile(process, number, job)
                self._settle(number, is_compiled)
        finally:
            if process is not None:
                process.kill()
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        pipe.close()

    def _start(self) -> subprocess.Popen[bytes] | None:
        package = str(Path(__file__).resolve().parents[2])
        paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths)),
            "TRITON_CACHE_DIR": str(self._cache),
        }
        # -P: nothing is imported from the folder that the server was started in.
        command = [sys.executable, "-P", "-m", "albor_serve.kernels.build_worker"]
        with self._lock:
            if self._is_closed:
                return None
            try:
                process = subprocess.Popen(  # noqa: S603
                    [*command, *map(str, self._target)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=environment,
                )
            except OSError:
                return None
            self._processes.add(process)
        return process

    def _next(self) -> tuple[int, Job] | None:
        with self._lock:
            return self._todo.popleft() if self._todo else None

    def _compile(self, process: subprocess.Popen[bytes], number: int, job: Job) -> bool:
        """Whether the process compiled it."""
        assert process.stdin is not None
        assert process.stdout is not None
        order = [job.module, job.name, job.specialization, number > 0]
        try:
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
            return process.stdout.readline() == b"done\n"
        except OSError:
            return False

    def _settle(self, number: int, is_compiled: bool) -> None:
        with self._lock:
            self._left[number] -= 1
            self._has_failed[number] |= not is_compiled
            if self._left[number]:
                return
            is_whole = not self._has_failed[number] and not self._is_closed
        if is_whole:
            try:
                self._cache.mkdir(parents=True, exist_ok=True)
                self._stamps[number].touch()
            except OSError:
                pass  # then the next start looks once more
        self._done[number].set()
