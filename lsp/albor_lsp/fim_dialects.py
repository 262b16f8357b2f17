"""How servers other than albor-serve are asked to fill in the middle.

Each dialect turns a question into (path, body) and an event or answer into text. Which one a
server speaks is found out once, by `service`; see docs/lsp.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

__all__ = [
    "FAMILIES",
    "Family",
    "family_of",
    "infill_body",
    "stops_of",
    "suffix_body",
    "token_body",
]


@dataclass(frozen=True, slots=True)
class Family:
    """A model family's control tokens around prefix, suffix and middle, in PSM order."""

    name: str
    marks: tuple[str, ...]
    """Parts of model names, in lower case."""
    prefix: str
    suffix: str
    middle: str
    ends: tuple[str, ...]
    """Strings that end an answer."""


FAMILIES: Final = (
    Family(
        "qwen",
        ("qwen", "albor"),
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        ("<|endoftext|>", "<|fim_pad|>", "<|file_sep|>", "<|repo_name|>"),
    ),
    Family(
        "starcoder",
        ("starcoder", "granite", "smollm", "stable-code", "refact"),
        "<fim_prefix>",
        "<fim_suffix>",
        "<fim_middle>",
        ("<|endoftext|>", "<file_sep>"),
    ),
    Family(
        "deepseek",
        ("deepseek",),
        "<｜fim▁begin｜>",
        "<｜fim▁hole｜>",
        "<｜fim▁end｜>",
        ("<｜end▁of▁sentence｜>",),
    ),
    Family("codellama", ("codellama",), "<PRE> ", " <SUF>", " <MID>", ("<EOT>",)),
    Family(
        "codegemma",
        ("codegemma",),
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        ("<|file_separator|>",),
    ),
)
"""Published control tokens, by family."""


def family_of(model: str) -> Family | None:
    """The family that a model's name tells; None for none."""
    name = model.lower()
    return next((each for each in FAMILIES if any(mark in name for mark in each.marks)), None)


def stops_of(scope: str) -> list[str]:
    """Stop strings in place of a scope."""
    return {"line": ["\n"], "block": ["\n\n"], "scope": ["\n\n\n"]}.get(scope, [])


def infill_body(
    prefix: str, suffix: str, chunks: list[tuple[str, str]], scope: str, max_tokens: int
) -> dict[str, Any]:
    """llama-server's /infill. An empty line must be allowed as the first one, so a scope of a
    block has no stop string there."""
    return {
        "input_prefix": prefix,
        "input_suffix": suffix,
        "input_extra": [{"filename": path, "text": text} for path, text in chunks],
        "prompt": "",
        "n_predict": max_tokens,
        "temperature": 0,
        "cache_prompt": True,
        "stop": stops_of(scope),
        "stream": max_tokens > 0,
    }


def suffix_body(
    prefix: str, suffix: str, scope: str, max_tokens: int, model: str
) -> dict[str, Any]:
    """OpenAI's /v1/completions where the server knows `suffix`."""
    return {
        "model": model,
        "prompt": prefix,
        "suffix": suffix,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stop": stops_of(scope),
        "stream": True,
    }


def token_body(
    prefix: str, suffix: str, scope: str, max_tokens: int, model: str, family: Family
) -> dict[str, Any]:
    """/v1/completions with the control tokens written out."""
    return {
        "model": model,
        "prompt": f"{family.prefix}{prefix}{family.suffix}{suffix}{family.middle}",
        "max_tokens": max_tokens,
        "temperature": 0,
        "stop": [*stops_of(scope), *family.ends],
        "stream": True,
    }
