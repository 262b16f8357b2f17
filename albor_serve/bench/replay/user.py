"""The simulated person: types a scene, sees ghost text, accepts what agrees."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

from albor_serve.bench.replay.clients.base import Client, EditorState, Ghost
from albor_serve.bench.replay.clock import Clock
from albor_serve.bench.replay.scenes import Scene
from albor_serve.bench.replay.typist import Typist, keystrokes

__all__ = ["Keystroke", "Person", "SceneTrace", "acceptable_len"]

REACTION_S = (0.250, 0.400)
MIN_ACCEPT_LEN = 3
"""Nobody reaches for Tab to save fewer characters."""


@dataclass(slots=True)
class Keystroke:
    """A change of the text by the person, and the ghost text that followed."""

    pressed_s: float
    shown_s: float | None = None
    """When ghost text for the new text was on screen; None if not before the next change."""
    is_kept: bool = False
    """The ghost text was there already and the key agreed with it."""
    had_ghost: bool = False
    """There was ghost text before the key, and the key agreed with it."""


@dataclass(slots=True)
class SceneTrace:
    """All that happened in one scene."""

    scene: str
    kind: str
    num_keys: int
    """Keystrokes that writing it without help takes."""
    keystrokes: list[Keystroke] = field(default_factory=list)
    num_keys_saved: int = 0
    """Keystrokes that accepted text replaced; each acceptance costs one, already subtracted."""
    num_shown: int = 0
    """Different suggestions shown."""
    num_accepted: int = 0
    num_wrong: int = 0
    """Shown suggestions whose first line was not what the person was about to write."""
    seconds: float = 0.0


class Person:
    """Types one scene with one client. `ghost` is what the editor shows at the cursor."""

    def __init__(
        self, scene: Scene, client: Client, typist: Typist, clock: Clock, seed: int
    ) -> None:
        keys = keystrokes(scene.typed)
        # One generator for typing and one for reactions: accepting must not change the typing.
        self._delays = typist.delays(keys, random.Random(f"{seed}-keys-{scene.name}"))
        self._reactions = random.Random(f"{seed}-reactions-{scene.name}")
        self._keys = keys
        self._scene = scene
        self._client = client
        self._clock = clock
        self._typed = ""
        self._version = 0
        self._ghost = ""
        self._expected = ""
        """What is left of ghost text that the editor took off the screen."""
        self._accept_at: float | None = None
        self._wait: asyncio.Future[None] | None = None
        self.trace = SceneTrace(scene.name, scene.kind, len(keys))

    async def write(self) -> SceneTrace:
        """Write the whole scene."""
        began = self._clock.now()
        self._client.on_ghost = self._show
        await self._client.open(self._state(), self._scene.open_files)
        try:
            next_key = self._clock.now()
            while len(self._typed) < len(self._scene.typed):
                next_key += self._delays[self._num_done()]
                if await self._accepts_before(next_key):
                    next_key = self._clock.now()
                else:
                    self._press(self._next_key())
        finally:
            self._client.on_ghost = None
            await self._client.close_scene()
        self.trace.seconds = self._clock.now() - began
        return self.trace

    async def _accepts_before(self, next_key: float) -> bool:
        """Wait for the next key's time; True if ghost text was accepted instead."""
        while (now := self._clock.now()) < next_key:
            if self._accept_at is not None and self._accept_at <= now:
                if self._accept():
                    return True
                self._accept_at = None
            until = next_key if self._accept_at is None else min(next_key, self._accept_at)
            self._wait = self._clock.at(until)
            await self._wait
            self._wait = None
        return False

    def _num_done(self) -> int:
        return len(keystrokes(self._typed))

    def _next_key(self) -> str:
        return self._keys[self._num_done()]

    def _remaining(self) -> str:
        return self._scene.typed[len(self._typed) :]

    def _state(self) -> EditorState:
        return EditorState(
            self._scene.source.path,
            self._scene.before + self._typed,
            self._scene.after,
            self._version,
        )

    def _press(self, key: str) -> None:
        agrees = len(self._ghost) > len(key) and self._ghost.startswith(key)
        stroke = Keystroke(self._clock.now(), had_ghost=agrees)
        self._ghost = self._ghost[len(key) :] if agrees else ""
        if not agrees:
            self._accept_at = None
        self._typed += key
        self._version += 1
        self.trace.keystrokes.append(stroke)
        if self._client.editor_keeps_ghost:
            if agrees:
                stroke.shown_s, stroke.is_kept = stroke.pressed_s, True
        else:
            # Taken off the screen; the reaction goes on if the same text comes back.
            self._expected, self._ghost = self._ghost, ""
        self._client.on_text(self._state())

    def _show(self, ghost: Ghost) -> None:
        """The client offers ghost text for a version of the text."""
        if ghost.version != self._version or not ghost.text.strip():
            return
        now = self._clock.now()
        if self.trace.keystrokes:
            stroke = self.trace.keystrokes[-1]
            if stroke.shown_s is None:
                stroke.shown_s = now
        old = self._ghost or self._expected
        is_same = bool(old) and (old.startswith(ghost.text) or ghost.text.startswith(old))
        self._ghost = ghost.text
        if is_same:
            if self.trace.keystrokes and self.trace.keystrokes[-1].had_ghost:
                self.trace.keystrokes[-1].is_kept = True
            return
        self.trace.num_shown += 1
        reaction = self._reactions.uniform(*REACTION_S)
        if acceptable_len(ghost.text, self._remaining()):
            self._accept_at = now + reaction
        else:
            self._accept_at = None
            self.trace.num_wrong += not _agrees_in_first_line(ghost.text, self._remaining())
        if self._wait is not None and not self._wait.done():
            self._wait.set_result(None)

    def _accept(self) -> bool:
        size = acceptable_len(self._ghost, self._remaining())
        if not size:
            return False
        text = self._ghost[:size]
        before = self._num_done()
        self._typed += text
        self._version += 1
        self._ghost = self._expected = ""
        self._accept_at = None
        self.trace.num_accepted += 1
        self.trace.num_keys_saved += self._num_done() - before - 1
        self.trace.keystrokes.append(Keystroke(self._clock.now()))
        self._client.on_accept(self._state())
        return True


def acceptable_len(ghost: str, remaining: str) -> int:
    """How many of the ghost text's characters the person takes over; 0 for none.

    All of it where it agrees with what is to be written, else its first line (editors have a key
    for that), else nothing.
    """
    whole = ghost.rstrip()
    first = _first_line(ghost)
    for text in (whole, first):
        if len(text.strip()) >= MIN_ACCEPT_LEN and remaining.startswith(text):
            return len(text)
    return 0


def _agrees_in_first_line(ghost: str, remaining: str) -> bool:
    return remaining.startswith(_first_line(ghost))


def _first_line(ghost: str) -> str:
    """Up to the end of the first line that says something."""
    size = len(ghost) - len(ghost.lstrip("\n"))
    return (ghost[:size] + ghost[size:].partition("\n")[0]).rstrip()
