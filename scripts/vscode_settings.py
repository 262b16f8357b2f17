"""Writes the language server's settings into the VS Code extension's package.json and README.

Usage: python scripts/vscode_settings.py        (after a change in lsp/albor_lsp/settings.py)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
PACKAGE: Final = ROOT / "editors" / "vscode" / "package.json"
README: Final = PACKAGE.with_name("README.md")
TABLE_HEAD: Final = "| Setting | Default | Meaning |\n| --- | --- | --- |\n"
OWN: Final = ("enabled", "automatic", "path")
"""Settings that the extension itself carries out."""
BY_EDITOR: Final = ("enabled", "disabledLanguages")
"""Settings of the language server for which VS Code has a way of its own."""
OF_MACHINE: Final = ("serverCommand", "apiKey")
"""What no project's folder may set: a program to run, a secret."""
RESTRICTED: Final = ("serverUrl", "model", "startServer")
"""What a project's folder may set once the person trusts it: where the code is sent."""


def mirrored() -> dict[str, dict[str, Any]]:
    """The contributed properties that follow from the language server's settings."""
    from albor_lsp.settings import Settings, documented

    limits = {_camel(name): field for name, field in Settings.__dataclass_fields__.items()}
    properties: dict[str, dict[str, Any]] = {}
    for name, kind, default, about in documented():
        if name in BY_EDITOR:
            continue
        value: dict[str, Any] = {"type": kind, "default": default, "description": about}
        if kind == "list of strings":
            value |= {"type": "array", "items": {"type": "string"}}
        for key, limit in (("minimum", "least"), ("maximum", "most")):
            if (bound := limits[name].metadata[limit]) is not None:
                value[key] = bound
        if name in OF_MACHINE:
            value["scope"] = "machine"
        elif name in RESTRICTED:
            value["scope"] = "machine-overridable"
        properties[f"albor.{name}"] = value
    return properties


def updated(package: dict[str, Any]) -> dict[str, Any]:
    """The manifest with all mirrored settings, and no others beside the extension's own."""
    configuration = package["contributes"]["configuration"]
    own = {name: configuration["properties"][name] for name in (f"albor.{own}" for own in OWN)}
    mirror = mirrored()
    for order, value in enumerate(mirror.values(), len(own)):
        value["order"] = order
    trust = {
        "supported": "limited",
        "description": "A folder that is not trusted can't choose where code is sent.",
        "restrictedConfigurations": [f"albor.{name}" for name in RESTRICTED],
    }
    return package | {
        "capabilities": package["capabilities"] | {"untrustedWorkspaces": trust},
        "contributes": package["contributes"]
        | {"configuration": configuration | {"properties": own | mirror}},
    }


def readme_with_table(readme: str, package: dict[str, Any]) -> str:
    """The README with one row for each contributed setting."""
    rows = []
    for name, value in package["contributes"]["configuration"]["properties"].items():
        about = value.get("markdownDescription") or value["description"]
        default = json.dumps(value["default"])
        rows.append(f"| `{name}` | `{default}` | {about} |\n".replace("||", "\\|\\|"))
    before, _, rest = readme.partition(TABLE_HEAD)
    after = rest[rest.index("\n\n") + 1 :]
    return before + TABLE_HEAD + "".join(rows) + after


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.title() for part in rest)


def main() -> None:
    """Rewrite both files where they differ."""
    package = updated(json.loads(PACKAGE.read_text(encoding="utf-8")))
    _write(PACKAGE, json.dumps(package, indent=2, ensure_ascii=False) + "\n")
    _write(README, readme_with_table(README.read_text(encoding="utf-8"), package))


def _write(path: Path, text: str) -> None:
    if text != path.read_text(encoding="utf-8"):
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "lsp"))
    main()
