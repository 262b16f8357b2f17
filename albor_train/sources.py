"""Where text comes from: pinned packages of the Python package index, and local folders.

A lock file names each package's version, file, SHA-256 and licence. Only wheels are taken, since
opening a source archive through pip would run its build script. pip fetches them, with whatever
index and mirror it is configured for; a file whose hash differs is refused.
"""

from __future__ import annotations

import contextlib
import email.parser
import hashlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from albor_train.errors import DataError
from albor_train.spec import FolderSource, to_plain

__all__ = [
    "Package",
    "fetch",
    "is_permissive",
    "licence_of_metadata",
    "pin",
    "project_name",
    "python_files_of_folder",
    "python_files_of_wheel",
    "read_lock",
    "write_lock",
]

_PLATFORM: Final = (
    "--only-binary=:all:",
    "--python-version=313",
    "--implementation=cp",
    "--abi=cp313",
    "--abi=abi3",
    "--abi=none",
    "--platform=manylinux_2_28_x86_64",
    "--platform=manylinux_2_17_x86_64",
    "--platform=manylinux2014_x86_64",
    "--platform=any",
)
"""One platform for everybody, so that the same file is chosen wherever the lock is used."""

_COPYLEFT = re.compile(
    r"\b(?:A|L)?GPL|General Public|Affero|\bMPL|Mozilla Public|\bEPL|Eclipse Public|\bCDDL|\bEUPL"
    r"|\bOSL|Open Software License|\bSSPL|\bBUSL|Business Source|Commons Clause|Non-?Commercial"
    r"|CC[- ]BY[- ](?:NC|SA|ND)|Proprietary|All rights reserved",
    re.IGNORECASE,
)
_PERMISSIVE = re.compile(
    r"\bMIT\b|\bBSD|\bApache|\bISC\b|\bZPL|Zope Public|\bPSF|Python Software Foundation"
    r"|\bPython-2\.0|\bHPND|Historical Permission|\bUnlicense|Public Domain|\bCC0|\b0BSD|\bZlib"
    r"|\bBSL-1\.0|Boost Software|\bMIT-0|\bUIUC|\bNCSA|\bWTFPL|\bAFL|Academic Free",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Package:
    """One pinned wheel."""

    name: str
    version: str
    file: str
    sha256: str
    licence: str


def project_name(name: str) -> str:
    """The index's normal form of a project name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def is_permissive(licence: str) -> bool:
    """Whether a licence text or SPDX expression is known, permissive and nothing else.

    "A OR B" is permissive where one side is: the user may choose.
    """
    if " OR " in licence:
        return any(is_permissive(side.strip(" ()")) for side in licence.split(" OR "))
    return bool(_PERMISSIVE.search(licence)) and not _COPYLEFT.search(licence)


def licence_of_metadata(metadata: str) -> str:
    """The licence that a package's METADATA states, on one short line; "" where it has none.

    The SPDX field decides; then the classifiers; then the free-text field's first line.
    """
    message = email.parser.HeaderParser().parsestr(metadata)
    expression = message.get("License-Expression", "").strip()
    if expression:
        return expression[:120]
    classifiers = [
        value.split("::")[-1].strip()
        for value in message.get_all("Classifier", [])
        if value.startswith("License ::")
    ]
    classifiers = [value for value in classifiers if value != "OSI Approved"]
    if classifiers:
        return " AND ".join(classifiers)[:200]
    text = message.get("License", "").strip()
    return " ".join(text.splitlines()[0].split())[:120] if text else ""


def read_lock(path: Path) -> tuple[Package, ...]:
    """The packages of a lock file, in its order.

    Raises:
        DataError: it can't be read, or an entry is incomplete, doubled or not permissive.
    """
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
        packages = tuple(Package(**entry) for entry in raw["packages"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is no lock file of packages: {reason}") from error
    seen: set[str] = set()
    for package in packages:
        if not re.fullmatch(r"[0-9a-f]{64}", package.sha256):
            raise DataError(f"{path}: {package.name} has no SHA-256: pin it again")
        if not is_permissive(package.licence):
            raise DataError(
                f"{path}: {package.name} is under {package.licence!r}, which is not known to be "
                f"permissive: remove it"
            )
        if package.name in seen:
            raise DataError(f"{path}: {package.name} is listed twice")
        seen.add(package.name)
    return packages


def write_lock(packages: Iterable[Package], path: Path) -> None:
    """Write a lock file, sorted by name; a temporary name is renamed when complete."""
    entries = sorted((to_plain(package) for package in packages), key=lambda entry: entry["name"])
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        text = yaml.safe_dump({"packages": entries}, sort_keys=False, width=200)
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def pin(name: str, version: str, cache: Path) -> Package:
    """Fetch one release, note its hash and licence, and keep its file in `cache`.

    Raises:
        DataError: there is no wheel, or its licence is not known to be permissive.
    """
    with _temporary_folder(cache) as folder:
        _pip_download(f"{name}=={version}" if version else name, folder)
        wheel = _only_file(folder, name)
        licence = licence_of_metadata(_wheel_metadata(wheel))
        if not is_permissive(licence):
            raise DataError(f"{name}: licence {licence!r} is not known to be permissive")
        sha256 = _sha256(wheel)
        wheel_name, wheel_version = wheel.name.split("-")[:2]
        package = Package(project_name(wheel_name), wheel_version, wheel.name, sha256, licence)
        wheel.replace(_cached(package, cache))
    return package


def fetch(package: Package, cache: Path) -> Path:
    """The package's wheel, from `cache` or from the index, its hash checked.

    Raises:
        DataError: it can't be had, or its bytes are not those of the lock.
    """
    path = _cached(package, cache)
    if path.exists() and _sha256(path) == package.sha256:
        return path
    with _temporary_folder(cache) as folder:
        _pip_download(f"{package.name}=={package.version}", folder)
        wheel = _only_file(folder, package.name)
        found = _sha256(wheel)
        if found != package.sha256:
            raise DataError(
                f"{package.name} {package.version}: the file has SHA-256 {found}, but the lock "
                f"says {package.sha256}: do not use it, or pin it again"
            )
        wheel.replace(path)
    return path


def python_files_of_wheel(path: Path, max_bytes: int) -> Iterator[tuple[str, bytes]]:
    """(path, content) of each Python file of a wheel, sorted; larger files are left out.

    Raises:
        DataError: the archive is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for info in sorted(archive.infolist(), key=lambda item: item.filename):
                if info.filename.endswith(".py") and 0 < info.file_size <= max_bytes:
                    yield info.filename, archive.read(info)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise DataError(f"{path} is no readable wheel: {error}") from error


def python_files_of_folder(
    source: FolderSource, folder: Path, max_bytes: int
) -> Iterator[tuple[str, bytes]]:
    """(path, content) of each Python file below a folder, sorted; links are not followed.

    Raises:
        DataError: the folder does not exist, or its licence is not known to be permissive.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: give one that holds Python files")
    if not is_permissive(source.licence):
        raise DataError(
            f"{source.project} is under {source.licence!r}, which is not known to be permissive: "
            f"remove it"
        )
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in source.exclude)
        for name in sorted(files):
            path = Path(root) / name
            if not name.endswith(".py") or path.is_symlink():
                continue
            if 0 < path.stat().st_size <= max_bytes:
                yield path.relative_to(folder).as_posix(), path.read_bytes()


def _cached(package: Package, cache: Path) -> Path:
    # Hashed, so that two releases or a changed file never share a name.
    return cache / f"{package.sha256[:12]}-{package.file}"


@contextlib.contextmanager
def _temporary_folder(cache: Path) -> Iterator[Path]:
    cache.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".fetch-", dir=cache))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _pip_download(requirement: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *_PLATFORM]
    command += ["--dest", str(folder), "--", requirement]
    try:
        done = subprocess.run(  # noqa: S603 - a fixed program; the requirement follows "--"
            command, capture_output=True, text=True, timeout=900, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"{requirement}: pip did not finish: {type(error).__name__}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = lines[-1] if lines else f"exit {done.returncode}"
        raise DataError(f"{requirement} can't be fetched: {reason}")


def _only_file(folder: Path, name: str) -> Path:
    files = [path for path in folder.iterdir() if path.suffix == ".whl"]
    if len(files) != 1:
        raise DataError(f"{name}: pip gave {len(files)} wheels instead of one")
    return files[0]


def _wheel_metadata(wheel: Path) -> str:
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if re.fullmatch(r"[^/]+\.dist-info/METADATA", name):
                    return archive.read(name).decode("utf-8", "replace")
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{wheel.name} is no readable wheel: {error}") from error
    raise DataError(f"{wheel.name} has no METADATA")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
