"""Files that claim more than they hold: each is refused by name before it takes memory or time, the rest goes on."""

import gzip
import os
import resource
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pydicom
import pytest
from conftest import ROOT, body, make_dicom, make_series
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
)
from test_prepare import reasons, table

from datasets import look
from datasets.dicom import MOST_INFLATED, stream_shape
from datasets.series import Refused
from datasets.sinograms import read_sinograms
from datasets.slices import read_slice
from models.scanner import make_scanner, read_geometry
from utils.errors import InputError

GIB = 1 << 30
PEAK = """
import resource, sys
from datasets.prepare import main
status = main(sys.argv[1:])
print(max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) // 1024)
sys.exit(status)
"""


def sof(marker, rows, columns, components=1):
    """The beginning of a JPEG or JPEG-LS stream."""
    return b"\xff\xd8\xff" + struct.pack(">BHBHHB", marker, 8 + 3 * components, 12, rows, columns, components)


def siz(rows, columns, components=1):
    """The beginning of a JPEG 2000 stream."""
    sides = (columns, rows, 0, 0)  # of the image, then of its tiles
    return b"\xff\x4f\xff\x51" + struct.pack(">HHIIIIIIIIH", 41, 0, *sides, *sides, components)


def deflated(path, swollen):
    """A DICOM file that is sound but for an element of zeros at its end, which deflate packs a thousand times."""
    make_dicom(path, syntax=DeflatedExplicitVRLittleEndian)
    content = path.read_bytes()
    start = 144 + pydicom.filereader.read_file_meta_info(path).FileMetaInformationGroupLength
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    element = struct.pack("<HH2sHI", 0x7FE1, 16, b"OB", 0, swollen)
    parts = [packer.compress(zlib.decompress(content[start:], -15) + element)]
    parts += [packer.compress(bytes(1 << 20)) for _ in range(swollen >> 20)] + [packer.flush()]
    path.write_bytes(content[:start] + b"".join(parts))


def packed_nifti(path, shape, dtype, megabytes):
    import nibabel

    header = nibabel.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header.set_sform(np.diag([0.8, 0.8, 1, 1]), 1)
    header["magic"], header["vox_offset"] = b"n+1", 352
    with gzip.open(path, "wb") as file:
        file.write(header.binaryblock + bytes(4))
        for _ in range(megabytes):
            file.write(bytes(1 << 20))


def test_an_archive_of_bombs_costs_neither_memory_nor_time(tmp_path):
    make_series(tmp_path / "in/good")
    bad = tmp_path / "in/bad"
    for number, (name, syntax, stream) in enumerate((
            ("jpeg", JPEGLosslessSV1, sof(0xC3, 65500, 65500)), ("baseline", JPEGBaseline8Bit, sof(0xC0, 16, 16, 3)),
            ("jls", JPEGLSLossless, sof(0xF7, 65500, 65500)), ("j2k", JPEG2000Lossless, siz(2**31, 2**31)),
            ("layers", JPEG2000Lossless, siz(16, 16, 16384)), ("none", JPEGLosslessSV1, b"\xff\xd8\xff\xd9"))):
        make_dicom(bad / f"{name}.dcm", syntax=syntax, PixelData=encapsulate([stream + bytes(900)]),
                   SeriesInstanceUID=f"1.9.{number}")
    make_dicom(bad / "minus.dcm", NumberOfFrames=-1)
    make_dicom(bad / "frames.dcm", NumberOfFrames=10**9)
    deflated(bad / "deflated.dcm", 2 * MOST_INFLATED)
    packed_nifti(bad / "tiny.nii.gz", (16000, 16000, 26), np.int8, 0)
    packed_nifti(bad / "zeros.nii.gz", (512, 512, 2047), np.int16, 4)
    (bad / "token.npy").write_bytes(b"\x93NUMPY\x01\x00\x05\x00{'''\n")
    (bad / "deep.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", 9001) + b"(" * 9000 + b"\n")
    (bad / "manifest.csv").write_bytes(b"file,patient\n\0\xff\xfe\"")
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--size",
                           "8", "--workers", "1", "--split", "1", "0", "0"], cwd=ROOT, capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 * GIB, 4 * GIB)))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert int(done.stdout.split()[-1]) < 1500 and time.monotonic() - start < 100  # MiB; seconds of a machine in use
    found = reasons(table(tmp_path / "out/report.csv"))
    for name, text in {
            "jpeg.dcm": "other than its 16 x 16", "baseline.dcm": "other than", "jls.dcm": "other than",
            "j2k.dcm": "other than", "layers.dcm": "other than", "none.dcm": "decoded", "minus.dcm": "-1 frames",
            "frames.dcm": "1000000000 frames", "deflated.dcm": "over 256 MiB", "tiny.nii.gz": "6656000000 bytes",
            "zeros.nii.gz": "over the limit", "token.npy": "damaged", "deep.npy": "damaged"}.items():
        assert text in found.pop(name), name
    assert not found
    assert len(table(tmp_path / "out/train_img/manifest.csv")) == 4


def test_the_size_of_a_stream_is_that_of_its_frame():
    assert stream_shape(sof(0xC3, 300, 200)) == (300, 200, 1)
    table = b"\xff\xc4" + struct.pack(">H", 6) + b"\xff\xc0\0\0"  # what looks like a frame inside a table is none
    assert stream_shape(b"\xff\xd8" + table + sof(0xC1, 30, 20, 3)[2:]) == (30, 20, 3)
    box = struct.pack(">I4sI", 12, b"jP  ", 0x0D0A870A) + struct.pack(">I4s", 12, b"jp2h") + bytes(4)
    assert stream_shape(box + struct.pack(">I4s", 0, b"jp2c") + siz(30, 20)) == (30, 20, 1)
    bits = sof(0xF7, 9, 9).replace(b"\x0c", b"\x11")  # 17: GDCM ends the process
    for stream in (b"", b"\xff\xd8", b"\xff" * 99, bytes(99), box, sof(0xC4, 1, 1), bits):
        with pytest.raises(ValueError):
            stream_shape(stream)


HEADERS = [b"{'''\n", b"(" * 9000, b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999, 99999999), }",
           b"{'descr': '<f8', 'fortran_order': False, 'shape': (-1, 4), }", b"[" * 200 + b"]" * 200, b"\xff\0", b""]


@pytest.mark.parametrize("header", HEADERS)
def test_headers_of_arrays_that_numpy_stumbles_over(tmp_path, header, capsys):
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    with pytest.raises(InputError, match="cannot be read"):
        read_slice(path)
    assert look.main([str(tmp_path)]) == 0 and "cannot be read" in capsys.readouterr().out


def test_what_is_no_array_or_no_file_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", body(16, 0))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    os.mkfifo(tmp_path / "b.npy")  # opening it would wait for ever
    for name, text in (("a.npy", ".npz archive"), ("b.npy", "no regular file")):
        with pytest.raises(InputError, match=text):
            read_slice(tmp_path / name)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize("name, text, said", [
    ("g.yaml", LAUGHS, "repeats parts"), ("g.yaml", "[" * 20000, "nests deeply"), ("g.json", "[" * 20000, "cannot"),
    ("g.json", "1" * 5000, "cannot be read"), ("g.json", " " * (5 << 20), "at most 4 MiB")])
def test_geometry_files_that_swell_are_refused(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    start = time.monotonic()
    with pytest.raises(InputError, match=said):
        read_geometry(tmp_path / name)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("change, said", [
    ({"angles": {"start": 0, "step": 1, "count": 10**9}}, "at most 100000"), ({"size": 10**9}, "over 100000"),
    ({"detector_count": 10**400}, "detector_count"), ({"detector_pitch_mm": 10**400}, "detector_pitch_mm")])
def test_geometries_of_a_thousand_million_are_refused(change, said):
    good = {"angles": {"start": 0, "step": 1, "count": 360}, "detector_count": 300, "detector_pitch_mm": 1,
            "field_of_view_mm": 200, "beam": "parallel"}
    assert make_scanner(good).detector_count == 300
    with pytest.raises(InputError, match=said):
        make_scanner(good | change)


def test_hdf5_that_reads_other_files_or_claims_terabytes_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py is in requirements.txt; without it HDF5 is not read")
    (tmp_path / "secret.txt").write_bytes(bytes(8 * 64))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("a", (8, 16), "f4", external=[(str(tmp_path / "secret.txt"), 0, 8 * 64)])
    with h5py.File(tmp_path / "b.h5", "w") as file:
        layout = h5py.VirtualLayout((8, 16), "f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "a.h5"), "a", (8, 16))
        file.create_virtual_dataset("b", layout)
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file.create_dataset("c", (10**6, 10**6), "f4", chunks=(100, 100))
    for name, text in (("a", "another file"), ("b", "another file"), ("c", "limit is 1 GiB")):
        with pytest.raises(Refused, match=text):
            read_sinograms(tmp_path / f"{name}.h5")
