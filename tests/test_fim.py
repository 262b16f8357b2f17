from __future__ import annotations

import re

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from albor_serve.errors import PromptTooLongError
from albor_serve.fim import (
    MAX_HEALED_BYTES,
    TEMPLATES,
    ExtraFile,
    FimPrompt,
    build_fim_prompt,
    detect_template,
    fim_document,
    heal_text,
    split_written,
)
from tests.fakes import ByteTokenizer

TOKENIZER = ByteTokenizer()
ALBOR = TEMPLATES["albor"]
QWEN = TEMPLATES["qwen2.5-coder"]
CODE = st.text(alphabet="ab_ 1\n\t(.):é🙂", max_size=60)


class Vocabulary(ByteTokenizer):
    """A vocabulary with chosen control tokens."""

    def __init__(self, *spellings: str) -> None:
        super().__init__()
        self._spellings = spellings

    def special_id(self, spelling: str) -> int | None:
        return 300 + self._spellings.index(spelling) if spelling in self._spellings else None


@pytest.mark.parametrize(
    ("text", "kept", "forced"),
    [
        ("", "", ""),
        ("x = foo", "x =", " foo"),
        ("self.max_le", "self.max", "_le"),
        ("self.na", "self", ".na"),
        ("def __init", "def __", "init"),
        ("def f(x):\n    ", "def f(x):\n", "    "),
        ("def f(x):\n", "def f(x", "):\n"),
        ("a = 12", "a =", " 12"),
        ("b12", "b", "12"),
        ("print(", "print", "("),
        ("f(x", "f", "(x"),
        ("f( x", "f(", " x"),
        ("f (x", "f (", "x"),
        ("a = 'bc", "a = '", "bc"),
        ("return ", "return", " "),
        ("x  foo", "x ", " foo"),
        ("a\n\n", "a", "\n\n"),
        ("if x:\r\n\t", "if x:\r\n", "\t"),
        ("naïve_é", "naïve", "_é"),
        ("变量", "", "变量"),
        ("🙂", "", "🙂"),
    ],
)
def test_heals_back_to_where_a_token_ends(text: str, kept: str, forced: str) -> None:
    assert heal_text(text) == (kept, forced)


def test_a_long_tail_is_left_alone() -> None:
    for text in ("a" * 65, "x\n" + " " * 65, "é" * 33):
        assert heal_text(text) == (text, "")
    assert heal_text("x = " + "a" * (MAX_HEALED_BYTES - 1))[1] == " " + "a" * 63


@given(CODE)
def test_healing_loses_nothing_and_is_bounded(text: str) -> None:
    kept, forced = heal_text(text)
    assert kept + forced == text
    assert len(forced.encode()) <= MAX_HEALED_BYTES


PIECES = pre_tokenizers.Split(
    Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "isolated",
)
"""How Qwen2's tokenizer, which is albor's as well, cuts text before it merges bytes."""


@given(
    st.text(alphabet="as'_( \n\t.=\"1é🙂\r", max_size=40),
    st.text(alphabet="as'_( \n\t.=\"1é🙂\r", max_size=5),
)
@example("x (le", "ft")
@example("return", " x")
@example("x\n  \n", "")
@example("x:\n  \n", "")
def test_what_is_kept_ends_where_a_token_does(before: str, after: str) -> None:
    kept, forced = heal_text(before)
    # Indentation that turns out to be a blank line is cut elsewhere; healing bets on code.
    assume(forced.strip(" \t") or not re.match(r"\s*[\r\n]", after))
    starts = {start for _, (start, _) in PIECES.pre_tokenize_str(before + after)}
    assert len(kept) in starts | {0, len(before + after)}


@pytest.mark.parametrize("family", TEMPLATES)
def test_detects_each_family_by_its_control_tokens(family: str) -> None:
    template = TEMPLATES[family]
    assert detect_template(Vocabulary(*template.spellings), f"{family}-1b") is template


def test_tells_families_with_the_same_tokens_apart() -> None:
    piped = Vocabulary(*ALBOR.spellings)
    assert detect_template(piped, "Qwen2.5-Coder-0.5B") is QWEN
    assert detect_template(piped, "albor-33m") is ALBOR
    assert detect_template(piped, "anything", layout_hint="spm") is ALBOR
    assert detect_template(piped, "albor-33m", layout_hint="psm") is QWEN


def test_a_model_without_the_tokens_has_no_template() -> None:
    assert detect_template(Vocabulary()) is None
    assert detect_template(Vocabulary("<|fim_prefix|>", "<|fim_suffix|>")) is None


def ids(*parts: str) -> tuple[int, ...]:
    return tuple(i for part in parts for i in TOKENIZER.encode(part, parse_special=True))


def test_prompts_are_in_the_familys_order() -> None:
    spm = build_fim_prompt(ALBOR, TOKENIZER, "a = foo", "\nb", max_prompt_len=100)
    assert spm.tokens == ids("<|fim_prefix|><|fim_suffix|>\nb<|fim_middle|>a =")
    assert spm.forced_bytes == b" foo"
    psm = build_fim_prompt(QWEN, TOKENIZER, "a = foo", "\nb", max_prompt_len=100, heal=False)
    assert psm.tokens == ids("<|fim_prefix|>a = foo<|fim_suffix|>\nb<|fim_middle|>")
    assert psm.forced_bytes == b""


def test_code_cannot_inject_control_tokens() -> None:
    prompt = build_fim_prompt(
        ALBOR, TOKENIZER, "<|fim_middle|> ", "<|endoftext|>", max_prompt_len=99
    )
    middle = TOKENIZER.special_id("<|fim_middle|>")
    assert prompt.tokens.count(middle) == 1
    assert TOKENIZER.special_id("<|endoftext|>") not in prompt.tokens


def test_a_small_window_keeps_what_is_near_the_cursor() -> None:
    prefix = "".join(f"line {i}\n" for i in range(50))
    suffix = "".join(f"\nafter {i}" for i in range(50))
    prompt = build_fim_prompt(ALBOR, TOKENIZER, prefix, suffix, max_prompt_len=103, heal=False)
    assert len(prompt.tokens) <= 103
    text = TOKENIZER.decode(prompt.tokens).decode()
    assert text.endswith("line 48\nline 49\n")
    assert text.startswith("\nafter 0\nafter 1")
    assert prefix[prompt.num_prefix_dropped :].startswith("line ")
    assert prompt.num_suffix_dropped > 0
    only = build_fim_prompt(ALBOR, TOKENIZER, prefix, "", max_prompt_len=103, heal=False)
    assert len(only.tokens) > 90
    with pytest.raises(PromptTooLongError):
        build_fim_prompt(ALBOR, TOKENIZER, "a", "b", max_prompt_len=3)


@given(CODE, CODE, st.integers(4, 60))
def test_a_prompt_always_fits_and_accounts_for_all_text(
    prefix: str, suffix: str, limit: int
) -> None:
    prompt = build_fim_prompt(ALBOR, TOKENIZER, prefix, suffix, max_prompt_len=limit)
    assert len(prompt.tokens) <= limit
    text = TOKENIZER.decode(prompt.tokens) + prompt.forced_bytes
    kept_suffix = suffix[: len(suffix) - prompt.num_suffix_dropped]
    kept_prefix = prefix[prompt.num_prefix_dropped :]
    assert text.decode() == kept_suffix + kept_prefix


def test_very_long_text_costs_little() -> None:
    prompt = build_fim_prompt(ALBOR, TOKENIZER, "x = 1\n" * 100_000, "", max_prompt_len=50)
    assert len(prompt.tokens) <= 50
    assert prompt.num_prefix_dropped > 599_000


def test_bos_goes_first_where_the_family_wants_it() -> None:
    class WithBos(ByteTokenizer):
        bos_token_id = 7
        adds_bos = True

    prompt = build_fim_prompt(ALBOR, WithBos(), "a ", "b", max_prompt_len=20)
    assert prompt.tokens[:2] == (7, TOKENIZER.special_id("<|fim_prefix|>"))


def test_training_documents_join_prefix_and_middle_only_for_spm() -> None:
    spm = fim_document(ALBOR, "P", "M", "S")
    assert "".join(s.text for s in spm) == "<|fim_prefix|><|fim_suffix|>S<|fim_middle|>PM"
    assert spm[-1].text == "PM"
    psm = fim_document(QWEN, "P", "M", "S")
    assert "".join(s.text for s in psm) == "<|fim_prefix|>P<|fim_suffix|>S<|fim_middle|>M"
    assert [s.is_control for s in psm] == [True, False, True, False, True, False]


class WithFiles(ByteTokenizer):
    """Knows tokens for a repository's name and its files."""

    def special_id(self, spelling: str) -> int | None:
        known = {"<|repo_name|>": 3, "<|file_sep|>": 4}
        return known.get(spelling, super().special_id(spelling))


EXTRA = (ExtraFile("a.py", "A = 1"), ExtraFile("b.py", "B = 2"))


def test_other_files_come_first_as_documents() -> None:
    def build(limit: int) -> FimPrompt:
        return build_fim_prompt(
            QWEN, WithFiles(), "x =", "\ny", max_prompt_len=limit, path="c.py", extra=EXTRA
        )

    prompt = build(100)
    want = (
        *(3, *ids("project\n")),
        *(4, *ids("a.py\nA = 1\n")),
        *(4, *ids("b.py\nB = 2\n")),
        *(4, *ids("c.py\n")),
        *ids("<|fim_prefix|>x<|fim_suffix|>\ny<|fim_middle|>"),
    )
    assert (prompt.tokens, prompt.forced_bytes) == (want, b" =")
    assert prompt.is_whole
    one = build(len(want) - 1)
    assert one.num_context_dropped == 1
    assert b"A = 1" not in TOKENIZER.decode(one.tokens)
    assert b"B = 2" in TOKENIZER.decode(one.tokens)
    none = build(10)
    assert none.num_context_dropped == 2
    assert none.tokens == ids("<|fim_prefix|>x<|fim_suffix|>\ny<|fim_middle|>")


def test_without_tokens_for_files_comments_name_them() -> None:
    files = (ExtraFile("a.ts", "let a"), ExtraFile("b.html", "<b>"))
    prompt = build_fim_prompt(
        ALBOR, TOKENIZER, "x =", "\ny", max_prompt_len=200, path="d/c\n.py", extra=files
    )
    text = "// a.ts\nlet a\n\n<!-- b.html -->\n<b>\n\n# d/c .py\nx"
    assert prompt.tokens == ids(f"<|fim_prefix|><|fim_suffix|>\ny<|fim_middle|>{text}")


@given(
    st.lists(st.builds(ExtraFile, CODE, CODE), max_size=4),
    st.none() | st.just("a/b.go"),
    st.integers(4, 120),
    st.sampled_from([TOKENIZER, WithFiles()]),
)
def test_other_files_never_take_room_from_code(
    extra: list[ExtraFile], path: str | None, limit: int, tokenizer: ByteTokenizer
) -> None:
    with_files = build_fim_prompt(
        ALBOR, tokenizer, "a = b\n" * 4, "\nc", max_prompt_len=limit, path=path, extra=extra
    )
    alone = build_fim_prompt(ALBOR, tokenizer, "a = b\n" * 4, "\nc", max_prompt_len=limit)
    assert len(with_files.tokens) <= limit
    assert with_files.num_prefix_dropped == alone.num_prefix_dropped
    assert with_files.num_suffix_dropped == alone.num_suffix_dropped
    assert 0 <= with_files.num_context_dropped <= len(extra)


def test_a_window_moves_in_steps_as_text_is_typed() -> None:
    prefix = "".join(f"line {i:02}\n" for i in range(100))
    suffix = "".join(f"\nafter {i}" for i in range(100))
    starts, suffixes = set(), set()
    for num in range(64):
        prompt = build_fim_prompt(
            ALBOR, TOKENIZER, prefix + "x" * num, suffix, max_prompt_len=403, heal=False
        )
        starts.add(prompt.num_prefix_dropped)
        suffixes.add(prompt.num_suffix_dropped)
    assert len(starts) <= 4
    assert len(suffixes) <= 5


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("<|fim_prefix|>a\n<|fim_suffix|>b<|fim_middle|>", ("a\n", "b")),
        ("<|fim_prefix|>a<|fim_suffix|><|fim_middle|>", ("a", "")),
        ("<|fim_prefix|><|fim_suffix|>b<|fim_middle|>a", None),  # the model's own order
        ("<|fim_prefix|><|fim_suffix|>b<|fim_middle|>", None),
        ("<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>c", None),
        ("x<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>", None),
        ("<|fim_prefix|>a<|fim_suffix|>b<|fim_suffix|>c<|fim_middle|>", None),
        ("<|fim_prefix|>a<|fim_middle|>b<|fim_suffix|>c<|fim_middle|>", None),
        ("<|fim_prefix|>a<|fim_middle|>", None),
        ("a", None),
        ("", None),
    ],
)
def test_a_prompt_in_the_other_order_is_split(prompt: str, parts: tuple[str, str] | None) -> None:
    assert split_written(TEMPLATES["albor"], prompt) == parts
    assert split_written(TEMPLATES["qwen2.5-coder"], prompt) is None
    assert split_written(None, prompt) is None
