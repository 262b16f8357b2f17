"""Which files and texts may be sent to the server at all."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

from pathspec import GitIgnoreSpec

__all__ = ["IgnoreRules", "holds_secret", "is_secret_name"]

_SECRET_NAMES: Final = (
    *(".env", ".env.*", "*.env", ".envrc", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.ppk"),
    *("*.keystore", "*.kdbx", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", ".netrc", "_netrc"),
    *("credentials", "credentials.*", "*kubeconfig*", ".pgpass", ".npmrc", ".pypirc", ".htpasswd"),
    *("secrets.*", "*.tfvars", ".git-credentials", "*.ovpn", "*.gpg", "*.asc"),
)
_SECRET_FOLDERS: Final = frozenset((".ssh", ".aws", ".gnupg", ".kube"))
_SECRET_TEXT: Final = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|\bgh[pousr]_[A-Za-z0-9]{36}"
    r"|\bgithub_pat_\w{22}"
    r"|\bglpat-[\w-]{20}"
    r"|\bxox[abprs]-[\w-]{10}"
    r"|\bsk-[A-Za-z0-9_-]{20}"
    r"|\bAIza[\w-]{35}"
    r"|\bhf_[A-Za-z0-9]{30}"
)

_SECRET_MARKS: Final = (
    *("PRIVATE KEY", "AKIA", "ASIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
    *("glpat-", "xox", "sk-", "AIza", "hf_"),
)
"""One of these stands in every match; a search for plain strings is far faster."""


def is_secret_name(path: str) -> bool:
    """Whether a file's name or folder says that it holds keys or passwords."""
    parts = path.replace("\\", "/").lower().split("/")
    return not _SECRET_FOLDERS.isdisjoint(parts[:-1]) or any(
        fnmatch(parts[-1], pattern) for pattern in _SECRET_NAMES
    )


def holds_secret(text: str) -> bool:
    """Whether text holds a private key or a key of a well-known service."""
    return any(mark in text for mark in _SECRET_MARKS) and _SECRET_TEXT.search(text) is not None


class IgnoreRules:
    """The .gitignore files of a workspace, nested ones too, read again when they change."""

    def __init__(self, root: Path | None) -> None:
        self._root = root.resolve() if root is not None else None
        self._specs: dict[Path, tuple[int, GitIgnoreSpec]] = {}

    def excludes(self, path: str) -> bool:
        """Whether a file, named absolutely or from the root, must stay out of every prompt."""
        if is_secret_name(path):
            return True
        if self._root is None:
            return False
        # Not resolved: a link inside the workspace is judged by its own name and by its target's.
        named = self._root / path
        target = named.resolve()
        if is_secret_name(target.as_posix()):
            return True
        if not target.is_relative_to(self._root):
            return False
        parts = target.relative_to(self._root).parts
        # As in git, nothing inside an ignored folder can be taken back in.
        return any(self._matches(parts[:end], end < len(parts)) for end in range(1, len(parts) + 1))

    def _matches(self, parts: tuple[str, ...], is_folder: bool) -> bool:
        assert self._root is not None
        ignored = ".git" in parts
        for depth in range(len(parts)):
            spec = self._spec(self._root.joinpath(*parts[:depth], ".gitignore"))
            if spec is not None:
                name = "/".join(parts[depth:]) + ("/" if is_folder else "")
                verdict = spec.check_file(name).include
                ignored = ignored if verdict is None else verdict
        return ignored

    def _spec(self, file: Path) -> GitIgnoreSpec | None:
        try:
            mtime_ns = file.stat().st_mtime_ns
            known = self._specs.get(file)
            if known is None or known[0] != mtime_ns:
                lines = file.read_text("utf-8", "replace").splitlines()
                known = self._specs[file] = (mtime_ns, GitIgnoreSpec.from_lines(lines))
        except (OSError, ValueError):
            return None
        return known[1]
