from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from albor_serve.healing import ForcedBytes, TokenIndex
from tests.fakes import ByteTokenizer

TOKENIZER = ByteTokenizer()
INDEX = TokenIndex(TOKENIZER)


@given(st.one_of(st.binary(min_size=1, max_size=6), st.sampled_from([b"re", b"d", b" ", b"\xff"])))
def test_compatible_is_exactly_the_definition(wanted: bytes) -> None:
    naive = {
        token_id
        for token_id in range(TOKENIZER.vocab_size)
        if (piece := TOKENIZER.token_bytes(token_id))
        and (piece.startswith(wanted) or wanted.startswith(piece))
    }
    found = INDEX.compatible(wanted).tolist()
    assert len(found) == len(set(found))
    assert set(found) == naive


@given(st.binary(min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_any_allowed_path_spells_the_forced_bytes(wanted: bytes, random) -> None:
    forced = ForcedBytes(INDEX, wanted)
    spelled = beyond = b""
    while not forced.is_done:
        piece = TOKENIZER.token_bytes(random.choice(forced.allowed().tolist()))
        spelled += piece
        beyond += forced.advance(piece)
    assert spelled == wanted + beyond
    assert forced.allowed() is None
    assert forced.advance(b"xyz") == b"xyz"


def test_control_tokens_are_never_allowed() -> None:
    eos = TOKENIZER.special_id("<|endoftext|>")
    assert eos not in INDEX.compatible(b"a")


def test_an_index_holds_every_token_that_has_bytes() -> None:
    index = TokenIndex(TOKENIZER)
    everything = index.compatible(b"re")
    assert everything.dtype == np.int64
    assert everything.tolist() == INDEX.compatible(b"re").tolist()
    pieces = [TOKENIZER.token_bytes(token_id) for token_id in everything.tolist()]
    assert b"r" in pieces
    assert b"" not in pieces
    # In the order of their bytes, the shorter first.
    assert pieces == sorted(pieces)
