"""Tiny random checkpoints and tokenizers, made by the libraries they imitate."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SEED_CODER_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_SPLITS = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")

FIM_TOKENS = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>")
SPECIALS = ("<|endoftext|>", *FIM_TOKENS, "<|repo_name|>", "<|file_sep|>")

HARD_STRINGS = (
    "",
    " ",
    "\n",
    "\r\n\r\n  x\r\n",
    "def f(x):\n    return x + 1\n",
    "\tif a:\n\t\tb = 12345 * 0x7f\n\n\n",
    "        " * 20 + "deep",
    "héllo wörld — “quotes” don't WE'LL I'm",
    "变量 = '你好世界' # 注释 한글 テスト",
    "🙂👩‍👩‍👧‍👦🇺🇳 e\u0301 \u200b\ufeff x",
    "a  b   c    d\u00a0e\u3000f",
    "x=1;y=22;z=333;w=4444;v=55555",
    "<|not_special|> <|fim_prefix|> </s> <s>",
    "$#@!%^&*()_+-={}[]|\\:;\"'<>,.?/~`",
    "ünïcödé ½ ² Ⅷ ٣ \x00\x01\x7f",
)

_CORPUS = [
    "def main(argv):\n    for value in range(100):\n        print(value, end='')\n",
    "class Node:\n    def __init__(self, left, right):\n        self.left = left\n",
    "import os, sys\nreturn self.items[0] + 12345\n\n\nif __name__ == '__main__':\n",
    "don't we'll I'm they've 你好 世界 héllo wörld 🙂 €100 x ** 2 != 3.14",
] * 3


def splitter(kind: str) -> Any:
    """The pre-tokenizer of a model family, as its tokenizer.json has it."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)

    def splits(*patterns: str) -> list[Any]:
        return [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]

    digits = pre_tokenizers.Digits(individual_digits=True)
    parts = {
        "gpt-2": [gpt2],
        "smollm": [digits, gpt2],
        "qwen2": [*splits(QWEN2_SPLIT), byte_level],
        "llama-bpe": [*splits(LLAMA3_SPLIT), byte_level],
        "smaug-bpe": [*splits(LLAMA3_SPLIT), byte_level],
        "seed-coder": [*splits(SEED_CODER_SPLIT), byte_level],
        "deepseek-coder": [*splits(*DEEPSEEK_SPLITS), digits, byte_level],
    }[kind]
    return parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)


def byte_level_tokenizer(kind: str = "qwen2", vocab_size: int = 384) -> Tokenizer:
    """A byte-level BPE tokenizer with the FIM tokens first, trained on a few lines of code."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    tokenizer.pre_tokenizer = splitter(kind)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def spm_tokenizer_json() -> dict[str, Any]:
    """A tokenizer in the manner of Llama 2: byte fallback, "▁" for spaces, all merges listed."""
    words = ["▁def", "▁return", "▁self", "▁x", "turn", "ret", "de", "▁▁", "▁▁▁▁", "el", "lf", "se"]
    pieces = dict.fromkeys(["▁", *"abcdefghijklmnopqrstuvwxyz():,.=+0123456789"])
    for word in words:
        for end in range(2, len(word) + 1):
            pieces[word[:end]] = None
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    multi = sorted((piece for piece in pieces if len(piece) > 1), key=lambda piece: -len(piece))
    single = [piece for piece in pieces if len(piece) == 1]
    tokens += [*multi, *single]
    known = set(pieces)
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in multi
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    added = [
        {"id": i, "content": token, "special": True, "normalized": False, "lstrip": False,
         "rstrip": False, "single_word": False}
        for i, token in enumerate(tokens[:3])
    ]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def tiny_config(architecture: str, **changes: Any) -> Any:
    """A transformers config of a model with some 100,000 weights."""
    import transformers

    kind = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
    }[architecture]
    values: dict[str, Any] = {
        "vocab_size": 416,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": architecture == "qwen3",
    }
    if architecture == "qwen3":
        values["head_dim"] = 32
    return kind(**(values | changes))


def save_tiny_model(folder: Path, architecture: str, dtype: str = "float32", **changes: Any) -> Any:
    """Make a random model, save it with its tokenizer into `folder`, and return it in float32."""
    import torch
    import transformers

    torch.manual_seed(7)
    config = tiny_config(architecture, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)  # logits far enough apart to tell models from noise
            elif "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.3 * torch.randn_like(parameter))
        model.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    return model.float()


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """The smallest writer of the format: float32 tensors, sorted as given."""
    header, blobs, position = {}, [], 0
    for name, array in tensors.items():
        data = array.astype("<f4").tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(array.shape),
            "data_offsets": [position, position + len(data)],
        }
        blobs.append(data)
        position += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def gguf_bytes(
    entries: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    version: int = 3,
    num_entries: int | None = None,
    num_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A GGUF file from its parts, counts overridable."""
    entries, tensors = entries or [], tensors or []
    head = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if num_tensors is None else num_tensors,
        len(entries) if num_entries is None else num_entries,
    )
    head += b"".join(entries) + b"".join(tensors)
    return head + b"\0" * (-len(head) % alignment) + data


def gguf_string(text: str | bytes) -> bytes:
    """A length-prefixed string."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def gguf_entry(key: str, kind: int, value: bytes) -> bytes:
    """One key-value pair."""
    return gguf_string(key) + struct.pack("<I", kind) + value


def gguf_tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """One tensor description; `shape` in the file's order, innermost first."""
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return gguf_string(name) + dims + struct.pack("<IQ", kind, offset)
