"""Damaged files of every kind that is read: a sentence or a whole result, never a traceback or a hang.

MUTATIONS is the number of each kind (25 by default; 1000 for a night).
"""

import gzip
import json
import os
import random
import resource
import signal
from contextlib import contextmanager

import h5py
import nibabel
import numpy as np
import pytest
import torch
from conftest import body, make_dicom

from datasets import formats
from datasets.series import Refused
from datasets.sinograms import read_sinograms
from datasets.slices import read_manifest, read_slice
from models.checkpoint import load_checkpoint, save_checkpoint, save_published
from models.scanner import make_scanner, read_geometry
from models.unet import UNet, UNetConfig
from utils import results
from utils.errors import InputError, RunFolderError
from utils.run_folder import described
from utils.state import newest_state, save_state

COUNT = int(os.environ.get("MUTATIONS", 25))
SECONDS, BYTES = 10, 4 << 30  # most that reading one file may take
NUMBERS = [b"-1", b"0", b"1e400", b"-1e400", b"NaN", b"1000000000", b"1" + b"0" * 40, b"null", b'"x"', b"[]", b"{}"]
GEOMETRY = {"angles": {"start": 0, "step": 10, "count": 36}, "detector_count": 64, "detector_pitch_mm": 2.0,
            "source_distance_mm": 500, "detector_distance_mm": 500, "field_of_view_mm": 120, "size": 32,
            "flip_image": "none", "water_per_cm": 0.2}


def image(path):
    """The slices of a file as prepare and reconstruct read them: (N, 16, 16)."""
    formats._load.cache_clear()  # another file of this name
    found = formats.scan(str(path))
    return [formats.read_hu(one, 16) for one in found]


def small_network():
    torch.manual_seed(0)
    return UNet(UNetConfig(width=32, multipliers=(1,), blocks=1, stem=4))


def published_network():
    torch.manual_seed(0)
    return UNet(UNetConfig(width=32, multipliers=(1,), blocks=1, stem=1, channels=1))


def make_dicom_file(path):
    make_dicom(path, pixels=(body(16, 0) + 1024).astype(np.uint16), compress=True)


def make_nifti(path):
    nibabel.save(nibabel.Nifti1Image(np.stack([body(16, 0)] * 2, -1).astype(np.int16), np.diag([1, 1, 2, 1])), path)


def make_npy(path):
    np.save(path, body(16, 0).astype(np.int16))


def make_safetensors(path):
    network = small_network()
    save_checkpoint(path, network.state_dict(), network.config, {"training": {"seed": 1}})


def make_published(path):
    save_published(path, published_network())


def make_state(path):
    save_state(path.parent, 1, {"network": small_network().state_dict(), "seen": 1, "seed": 7})


def make_h5(path):
    with h5py.File(path, "w") as file:
        file["sinogram"] = np.ones((36, 64), np.float32)


def make_results(path):
    row = dict.fromkeys(results.COLUMNS, "1.5") | {"file": "A_000.npy", "patient": "A", "method": "fbp", "views": "18"}
    rows = [row | {"views": str(n), "psnr": repr(30 + n / 7)} for n in range(1, 9)]
    path.write_text("\n".join([",".join(results.COLUMNS), *(
        ",".join((r | {"check": results.check_of(r)})[name] for name in results.COLUMNS) for r in rows)]) + "\n")


KINDS = {  # name of the file: (how it is made, how it is read)
    "a.dcm": (make_dicom_file, image),
    "a.nii": (make_nifti, image),
    "a.nii.gz": (make_nifti, image),
    "a.npy": (make_npy, image),
    "A_001.npy": (make_npy, lambda path: read_slice(path)),
    "a.safetensors": (make_safetensors, lambda path: load_checkpoint(path)[0].state_dict()),
    "a.pkl": (make_published, lambda path: load_checkpoint(path)[0].state_dict()),
    "state-000000001.pt": (make_state, lambda path: newest_state(path.parent)[1]),
    "a.json": (lambda path: path.write_text(json.dumps(GEOMETRY)), lambda path: make_scanner(read_geometry(path))),
    "a.yaml": (lambda path: path.write_text("\n".join(f"{k}: {json.dumps(v)}" for k, v in GEOMETRY.items())),
               lambda path: make_scanner(read_geometry(path))),
    "a.h5": (make_h5, lambda path: np.array(read_sinograms(path)[0])),
    "manifest.csv": (lambda path: path.write_text("file,patient,index\nA_000.npy,A,0\nB_000.npy,B,1\n"),
                     lambda path: read_manifest(path.parent)),
    "run.json": (lambda path: path.write_text(json.dumps({"views": [18], "preset": {"width": 32}, "seed": 1})),
                 lambda path: described(path.parent)),
    "results.csv": (make_results, lambda path: results.whole_rows(path)),
}
CHECKED = {"a.safetensors", "state-000000001.pt", "results.csv"}  # carry check sums: any change is noticed


def mutate(content: bytes, draw: random.Random) -> bytes:
    """Flipped, cut, zeroed, doubled or re-numbered: once to four times."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        size = max(1, len(data))
        place = draw.randrange(min(size, 900) if draw.random() < 0.7 else size)  # headers are small and matter
        match draw.randrange(6):
            case 0 | 1:
                data[place:place + 1] = bytes([draw.randrange(256)])
            case 2:
                del data[draw.randrange(size):]
            case 3:
                length = draw.choice((1, 8, 64, 4096))
                data[place:place + length] = bytes(min(length, len(data) - place))
            case 4:
                data[place:place] = data[place:place + draw.choice((4, 32, 256))]
            case 5:
                digits = [i for i, byte in enumerate(data[:4000]) if 48 <= byte < 58]
                if digits:
                    at = draw.choice(digits)
                    data[at:at + 1] = draw.choice(NUMBERS)
    return bytes(data)


@contextmanager
def limits():
    """TimeoutError after SECONDS; MemoryError for BYTES more than are in use."""
    def late(*_):
        raise TimeoutError
    pages = int(open("/proc/self/statm", encoding="ascii").read().split()[0])
    before, alarm = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, before[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
        resource.setrlimit(resource.RLIMIT_AS, before)


def same(a, b) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_gives_a_sentence_or_a_whole_result(name, tmp_path, capsys):
    make, read = KINDS[name]
    path = tmp_path / name
    make(path)
    whole, original = path.read_bytes(), read(path)
    draw, refused, crashed = random.Random(name), 0, []
    for number in range(COUNT):
        damaged = mutate(gzip.decompress(whole), draw) if name.endswith(".gz") and number % 2 else mutate(whole, draw)
        path.write_bytes(gzip.compress(damaged) if name.endswith(".gz") and number % 2 else damaged)
        try:
            with limits():
                found = read(path)
        except (Refused, InputError, RunFolderError):
            refused += 1
            continue
        except BaseException as error:  # noqa: BLE001  a hang, too
            crashed.append(f"{number}: {error!r}")
            if dump := os.environ.get("MUTATIONS_KEEP"):
                (path.parent.__class__(dump) / f"{number}-{name}").write_bytes(path.read_bytes())
            continue
        if name in CHECKED and name != "results.csv":
            assert found is None or same(found, original), number
        elif name == "results.csv":
            assert all(row in original for row in found), number
        elif name.startswith(("a.dcm", "a.n")):
            assert all(one.shape == (16, 16) and one.dtype == np.int16 for one in found), number
        elif name == "A_001.npy":
            assert np.isfinite(found).all() and found.shape[0] == found.shape[1]
    assert not crashed, "\n".join(crashed)
    assert refused or name in ("state-000000001.pt", "manifest.csv", "results.csv")
    capsys.readouterr()
