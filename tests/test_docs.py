"""What the README and docs/ tell people to type exists: commands, options, files, targets."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest

from albor_serve.bench.cli import main as bench_main
from albor_serve.cli import main as serve_main
from albor_serve.errors import ConfigError
from albor_train.cli import main as train_main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAINS = {"albor-serve": serve_main, "albor-bench": bench_main, "albor-train": train_main}
SUBCOMMAND = re.compile(r"[a-z][a-z-]*")


def commands(page: Path) -> list[str]:
    """Lines of code blocks and inline code, continued lines joined, comments cut off."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:sh)?\n(.*?)```", text, re.DOTALL)
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = [line for b in blocks for line in re.sub(r"\\\n\s*", "", b).split("\n")]
    lines += re.findall(r"`([^`\n]+)`", outside)
    return [re.sub(r"\s+#.*", "", line).strip() for line in lines]


def help_text(program: str, *arguments: str) -> str | None:
    """What `program … --help` prints; None if there is no such subcommand."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = MAINS[program]([*arguments, "--help"])
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 0
    return out.getvalue() if code in (0, None) else None


ALBOR_COMMANDS = sorted(
    {
        (page.relative_to(ROOT).as_posix(), command)
        for page in PAGES
        for command in commands(page)
        if command.split(" ")[0] in MAINS
    }
)


@pytest.mark.parametrize(("page", "command"), ALBOR_COMMANDS)
def test_an_albor_command_and_its_options_exist(page: str, command: str) -> None:
    program, *words = command.split()
    sub = [words[0]] if words and SUBCOMMAND.fullmatch(words[0]) else []
    text = help_text(program, *sub)
    assert text is not None, f"{page}: {command}"
    for option in re.findall(r"--[a-z][a-z-]*", command):
        assert option in text, f"{page}: {command}: no {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_make_targets_scripts_extras_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    for command in commands(page):
        if found := re.fullmatch(r"make ([a-z0-9-]+)", command):
            assert f"\n{found[1]}:" in makefile, command
        if found := re.match(r"sh (\S+)", command):
            assert (ROOT / found[1]).is_file(), command
        for extra in re.findall(r"albor\[([a-z]+)\]", command):
            assert f"\n{extra} = [" in project, command
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:tests|docs|specs|scripts)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own, on import
def test_the_ray_command_names_an_application_and_its_options() -> None:
    pytest.importorskip("ray")
    [command] = [c for c in commands(ROOT / "docs" / "scale.md") if "serve run" in c]
    target, *pairs = shlex.split(command.partition("serve run ")[2])
    module, _, name = target.partition(":")
    application = importlib.import_module(module)
    assert callable(getattr(application, name))
    options = dict(pair.split("=") for pair in pairs)
    # `serve run` hands the application's function a dict of strings.
    assert application.build(options)
    with pytest.raises(ConfigError, match=r"replica is '2'.*options are .*replicas"):
        application.build({"replica": "2"})
    table = re.findall(r"^\| `(\w+)`", (ROOT / "docs" / "scale.md").read_text(), re.MULTILINE)
    assert sorted(table) == sorted(application.ScaleOptions.model_fields)
