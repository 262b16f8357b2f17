"""Fill-in-the-middle: how code around a cursor becomes a prompt, for each model family.

The one definition of the transform (Bavarian et al. 2022): training, evaluation and serving use
it alike. A template is the order in which a family puts control tokens and text. Where the text
before the cursor comes last (SPM), typing only appends tokens, so the KV cache stays useful.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from albor_serve.errors import PromptTooLongError
from albor_serve.tokenizer import Tokenizer

__all__ = [
    "TEMPLATES",
    "ExtraFile",
    "FimPrompt",
    "FimTemplate",
    "Segment",
    "build_fim_prompt",
    "detect_template",
    "fim_document",
    "heal_text",
    "split_written",
]


@dataclass(frozen=True, slots=True)
class Text:
    """A place in a template where code goes."""

    role: Literal["prefix", "suffix"]


PREFIX: Final = Text("prefix")
SUFFIX: Final = Text("suffix")


@dataclass(frozen=True, slots=True)
class FimTemplate:
    """Order of control tokens (by their spelling) and text in one family's prompts."""

    family: str
    parts: tuple[str | Text, ...]

    @property
    def spellings(self) -> tuple[str, ...]:
        """The control tokens that the vocabulary must have."""
        return tuple(part for part in self.parts if isinstance(part, str))

    @property
    def grows_at_the_end(self) -> bool:
        """Whether typing only appends tokens to the prompt."""
        return self.parts[-1] == PREFIX


_PIPED = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")

TEMPLATES: Final = {
    template.family: template
    for template in (
        FimTemplate("albor", (_PIPED[0], _PIPED[1], SUFFIX, _PIPED[2], PREFIX)),
        FimTemplate("qwen2.5-coder", (_PIPED[0], PREFIX, _PIPED[1], SUFFIX, _PIPED[2])),
        FimTemplate(
            "deepseek-coder",
            ("<｜fim▁begin｜>", PREFIX, "<｜fim▁hole｜>", SUFFIX, "<｜fim▁end｜>"),  # noqa: RUF001
        ),
        FimTemplate("codellama", ("▁<PRE>", PREFIX, "▁<SUF>", SUFFIX, "▁<MID>")),
        # StarCoder 1 and 2, Granite Code and SantaCoder's successors share these.
        FimTemplate("starcoder", ("<fim_prefix>", PREFIX, "<fim_suffix>", SUFFIX, "<fim_middle>")),
        FimTemplate("mellum", ("<fim_suffix>", SUFFIX, "<fim_prefix>", PREFIX, "<fim_middle>")),
        FimTemplate(
            "seed-coder",
            ("<[fim-suffix]>", SUFFIX, "<[fim-prefix]>", PREFIX, "<[fim-middle]>"),
        ),
    )
}
"""Families by name, in the order in which `detect_template` tries them."""

_NAMED = ("albor", "mellum")
"""Families that share their control tokens with another and are told apart by name."""


def detect_template(
    tokenizer: Tokenizer, model_name: str = "", layout_hint: str | None = None
) -> FimTemplate | None:
    """The template of a model, or None where its vocabulary knows no fill-in-the-middle.

    `layout_hint` is the file's own word ("spm" or "psm", GGUF key albor.fim.layout) and decides
    between families that share control tokens; without it the model's name does.
    """
    for template in TEMPLATES.values():
        if any(tokenizer.special_id(spelling) is None for spelling in template.spellings):
            continue
        if template.family == "albor" and layout_hint is not None:
            if layout_hint == "spm":
                return template
            continue
        if template.family in _NAMED and template.family not in model_name.lower():
            continue
        if template.family == "starcoder" and "mellum" in model_name.lower():
            continue
        return template
    return None


def split_written(template: FimTemplate | None, prompt: str) -> tuple[str, str] | None:
    """(prefix, suffix) of a prompt that a client wrote out itself with the prefix first.

    Editors that write control tokens themselves know Qwen's order, and a model that learned the
    same tokens with the suffix first fills in several times worse from it. None for any other
    prompt, the model's own order included.
    """
    if template is None or template.family != "albor":
        return None
    begin, middle, end = _PIPED
    if not (prompt.startswith(begin) and prompt.endswith(end)):
        return None
    prefix, found, suffix = prompt[len(begin) : -len(end)].partition(middle)
    if not found or not prefix or any(each in prefix + "\0" + suffix for each in _PIPED):
        return None
    return prefix, suffix


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a training document: one control token's spelling, or text to tokenize."""

    text: str
    is_control: bool


def fim_document(template: FimTemplate, prefix: str, middle: str, suffix: str) -> list[Segment]:
    """A training document without its end-of-text token.

    Where the template ends with the prefix, prefix and middle are one piece of text: training
    then never shows a token boundary at the cursor.
    """
    texts = {PREFIX: prefix + middle if template.grows_at_the_end else prefix, SUFFIX: suffix}
    segments = [
        Segment(part, True) if isinstance(part, str) else Segment(texts[part], False)
        for part in template.parts
    ]
    if not template.grows_at_the_end:
        segments.append(Segment(middle, False))
    return segments


MAX_HEALED_BYTES: Final = 64

_TAIL = re.compile(
    r"""
      (?: (?<! [^\w\s] | [_ ] ) (?: [^\w\s] | _ ) | [^\S\r\n] )? [^\W\d_]+ \Z  # word, one sign
    | [ ]? \d+ \Z
    | [ ]? (?: [^\w\s] | _ )+ [\r\n]* \Z                                   # signs, line ends
    | (?: (?<= [^\w\s] | _ ) [\r\n]* | (?<! [^\w\s] | _ ) ) (?P<lines> \s* [\r\n]+ ) \Z
    | [^\S\r\n]+ \Z                                                        # indentation, spaces
    """,
    re.VERBOSE,
)
"""What byte-level tokenizers split off last and what the next characters may still change:
their pre-tokenizers keep a word with one sign or space before it, runs of signs with the space
before and the line ends after them, and runs of spaces. An end of indentation counts as settled
by the text before it, though a line end after it would make both one blank line."""


def heal_text(text: str) -> tuple[str, str]:
    """Split text at the last place where a token is certain to end: (kept, forced).

    A model has never seen "    " and then "return" as two tokens, since training always joined
    them otherwise. So the tail that the next characters may still change is left out of the
    prompt, and the answer is forced to begin with it. A tail of more than 64 bytes is left as it
    is.
    """
    # Nothing longer than the limit is ever cut off, so a short look is enough.
    window = text[-(MAX_HEALED_BYTES + 2) :]
    match = _TAIL.search(window)
    if match is None:
        return text, ""
    tail = match["lines"] or match.group()
    if len(tail.encode("utf-8", "replace")) > MAX_HEALED_BYTES:
        return text, ""
    return text[: len(text) - len(tail)], tail


@dataclass(frozen=True, slots=True)
class ExtraFile:
    """A piece of another file that helps to complete this one."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class FimPrompt:
    """A prompt made of the code around a cursor."""

    tokens: tuple[int, ...]
    forced_bytes: bytes
    """What the answer must begin with; see `heal_text`."""
    num_prefix_dropped: int
    """Characters left out at the start of the prefix."""
    num_suffix_dropped: int
    """Characters left out at the end of the suffix."""
    num_context_dropped: int = 0
    """Extra files left out, the first first: they stand farthest from the cursor."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing was left out."""
        return not (self.num_prefix_dropped or self.num_suffix_dropped or self.num_context_dropped)


PREFIX_SHARE: Final = 0.75
"""Of a window that is too small for both, the part that the text before the cursor gets."""
SUFFIX_STEP_LEN: Final = 32
"""A suffix that is cut keeps a multiple of so many tokens, so that typing rarely changes it."""
MAX_ANCHOR_LINES: Final = 64
"""A prefix that is cut starts at a multiple of up to so many lines, so that typing rarely moves
the start; see DESIGN.md, anchored windows."""

_REPOSITORY_TOKENS: Final = (("<|repo_name|>", "<|file_sep|>"), ("<repo_name>", "<file_sep>"))
"""Control tokens of a repository's name and of each file, by family."""
_PROJECT: Final = "project"
"""Stands for the repository's name, which nobody knows here."""
_SLASH_COMMENTS: Final = frozenset(
    (
        "c",
        "cc",
        "cpp",
        "cs",
        "cu",
        "dart",
        "go",
        "h",
        "hpp",
        "java",
        "js",
        "jsx",
        "kt",
        "m",
        "mm",
        "php",
        "rs",
        "scala",
        "scss",
        "swift",
        "ts",
        "tsx",
        "zig",
    )
)
_MARKUP_COMMENTS: Final = frozenset(("htm", "html", "md", "svelte", "vue", "xml"))


def build_fim_prompt(
    template: FimTemplate,
    tokenizer: Tokenizer,
    fim_prefix: str,
    fim_suffix: str,
    *,
    max_prompt_len: int,
    heal: bool = True,
    path: str | None = None,
    extra: Sequence[ExtraFile] = (),
) -> FimPrompt:
    """Tokens of a fill-in-the-middle prompt of at most `max_prompt_len` tokens.

    Code is tokenized as text, so it can't inject control tokens. Where it is too long, extra files
    go first; then the prefix keeps its end and the suffix its start, both cut at line starts if
    possible. `extra` comes most stable first; `path` is the current file's.

    Raises:
        PromptTooLongError: max_prompt_len does not even hold the control tokens.
    """
    kept, forced = heal_text(fim_prefix) if heal else (fim_prefix, "")
    bos = (
        ()
        if not tokenizer.adds_bos or tokenizer.bos_token_id is None
        else (tokenizer.bos_token_id,)
    )
    room = max_prompt_len - len(template.spellings) - len(bos)
    if room < 1:
        raise PromptTooLongError(len(template.spellings) + len(bos) + 1, max_prompt_len)
    # No token is longer than some tens of bytes: text far outside the window needs no tokenizing.
    before = tokenizer.encode(kept[-room * 64 :])
    after = tokenizer.encode(fim_suffix[: room * 64])
    dropped_before = max(0, len(kept) - room * 64)
    dropped_after = max(0, len(fim_suffix) - room * 64)
    if len(before) + len(after) > room:
        for_prefix = max(int(room * PREFIX_SHARE), room - len(after))
        before, cut = _keep_end(tokenizer, kept, before, min(for_prefix, len(before)))
        dropped_before = cut
        for_suffix = room - len(before)
        if for_suffix < len(after) and for_suffix > SUFFIX_STEP_LEN:
            for_suffix -= for_suffix % SUFFIX_STEP_LEN
        after, dropped_after = _keep_start(tokenizer, fim_suffix, after, for_suffix)
    context, is_document, dropped_context = _context(
        tokenizer, path, extra, room - len(before) - len(after)
    )
    tokens: list[int] = [*bos, *(context if is_document else ())]
    for part in template.parts:
        if isinstance(part, str):
            token_id = tokenizer.special_id(part)
            assert token_id is not None, "detect_template checked the vocabulary"
            tokens.append(token_id)
        elif part is PREFIX:
            tokens += before if is_document else [*context, *before]
        else:
            tokens += after
    return FimPrompt(
        tuple(tokens),
        forced.encode("utf-8", "replace"),
        dropped_before,
        dropped_after,
        dropped_context,
    )


def _context(
    tokenizer: Tokenizer, path: str | None, extra: Sequence[ExtraFile], room: int
) -> tuple[list[int], bool, int]:
    """(tokens of other files and of this one's path, whether they are documents of their own,
    files left out). A family without tokens for files gets comments at the start of the prefix.
    """
    if path is None and not extra:
        return [], True, 0
    marks = _repository_tokens(tokenizer)
    if marks is not None:
        repo_name, file_sep = marks
        head = [repo_name, *tokenizer.encode(f"{_PROJECT}\n")]
        tail = [file_sep, *tokenizer.encode(f"{_one_line(path or 'untitled')}\n")]
        room -= len(head)
    else:
        head = []
        tail = tokenizer.encode(_comment(path)) if path is not None else []
    room -= len(tail)
    if room < 0:
        return [], marks is not None, len(extra)
    pieces: list[list[int]] = []
    for file in reversed(extra):  # the nearest first
        if marks is not None:
            # No token is longer than some tens of bytes: a file that can't fit isn't tokenized.
            text = f"{_one_line(file.path)}\n{file.text}\n"
            piece = [marks[1], *tokenizer.encode(text)] if len(text) <= room * 64 else None
        else:
            text = f"{_comment(file.path)}{file.text}\n\n"
            piece = tokenizer.encode(text) if len(text) <= room * 64 else None
        if piece is None or len(piece) > room:
            break
        room -= len(piece)
        pieces.insert(0, piece)
    tokens = [*head, *(token for piece in pieces for token in piece), *tail]
    return tokens, marks is not None, len(extra) - len(pieces)


def _repository_tokens(tokenizer: Tokenizer) -> tuple[int, int] | None:
    for repo_spelling, file_spelling in _REPOSITORY_TOKENS:
        repo_name, file_sep = (tokenizer.special_id(s) for s in (repo_spelling, file_spelling))
        if repo_name is not None and file_sep is not None:
            return repo_name, file_sep
    return None


def _one_line(path: str) -> str:
    return " ".join(path.split())


def _comment(path: str) -> str:
    """A path as a comment line of its language."""
    name = _one_line(path)
    extension = name.rpartition(".")[2].lower()
    if extension in _SLASH_COMMENTS:
        return f"// {name}\n"
    if extension in _MARKUP_COMMENTS:
        return f"<!-- {name} -->\n"
    return f"# {name}\n"


def _keep_end(tokenizer: Tokenizer, text: str, ids: list[int], limit: int) -> tuple[list[int], int]:
    """The last `limit` tokens or fewer, from a line start on; also the characters dropped."""
    if len(ids) <= limit:
        return ids, len(text) - len(tokenizer.decode(ids).decode("utf-8", "replace"))
    tail = tokenizer.decode(ids[len(ids) - limit :]).decode("utf-8", "ignore")
    line_start = tail.find("\n") + 1
    # Without a line end in reach, half a line is better than nothing.
    if 0 < line_start < len(tail):
        tail = tail[line_start:]
        tail = tail[_to_anchor(text, len(text) - len(tail), limit) :]
    fitted = tokenizer.encode(tail)
    while len(fitted) > limit:  # a cut can change where tokens end
        tail = tail[max(1, len(tail) // 16) :]
        fitted = tokenizer.encode(tail)
    return fitted, len(text) - len(tail)


def _to_anchor(text: str, start: int, limit: int) -> int:
    """Characters from `start`, a line's start, to the next line whose number is anchored.

    The step between such lines is a power of two and about a quarter of the window at most.
    """
    step = 1
    while step < MAX_ANCHOR_LINES and step * 80 <= limit:
        step *= 2
    num_to_skip = -text.count("\n", 0, start) % step
    at = start
    for _ in range(num_to_skip):
        at = text.find("\n", at) + 1
        if at == 0 or at - start > (len(text) - start) // 2:
            return 0  # long lines: keep what there is
    return at - start


def _keep_start(
    tokenizer: Tokenizer, text: str, ids: list[int], limit: int
) -> tuple[list[int], int]:
    """The first `limit` tokens or fewer, up to a line end; also the characters dropped."""
    if len(ids) <= limit:
        return ids, max(0, len(text) - len(tokenizer.decode(ids).decode("utf-8", "replace")))
    head = tokenizer.decode(ids[:limit]).decode("utf-8", "ignore")
    line_end = head.rfind("\n") + 1
    if line_end > 0:
        head = head[:line_end]
    fitted = tokenizer.encode(head)
    while len(fitted) > limit:
        head = head[: len(head) - max(1, len(head) // 16)]
        fitted = tokenizer.encode(head)
    return fitted, len(text) - len(head)
