"""Where weights are: known names, files, and Hugging Face. Needs no PyTorch."""

import re
import sys
from pathlib import Path

from utils.errors import InputError
from utils.files import sha256

# name: (file or address, its SHA-256 where it is known). The published weights were never fetched for this table.
KNOWN = {
    "tiny": (str(Path(__file__).parent / "tiny.safetensors"),
             "f0ae001d8bad9c8ea8fd2695697193a208561ba1c4a4cb6ab1385a624ba7e142"),
    "cvg-diff": ("hf://HajihajihaJimmy/CvG-Diff/CvG-Diff-net-colddiff_best_epoch.pkl", None),
}


def find_checkpoint(name: str) -> Path:
    """The file of a name in KNOWN, of hf://owner/repository[@revision]/file (downloaded once, then from the cache), or
    of a path.

    Which revision of Hugging Face it is, and its SHA-256, are printed. Raises InputError where there is none, or where
    a known name has another SHA-256.
    """
    address, expected = KNOWN.get(name, (name, None))
    if not address.startswith("hf://"):
        path, revision = Path(address), ""
        if not path.is_file():
            raise InputError(f"The checkpoint {name} does not exist; expected a file, hf://owner/repository/file, or "
                             f"one of {', '.join(KNOWN)}.")
    else:
        path, revision = _from_hub(address)
    if expected or revision:
        found = sha256(path)
        if expected not in (None, found):
            raise InputError(f"{name} is {path}, whose SHA-256 {found} is not {expected}; restore or download it, "
                             "or give the path of a file of your own.")
        if revision:
            print(f"{address}: revision {revision}, SHA-256 {found}.", file=sys.stderr)
    return path


def _from_hub(address: str) -> tuple[Path, str]:
    """(file in the Hugging Face cache, the revision it is of)."""
    place = re.fullmatch("hf://([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", address)
    if not place:
        raise InputError(f"--checkpoint {address}: expected hf://owner/repository/file.")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    repository, revision, file = place.groups()
    try:
        path = try_to_load_from_cache(repository, file, revision=revision)
        if not isinstance(path, str):
            print(f"Downloading {address} into the Hugging Face cache.", file=sys.stderr)
            path = hf_hub_download(repository, file, revision=revision)
    except (OSError, ValueError) as error:  # what its HTTP, offline, missing-file and bad-name errors have in common
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{address} is not in the Hugging Face cache and could not be downloaded "
                         f"({type(error).__name__}: {reason}). Download the file by hand and give its path.") from error
    return Path(path), Path(path).parts[-1 - len(Path(file).parts)]
