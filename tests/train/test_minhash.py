from __future__ import annotations

import random

import numpy as np

from albor_train.minhash import NearDuplicates, signature
from tests.train.fixtures_train import source_file


def similarity(a: set[int], b: set[int]) -> float:
    return len(a & b) / len(a | b)


def test_estimate_is_near_the_jaccard_index() -> None:
    rng = random.Random(0)
    words = [f"w{i}" for i in range(5000)]
    base = [rng.choice(words) for _ in range(400)]
    for share in (0.0, 0.02, 0.1, 0.5):
        changed = [rng.choice(words) if rng.random() < share else w for w in base]

        def shingles(items: list[str]) -> set[int]:
            return {hash(tuple(items[i : i + 5])) for i in range(len(items) - 4)}

        estimate = float(np.mean(signature(" ".join(base)) == signature(" ".join(changed))))
        assert abs(estimate - similarity(shingles(base), shingles(changed))) < 0.15


def test_small_changes_are_found_and_other_files_kept() -> None:
    near = NearDuplicates(0.7)
    files = [source_file(seed, functions=12) for seed in range(50)]
    assert all(near.add(signature(text)) for text in files)
    for seed, text in enumerate(files):
        assert not near.add(signature(text.replace("range", f"span_{seed}", 1)))


def test_a_shared_licence_makes_no_duplicates() -> None:
    licence = "".join(f"# line {i} of the same long licence text\n" for i in range(60))
    near = NearDuplicates(0.7)
    assert all(near.add(signature(licence + source_file(seed))) for seed in range(20))


def test_files_without_words_have_a_signature() -> None:
    assert signature("").shape == signature("# only a comment\n").shape == signature("x").shape
