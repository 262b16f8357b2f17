"""Answers that still fit: exactly here, or because the person typed what they began with."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

__all__ = ["CompletionCache", "Key"]

MAX_PLACES: Final = 64
MAX_ANSWERS: Final = 128

InfoT = TypeVar("InfoT")


@dataclass(frozen=True, slots=True)
class Key:
    """What must be the same for an answer to be of any use: all that the model read but the text
    before the cursor, which may grow."""

    uri: str
    model: str
    generation: int
    """Of the context from other files."""
    suffix: str
    scope: str
    """Where answers end; "" for those of any."""


@dataclass(frozen=True, slots=True)
class _Answer(Generic[InfoT]):
    prefix: str
    text: str
    info: InfoT


class CompletionCache(Generic[InfoT]):
    """Least recently used first out, in two steps: places (`Key`), and prefixes in each.

    Whole texts are compared, no hashes: an answer can't belong to another file, model or context.
    """

    def __init__(self, max_places: int = MAX_PLACES, max_answers: int = MAX_ANSWERS) -> None:
        self._places: OrderedDict[Key, OrderedDict[str, _Answer[InfoT]]] = OrderedDict()
        self._max_places = max_places
        self._max_answers = max_answers

    def put(self, key: Key, prefix: str, text: str, info: InfoT) -> None:
        """Keep the answer to a prompt."""
        place = self._places.setdefault(key, OrderedDict())
        self._places.move_to_end(key)
        place[prefix] = _Answer(prefix, text, info)
        place.move_to_end(prefix)
        while len(place) > self._max_answers:
            place.popitem(last=False)
        while len(self._places) > self._max_places:
            self._places.popitem(last=False)

    def find(self, key: Key, prefix: str, *, type_through: bool = True) -> tuple[str, InfoT] | None:
        """What is left of the longest answer that fits; its text is "" where nothing is to come.

        An answer that was typed to its end does not fit any more: more may follow.
        """
        place = self._places.get(key)
        if place is None:
            return None
        exact = place.get(prefix)
        if exact is not None:
            self._used(key, place, prefix)
            return exact.text, exact.info
        if not type_through:
            return None
        best: tuple[str, _Answer[InfoT]] | None = None
        for answer in place.values():
            typed_len = len(prefix) - len(answer.prefix)
            if 0 < typed_len < len(answer.text) and (
                prefix.startswith(answer.prefix)
                and answer.text.startswith(prefix[len(answer.prefix) :])
            ):
                left = answer.text[typed_len:]
                if best is None or len(left) > len(best[0]):
                    best = left, answer
        if best is None:
            return None
        self._used(key, place, best[1].prefix)
        return best[0], best[1].info

    def drop(self, uri: str) -> None:
        """Forget a file."""
        for key in [key for key in self._places if key.uri == uri]:
            del self._places[key]

    def clear(self) -> None:
        """Forget everything."""
        self._places.clear()

    def __len__(self) -> int:
        return sum(map(len, self._places.values()))

    def _used(self, key: Key, place: OrderedDict[str, _Answer[InfoT]], prefix: str) -> None:
        place.move_to_end(prefix)
        self._places.move_to_end(key)
