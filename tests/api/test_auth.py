"""Keys, CORS and names, over a real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from albor_serve.api.app import AppSettings
from albor_serve.api.auth import ApiKeys, read_api_keys
from albor_serve.errors import ConfigError
from tests.api.live import Live, serving_tiny

PAGE = "https://editor.example"
BODY = {"prompt": "a", "max_tokens": 1}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    settings = AppSettings(api_keys=ApiKeys(["first", "second"]), cors_origins=(PAGE,))
    with serving_tiny(tmp_path_factory.mktemp("model"), settings) as live:
        yield live


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer third"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer first second"},
        {"authorization": "first"},
        {"authorization": "Basic first"},
        {"authorization": "Bearer FIRST"},
        {"x-api-key": "firs"},
        {"x-api-key": ""},
    ],
)
def test_without_a_key_everything_but_health_is_401(live: Live, headers: dict[str, str]) -> None:
    for method, path in (
        ("POST", "/v1/completions"),
        ("GET", "/v1/models"),
        ("GET", "/"),
        ("GET", "/openapi.json"),
        ("GET", "/nowhere"),
        ("GET", "//health"),
    ):
        answer = httpx.request(method, live.url + path, headers=headers, timeout=30)
        assert answer.status_code == 401, path
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{live.url}/health", headers=headers, timeout=30).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer first"},
        {"authorization": "bearer second"},
        {"x-api-key": "second"},
    ],
)
def test_each_key_opens(live: Live, headers: dict[str, str]) -> None:
    answer = httpx.post(f"{live.url}/v1/completions", json=BODY, headers=headers, timeout=30)
    assert answer.status_code == 200


def test_the_openai_client_brings_its_key(live: Live) -> None:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="first") as client:
        assert client.completions.create(model="albor-tiny", prompt="a", max_tokens=1).choices
    with (
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_a_preflight_needs_no_key_and_names_only_allowed_sites(live: Live) -> None:
    asks = {"access-control-request-method": "POST"}
    url = f"{live.url}/v1/completions"
    answer = httpx.options(url, headers={"origin": PAGE, **asks})
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in answer.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in answer.headers
    for origin in ("https://evil.example", f"{PAGE}.evil.example", "null", "http://editor.example"):
        refused = httpx.options(url, headers={"origin": origin, **asks})
        assert refused.status_code == 403
        assert "access-control-allow-origin" not in refused.headers


def test_an_allowed_page_can_read_answers_and_errors(live: Live) -> None:
    url = f"{live.url}/v1/completions"
    key = {"authorization": "Bearer first"}
    for headers, status in (({"origin": PAGE, **key}, 200), ({"origin": PAGE}, 401)):
        answer = httpx.post(url, json=BODY, headers=headers, timeout=30)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert answer.headers["vary"] == "origin"
    plain = httpx.post(url, json=BODY, headers=key, timeout=30)
    assert "access-control-allow-origin" not in plain.headers


def test_a_star_allows_every_site_but_no_foreign_host(tmp_path: Path) -> None:
    with serving_tiny(tmp_path, AppSettings(cors_origins=("*",))) as live:
        for origin in ("https://any.example", "null"):
            answer = httpx.get(f"{live.url}/health", headers={"origin": origin}, timeout=30)
            assert answer.headers["access-control-allow-origin"] == origin
        rebound = httpx.get(f"{live.url}/health", headers={"host": "any.example"}, timeout=30)
        assert rebound.status_code == 403


def test_keys_come_from_all_three_places(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n  in-file \n\nother\n")
    keys = read_api_keys(["given"], file, {"ALBOR_API_KEY": "one, two,"})
    for key in (b"given", b"in-file", b"other", b"one", b"two"):
        assert keys.accept(key)
    for key in (b"", b"# ours", b"one, two", b"give"):
        assert not keys.accept(key)
    assert not read_api_keys([], None, {})
    assert not read_api_keys([], None, {"ALBOR_API_KEY": ""})


@pytest.mark.parametrize(
    ("key", "content", "says"),
    [
        ("", None, "an API key is empty"),
        ("a\nb", None, "not printable"),
        ("é", None, "ASCII"),
        ("x" * 513, None, "longer than 512"),
        (" a", None, "space"),
        ("a", b"# nothing\n\n", "holds no key"),
        ("a", b"\xff\xfe", "not text"),
        ("a", b"a\n" * (1 << 20), "larger than"),
        ("a", b"a\n" * 1025, "1024 is the limit"),
    ],
)
def test_impossible_keys(tmp_path: Path, key: str, content: bytes | None, says: str) -> None:
    file = None
    if content is not None:
        file = tmp_path / "keys"
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        read_api_keys([key], file, {})


def test_a_missing_key_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--api-key-file"):
        read_api_keys([], tmp_path / "nowhere", {})
