"""Raw bytes at a real albor-serve process: bodies, heads, chunks, pipelines, half-closed sockets.

    python -m fuzz.raw --cases 50000

Meanwhile one client keeps asking for completions as an editor does. What must hold:

  - no 5xx (503 "busy" apart), and every answer is HTTP;
  - nothing that the inputs hold comes back in an error (a marker is in all of them);
  - the other client is answered all the time, quickly;
  - afterwards the server lives, no slot is busy and its memory is what it was.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import re
import select
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fuzz.server import FuzzServer, fuzz_server

__all__ = ["Report", "make_case", "run"]

MARKER: Final = b"xyzzyPlugh"
ANSWER_S: Final = 10.0
"""A case that gets no end within this time is a hang."""
MAX_ERROR_BYTES: Final = 2000
ROUTES: Final = (
    *(b"/v1/completions", b"/infill", b"/completion", b"/v1/fim/completions", b"/tokenize"),
    *(b"/detokenize", b"/health", b"/slots", b"/props", b"/metrics", b"/v1/models", b"/"),
    *(b"/v1/models/" + MARKER, b"/" + MARKER, b"/%00", b"/../" + MARKER, b"*", b"//", b"/%ff%fe"),
)
POST_ROUTES: Final = ROUTES[:6]
METHODS: Final = (b"GET", b"POST", b"PUT", b"HEAD", b"OPTIONS", b"TRACE", b"PRI", b"get", MARKER)
BODIES: Final = (
    b'{"prompt": "def f(xyzzyPlugh):", "max_tokens": 2}',
    b'{"prompt": "xyzzyPlugh", "suffix": "}", "max_tokens": 2, "stream": true}',
    b'{"input_prefix": "xyzzyPlugh", "input_suffix": "\\n", "n_predict": 2, "input_extra": []}',
    b'{"prompt": [1, 2, 3], "n": 2, "max_tokens": 1, "logprobs": 2, "stop": ["xyzzyPlugh"]}',
    b'{"content": "xyzzyPlugh", "with_pieces": true}',
    b'{"tokens": [5, 6, 7], "x": "xyzzyPlugh"}',
    b'{"prompt": "a", "max_tokens": 2, "albor": {"session": "xyzzyPlugh", "deadline_ms": 50}}',
)
_FITTING: Final = (
    (b"input_prefix", b"/infill"),
    (b"content", b"/tokenize"),
    (b'tokens": [', b"/detokenize"),
    (b"suffix", b"/v1/fim/completions"),
    (b"prompt", b"/v1/completions"),
)
"""What a body must hold to be meant for a route; the first that fits."""
TOKENS: Final = (
    *(b"\r\n", b"\n", b"\0", b"\xff", b"{", b"}", b"[", b'"', b"1e999", b"NaN", b"-1", b"null"),
    *(b"99999999999999999999", b"true", MARKER, b"\\ud800", b": ", b",", b"[[[[[[[[", b"\xc3\x28"),
)
HEADERS: Final = (
    *(b"Content-Length: -1", b"Content-Length: 1, 2", b"Content-Length: +5"),
    *(b"Content-Length: 99999999999999999999", b"Content-Length: " + MARKER),
    *(
        b"Transfer-Encoding: chunked, gzip",
        b"Transfer-Encoding: " + MARKER,
        b"Expect: 100-continue",
    ),
    *(b"Host: " + MARKER, b"Host:", b"Host: a\x00b", b"Origin: http://" + MARKER, b"Upgrade: h2c"),
    *(b"Connection: close", b"Connection: upgrade", b"Authorization: Bearer " + MARKER),
    *(b"Cookie: " + MARKER * 500, b" folded", b"NoColon", b": empty", b"X-Request-Id: " + MARKER),
    *(
        b"X-Request-Id: a\x7fb",
        b"Content-Type: " + MARKER,
        b"Content-Encoding: gzip",
        b"X: \xff\xfe",
    ),
    *(b"Accept: " + MARKER, b"X-Forwarded-For: " + MARKER, b"Range: bytes=0-" + b"9" * 50),
)


@dataclass(slots=True)
class Case:
    """What one connection sends."""

    kind: str
    parts: list[bytes]
    """Sent one after the other."""
    pause_s: float = 0.0
    """Between the parts."""
    half_close: bool = False
    """Shut down the sending side afterwards."""
    leave: bool = False
    """Go away without reading."""
    expects_end: bool = False
    """Whether the server must answer or close by itself, the request being complete."""


@dataclass(slots=True)
class Report:
    """What happened."""

    counts: Counter[str] = field(default_factory=Counter)
    """Cases of each kind."""
    statuses: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    waits_ms: list[float] = field(default_factory=list)
    """What the other client waited for each of its completions."""

    @property
    def num_cases(self) -> int:
        """Connections made."""
        return sum(self.counts.values())


def make_case(rng: random.Random) -> Case:
    """A case; the same generator state gives the same case."""
    return rng.choice(_MAKERS)(rng)


def run(server: FuzzServer, cases: int, workers: int = 4, seed: int = 0) -> Report:
    """Send so many cases from `workers` threads."""
    report = Report()
    lock = threading.Lock()
    done = threading.Event()
    other = threading.Thread(target=_other_client, args=(server, report, done))
    other.start()
    senders = [
        threading.Thread(
            target=_send_cases,
            args=(server, report, lock, random.Random(seed * 1000 + i), -(-cases // workers)),
        )
        for i in range(workers)
    ]
    for thread in senders:
        thread.start()
    for thread in senders:
        thread.join()
    done.set()
    other.join()
    _check_after(server, report)
    return report


def main() -> int:
    """Run; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=50_000)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.monotonic()
    num_problems, total = 0, 0
    with fuzz_server() as server:
        rss = [server.rss_mib()]
        step = 5000
        for start in range(0, args.cases, step):
            report = run(
                server, min(step, args.cases - start), args.workers, args.seed + start // step
            )
            rss.append(server.rss_mib())
            total += report.num_cases
            num_problems += len(report.problems)
            waits = sorted(report.waits_ms) or [0.0]
            print(
                f"{total} cases, {time.monotonic() - started:.0f} s, {rss[-1]:.1f} MiB, "
                f"statuses {dict(sorted(report.statuses.items()))}, other client "
                f"{len(waits)} completions, median {waits[len(waits) // 2]:.0f} ms, "
                f"99 % {waits[int(len(waits) * 0.99)]:.0f} ms, worst {waits[-1]:.0f} ms",
                flush=True,
            )
            for problem in report.problems[:20]:
                print(f"  PROBLEM {problem}", flush=True)
        print(f"kinds of the last step: {dict(report.counts)}")
    print(f"memory {' '.join(f'{mib:.0f}' for mib in rss)} MiB; {num_problems} problems")
    return int(num_problems > 0)


def _send_cases(
    server: FuzzServer, report: Report, lock: threading.Lock, rng: random.Random, count: int
) -> None:
    for _ in range(count):
        case = make_case(rng)
        statuses, problem = _send(server.port, case)
        with lock:
            report.counts[case.kind] += 1
            report.statuses.update(statuses)
            if problem is not None:
                report.problems.append(f"{case.kind}: {problem}: {b''.join(case.parts)[:200]!r}")


def _send(port: int, case: Case) -> tuple[list[int], str | None]:
    """(statuses, what was wrong or None)."""
    deadline = time.monotonic() + ANSWER_S
    data = b""
    ended = False
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S) as sock:
            for i, part in enumerate(case.parts):
                if i and case.pause_s:
                    time.sleep(case.pause_s)
                sock.sendall(part)
            if case.half_close:
                sock.shutdown(socket.SHUT_WR)
            if case.leave:
                return [], None
            # An incomplete request rightly gets no answer: give it a moment only.
            wait_s = ANSWER_S if case.expects_end else 0.05
            while time.monotonic() < deadline:
                readable, _, _ = select.select([sock], [], [], wait_s)
                if not readable:
                    break
                piece = sock.recv(65536)
                if not piece:
                    ended = True
                    break
                data += piece
                if _is_whole(data):
                    wait_s = 0.002
    except (ConnectionError, TimeoutError):
        ended = True
    return _judge(case, data, ended)


def _judge(case: Case, data: bytes, ended: bool) -> tuple[list[int], str | None]:
    statuses = [int(s) for s in re.findall(rb"(?:^|\n)HTTP/1\.1 ([0-9]{3}) ", data)]
    if data and not statuses:
        return statuses, f"answer is not HTTP: {data[:80]!r}"
    if case.expects_end and not data and not ended:
        return statuses, "no answer in time"
    for answer in re.split(rb"(?=HTTP/1\.1 [0-9]{3} )", data):
        status = answer[9:12]
        if status[:1] == b"5" and status != b"503":
            return statuses, f"status {status.decode()}"
        if status[:1] == b"4" and MARKER in answer:
            # Ids of requests are for the client to choose and are sent back.
            shown = re.sub(rb"(?i)x-request-id: [^\r\n]*", b"", answer)
            if MARKER in shown:
                return statuses, f"echo: {answer[:300]!r}"
        if status[:1] == b"4" and len(answer) > MAX_ERROR_BYTES:
            return statuses, f"an error of {len(answer)} bytes"
    return statuses, None


def _is_whole(data: bytes) -> bool:
    head, found, body = data.partition(b"\r\n\r\n")
    if not found:
        return False
    length = re.search(rb"(?i)content-length: ([0-9]+)", head)
    if length:
        return len(body) >= int(length[1])
    return data.endswith(b"0\r\n\r\n")


def _other_client(server: FuzzServer, report: Report, done: threading.Event) -> None:
    body = json.dumps({"prompt": "def f(x):\n", "max_tokens": 2, "temperature": 0})
    while not done.is_set():
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=ANSWER_S)
        with contextlib.closing(connection):
            started = time.monotonic()
            try:
                connection.request("POST", "/v1/completions", body)
                answer = connection.getresponse()
                answer.read()
                if answer.status != 200:
                    report.problems.append(f"the other client got {answer.status}")
            except (OSError, http.client.HTTPException) as error:
                report.problems.append(f"the other client was not answered: {error!r}")
            report.waits_ms.append(1000 * (time.monotonic() - started))
        done.wait(0.05)


def _check_after(server: FuzzServer, report: Report) -> None:
    if not server.is_alive():
        report.problems.append("the server died")
        return
    deadline = time.monotonic() + ANSWER_S
    while time.monotonic() < deadline:
        slots = json.loads(server.get("/slots"))
        if not any(slot["is_processing"] for slot in slots):
            break
        time.sleep(0.05)
    else:
        report.problems.append("a slot is still busy")
    if b"ok" not in server.get("/health"):
        report.problems.append("/health does not answer ok")
    report.problems += [f"log: {line.strip()}" for line in server.tracebacks()]


def _request(
    rng: random.Random,
    body: bytes,
    *,
    method: bytes = b"POST",
    route: bytes | None = None,
    extra: tuple[bytes, ...] = (),
) -> bytes:
    if route is None:
        fitting = next((r for key, r in _FITTING if key in body), None)
        route = rng.choice(POST_ROUTES) if fitting is None or rng.random() < 0.3 else fitting
    lines = [b"%s %s HTTP/1.1" % (method, route), b"Host: localhost"]
    lines += [b"Content-Type: application/json", b"Content-Length: %d" % len(body), *extra]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def _mutate(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(len(out) + 1)
        what = rng.randrange(5)
        if what == 0:
            out[at:at] = rng.choice(TOKENS)
        elif what == 1:
            del out[at : at + rng.choice((1, 2, 10))]
        elif what == 2 and at < len(out):
            out[at] = rng.randrange(256)
        elif what == 3:
            out[at : at + 4] = rng.choice(TOKENS)
        else:
            out[at:at] = out[max(0, at - 20) : at] * rng.choice((1, 3))
    return bytes(out)


def _body(rng: random.Random) -> Case:
    body = _mutate(rng, rng.choice(BODIES))
    return Case("body", [_request(rng, body, extra=(b"Connection: close",))], expects_end=True)


def _header(rng: random.Random) -> Case:
    extra = tuple(rng.choice(HEADERS) for _ in range(rng.choice((1, 2, 3))))
    request = _request(
        rng,
        rng.choice(BODIES),
        method=rng.choice((b"POST", b"POST", *METHODS)),
        route=rng.choice(ROUTES),
        extra=extra,
    )
    return Case("header", [request], half_close=rng.random() < 0.5)


def _head_bytes(rng: random.Random) -> Case:
    head, _, body = _request(rng, rng.choice(BODIES)).partition(b"\r\n\r\n")
    return Case("head bytes", [_mutate(rng, head) + b"\r\n\r\n" + body], half_close=True)


def _garbage(rng: random.Random) -> Case:
    data = rng.randbytes(rng.choice((1, 10, 100, 5000)))
    return Case("garbage", [MARKER + data if rng.random() < 0.5 else data], half_close=True)


def _giant_header(rng: random.Random) -> Case:
    size = rng.choice((20_000, 40_000, 200_000))
    extra = rng.choice(
        (b"X: " + MARKER * (size // 10), b"X-%s: 1\r\n" % MARKER * (size // 20), MARKER * 5000)
    )
    route = b"/" + MARKER * 5000 if rng.random() < 0.2 else None
    request = _request(rng, b"{}", route=route, extra=(extra.rstrip(), b"Connection: close"))
    return Case("giant header", [request], expects_end=True)


def _chunked(rng: random.Random) -> Case:
    body = rng.choice(BODIES)
    chunks = []
    while body:
        size = rng.choice((1, 7, 50))
        piece, body = body[:size], body[size:]
        chunks.append(b"%x\r\n%s\r\n" % (len(piece), piece))
    data = b"".join(chunks) + b"0\r\n\r\n"
    if rng.random() < 0.7:
        bad = (b"-1", b"fffffffffffffffff", b"zz", b"1;" + MARKER * 50, b"", b"0x5", b"1\n", b" 1")
        data = _mutate(rng, data) if rng.random() < 0.5 else rng.choice(bad) + b"\r\n" + data
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    return Case("chunked", [head % rng.choice(POST_ROUTES) + data], half_close=True)


def _half_closed(rng: random.Random) -> Case:
    data = _request(rng, rng.choice(BODIES))
    return Case("half-closed", [data[: rng.randrange(1, len(data) + 1)]], half_close=True)


def _gone(rng: random.Random) -> Case:
    data = _request(rng, rng.choice(BODIES))
    cut = len(data) if rng.random() < 0.6 else rng.randrange(1, len(data))
    return Case("gone", [data[:cut]], leave=True)


def _pipeline(rng: random.Random) -> Case:
    requests = [_request(rng, rng.choice(BODIES)) for _ in range(rng.choice((2, 3, 6)))]
    if rng.random() < 0.5:
        i = rng.randrange(len(requests))
        requests[i] = _mutate(rng, requests[i])
    return Case("pipeline", [b"".join(requests)], half_close=rng.random() < 0.5)


def _slow(rng: random.Random) -> Case:
    data = _request(rng, rng.choice(BODIES), extra=(b"Connection: close",))
    cuts = sorted(rng.randrange(1, len(data)) for _ in range(4))
    parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    return Case("slow", parts, pause_s=0.005, expects_end=True)


def _length_lies(rng: random.Random) -> Case:
    body = rng.choice(BODIES)
    claimed = rng.choice((0, 1, len(body) - 1, len(body) + 1, 10**6, 10**7, 10**18))
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    return Case("false length", [head % (rng.choice(POST_ROUTES), claimed) + body], half_close=True)


_MAKERS: Final[tuple[Callable[[random.Random], Case], ...]] = (
    *(_body, _body, _body, _body, _header, _header, _head_bytes, _garbage, _giant_header),
    *(_chunked, _chunked, _half_closed, _gone, _pipeline, _slow, _length_lies),
)


if __name__ == "__main__":
    sys.exit(main())
