"""The output folder of a run: one process at a time writes there, and run.json says what it holds."""

import json
import os
import re
import socket
from contextlib import suppress
from pathlib import Path

from utils.errors import RunFolderError
from utils.files import atomic, writing

LOCK = ".lock"
_held: dict[Path, tuple[int, bool]] = {}  # {folder: (descriptor of its lock, whether `lock` made the folder)}


def lock(out: Path) -> None:
    """Make OUT where it is not there, and keep other programs out until `unlock`, or until this process ends anyhow.

    Raises RunFolderError where another process has it or it is no folder, Stopped where it cannot be written.
    """
    folder = out.resolve()
    if folder in _held:
        return
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"{out} is a file; give --out a new or empty folder.")
    made, mine = not out.exists(), False
    while not mine:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            number = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        if not _locked(number):
            owner = os.read(number, 1000).decode(errors="replace") or "another process"
            os.close(number)
            raise RunFolderError(f"{out} is in use by {owner}; wait for it or stop it, or give --out another folder.")
        with suppress(FileNotFoundError):
            mine = os.path.samestat(os.fstat(number), os.stat(out / LOCK))
        if not mine:  # its owner removed it while we opened it
            os.close(number)
    _held[folder] = number, made
    with writing(out):
        os.truncate(number, 0)
        os.write(number, f"process {os.getpid()} on {socket.gethostname()}".encode())


def _locked(number: int) -> bool:
    """Lock an open file; False where another process has. The system ends it with the process that holds it."""
    try:
        if os.name == "nt":
            import msvcrt
            os.lseek(number, 2**20, os.SEEK_SET)  # Windows lets nobody read what is locked
            msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
            os.lseek(number, 0, os.SEEK_SET)
        else:
            import fcntl
            fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.lseek(number, 0, os.SEEK_SET)
        return False
    except OSError:  # a file system without locks
        return True
    return True


def unlock() -> None:
    """Give back all folders of this process, and remove those that it made and that stayed empty."""
    for folder, (number, made) in _held.items():
        with suppress(OSError):
            (folder / LOCK).unlink()
        os.close(number)
        with suppress(OSError):
            if made:
                folder.rmdir()
    _held.clear()


def is_leftover(path: Path) -> bool:
    """Whether a file is a lock or half a file, as a killed run leaves it."""
    return path.name == LOCK or re.fullmatch(r"\..+\.\d+\.partial", path.name) is not None


def sweep(out: Path) -> None:
    """Remove half files of killed runs. OUT is locked, so none of them is being written."""
    with writing(out):
        for path in filter(is_leftover, list(out.rglob(".*.partial"))):
            path.unlink(missing_ok=True)


def described(out: Path, name: str = "run.json") -> dict | None:
    """What OUT/run.json says, or None where it says nothing. Raises RunFolderError where it is damaged."""
    path = out / name
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"{path} cannot be read ({error}); restore it, or give --out a new folder.") from None
    if not isinstance(found, dict):
        raise RunFolderError(f"{path} holds no description of a run; restore it, or give --out a new folder.")
    return found or None


def check(out: Path, description: dict, what: str, *, before: dict | None = None, accept: tuple[str, ...] = (),
          hints: dict[str, str] | None = None, once: dict | None = None) -> dict:
    """What run.json will say of the run that `description` (JSON) describes. Raises RunFolderError where OUT holds
    something else.

    what: the kind of run, for the sentence. before: what OUT is known to hold; run.json if None. accept: keys that may
    differ. hints: what to do where only that key differs. once: values that only the first run decides.
    """
    before = before or described(out)
    if not before and out.exists() and not all(map(is_leftover, out.iterdir())):
        raise RunFolderError(f"{out} is not empty and holds no {what}; give --out a new or empty folder.")
    now, once = json.loads(json.dumps(description)), once or {}
    before = before or now
    wrong = [key for key in {**now, **before} if before.get(key) != now.get(key) and key not in once]
    if set(wrong) - set(accept):
        hint = (hints or {}).get(wrong[0]) if len(wrong) == 1 else None
        names = ", ".join(_named(key, before.get(key), now.get(key)) for key in wrong)
        raise RunFolderError(f"{out} holds a {what} with another {names}; "
                             + (hint or "give --out a new folder, or the same options to resume."))
    return now | {key: before.get(key, value) for key, value in once.items()}


def claim(out: Path, description: dict, what: str, **options) -> dict:
    """Make OUT the folder of the run that `description` describes, locked, or find that it is: run.json's content.

    options and errors: of `check` and `lock`.
    """
    lock(out)
    now = check(out, description, what, **options)
    sweep(out)
    with atomic(out / "run.json") as partial:
        partial.write_text(json.dumps(now, indent=1), encoding="utf-8")
    return now


def _named(key: str, before, now) -> str:
    """The key, with those inside it that differ."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return key
    return f"{key} ({', '.join(name for name in {**now, **before} if before.get(name) != now.get(name))})"
