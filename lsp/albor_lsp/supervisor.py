"""Keeps one completion server running for all windows, and ends it after the last one.

Each language server that uses the server holds a shared lock on a file; the kernel drops it
whatever becomes of its owner. This program, started by the first of them, runs the server as its
child, and ends it and itself once it could have that lock alone for a while. It imports little,
as it stays in memory.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["is_free", "main", "run_files"]

POLL_S = 0.25
GRACE_S = 3.0
"""Unused time before the end: an editor that restarts finds its server again."""
TERM_S = 8.0
PR_SET_PDEATHSIG = 1


def run_files(folder: Path, name: str) -> dict[str, Path]:
    """The files of one shared server, by use."""
    return {
        "socket": folder / f"{name}.sock",
        "clients": folder / f"{name}.clients",
        "server": folder / f"{name}.server",
        "log": folder / f"{name}.log",
    }


def is_free(path: Path) -> bool:
    """Whether nobody holds the lock on a file."""
    import fcntl

    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


def main(arguments: list[str]) -> int:
    """Run `FOLDER NAME COMMAND...` until nobody uses it.

    Goes into the background and returns at once there; the lock on the file "server" is held as
    long as it runs.
    """
    import fcntl

    files = run_files(Path(arguments[0]), arguments[1])
    with files["server"].open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return 0  # another one runs the server already
        if os.fork():
            os._exit(0)  # the lock stays with the child
        os.setsid()
        return _run([*arguments[2:], "--uds", str(files["socket"])], files)


def _run(command: list[str], files: dict[str, Path]) -> int:
    stopping = False

    def stop(_number: int, _frame: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with files["log"].open("wb") as log:
        try:
            child = subprocess.Popen(  # noqa: S603 - the person's own command
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_parent,
            )
        except OSError as error:
            log.write(f"{command[0]} can't be run: {error.strerror}\n".encode())
            return 1
    unused_since: float | None = None
    try:
        while child.poll() is None and not stopping:
            now = time.monotonic()
            if not is_free(files["clients"]):
                unused_since = None
            elif unused_since is None:
                unused_since = now
            elif now - unused_since > GRACE_S:
                break
            time.sleep(POLL_S)
        return child.poll() or 0
    finally:
        _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(TERM_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _die_with_parent() -> None:
    """Linux ends the server when this program is killed; elsewhere nothing does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == 1:
            os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
