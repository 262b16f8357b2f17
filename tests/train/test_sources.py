from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from albor_train import sources
from albor_train.errors import DataError
from albor_train.sources import (
    Package,
    fetch,
    is_permissive,
    licence_of_metadata,
    pin,
    project_name,
    python_files_of_wheel,
    read_lock,
    write_lock,
)

LOCK = Path(__file__).parents[2] / "specs/sources.lock.yaml"


@pytest.mark.parametrize(
    ("licence", "allowed"),
    [
        ("MIT", True),
        ("BSD-3-Clause", True),
        ("Apache Software License", True),
        ("Apache-2.0 OR GPL-3.0-only", True),
        ("MIT AND LGPL-2.1-or-later", False),
        ("GNU General Public License v3 (GPLv3)", False),
        ("AGPL-3.0", False),
        ("MPL-2.0", False),
        ("BSD License AND Mozilla Public License 2.0 (MPL 2.0)", False),
        ("CC BY-NC 4.0", False),
        ("BUSL-1.1", False),
        ("Custom", False),
        ("", False),
        ("MITRE terms", False),
    ],
)
def test_only_permissive_licences(licence: str, allowed: bool) -> None:
    assert is_permissive(licence) is allowed


def test_licence_fields_in_order() -> None:
    head = "Metadata-Version: 2.1\nName: x\n"
    classifier = "Classifier: License :: OSI Approved :: MIT License\n"
    assert licence_of_metadata(head + "License-Expression: ISC\n" + classifier) == "ISC"
    assert licence_of_metadata(head + "License: whatever\n" + classifier) == "MIT License"
    assert licence_of_metadata(head + "License: BSD\n        more text\n") == "BSD"
    assert licence_of_metadata(head + "\nLicense: in the body\n") == ""


def test_the_committed_lock_is_sound() -> None:
    packages = read_lock(LOCK)
    assert len(packages) == 270
    assert [p.name for p in packages] == sorted(p.name for p in packages)
    assert all(p.name == project_name(p.name) for p in packages)


def test_lock_round_trip_and_refusals(tmp_path: Path) -> None:
    package = Package("a", "1", "a-1-py3-none-any.whl", "0" * 64, "MIT")
    path = tmp_path / "lock.yaml"
    write_lock([package], path)
    assert read_lock(path) == (package,)
    for entry in (
        Package("b", "1", "f", "0" * 64, "GPL-3.0"),
        Package("b", "1", "f", "short", "MIT"),
        package,
    ):
        write_lock([package, entry], path)
        with pytest.raises(DataError):
            read_lock(path)
    path.write_text("packages: [1, 2]")
    with pytest.raises(DataError):
        read_lock(path)


def wheel(folder: Path, licence: str = "MIT") -> Path:
    path = folder / "demo-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("demo/b.py", "x = 1\n")
        archive.writestr("demo/a.py", "y = 1\n")
        archive.writestr("demo/data.txt", "no")
        archive.writestr("demo/large.py", "#" * 5000)
        metadata = (
            f"Metadata-Version: 2.4\nName: demo\nVersion: 1.0\nLicense-Expression: {licence}\n"
        )
        archive.writestr("demo-1.0.dist-info/METADATA", metadata)
    return path


def fake_pip(monkeypatch: pytest.MonkeyPatch, licence: str = "MIT") -> list[str]:
    asked: list[str] = []

    def download(requirement: str, folder: Path) -> None:
        asked.append(requirement)
        wheel(folder, licence)

    monkeypatch.setattr(sources, "_pip_download", download)
    return asked


def test_pin_then_fetch_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_pip(monkeypatch)
    package = pin("demo", "", tmp_path)
    assert (package.name, package.version, package.licence) == ("demo", "1.0", "MIT")
    path = fetch(package, tmp_path)
    assert asked == ["demo"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == package.sha256
    path.write_bytes(b"damaged")
    # zipfile writes time stamps, so another build of the wheel has other bytes.
    monkeypatch.setattr(sources, "_sha256", lambda p: package.sha256 if p != path else "x")
    assert fetch(package, tmp_path).read_bytes() != b"damaged"
    assert asked == ["demo", "demo==1.0"]


def test_changed_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch)
    package = Package("demo", "1.0", "demo-1.0-py3-none-any.whl", "0" * 64, "MIT")
    with pytest.raises(DataError, match="do not use it"):
        fetch(package, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_copyleft_is_not_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, "GPL-3.0-or-later")
    with pytest.raises(DataError, match="GPL"):
        pin("demo", "", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_wheel_are_sorted_and_limited(tmp_path: Path) -> None:
    path = wheel(tmp_path)
    assert [name for name, _ in python_files_of_wheel(path, 1000)] == ["demo/a.py", "demo/b.py"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError):
        list(python_files_of_wheel(path, 1000))


def test_pip_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        returncode = 1
        stderr = "WARNING: x\nERROR: no version\nERROR: No matching distribution found\n"

    def run(*_: Any, **__: Any) -> Done:
        return Done()

    monkeypatch.setattr("subprocess.run", run)
    with pytest.raises(DataError, match="No matching distribution") as caught:
        pin("demo", "9", tmp_path)
    assert "\n" not in str(caught.value)
