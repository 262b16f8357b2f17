"""Finding a completion server, or starting one."""

from __future__ import annotations

import os
from collections.abc import Callable

from albor_lsp.http import Address, parse_address
from albor_lsp.settings import Settings

__all__ = ["Launcher"]


class Launcher:
    """Knows where the server is; `close` when done."""

    async def find(self, settings: Settings, tell: Callable[[str], None]) -> Address:  # noqa: ARG002
        """The address of the server to use.

        Raises:
            LspError: there is none, with a remedy.
        """
        url = settings.server_url or os.environ.get("ALBOR_SERVER_URL", "")
        return parse_address(url) if url else Address()

    def close(self) -> None:
        """Give up what was started."""
