"""How answers end: by scope, by repeating the suffix, by confidence; and drafts from a caller."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest

from albor_serve.backends.base import LogitRows
from albor_serve.config import EngineConfig, SamplingParams
from albor_serve.engine import Engine
from albor_serve.errors import RequestError
from albor_serve.sequence import CodeAround, GenerateRequest
from tests.fakes import ByteTokenizer, HashBackend, LinearCosts
from tests.test_engine import Reply, until

TOKENIZER = ByteTokenizer()
GREEDY = SamplingParams(temperature=0.0, num_logprobs=0)
PROMPT = tuple(TOKENIZER.encode("def f(x):\n"))


class ScriptBackend(HashBackend):
    """Continues PROMPT with a script; each token with a probability of its own."""

    def __init__(self, script: Sequence[int], probs: Sequence[float] = ()) -> None:
        super().__init__(TOKENIZER.vocab_size)
        self.script = [*script, *TOKENIZER.eos_token_ids]
        self.probs = probs

    def row(self, tokens: Sequence[int]) -> LogitRows:
        at = min(max(len(tokens) - len(PROMPT), 0), len(self.script) - 1)
        prob = self.probs[at] if at < len(self.probs) else 0.9
        size = TOKENIZER.vocab_size
        row = np.full(size, math.log((1 - prob) / (size - 1)), dtype=np.float32)
        row[self.script[at]] = math.log(prob)
        return row


@contextmanager
def running(backend: HashBackend, *, costs: LinearCosts | None = None) -> Iterator[Engine]:
    engine = Engine(
        backend,
        TOKENIZER,
        EngineConfig(num_slots=2, max_seq_len=256),
        (lambda _: costs) if costs else None,
    )
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


def ask(engine: Engine, num: int = 100, **kwargs: object) -> Reply:
    reply = Reply()
    engine.submit(GenerateRequest(PROMPT, num, GREEDY, **kwargs), reply)  # type: ignore[arg-type]
    return reply.wait()


def test_a_scope_ends_decoding_at_the_token_that_tells() -> None:
    script = TOKENIZER.encode("    return x\n\n\ndef g(y):\n    pass\n")
    with running(ScriptBackend(script)) as engine:
        code = CodeAround("def f(x):\n", "", "a.py")
        reply = ask(engine, stop_scope="scope", code=code)
        assert ask(engine).text == TOKENIZER.decode(script).decode()
    assert reply.text == "    return x"
    assert (reply.end.reason, reply.end.stopped_by) == ("stop", "scope")
    shown = TOKENIZER.encode("    return x\n\n\ndef")
    assert reply.end.timings.num_new_tokens == len(shown)


def test_a_line_costs_one_token_beyond_itself() -> None:
    script = TOKENIZER.encode("    return x\n    # more\n")
    with running(ScriptBackend(script)) as engine:
        reply = ask(engine, stop_scope="line", code=CodeAround("def f(x):\n", "", None))
    assert (reply.text, reply.end.stopped_by) == ("    return x", "line")
    assert reply.end.timings.num_new_tokens == len(TOKENIZER.encode("    return x")) + 1


def test_repeating_the_suffix_ends_the_answer() -> None:
    script = TOKENIZER.encode("    y = 1\n    return y + x\n")
    with running(ScriptBackend(script)) as engine:
        code = CodeAround("def f(x):\n", "\n    return y + x\n", None)
        reply = ask(engine, stop_scope="scope", code=code)
    assert (reply.text, reply.end.stopped_by) == ("    y = 1", "suffix")


def test_held_text_comes_at_the_end_of_the_tokens_and_at_a_deadline() -> None:
    script = TOKENIZER.encode("    y = 1\n    return y + x\n")
    code = CodeAround("def f(x):\n", "\n    return y + z\n", None)
    with running(ScriptBackend(script)) as engine:
        num = len(TOKENIZER.encode("    y = 1\n    return y"))
        reply = ask(engine, num, stop_scope="scope", code=code)
    assert (reply.text, reply.end.reason) == ("    y = 1\n    return y", "length")
    line = "z" * 80
    slow = ScriptBackend(TOKENIZER.encode(f"y\n{line}\n"))
    slow.ms_per_token = 10.0
    code = CodeAround("def f(x):\n", f"\n{line}\n", None)
    with running(slow) as engine:
        late = ask(engine, stop_scope="scope", code=code, deadline_ms=450)
    assert late.end.reason == "deadline"
    shown = b"".join(t.token_bytes for e in late.events[:-1] for t in e.tokens)  # type: ignore
    assert late.text == shown.decode()


def test_a_stop_string_is_told_apart_from_a_scope() -> None:
    script = TOKENIZER.encode("    a; b\n    c\n")
    with running(ScriptBackend(script)) as engine:
        code = CodeAround("def f(x):\n", "", None)
        reply = ask(engine, stop_scope="line", code=code, stop=(";",))
    assert (reply.text, reply.end.stopped_by, reply.end.stop_string) == ("    a", "stop", ";")


@pytest.mark.parametrize(
    ("limit", "shown", "stopped_by"),
    [(0.0, "abcd", None), (0.3, "abcd", None), (0.5, "ab", "confidence"), (0.95, "", "confidence")],
)
def test_an_unsure_token_cuts_the_answer(limit: float, shown: str, stopped_by: str | None) -> None:
    backend = ScriptBackend(TOKENIZER.encode("abcd"), (0.9, 0.8, 0.4, 0.9, 0.2))
    with running(backend) as engine:
        reply = ask(engine, min_confidence=limit)
    assert (reply.text, reply.end.stopped_by, reply.end.reason) == (shown, stopped_by, "stop")
    assert len(reply.token_ids) == len(shown)


def test_confidence_is_given_the_forced_bytes() -> None:
    # "de" is unlikely here, but it is what stands before the cursor: only "f" is a choice.
    backend = ScriptBackend(TOKENIZER.encode("def"), (0.001,))
    backend.probs = (0.3,)
    with running(backend) as engine:
        reply = ask(engine, 1, min_confidence=0.9, forced_bytes=b"de")
        info = next(t for e in reply.events[:-1] for t in e.tokens)  # type: ignore[union-attr]
    assert reply.text == "f"
    assert info.logprob is not None
    assert math.exp(info.logprob) > 0.9


def test_a_draft_is_verified_from_the_first_token() -> None:
    script = TOKENIZER.encode("zyxwvutsrqponm")
    backend = ScriptBackend(script)
    with running(backend, costs=LinearCosts(fixed=1.0)) as engine:
        helped = ask(engine, drafts=(tuple(script),))
    assert helped.text == "zyxwvutsrqponm"
    assert helped.end.timings.num_accepted >= 8
    assert len(backend.calls) <= 6
    plain = ScriptBackend(script)
    with running(plain, costs=LinearCosts(fixed=1.0)) as engine:
        assert ask(engine).text == "zyxwvutsrqponm"
    assert len(plain.calls) > 12


def test_a_wrong_draft_changes_nothing() -> None:
    script = TOKENIZER.encode("zyxwvutsrqponm")
    wrong = tuple(TOKENIZER.encode("zyxwvAAArqpBB"))
    with running(ScriptBackend(script), costs=LinearCosts(each=0.01)) as engine:
        assert ask(engine, drafts=(wrong,)).text == "zyxwvutsrqponm"
        with pytest.raises(RequestError, match="draft"):
            ask(engine, drafts=((TOKENIZER.vocab_size,),))


def test_a_request_may_leave_its_sessions_others_alone() -> None:
    backend = ScriptBackend(TOKENIZER.encode("abc" * 40))
    backend.ms_per_token = 2.0
    first, second = Reply(), Reply()
    with running(backend) as engine:
        engine.submit(GenerateRequest(PROMPT, 30, GREEDY, session="s"), first)
        until(first.started.is_set)
        engine.submit(GenerateRequest(PROMPT, 3, GREEDY, session="s", supersede=False), second)
        assert second.wait().end.reason == "length"
        assert first.wait().end.reason == "length"


def test_prefill_time_is_estimated_from_what_is_cached() -> None:
    backend = ScriptBackend(TOKENIZER.encode("abc"))
    with running(backend, costs=LinearCosts(prefill=2.0)) as engine:
        ask(engine, 1)
        assert engine.prefill_ms(PROMPT) == 0
        assert engine.prefill_ms((*PROMPT[:5], 1, 2, 3)) == 6.0
        assert engine.prefill_ms((1, 2, 3)) == 6.0
