"""The albor command: setting up editors, and finding out what is wrong."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from albor_lsp import __version__
from albor_lsp.command import Parser, exit_code

__all__ = ["main"]

MARKS = {"ok": "ok  ", "note": "note", "bad": "BAD "}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (0 fine, 1 failed or found bad, 2 wrong usage)."""
    return exit_code("albor", lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    options = _parser().parse_args(argv)
    if options.command == "doctor":
        return _doctor(options)
    return _remove() if options.remove else _set_up(options)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="albor", description="Code completion from your own machine.")
    parser.add_argument("--version", action="version", version=f"albor {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    setup = commands.add_parser("setup", help="set up the editors that are installed")
    setup.add_argument("--yes", action="store_true", help="write without asking")
    setup.add_argument("--remove", action="store_true", help="take back all that setup wrote")
    doctor = commands.add_parser("doctor", help="look at everything and say what to do")
    doctor.add_argument("--quick", action="store_true", help="don't ask for a suggestion")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


def _set_up(options: argparse.Namespace) -> int:
    from albor_lsp.setup import apply, find_editors, plan

    editors = find_editors()
    if not editors:
        print("No editor found on the PATH: docs/editors.md tells how to set up others.")
        return 0
    for editor in editors:
        print(f"found {editor.name}: {editor.program}")
    changes, by_hand = plan(editors)
    for line in by_hand:
        print(f"by hand: {line}")
    if not changes:
        print("Nothing to write.")
        return 0
    print("Would write:" if not options.yes else "Writing:")
    for change in changes:
        print(f"  {change.path}" + (" (a block at its end)" if change.is_block else ""))
        if change.is_block:
            print("".join(f"    {line}" for line in change.text.splitlines(True)), end="")
    if not options.yes and not _agrees():
        print("Nothing was written.")
        return 0
    apply(changes)
    print("Done. `albor setup --remove` takes it back; `albor doctor` looks whether it works.")
    return 0


def _agrees() -> bool:
    print("Write this? [y/N] ", end="", flush=True)
    answer = sys.stdin.readline().strip().lower()
    if not answer:
        print()
    return answer in ("y", "yes")


def _remove() -> int:
    from albor_lsp.setup import remove

    lines = remove()
    print("\n".join(lines) if lines else "There is nothing that setup wrote.")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from albor_lsp.doctor import examine

    findings = []
    for finding in examine(attempt=not options.quick):
        findings.append(finding)
        if not options.json:
            print(f"{MARKS[finding.verdict]}  {finding.what}", flush=True)
            if finding.remedy:
                print(f"      do: {finding.remedy}", flush=True)
    if options.json:
        print(json.dumps([dataclasses.asdict(each) for each in findings], indent=1))
    return int(any(each.verdict == "bad" for each in findings))


if __name__ == "__main__":
    sys.exit(main())
