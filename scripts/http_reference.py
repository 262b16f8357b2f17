"""Writes the reference part of docs/http.md from the server's own OpenAPI document.

Usage: python scripts/http_reference.py        (after a change of a route or of a body's fields)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

PAGE: Final = Path(__file__).resolve().parents[1] / "docs" / "http.md"
BEGIN: Final = "<!-- reference: made by scripts/http_reference.py -->\n"
LIMITS: Final = (
    ("minimum", "≥ {}"),
    ("exclusiveMinimum", "> {}"),
    ("maximum", "≤ {}"),
    ("exclusiveMaximum", "< {}"),
    ("maxLength", "≤ {} characters"),
    ("maxItems", "≤ {} items"),
    ("maxProperties", "≤ {} entries"),
)


def openapi() -> dict[str, Any]:
    """The document of a server; no model is loaded for it."""
    from albor_serve.api.app import create_app
    from albor_serve.api.completion import ServedModel
    from albor_serve.api.registry import ModelRegistry, ModelSource

    def load() -> ServedModel:
        raise AssertionError("nothing is asked of this server")

    document: dict[str, Any] = create_app(ModelRegistry([ModelSource("m", load)])).openapi()
    return document


def reference(document: dict[str, Any]) -> str:
    """All endpoints, then all bodies and answers that they name."""
    parts = document["components"]["schemas"]
    lines: list[str] = ["## Endpoints", ""]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            lines += _endpoint(method.upper(), path, operation)
    lines += ["## Bodies and answers", ""]
    for name, schema in parts.items():
        lines += _part(name, schema)
    return "\n".join(lines).rstrip() + "\n"


def page_with(text: str, document: dict[str, Any]) -> str:
    """A page's text with its reference part made anew."""
    head, mark, _ = text.partition(BEGIN)
    if not mark:
        raise SystemExit(f"{PAGE} has no line {BEGIN.strip()!r}: put it where the reference begins")
    return head + BEGIN + "\n" + reference(document)


def _endpoint(method: str, path: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"### {method} {path}"
    yield ""
    yield operation["summary"]
    yield ""
    for parameter in operation.get("parameters", ()):
        about = parameter.get("description", "")
        yield f"- `{parameter['name']}` in the {parameter['in']}. {about}".rstrip()
    body = operation.get("requestBody")
    if body is not None:
        yield f"- Body: {_type(body['content']['application/json']['schema'])}"
    statuses = []
    for status, response in operation["responses"].items():
        kinds = response.get("content", {})
        if status == "200":
            answers = [_answer(kind, content["schema"]) for kind, content in kinds.items()]
            yield f"- Answer: {' or '.join(answers)}"
        else:
            statuses.append(status)
    if statuses:
        yield f"- Errors: {', '.join(statuses)}"
    yield ""


def _answer(kind: str, schema: dict[str, Any]) -> str:
    if kind == "text/event-stream":
        return "`text/event-stream` with `stream`"
    return _type(schema) if kind == "application/json" else f"`{kind}`"


def _part(name: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f"### {name}"
    yield ""
    if "description" in schema:
        yield " ".join(schema["description"].split())
        yield ""
    if "properties" not in schema:
        yield f"{_type(schema)}"
        yield ""
        return
    required = schema.get("required", ())
    yield "| field | type | default | meaning |"
    yield "|---|---|---|---|"
    for field, value in schema["properties"].items():
        default = "needed" if field in required else _default(value.get("default"))
        about = value.get("description", "").replace("|", "\\|").replace("<", "&lt;")
        yield f"| `{field}` | {_type(value)} | {default} | {about} |"
    yield ""


def _default(value: Any) -> str:
    if value is None or value in ({}, []):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def _type(schema: dict[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        kinds = [_type(each) for each in schema["anyOf"] if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join(f"`{value}`" for value in values)
    kind = schema.get("type", "any")
    limits = [text.format(schema[key]) for key, text in LIMITS if key in schema]
    if kind == "array":
        inner = _type(schema["items"]) if "items" in schema else "any"
        kind = f"list of ({inner})" if " " in inner and "[" not in inner else f"list of {inner}"
    return f"{kind} {', '.join(limits)}" if limits else kind


def main() -> int:
    """Write the page; returns the exit status."""
    text = PAGE.read_text(encoding="utf-8")
    new = page_with(text, openapi())
    if new != text:
        PAGE.write_text(new, encoding="utf-8")
        sys.stdout.write(f"wrote {PAGE.name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
