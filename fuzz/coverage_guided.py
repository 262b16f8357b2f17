"""The loaders under atheris (libFuzzer over Python's own coverage).

    python -m fuzz.coverage_guided gguf --seconds 1800

An input that brings out anything but an AlborError is kept under fuzz/findings, one for each
place in the code, and the run goes on. A crash, a hang or too much memory ends the child process;
libFuzzer keeps its input there too, and the run is started again until its time is up.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import resource
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

FINDINGS = Path(__file__).parent / "findings"
CORPUS = Path(__file__).parent / "corpus"
MEMORY_BYTES = 6 << 30
"""Of address space; the interpreter with numpy and llama.cpp maps about 2 GB."""
INPUT_SECONDS = 20
MAX_INPUT_BYTES = 1 << 18


def main() -> int:
    """Run one target for a time; 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=("gguf", "hf", "load", "foreign"))
    parser.add_argument("--seconds", type=int, default=1800)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        _child(args.target, args.seconds)
        return 0
    return _parent(args.target, args.seconds)


def _parent(target: str, seconds: int) -> int:
    FINDINGS.mkdir(exist_ok=True)
    before = set(FINDINGS.iterdir())
    started = time.monotonic()
    num_restarts = 0
    while (left := seconds - (time.monotonic() - started)) > 1:
        command = [sys.executable, "-m", "fuzz.coverage_guided", target, "--child"]
        code = subprocess.run(
            [*command, "--seconds", str(int(left))],
            check=False,
            # Backtraces of the native libraries take seconds each.
            env={**os.environ, "GGML_NO_BACKTRACE": "1", "RUST_BACKTRACE": "0"},
        ).returncode
        if code == 0:
            break
        num_restarts += 1
        print(f"{target}: the child ended with {code}; started again", flush=True)
        time.sleep(1)
    found = sorted(path.name for path in set(FINDINGS.iterdir()) - before)
    spent = time.monotonic() - started
    print(f"{target}: {spent:.0f} s, {num_restarts} restarts, {len(found)} findings: {found}")
    return 1 if found else 0


def _child(target: str, seconds: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["albor_serve"]):
        from fuzz import loaders
    from fuzz import seeds

    run = loaders.TARGETS[target]
    make_seeds = {"hf": seeds.hf_seeds, "foreign": seeds.foreign_seeds}
    originals = make_seeds.get(target, seeds.gguf_seeds)()
    mutate = seeds.mutate_hf if target == "hf" else seeds.mutate_gguf
    corpus = CORPUS / target
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in originals:
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    seen: set[str] = set()
    counts = {"inputs": 0, "sound": 0}
    last_report = time.monotonic()

    def one_input(data: bytes) -> None:
        nonlocal last_report
        counts["inputs"] += 1
        try:
            counts["sound"] += run(data)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            place = _place(error)
            if place not in seen:
                seen.add(place)
                name = hashlib.sha256(place.encode()).hexdigest()[:12]
                (FINDINGS / f"{target}-{name}.bin").write_bytes(data)
                (FINDINGS / f"{target}-{name}.txt").write_text(_text(error))
                print(f"{target}: FOUND {place}", flush=True)
        if time.monotonic() - last_report > 60:
            last_report = time.monotonic()
            print(f"{target}: {counts}", flush=True)

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.7:
            return mutate(rng.choice(originals), rng)[:max_size]
        return bytes(atheris.Mutate(data, max_size))

    options = [
        f"-max_total_time={seconds}",
        f"-timeout={INPUT_SECONDS}",
        f"-max_len={MAX_INPUT_BYTES}",
        "-rss_limit_mb=2500",
        f"-artifact_prefix={FINDINGS}/{target}-",
        "-close_fd_mask=0",
        "-print_final_stats=1",
        str(corpus),
    ]
    atheris.Setup([sys.argv[0], *options], one_input, custom_mutator=mutator)
    atheris.Fuzz()


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "albor_serve" in frame.filename] or list(frames)
    last: Any = ours[-1]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"


def _text(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-4000:]


if __name__ == "__main__":
    sys.exit(main())
