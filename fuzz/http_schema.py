"""schemathesis over the OpenAPI document of a real albor-serve process.

    python -m fuzz.http_schema --cases 20000

Every answer must have a status, a content type and a body that the document describes; no 5xx, no
answer slower than REQUEST_S. Prints the number of cases, and the server's memory on the way.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fuzz.server import FuzzServer, fuzz_server

REQUEST_S = 15
ROUND_EXAMPLES = 500
"""For each operation and round; the memory is read between rounds."""
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


def main() -> int:
    """Run rounds until there were enough cases; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--examples", type=int, default=ROUND_EXAMPLES)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1, help="of the first round")
    args = parser.parse_args()
    with fuzz_server() as server:
        return run(server, args.cases, args.examples, args.workers, args.seed)


def run(
    server: FuzzServer, cases: int, examples: int, workers: int = 1, first_seed: int = 1
) -> int:
    """Rounds with other seeds until `cases` requests were made; 1 if anything failed."""
    started = time.monotonic()
    total, failed, seed = 0, 0, first_seed - 1
    rss = [server.rss_mib()]
    while total < cases and not failed and server.is_alive():
        seed += 1
        phases = "coverage,fuzzing" if seed == 1 else "fuzzing"
        count, failed = _round(server, examples, workers, seed, phases)
        if not count:
            failed = 1
        total += count
        rss.append(server.rss_mib())
        spent = time.monotonic() - started
        print(f"round {seed}: {total} cases in {spent:.0f} s, {rss[-1]:.1f} MiB", flush=True)
    alive = server.is_alive() and b"ok" in server.get("/health")
    busy = any(slot["is_processing"] for slot in json.loads(server.get("/slots")))
    if server.tracebacks():
        print("".join(server.log)[-4000:])
        failed = 1
    print(
        f"{total} cases, {time.monotonic() - started:.0f} s, resident memory "
        f"{' '.join(f'{mib:.0f}' for mib in rss)} MiB, alive {alive}, slots busy {busy}"
    )
    return int(bool(failed) or not alive or busy)


def _round(
    server: FuzzServer, examples: int, workers: int, seed: int, phases: str
) -> tuple[int, int]:
    """(cases, failures) of one run of schemathesis."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
            *("--checks", ",".join(CHECKS), "--max-examples", str(examples)),
            *("--workers", str(workers), "--seed", str(seed), "--continue-on-failure"),
            *("--request-timeout", str(REQUEST_S), "--max-response-time", str(REQUEST_S)),
            *("--phases", phases, "--suppress-health-check", "all"),
            *("--report-json-path", str(report), "--no-color", "--warnings", "off"),
            *("--generation-database", "none"),
        ]
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder)
        if not report.is_file():
            print(done.stdout[-4000:], done.stderr[-2000:], flush=True)
            return 0, 1
        summary: Any = json.loads(report.read_text())
        failures = int(summary["test_cases"]["unique_failures"])
        # A request without an answer in time, or a connection that broke.
        failures += sum(e["count"] for e in summary["errors"] if "Network" in e["title"])
        if failures:
            print(done.stdout[-8000:], flush=True)
        # An error without a failure is the tool's own: some schemas are too much for its
        # generators on some interpreters.
        elif done.returncode:
            print(f"schemathesis had an error of its own: {str(summary['errors'])[:300]}")
        return int(summary["test_cases"]["generated"]), failures


if __name__ == "__main__":
    sys.exit(main())
