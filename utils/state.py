"""The state of a training on disk: written whole or not at all, and found again on resume."""

import hashlib
import importlib.metadata
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import torch

from utils.files import atomic

MARK = b"sha256 "  # then 64 digits: the end of a state


def commit() -> str:
    """Git commit of this code, or "unknown" outside a repository and where git is not installed."""
    try:
        return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                                       stderr=subprocess.DEVNULL).decode().strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Of Python and of the packages that the numbers depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in ("torch", "numpy", "numba", "torch-radon"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def save_state(out: Path, seen: int, content: dict) -> None:
    """Write state-`seen`.pt; then remove all older ones but one. Later ones are damaged and will be overwritten."""
    path = out / f"state-{seen:09d}.pt"
    with atomic(path) as partial, open(partial, "w+b") as file:
        torch.save(content, file)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.write(MARK + digest.encode())
    for old in [p for p in sorted(out.glob("state-*.pt")) if p <= path][:-2]:
        old.unlink()


def newest_state(out: Path):
    """(path, content on the CPU) of the newest whole state, or (None, None); a damaged one is named and passed over."""
    for path in sorted(out.glob("state-*.pt"), reverse=True):
        try:
            check_state(path)
            return path, torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a truncated zip fails in many ways, and an older state serves
            print(f"{path.name} cannot be read ({type(error).__name__}); trying the one before.", file=sys.stderr)
    return None, None


def check_state(path: Path) -> None:
    """Raises BadZipFile where a state is not as it was written. PyTorch compares nothing."""
    content = memoryview(path.read_bytes())
    body, end = content[:-len(MARK) - 64], content[-len(MARK) - 64:]
    if end[:len(MARK)] != MARK:  # written by an older version: nothing comes after the zip's end, nor half a mark
        with ZipFile(path) as file:
            if content[-22:-18] != b"PK\5\6" or file.testzip():
                raise BadZipFile("damaged")
    elif hashlib.sha256(body).hexdigest().encode() != end[len(MARK):]:
        raise BadZipFile("another SHA-256")
