"""Files are written to a temporary name and renamed: a reader never sees half of one."""

import csv
import errno
import hashlib
import os
import re
from contextlib import contextmanager
from pathlib import Path

from utils.errors import Stopped


@contextmanager
def atomic(path: str | Path):
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, remove it if not."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def full_disk(out: Path):
    """Say in a sentence that the disk is full: what was whole on it still is. Raises Stopped."""
    try:
        yield
    except Exception as error:  # torch.save raises its own error over the cause, safetensors tells the number in words
        told = re.search(r"\(os error (\d+)\)", str(error))
        numbers = {getattr(error, "errno", None), getattr(error.__context__, "errno", None), told and int(told[1])}
        full = numbers & {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        if not full:
            raise
        raise Stopped(f"{out} takes no more data ({os.strerror(full.pop())}). What was written before is whole: free "
                      "some space and repeat the command to go on from there.") from error


def hash16(data: bytes | Path) -> str:
    """16 hexadecimal digits of the SHA-256 of bytes, or of a file's content."""
    return hashlib.sha256(data.read_bytes() if isinstance(data, Path) else data).hexdigest()[:16]


def write_table(path: Path, header, rows) -> None:
    """Write a CSV file: a header and rows of as many values. Bytes of a path that are no text are escaped."""
    with atomic(path) as partial, open(partial, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
