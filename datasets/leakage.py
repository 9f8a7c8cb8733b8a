"""Leakage: a checkpoint keeps short hashes of the patients and slices that it was trained on.

So an evaluation notices them again. 10,000 slices take 100 kB of a header.
"""

import hashlib
from pathlib import Path

import numpy as np

from datasets.slices import patients_of, unsure

DIGITS = 10  # of a hash: 1,000 slices meet 10,000 others by chance in one of 100,000 evaluations


def traces(files: list[Path], hu: np.ndarray, source: str | None = None) -> dict:
    """What a header keeps of slices (N, H, H): hashes of their patients' names and of their HU, one after another.

    source: of datasets.slices.patients_of. Left out are patients whose names say nothing, and slices of air alone.
    """
    owners = [] if source is None and unsure(files) else patients_of(files, source)
    return _joined({_hash(owner.casefold().encode(errors="backslashreplace")) for owner in owners},
                   {_hash(np.ascontiguousarray(one + 0.0)) for one in hu if np.ptp(one)}, True)


def together(*parts: dict | None) -> dict:
    """What several trainings saw, one after the other; it is not `complete` where one does not say."""
    known = [part for part in parts if part]
    patients, slices = (set().union(*(_hashes(part, name) for part in known)) for name in ("patients", "slices"))
    return _joined(patients, slices, all(part and part.get("complete") for part in parts))


def met_again(known: dict | None, now: dict) -> dict | str:
    """{"slices", "patients"}: how many of those `now` evaluated are `known` from training; "unknown" if it isn't said.
    """
    if not isinstance(known, dict):
        return "unknown"
    found = {name: len(_hashes(known, name) & _hashes(now, name)) for name in ("slices", "patients")}
    return found if any(found.values()) or known.get("complete") is True else "unknown"


def _joined(patients: set[str], slices: set[str], complete: bool) -> dict:
    return {"patients": "".join(sorted(patients)), "slices": "".join(sorted(slices)), "complete": complete}


def _hashes(part: dict, name: str) -> set[str]:
    text = str(part.get(name, ""))
    return {text[i:i + DIGITS] for i in range(0, len(text), DIGITS)}


def _hash(content) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]
