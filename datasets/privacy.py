"""Pseudonyms in place of patients' names and IDs: in file names, in tables and where a path repeats them."""

import hashlib
import re

from datasets.series import Slice


def pseudonym(text: str, kind: str, keep: bool) -> str:
    """A name safe for files: `kind`-hash, or with `keep` the text itself, made unique where it had to be cleaned."""
    code = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()
    if not keep:
        return f"{kind}-{code[:10]}"
    clean = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.")[:64]
    return clean if clean == text else f"{clean or kind}-{code[:6]}"


def pseudonymizer(slices: list[Slice], keep: bool):
    """A function of a text that puts pseudonyms in place of the patients' names and IDs, unless `keep`."""
    words = {name.lower(): one.patient for one in slices for name in one.names if not keep}
    if not words:
        return str
    choices = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    pattern = re.compile(rf"(?<![A-Za-z0-9])({choices})(?![A-Za-z0-9])", re.I)
    return lambda text: pattern.sub(lambda m: pseudonym(words[m[0].lower()], "patient", keep=False), text)
