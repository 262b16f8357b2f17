from __future__ import annotations

import pytest
import torch
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
