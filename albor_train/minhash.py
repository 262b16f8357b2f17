"""Near-duplicates by MinHash and locality-sensitive hashing (Broder 1997).

A file is the set of its five-word shingles, comment lines left out, since one licence text tops
thousands of files. The share of equal minima of two signatures
estimates the similarity (Jaccard index) of the two sets; signatures that agree on a whole band
are compared.
"""

from __future__ import annotations

import re
import zlib
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["BANDS", "ROWS", "NearDuplicates", "signature"]

BANDS: Final = 14
ROWS: Final = 8
"""Fourteen bands of eight: two sets of similarity 0.72 share a band half the time."""

_SHINGLE_LEN: Final = 5
_WORD = re.compile(r"\w+|[^\w\s]")
_COMMENT_LINE = re.compile(r"^[ \t]*#.*\n?", re.MULTILINE)
_HALF: Final = np.uint64(32)

Signature = npt.NDArray[np.uint32]


def _coefficients() -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Odd factors and offsets of multiply-shift hashing (Dietzfelbinger et al. 1997)."""
    rng = np.random.default_rng(61)
    high = np.iinfo(np.uint64).max
    a = rng.integers(1, high, size=BANDS * ROWS, dtype=np.uint64) | np.uint64(1)
    return a, rng.integers(0, high, size=BANDS * ROWS, dtype=np.uint64)


_A, _B = _coefficients()


def signature(text: str) -> Signature:
    """uint32 [BANDS * ROWS]: the minima of as many hash functions over the file's shingles."""
    words = _WORD.findall(_COMMENT_LINE.sub("", text) or text)
    count = max(1, len(words) - _SHINGLE_LEN + 1)
    shingles = {" ".join(words[i : i + _SHINGLE_LEN]) for i in range(count)}
    hashes = np.fromiter(
        (zlib.crc32(shingle.encode("utf-8", "replace")) for shingle in shingles),
        dtype=np.uint64,
        count=len(shingles),
    )
    minima = np.full(BANDS * ROWS, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(hashes), 4096):  # bounds the memory of the outer product
        part = hashes[start : start + 4096, None]
        mixed = (part * _A[None, :] + _B[None, :]) >> _HALF  # modulo 2^64
        np.minimum(minima, mixed.min(axis=0), out=minima)
    return minima.astype(np.uint32)


class NearDuplicates:
    """Signatures of the files kept so far."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._kept: list[Signature] = []
        self._bands: list[dict[bytes, list[int]]] = [{} for _ in range(BANDS)]

    def add(self, item: Signature) -> bool:
        """Keep a file unless one like it was kept before; whether it was kept."""
        keys = [item[band * ROWS : (band + 1) * ROWS].tobytes() for band in range(BANDS)]
        checked: set[int] = set()
        for band, key in zip(self._bands, keys, strict=True):
            for index in band.get(key, ()):
                if index in checked:
                    continue
                checked.add(index)
                if float(np.mean(self._kept[index] == item)) >= self._threshold:
                    return False
        for band, key in zip(self._bands, keys, strict=True):
            band.setdefault(key, []).append(len(self._kept))
        self._kept.append(item)
        return True
