"""The state of a run on disk: written whole or not at all, found again on resume, never that of another run."""

import errno
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from utils.files import atomic


def commit() -> str:
    """Git commit of this code, or "unknown" outside a repository."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def versions() -> dict[str, str]:
    """Of Python and of the packages that the numbers depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in ("torch", "numpy", "numba", "torch-radon"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@contextmanager
def full_disk(out: Path):
    """Say in a sentence that the disk is full: what was whole on it still is."""
    try:
        yield
    except Exception as error:  # torch.save raises its own error over the cause, safetensors tells the number in words
        told = re.search(r"\(os error (\d+)\)", str(error))
        numbers = {getattr(error, "errno", None), getattr(error.__context__, "errno", None), told and int(told[1])}
        full = numbers & {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        if not full:
            raise
        sys.exit(f"{out} takes no more data ({os.strerror(full.pop())}). Its last checkpoint is whole: free some "
                 "space and repeat the command to go on from there.")


def save_state(out: Path, seen: int, content: dict) -> None:
    """Write state-`seen`.pt; then remove all older ones but one. Later ones are damaged and will be overwritten."""
    path = out / f"state-{seen:09d}.pt"
    with full_disk(out), atomic(path) as partial, open(partial, "wb") as file:
        torch.save(content, file)
    for old in [p for p in sorted(out.glob("state-*.pt")) if p <= path][:-2]:
        old.unlink()


def newest_state(out: Path, device: str):
    """(path, content) of the newest whole state, or (None, None); a damaged one is named and passed over."""
    for path in sorted(out.glob("state-*.pt"), reverse=True):
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a truncated zip fails in many ways, and an older state serves
            print(f"{path.name} cannot be read ({type(error).__name__}); trying the one before.", file=sys.stderr)
        else:
            return path, torch.load(path, map_location=device, weights_only=True)  # may fail: the file is whole
    return None, None


def check_run(out: Path, run: dict, before: dict | None, accept_new_data: bool) -> None:
    """Exit with a sentence where OUT holds a run other than `run`; `before` describes the run in it."""
    if before is None:
        if out.is_dir() and any(out.iterdir()):
            sys.exit(f"{out} is not empty and holds no run of train.py; give --out a new or empty folder.")
        return
    run = json.loads(json.dumps(run))
    wrong = sorted(k for k in {*run, *before} if before.get(k) != run.get(k))
    if wrong == ["data"]:
        if not accept_new_data:
            sys.exit(f"The slices changed since {out} was begun: their fingerprint is {' '.join(run['data'])}, it was "
                     f"{' '.join(before['data'])}. Restore them, give --out a new folder, or go on with what is there "
                     "now by --accept-new-data.")
        print("The slices changed since the run was begun; going on with what is there now.")
    elif wrong:
        fields = [k for k, v in run["preset"].items() if before.get("preset", {}).get(k) != v]
        detail = f" ({', '.join(fields)})" if fields else ""
        sys.exit(f"{out} holds a run with another {' and '.join(wrong)}{detail}; "
                 "give --out a new folder, or the same options to resume.")


def describe_run(out: Path, run: dict) -> None:
    """Write run.json."""
    out.mkdir(parents=True, exist_ok=True)
    with full_disk(out), atomic(out / "run.json") as partial:
        partial.write_text(json.dumps(run, indent=1))


def described_run(out: Path) -> dict | None:
    """What run.json in OUT says, or None where there is none."""
    path = out / "run.json"
    return json.loads(path.read_text()) if path.is_file() else None
