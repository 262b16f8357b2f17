from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from albor_serve.config import ModelConfig
from albor_serve.model import Decoder
from albor_train.attention import attention_for, document_ids, prepare_mask, sdpa_by
from albor_train.errors import TrainingError
from albor_train.spec import AttentionKind

CPU = torch.device("cpu")
CONFIG = ModelConfig("qwen3", 32, 32, 64, 2, 4, 2, 8, 64, qk_norm=True, tie_embeddings=True)


def test_documents_end_with_their_end() -> None:
    tokens = torch.tensor([[5, 6, 0, 7, 0, 4, 4], [5, 0, 6, 6, 6, 6, 6]])
    assert document_ids(tokens, 0, 4).tolist() == [[0, 0, 0, 1, 1, 3, 3], [0, 0, 1, 1, 1, 1, 1]]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["document_mask", "document_flex"])
def test_a_document_sees_only_itself(kind: AttentionKind) -> None:
    torch.manual_seed(0)
    model = Decoder(CONFIG)
    first, second = torch.randint(5, 32, (1, 9)), torch.randint(5, 32, (1, 7))
    first[0, -1] = second[0, -1] = 0
    row = torch.cat([first, second], dim=1)
    attend = attention_for(kind, prepare_mask(kind, document_ids(row, 0, 4), CPU))
    with torch.no_grad():
        packed = model.hidden(row, attend=attend)
        alone = [model.hidden(part) for part in (first, second)]
    # Rotary positions are relative, so the second document's start does not matter.
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)


def test_a_library_for_causal_attention_is_chosen_by_name() -> None:
    q = torch.randn(1, 2, 8, 16)
    plain = functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    for backend in ("any", "flash"):
        with sdpa_by(backend, CPU):
            out = functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        torch.testing.assert_close(out, plain)
    with pytest.raises(TrainingError, match="needs a CUDA device"):
        sdpa_by("cudnn", CPU)


def test_varlen_on_a_cpu_is_an_error() -> None:
    with pytest.raises(TrainingError, match="CUDA"):
        prepare_mask("document_varlen", torch.zeros(1, 8, dtype=torch.int32), CPU)


@pytest.mark.parametrize("spelling", ["newer", "older"])
def test_varlen_is_told_the_documents_bounds(
    monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    """The kernel of torch, in either release, gets the bounds that plain attention has."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def each(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
        parts = []
        for begin, end in pairwise(bounds.tolist()):
            assert end - begin <= longest
            x = [t[begin:end].transpose(0, 1) for t in (q, k, v)]
            shared = x[0].shape[0] != x[1].shape[0]
            out = functional.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=shared)
            parts.append(out.transpose(0, 1))
        return torch.cat(parts)

    def newer(  # type: ignore[no-untyped-def]
        q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, is_causal=False, enable_gqa=False
    ):
        assert is_causal
        assert enable_gqa
        assert torch.equal(cu_seq_q, cu_seq_k)
        return each(q, k, v, cu_seq_q, max_q)

    def older(  # type: ignore[no-untyped-def]
        q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)
    ):
        assert window_size == (-1, 0)
        assert q.shape == k.shape == v.shape
        return each(q, k, v, cu_seq_q, max_q)

    monkeypatch.setattr(varlen, "varlen_attn", newer if spelling == "newer" else older)
    torch.manual_seed(0)
    model = Decoder(CONFIG)
    rows = torch.randint(5, 32, (2, 16))
    rows[0, 8] = rows[1, 3] = 0  # documents of 9, 7, 4 and 12 tokens
    bounds = torch.tensor([0, 9, 16, 20, 32, 32, 32], dtype=torch.int32)
    want = attention_for("document_mask", prepare_mask("document_mask", _ids(rows), CPU))
    with torch.no_grad():
        got = model.hidden(rows, attend=attention_for("document_varlen", bounds))
        torch.testing.assert_close(got, model.hidden(rows, attend=want), rtol=1e-4, atol=1e-5)


def _ids(rows: Tensor) -> Tensor:
    return document_ids(rows, 0, 4)
