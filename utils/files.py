"""Files are written to a temporary name and renamed: a reader never sees half of one."""

import csv
import errno
import hashlib
import os
from contextlib import contextmanager
from pathlib import Path

from utils.errors import CvGDiffError, Stopped

FORMULA = frozenset("=+-@\t\r'")  # what a spreadsheet's formula begins with, and the apostrophe that says it is none


@contextmanager
def atomic(path: str | Path):
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, remove it if not.

    File and folder are synchronized: neither a power cut nor a full disk costs what was there. Raises Stopped where
    writing fails.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path):
        try:
            yield partial
            _sync(partial, os.O_RDWR)  # Windows refuses it for a file opened for reading
            os.replace(partial, path)
            if os.name != "nt":  # it opens no folders
                _sync(path.parent, os.O_RDONLY)
        finally:
            partial.unlink(missing_ok=True)


def _sync(path: Path, mode: int) -> None:
    number = os.open(path, mode)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems have no such call for folders
            raise
    finally:
        os.close(number)


@contextmanager
def writing(out: Path):
    """Say in a sentence that OUT cannot be written: what was whole there still is. Raises Stopped."""
    try:
        yield
    except CvGDiffError:
        raise
    except Exception as error:
        chain = [error]
        while inner := chain[-1].__context__:  # torch.save and pydicom raise their own errors over the system's
            chain.append(inner)
        cause = next((one for one in reversed(chain) if isinstance(one, OSError)), None)
        if cause is None:
            raise
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)  # None: NumPy counts what it wrote
        found, advice = ("takes no more data", "free some space") if full else ("cannot be written", "put that right")
        raise Stopped(f"Stopped: writing failed ({out} {found}: {cause.strerror or cause}). What was written before "
                      f"is whole: {advice} and repeat the command to go on from there.") from error


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash16(data: str | bytes | Path) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of text (a file's name may be none), bytes or a file's content."""
    if isinstance(data, Path):
        return sha256(data)[:16]
    data = data.encode(errors="backslashreplace") if isinstance(data, str) else data
    return hashlib.sha256(data).hexdigest()[:16]


def write_table(path: Path, header, rows) -> None:
    """Write a CSV file: a header and rows of as many values. Bytes of a path that are no text are escaped."""
    with atomic(path) as partial, open(partial, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file, lineterminator="\n").writerows(map(as_cells, [header, *rows]))


def as_cells(row) -> list:
    """Values of a CSV row. Text that a spreadsheet would take for a formula gets an apostrophe; numbers stay."""
    return ["'" + value if isinstance(value, str) and value[:1] in FORMULA and not _is_number(value) else value
            for value in row]


def from_cells(row: list[str]) -> list[str]:
    """What `as_cells` was given."""
    return [value[1:] if value[:1] == "'" and value[1:2] in FORMULA else value for value in row]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
