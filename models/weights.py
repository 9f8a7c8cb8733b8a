"""Where weights are: known names, files, and Hugging Face. Needs no PyTorch."""

import re
import sys
from pathlib import Path

from utils.errors import InputError

KNOWN = {"tiny": str(Path(__file__).parent / "tiny.safetensors"),
         "cvg-diff": "hf://HajihajihaJimmy/CvG-Diff/CvG-Diff-net-colddiff_best_epoch.pkl"}


def find_checkpoint(name: str) -> Path:
    """The file of a name in KNOWN, of hf://owner/repository/file (downloaded once, then from the cache), or of a path.

    Raises InputError where there is none.
    """
    name = KNOWN.get(name, name)
    if not name.startswith("hf://"):
        if not Path(name).is_file():
            raise InputError(f"The checkpoint {name} does not exist; expected a file, hf://owner/repository/file, or "
                             f"one of {', '.join(KNOWN)}.")
        return Path(name)
    place = re.fullmatch("hf://([^/]+/[^/]+)/(.+)", name)
    if not place:
        raise InputError(f"--checkpoint {name}: expected hf://owner/repository/file.")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(*place.groups())
        if isinstance(cached, str):
            return Path(cached)
        print(f"Downloading {name} into the Hugging Face cache.", file=sys.stderr)
        return Path(hf_hub_download(*place.groups()))
    except (OSError, ValueError) as error:  # what its HTTP, offline, missing-file and bad-name errors have in common
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{name} is not in the Hugging Face cache and could not be downloaded "
                         f"({type(error).__name__}: {reason}). Download the file by hand and give its path.") from error
