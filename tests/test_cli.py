"""The commands as a person runs them: separate processes, real files, real signals."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from albor_serve.checkpoint.gguf_header import open_gguf_header
from tests.api.live import tiny_gguf
from tests.fixtures_tiny import save_hf_folder, tiny_model

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-c", "import sys; from albor_serve.cli import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("model"))


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONUNBUFFERED": "1"}


def run(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], cwd=ROOT, env=env, capture_output=True, text=True
    )


class Server:
    """albor-serve in a process of its own."""

    def __init__(
        self,
        *arguments: str | Path,
        env: dict[str, str] | None = None,
        url: str = r"http://\S+",
    ) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, arguments), "--port", "0"],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.greeting = [self.process.stdout.readline() for _ in range(3)]
        found = re.search(url, self.greeting[1])
        assert found, self.stop(signal.SIGKILL)
        self.url = found.group()

    def stop(self, number: int) -> tuple[int, str]:
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    started: list[Server] = []
    yield started
    for server in started:
        server.stop(signal.SIGKILL)  # does nothing to one that has ended, but closes its pipes


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serves_a_file_until_a_signal_and_exits_0(
    gguf: Path, servers: list[Server], number: int
) -> None:
    server = Server(gguf, "--slots", "2", "--alias", "code", "--alias", "other")
    servers.append(server)
    assert "2 slots of 256 tokens" in server.greeting[0]
    assert "fill-in-the-middle: albor" in server.greeting[0]
    assert "first token in" in server.greeting[1]
    assert server.greeting[2].startswith("try: curl")
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "model": "other"})
    assert answer.json()["model"] == "code"
    code, errors = server.stop(number)
    assert (code, errors) == (0, "")


def test_the_address_answers_as_soon_as_it_is_printed(gguf: Path, servers: list[Server]) -> None:
    for _ in range(3):
        server = Server(gguf)
        host, _, port = server.url.removeprefix("http://").partition(":")
        servers.append(server)
        socket.create_connection((host, int(port)), timeout=5).close()


def test_keys_come_from_the_environment_and_the_command_line(
    gguf: Path, env: dict[str, str], servers: list[Server]
) -> None:
    server = Server(gguf, "--api-key", "given", env={**env, "ALBOR_API_KEY": "known"})
    servers.append(server)
    for key, status in (("given", 200), ("known", 200), ("other", 401)):
        headers = {"authorization": f"Bearer {key}"}
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == status


def test_a_unix_socket_is_ours_alone_and_goes_at_the_end(
    gguf: Path, tmp_path: Path, servers: list[Server]
) -> None:
    path = tmp_path / "albor.sock"
    with socket.socket(socket.AF_UNIX) as abandoned:
        abandoned.bind(str(path))  # as a killed server leaves it
    server = Server(gguf, "--uds", path, url=r"unix:\S+")
    servers.append(server)
    assert path.stat().st_mode & 0o077 == 0
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as http:
        assert http.get("http://localhost/health").status_code == 200
        assert http.get("http://evil.example/health").status_code == 403
    second = run(gguf, "--uds", path)
    assert second.returncode == 2
    assert_one_line(second)
    assert path.exists()
    command = server.greeting[2].removeprefix("try: ").strip()
    output = subprocess.run(["sh", "-c", f"{command} -s"], capture_output=True, text=True)
    assert json.loads(output.stdout)["choices"]
    assert server.stop(signal.SIGTERM) == (0, "")
    assert not path.exists()


def test_serves_https(gguf: Path, tmp_path: Path, servers: list[Server]) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert),
        ],
        capture_output=True,
    )
    assert made.returncode == 0, made.stderr
    result = run(gguf, "--tls-cert", cert)
    assert result.returncode == 2
    assert_one_line(result)
    server = Server(gguf, "--tls-cert", cert, "--tls-key", key, url=r"https://\S+")
    servers.append(server)
    context = ssl.create_default_context(cafile=str(cert))
    with httpx.Client(base_url=server.url, verify=context) as http:
        answer = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
    assert answer.status_code == 200


def test_the_example_in_the_greeting_works(gguf: Path, servers: list[Server]) -> None:
    server = Server(gguf)
    servers.append(server)
    command = server.greeting[2].removeprefix("try: ")
    output = subprocess.run(["sh", "-c", f"{command.strip()} -s"], capture_output=True, text=True)
    assert json.loads(output.stdout)["choices"][0]["text"]


def test_a_running_answer_is_finished_before_the_exit(gguf: Path, servers: list[Server]) -> None:
    server = Server(gguf)
    servers.append(server)
    body = {"prompt": "a", "max_tokens": 240, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGINT)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(20) == 0


def test_a_port_in_use_is_one_line(gguf: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        result = run(gguf, "--port", str(port))
    assert result.returncode == 2
    assert f"port {port}" in result.stderr
    assert "--port" in result.stderr
    assert_one_line(result)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["/nowhere/model.gguf"], 1, "no model at"),
        (["--port", "99999"], 2, "port"),
        (["--port", "x"], 2, "--port"),
        (["--slots", "0"], 2, "num_slots"),
        (["--ctx", "7"], 2, "max_seq_len"),
        (["--ctx", "0", "--port", "0"], 2, "max_seq_len"),
        (["--threads", "0"], 2, "--threads"),
        (["--alias", ""], 2, "--alias"),
        (["--api-key", ""], 2, "API key"),
        (["--uds", "/nowhere/albor.sock"], 2, "--uds"),
        (["--uds", "/tmp/" + "x" * 200], 2, "--uds"),
        (["--tls-cert", "/nowhere/cert.pem"], 2, "--tls-cert"),
        (["--tls-key", "/nowhere/key.pem"], 2, "--tls-cert"),
        (["--api-key-file", "/nowhere/keys"], 2, "--api-key-file"),
        (["--cors-origin", "example.org"], 2, "--cors-origin"),
        (["--host", ""], 2, "--host"),
        (["--ctx", "100000000"], 2, "--ctx"),
        (["--host", "203.0.113.1"], 2, "cannot listen"),
        (["--nonsense"], 2, "--help"),
        (["convert"], 2, "SRC"),
        (["convert", "/nowhere", "/tmp/out.gguf"], 1, "nowhere"),
        (["convert", "a", "b", "--quant", "q1"], 2, "quant"),
    ],
)
def test_bad_arguments_are_one_line(gguf: Path, arguments: list[str], code: int, says: str) -> None:
    has_model = not arguments[0].startswith("-")
    result = run(*([] if has_model else [gguf]), *arguments)
    assert result.returncode == code, result.stderr
    assert says in result.stderr
    assert_one_line(result)


def test_files_that_are_no_models_are_one_line(tmp_path: Path, gguf: Path) -> None:
    data = gguf.read_bytes()
    for name, content in (
        ("empty.gguf", b""),
        ("text.gguf", b"hello" * 100),
        ("cut.gguf", data[: len(data) // 2]),
        ("huge.gguf", data[:8] + b"\xff" * 16 + data[24:]),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        result = run(path, "--port", "0")
        assert result.returncode == 1, result.stderr
        assert_one_line(result)
    (tmp_path / "folder").mkdir()
    result = run(tmp_path / "folder", "--port", "0")
    assert result.returncode == 1
    assert_one_line(result)


def assert_one_line(result: subprocess.CompletedProcess) -> None:
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("albor-serve: ")
    assert "Traceback" not in result.stderr


def test_too_little_memory_is_told_before_loading(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from albor_serve import loader
    from albor_serve.errors import ConfigError

    monkeypatch.setattr(loader, "_available_bytes", lambda: 1000)
    with pytest.raises(ConfigError, match=r"lower --ctx or --slots"):
        loader.load_model(gguf, loader.LoadOptions())


def test_reads_the_free_memory(tmp_path: Path) -> None:
    from albor_serve.loader import _available_bytes

    file = tmp_path / "meminfo"
    file.write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    assert _available_bytes(file) == 2048 * 1024
    file.write_text("MemAvailable: none\n")
    assert _available_bytes(file) is None
    assert _available_bytes(tmp_path / "missing") is None


def test_help_and_version_teach_and_need_no_model() -> None:
    for arguments, says in (
        (["--help"], "examples:"),
        (["convert", "--help"], "--quant"),
        (["--version"], "albor"),
    ):
        result = run(*arguments)
        assert result.returncode == 0
        assert says in result.stdout


def test_converts_a_folder_and_says_what_it_made(tmp_path: Path, env: dict[str, str]) -> None:
    folder = save_hf_folder(tmp_path / "tiny", *tiny_model("qwen2"))
    out = tmp_path / "out.gguf"
    result = run("convert", folder, out, "--quant", "q8_0", env=env)
    assert result.returncode == 0, result.stderr
    assert "MB" in result.stdout
    assert open_gguf_header(out).architecture == "qwen2"
    assert {path.name for path in tmp_path.iterdir()} <= {"tiny", "out.gguf", "cache"}


def test_serves_a_folder_and_converts_it_once(
    tmp_path: Path, env: dict[str, str], servers: list[Server]
) -> None:
    folder = save_hf_folder(tmp_path / "tiny", *tiny_model("llama"))
    for _ in range(2):
        server = Server(folder, env=env)
        servers.append(server)
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"})
        assert answer.json()["model"] == "tiny"
        assert server.stop(signal.SIGTERM)[0] == 0
    assert len(list((tmp_path / "cache").rglob("*.gguf"))) == 1


def test_a_gpu_that_is_not_there_ends_the_start_or_leaves_it_to_the_cpu(
    gguf: Path, servers: list[Server], env: dict[str, str]
) -> None:
    env |= {"CUDA_VISIBLE_DEVICES": "", "TERM": "dumb"}
    refused = run(gguf, "--backend", "cuda", "--port", "0", env=env)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "--backend cuda" in refused.stderr
    server = Server(gguf, "--backend", "cuda", "--fallback", "cpu", env=env)
    servers.append(server)
    assert "on cpu" in server.greeting[0]
    assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"}).status_code == 200
    degraded = httpx.get(f"{server.url}/health").json()["degraded"]
    code, errors = server.stop(signal.SIGTERM)
    assert code == 0
    assert errors.count("\n") == 1
    assert degraded in errors


def test_a_fallback_needs_a_gpu_to_fall_from(gguf: Path) -> None:
    result = run(gguf, "--fallback", "cpu", "--port", "0")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "--fallback cpu needs --backend cuda" in result.stderr
