"""What albor's commands share: one line for each error, and one exit code for each kind."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from albor_lsp.errors import LspError, SettingsError

__all__ = ["Parser", "exit_code"]


class Parser(argparse.ArgumentParser):
    """Raises SettingsError where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        """See `argparse.ArgumentParser.error`."""
        raise SettingsError(f"{message}: see {self.prog} --help")


def exit_code(program: str, run: Callable[[], int]) -> int:
    """What `run` returns; 2 for wrong usage, 1 for another failure, told on standard error."""
    try:
        return run()
    except SettingsError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except (LspError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
