"""The output folder of a run: run.json says what it holds, and nothing else may write there."""

import json
from pathlib import Path

from utils.errors import RunFolderError
from utils.files import atomic, full_disk


def described(out: Path) -> dict | None:
    """What OUT/run.json says, or None where it says nothing. Raises RunFolderError where it is damaged."""
    path = out / "run.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read ({error}); restore it, or give --out a new folder.") from None
    if not isinstance(found, dict):
        raise RunFolderError(f"{path} holds no description of a run; restore it, or give --out a new folder.")
    return found or None


def claim(out: Path, description: dict, what: str, *, before: dict | None = None, accept: tuple[str, ...] = (),
          hints: dict[str, str] | None = None, once: dict | None = None) -> dict:
    """Make OUT the folder of the run that `description` (JSON) describes, or find that it is: run.json's content.

    what: the kind of run, for the sentence. before: what OUT is known to hold; run.json if None. accept: keys that may
    differ. hints: what to do where only that key differs. once: values that only the first run decides. Raises
    RunFolderError where OUT holds something else.
    """
    before = before or described(out)
    if not before and out.exists() and (not out.is_dir() or any(out.iterdir())):
        state = "is not empty and holds" if out.is_dir() else "is a file,"
        raise RunFolderError(f"{out} {state} no {what}; give --out a new or empty folder.")
    now, once = json.loads(json.dumps(description)), once or {}
    before = before or now
    wrong = [key for key in {**now, **before} if before.get(key) != now.get(key) and key not in once]
    if set(wrong) - set(accept):
        hint = (hints or {}).get(wrong[0]) if len(wrong) == 1 else None
        names = ", ".join(_named(key, before.get(key), now.get(key)) for key in wrong)
        raise RunFolderError(f"{out} holds a {what} with another {names}; "
                             + (hint or "give --out a new folder, or the same options to resume."))
    now |= {key: before.get(key, value) for key, value in once.items()}
    with full_disk(out):
        out.mkdir(parents=True, exist_ok=True)
        with atomic(out / "run.json") as partial:
            partial.write_text(json.dumps(now, indent=1), encoding="utf-8")
    return now


def _named(key: str, before, now) -> str:
    """The key, with those inside it that differ."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return key
    return f"{key} ({', '.join(name for name in {**now, **before} if before.get(name) != now.get(name))})"
