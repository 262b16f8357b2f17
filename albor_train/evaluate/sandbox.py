"""Run a generated program where it can do little harm, and say whether it ran to its end.

Each program gets a process of its own in an empty folder, with limits on time, memory, file size
and processes, no environment, and an audit hook (PEP 578) that refuses the network, other
programs, native code and writes outside the folder. That stops accidents and careless code; it
is no wall against an attacker, so run evaluations on a machine that you could lose.

A program has passed only if the runner, after the program's last line, prints a secret that the
program has never seen: exiting early or printing "ok" does not count.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from albor_train.errors import EvaluationError

__all__ = ["PLAIN", "Interpreter", "Outcome", "run_program", "run_programs"]

_RUNNER: Final = r"""
import json, os, resource, sys
job = json.load(sys.stdin)
root = os.path.realpath(os.getcwd())
limit = job["memory_bytes"]
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
resource.setrlimit(resource.RLIMIT_CPU, (job["cpu_seconds"], job["cpu_seconds"] + 1))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 24, 1 << 24))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
REFUSED = ("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn",
           "os.system", "os.startfile", "pty.", "ctypes.", "os.kill", "os.putenv", "sys.settrace",
           "signal.pthread_kill", "resource.setrlimit", "gc.get_", "sys.addaudithook",
           "webbrowser.", "urllib.", "http.", "ftplib.", "smtplib.", "cpython.remote_debugger")
# Positions of a path and of the folder descriptor it is relative to, for each changing call.
CHANGES = {"os.remove": ((0, 1),), "os.rename": ((0, 2), (1, 3)), "os.mkdir": ((0, 2),),
           "os.rmdir": ((0, 1),), "os.link": ((0, 2), (1, 3)), "os.symlink": ((0, None), (1, 2)),
           "os.truncate": ((0, None),), "os.chmod": ((0, 2),), "os.chown": ((0, 3),),
           "os.utime": ((0, 3),), "os.chdir": ((0, None),), "os.setxattr": ((0, None),),
           "os.removexattr": ((0, None),), "os.chflags": ((0, None),)}
WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_join, _real, _fsdecode = os.path.join, os.path.realpath, os.fsdecode
_isdir, _readlink = os.path.isdir, os.readlink
def inside(path, folder=-1):
    if isinstance(path, int):
        return path > 2
    path = _fsdecode(path)
    if isinstance(folder, int) and folder >= 0:
        path = _join(_readlink("/proc/self/fd/%d" % folder), path)
    full = _real(path)
    return full == root or full.startswith(root + "/") or full == "/dev/null"
def hook(event, args):
    if event.startswith(REFUSED):
        raise PermissionError("refused: " + event)
    if event == "open":
        path, mode, flags = args
        writes = (flags or 0) & WRITE or any(c in (mode or "") for c in "wax+")
        if isinstance(path, int) or inside(path):
            return
        # A folder's descriptor would let later calls name files without their folder.
        if writes or _isdir(path):
            raise PermissionError("refused: write outside the folder")
    elif event in CHANGES:
        for index, folder in CHANGES[event]:
            if not inside(args[index], -1 if folder is None else args[folder]):
                raise PermissionError("refused: " + event)
token, source, report = job.pop("token"), job.pop("source"), os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
for number in (0, 1, 2):
    os.dup2(null, number)
for name in job["preload"]:
    __import__(name)
def main(write, leave, token):
    code = compile(source, "<program>", "exec")
    sys.addaudithook(hook)
    try:
        exec(code, {"__name__": "__main__"})
        word = token
    except BaseException as error:
        word = "failed: " + type(error).__name__
    write(report, word.encode("utf-8", "replace"))
    leave(0)
try:
    main(os.write, os._exit, token)
except BaseException as error:
    os.write(report, ("failed: " + type(error).__name__).encode())
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended."""

    passed: bool
    reason: str
    """"passed", "timed out", "failed: ERROR" or "died"."""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """The Python that runs programs, and what it imports for them."""

    python: str = sys.executable
    preload: tuple[str, ...] = ()
    """Libraries imported before the audit hook, which would refuse them to load native code."""
    memory_bytes: int = 1 << 30
    """Limit of the address space."""


PLAIN: Final = Interpreter()
"""This Python without any installed package."""


def run_program(source: str, *, seconds: float = 10.0, interpreter: Interpreter = PLAIN) -> Outcome:
    """Run a program to its end, or stop it. Nothing it wrote remains.

    Args:
        source: Python text, tests included; it must raise if a test fails.
        seconds: wall-clock limit.
        interpreter: the Python, its preloaded libraries and its memory.

    Raises:
        EvaluationError: the interpreter does not start.
    """
    token = secrets.token_hex(16)
    job = {
        "source": source,
        "token": token,
        "memory_bytes": interpreter.memory_bytes,
        "preload": interpreter.preload,
        "cpu_seconds": max(1, round(seconds) + 1),
    }
    with tempfile.TemporaryDirectory(prefix="albor-eval-") as folder:
        packages = [] if interpreter.preload else ["-S"]
        process = _start(
            [interpreter.python, "-I", *packages, "-B", "-c", _RUNNER],
            folder,
            {
                "PATH": "",
                "HOME": folder,
                "TMPDIR": folder,
                "PYTHONHASHSEED": "0",
                "MPLBACKEND": "agg",
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },
        )
        try:
            out, _ = process.communicate(json.dumps(job).encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, "timed out")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    text = out.decode("utf-8", "replace")
    if text == token:
        return Outcome(True, "passed")
    return Outcome(False, text[:80] if text.startswith("failed: ") else "died")


def _start(command: list[str], folder: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(  # noqa: S603 - the interpreter that was asked for
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise EvaluationError(f"{command[0]} can't be started: {error.strerror}") from error


def run_programs(
    sources: Sequence[str],
    *,
    processes: int,
    seconds: float = 10.0,
    interpreter: Interpreter = PLAIN,
) -> Iterator[Outcome]:
    """`run_program` of many, several at a time; outcomes in order."""
    with ThreadPoolExecutor(processes) as pool:
        yield from pool.map(
            lambda source: run_program(source, seconds=seconds, interpreter=interpreter), sources
        )
