from pathlib import Path

from albor_lsp.context import ContextBuilder, ContextSettings
from albor_lsp.ignore import IgnoreRules, holds_secret, is_secret_name
from albor_lsp.ring import Ring
from hypothesis import given
from hypothesis import strategies as st


@given(st.text(alphabet="ab\n\u2028\f", max_size=2000), st.integers(0, 2000))
def test_the_window_holds_the_cursor(text: str, offset: int) -> None:
    offset = min(offset, len(text))
    window = ContextBuilder(None).window(text, offset)
    assert text[:offset].endswith(window.prefix)
    assert text[offset:].startswith(window.suffix)


def test_the_window_moves_in_steps() -> None:
    text = "".join(f"line {i}\n" for i in range(5000))
    places = [text.index(f"line {i}\n") for i in range(1000, 1200)]
    windows = [ContextBuilder(None).window(text, at) for at in places]
    starts = {at - len(w.prefix) for at, w in zip(places, windows, strict=True)}
    ends = {at + len(w.suffix) for at, w in zip(places, windows, strict=True)}
    assert len(starts) <= 4
    assert len(ends) <= 4
    assert all(text[start - 1] == "\n" for start in starts)


def test_adding_never_reorders() -> None:
    ring = Ring(8, 4)
    seen: list[str] = []
    for i in range(40):
        ring.add(f"{i}.py", "\n".join(f"name_{i}_{j}" for j in range(9)), 0)
        seen.append(f"{i}.py")
        paths = [chunk.path for chunk in ring.chunks]
        assert paths == seen[-len(paths) :]
        assert len(paths) <= 8
    assert not ring.add("copy.py", ring.chunks[-1].text, 0)


def test_secrets() -> None:
    for name in (".env", "a/id_rsa", "x/server.pem", ".aws/config", "kubeconfig", ".env.local"):
        assert is_secret_name(name), name
    assert not is_secret_name("environment.py")
    assert holds_secret("-----BEGIN RSA PRIVATE KEY-----")
    assert not holds_secret("key = None")
    for start, length in (("AKIA", 16), ("ASIA", 16), ("ghp_", 36), ("ghs_", 36), ("hf_", 30)):
        assert holds_secret(f"key = '{start}{'A' * length}'"), start
    for start, length in (("github_pat_", 22), ("glpat-", 20), ("xoxb-", 10), ("sk-", 20)):
        assert holds_secret(f"key = '{start}{'a' * length}'"), start
    assert holds_secret("AIza" + "b" * 35)


def test_gitignore(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".gitignore").write_text("build/\n*.log\n")
    (tmp_path / "sub/.gitignore").write_text("!keep.log\nlocal.py\n")
    rules = IgnoreRules(tmp_path)
    assert rules.excludes("build/x.py")
    assert rules.excludes("a.log")
    assert not rules.excludes("sub/keep.log")
    assert rules.excludes(str(tmp_path / "sub/local.py"))
    assert not rules.excludes("local.py")


def test_chunks(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("hidden.py\n")
    (tmp_path / "shapes.py").write_text(
        'class Box:\n    """A box."""\n\n'
        "    def area(self, scale: float) -> float:\n        return 1\n"
    )
    other = "\n".join(f"value_{i} = {i}" for i in range(20))
    context = ContextBuilder(tmp_path)
    context.opened("hidden.py", other, "python")
    context.opened(".env", other, "plaintext")
    context.opened("key.py", other + "\n-----BEGIN PRIVATE KEY-----", "python")
    assert context.generation == 0
    context.opened("other.py", other, "python")
    assert context.generation == 1
    context.opened("other.py", other, "python")
    assert context.generation == 1
    text = "from shapes import Box\n"
    chunks = context.chunks(str(tmp_path / "main.py"), text, len(text))
    assert [chunk.path for chunk in chunks] == ["shapes.py", "other.py"]
    assert "def area(self, scale: float) -> float:" in chunks[0].text
    assert "A box." in chunks[0].text
    assert context.chunks("other.py", other, 0) == ()
    assert context.chunks(".env", text, 0) == ()


def test_the_disk_is_asked_once_a_second(tmp_path: Path) -> None:
    now = [0.0]
    context = ContextBuilder(tmp_path, clock=lambda: now[0])
    other = "\n".join(f"value_{i} = {i}" for i in range(20))
    context.opened("other.py", other, "python")
    assert [chunk.path for chunk in context.chunks("main.py", "", 0)] == ["other.py"]
    (tmp_path / ".gitignore").write_text("other.py\n")
    now[0] = 0.9
    assert len(context.chunks("main.py", "", 0)) == 1
    now[0] = 1.0
    generation = context.generation
    assert context.chunks("main.py", "", 0) == ()
    assert context.generation == generation + 1


def test_lines_typed_above_leave_the_suffix_as_it_is() -> None:
    builder = ContextBuilder(None, ContextSettings(prefix_lines=8, suffix_lines=8))
    text = "".join(f"line {n}\n" for n in range(400))
    offset = text.index("line 100\n")
    suffixes = set()
    for _ in range(70):
        text = text[:offset] + "new\n" + text[offset:]
        offset += 4
        window = builder.window(text, offset)
        assert text.startswith(window.suffix, offset)
        assert 8 <= window.suffix.count("\n") <= 8 + 64
        suffixes.add(window.suffix)
    assert len(suffixes) == 1
