"""Who may talk to the server: API keys, names of this machine, pages of other sites."""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from albor_serve.api.errors import error_response
from albor_serve.errors import ConfigError, RequestError

__all__ = ["ApiKeys", "KeyCheck", "SiteCheck", "read_api_keys"]

MAX_KEYS = 1024
MAX_KEY_CHARS = 512
MAX_KEY_FILE_BYTES = 1 << 20
KEY_VARIABLE = "ALBOR_API_KEY"
OPEN_PATHS = frozenset({"/health"})
"""Answered without a key: supervisors have none."""
CORS_MAX_AGE_S = 600


class ApiKeys:
    """The keys that open the server. Only their digests are kept."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(sha256(key.encode()).digest() for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, key: bytes) -> bool:
        """Whether `key` is one of them; takes equally long whichever it is, and if it is none."""
        digest = sha256(key).digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found


def read_api_keys(
    given: Sequence[str], file: Path | None, environment: Mapping[str, str] = os.environ
) -> ApiKeys:
    """The keys from the command line, from a file (one a line; # starts a comment line) and from
    ALBOR_API_KEY (separated by commas).

    Raises:
        ConfigError: the file can't be read or holds no key; a key is empty or not plain ASCII.
    """
    keys = [*given]
    if file is not None:
        keys += _keys_in(file)
    keys += filter(None, (key.strip() for key in environment.get(KEY_VARIABLE, "").split(",")))
    if len(keys) > MAX_KEYS:
        raise ConfigError(f"{len(keys)} API keys were given: {MAX_KEYS} is the limit")
    for key in keys:
        if not 0 < len(key) <= MAX_KEY_CHARS or not key.isascii() or not key.isprintable():
            raise ConfigError(
                f"an API key is empty, longer than {MAX_KEY_CHARS} characters or not printable "
                f"ASCII: give a word such as one of `openssl rand -hex 24`"
            )
        if key != key.strip():
            raise ConfigError("an API key begins or ends with a space: quote it without")
    return ApiKeys(keys)


def _keys_in(file: Path) -> list[str]:
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_KEY_FILE_BYTES + 1)
        text = data.decode()
    except OSError as error:
        raise ConfigError(
            f"cannot read the key file {file} ({error.strerror}): check --api-key-file"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"the key file {file} is not text: put one key on each line") from None
    if len(data) > MAX_KEY_FILE_BYTES:
        raise ConfigError(
            f"the key file {file} is larger than {MAX_KEY_FILE_BYTES} bytes: check --api-key-file"
        )
    lines = (line.strip() for line in text.splitlines())
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        # Open to all is never what someone who names a key file wants.
        raise ConfigError(f"the key file {file} holds no key: put one on each line")
    return keys


class KeyCheck:
    """Middleware: 401 for requests without a key of ours.

    The key comes as `Authorization: Bearer KEY` (OpenAI's clients) or `X-Api-Key: KEY`.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 or pass the request on."""
        if scope["type"] == "http" and self._keys and scope["path"] not in OPEN_PATHS:
            offered = _offered_key(scope)
            if offered is None or not self._keys.accept(offered):
                error = RequestError(
                    "this server needs an API key: send it as Authorization: Bearer KEY",
                    code="invalid_api_key",
                )
                response = error_response(error, 401)
                response.headers["www-authenticate"] = "Bearer"
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _offered_key(scope: Scope) -> bytes | None:
    headers: dict[bytes, bytes] = dict(scope["headers"])
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return key.strip()
    return headers.get(b"x-api-key")


class SiteCheck:
    """Middleware: refuses what a web page of another site sends, and answers for allowed ones.

    A request whose Host is not a name of ours comes from a page that has pointed its own name at
    this machine (DNS rebinding). A request with an Origin of another site is refused, unless that
    origin is allowed: then it gets the headers of CORS (never with credentials).
    """

    def __init__(
        self,
        app: ASGIApp,
        allowed_hosts: tuple[str, ...] | None,
        cors_origins: tuple[str, ...] = (),
    ) -> None:
        """`allowed_hosts`: names without port, None for any. `cors_origins`: as browsers send
        them ("https://example.org:8443"), or "*" for every site."""
        self._app = app
        self._allowed_hosts = allowed_hosts
        self._cors_origins = frozenset(origin.lower().rstrip("/") for origin in cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403 or a preflight, or pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        is_cors = bool(origin) and bool(self._cors_origins & {origin, "*"})
        refusal = self._refusal(headers.get(b"host", b""), "" if is_cors else origin)
        if refusal is not None:
            error = RequestError(refusal, code="host_not_allowed")
            await error_response(error, 403)(scope, receive, send)
            return
        if not is_cors:
            await self._app(scope, receive, send)
            return
        extra = [(b"access-control-allow-origin", headers[b"origin"]), (b"vary", b"origin")]
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            await _answer_preflight(send, extra)
            return

        async def send_with_cors(message: Message) -> None:
            if message["type"] == "http.response.start":
                exposed = (b"access-control-expose-headers", b"x-request-id")
                message = {**message, "headers": [*message["headers"], *extra, exposed]}
            await send(message)

        await self._app(scope, receive, send_with_cors)

    def _refusal(self, host: bytes, origin: str) -> str | None:
        if self._allowed_hosts is None:
            return None
        if origin and "://" not in origin:  # "null": a sandboxed page or a local file
            return "this Origin is not allowed: see --cors-origin"
        site = origin.partition("://")[2]
        for name in (host.decode("latin-1").lower(), site):
            if name and _without_port(name) not in self._allowed_hosts:
                return (
                    "this server answers only to pages and names of this machine: use 127.0.0.1 "
                    "or localhost, or start it with --host and the name, or --cors-origin"
                )
        return None


async def _answer_preflight(send: Send, extra: list[tuple[bytes, bytes]]) -> None:
    headers = [
        *extra,
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", b"authorization, content-type, x-api-key, x-request-id"),
        (b"access-control-max-age", str(CORS_MAX_AGE_S).encode()),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def _without_port(host: str) -> str:
    """The name in "name:port"; IPv6 addresses keep their brackets."""
    return host if host.endswith("]") else host.rsplit(":", 1)[0]
