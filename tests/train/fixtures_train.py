"""A tiny spec over generated source files, for tests of training."""

from __future__ import annotations

import random
from pathlib import Path

import yaml

WORDS = (
    "value total index name node graph item result count left right path key data".split()  # noqa: SIM905
)
VERBS = ["load", "make", "find", "join", "sort", "pick", "split", "merge", "trace", "bound"]


def source_file(seed: int, functions: int = 4) -> str:
    """A small module of its own: parses, has definitions and indentation."""
    rng = random.Random(seed)

    def word() -> str:
        return f"{rng.choice(VERBS)}_{rng.choice(WORDS)}{rng.choice(['', 's', '_id', '_map'])}"

    def statement() -> str:
        a, b, c = word(), word(), word()
        number = rng.randint(0, 99)
        kinds = [
            f"{a} = {b}({number}, {c})",
            f"{a} = [{b} + {number} for {b} in {c}]",
            f"if {a} > {number}:\n        return {b}({c})",
            f"for {a} in range({number}):\n        {b}({a}, {c})",
            f"while {a} != {b}:\n        {a} += {number}",
            f"{a}[{b}] = {{{number}: {c}}}",
            f"assert {a} is not {b}, '{c} {number}'",
        ]
        return "    " + rng.choice(kinds)

    lines = [f'"""The module {word()} of {word()}."""', "", f"import {word()}", ""]
    for number in range(functions):
        lines += ["", f"def {word()}_{seed}_{number}({rng.choice(WORDS)}, key={number}):"]
        lines += [statement() for _ in range(rng.randint(3, 8))]
        lines += [f"    return {word()}", ""]
    return "\n".join(lines)


def write_project(folder: Path, first_seed: int, num_files: int) -> None:
    """A folder of Python files in two packages."""
    for number in range(num_files):
        path = folder / f"pkg{number % 2}" / f"module_{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source_file(first_seed + number), "utf-8")


def tiny_spec_dict() -> dict[str, object]:
    """The smallest spec that trains: two projects, one of them held out."""
    return {
        "name": "tiny",
        "seed": 42,
        "data": {
            "folders": [
                {"path": "alpha", "project": "alpha", "licence": "MIT"},
                {"path": "beta", "project": "beta", "licence": "BSD-3-Clause"},
            ],
            "held_out": ["beta"],
        },
        "tokenizer": {"vocab_size": 512, "sample_bytes": 1_000_000},
        "model": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 16,
            "max_seq_len": 256,
        },
        "fim": {"chunk_chars": 500},
        "train": {
            "steps": 20,
            "epochs": 4,
            "batch_tokens": 1024,
            "micro_batch_rows": 2,
            "sequence_len": 256,
            "lr": 5e-3,
            "warmup_steps": 2,
            "dtype": "float32",
            "compile": False,
            "attention": "document_mask",
            "loss_chunk_tokens": 128,
            "checkpoint_every": 10,
            "validate_every": 10,
            "validation_tokens": 2048,
        },
    }


def write_tiny_spec(folder: Path, raw: dict[str, object] | None = None) -> Path:
    """The spec and its two projects on disk."""
    write_project(folder / "alpha", 0, 60)
    write_project(folder / "beta", 1000, 12)
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(raw or tiny_spec_dict()), "utf-8")
    return path
