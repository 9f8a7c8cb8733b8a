"""What a pickle of weights asks for, looked at before PyTorch reads it.

PyTorch's reader runs no code of a file, but it makes bytearrays and tensors of whatever size a few bytes ask for.
"""

import re
from pathlib import Path
from pickle import UnpicklingError
from pickletools import genops
from zipfile import ZipFile

from utils.errors import InputError

LONGEST = 2**20  # bytes: of what describes the weights; that of the published file takes 0.1 MB
NAMES = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage")
MAGIC = 0x1950A86A20F9469CFC6C  # the first of the five pickles in a file from before PyTorch 1.6


def check_pickles(path: Path) -> None:
    """Raises UnpicklingError for names beyond those of weights, InputError for more than the file can hold."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            file.seek(0)
            for _ in range(5):
                _check(path, file, size)
            return
    with ZipFile(path) as archive:
        parts = archive.infolist()
        if sum(part.file_size for part in parts) > size:
            raise InputError(f"{path} is compressed, which no checkpoint of PyTorch is.")
        for part in parts:
            if part.filename.endswith("data.pkl"):
                with archive.open(part) as file:
                    _check(path, file, size)


def _check(path, file, size: int) -> None:
    maker, before = {}, ""  # {place in the memo: the operation that made what is there}, the operation before this
    for operation, value, place in genops(file):
        name = operation.name
        if name == "GLOBAL" and not NAMES.fullmatch(value):
            raise UnpicklingError(value)
        memo = "GET" in name or "PUT" in name
        too_many = isinstance(value, int) and value > max(size, 10**6) and value != MAGIC and not memo
        twice = "GET" in name and maker.get(value, "").startswith("TUPLE")  # and so 2^n times
        if too_many or twice or place > LONGEST:
            raise InputError(f"{path} describes more than its {size} bytes can hold; expected a checkpoint of the "
                             "published CvG-Diff code.")
        if "PUT" in name:
            maker[value] = before
        before = name
