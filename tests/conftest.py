"""Small synthetic data: ellipses in HU, two patients of four slices a split; DICOM files with any tags."""

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from utils import progress

ROOT = Path(__file__).parent.parent


def body(size: int, seed: int) -> np.ndarray:
    """A made-up body slice in HU, (size, size) int16."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[0:size, 0:size] / size - 0.5
    hu = np.full((size, size), -1000.0)
    hu[(xx / 0.42) ** 2 + (yy / 0.36) ** 2 < 1] = 40
    for _ in range(5):
        x, y = rng.uniform(-0.2, 0.2, 2)
        a, b = rng.uniform(0.03, 0.12, 2)
        hu[((xx - x) / a) ** 2 + ((yy - y) / b) ** 2 < 1] = rng.choice([-850, 120, 700])
    return hu.astype(np.int16)


def write_slices(folder: Path, patients, count: int, size: int) -> Path:
    folder.mkdir(parents=True)
    for p, patient in enumerate(patients):
        for i in range(count):
            np.save(folder / f"{patient}_{i:03d}.npy", body(size, 100 * p + i))
    return folder


def make_dicom(path, side=16, pixels=None, syntax=ExplicitVRLittleEndian, remove=(), compress=False, damage=False,
               **tags):
    """Write a CT file whose values tell where they are; `tags` replace, `remove` deletes, RLE can be damaged."""
    if pixels is None:
        pixels = np.arange(side * side, dtype=np.uint16).reshape(side, side) % 3000
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    bits = 8 * pixels.dtype.itemsize
    values = {
        "SOPClassUID": pydicom.uid.CTImageStorage, "SOPInstanceUID": pydicom.uid.generate_uid(), "Modality": "CT",
        "PatientID": "SECRET-ID", "PatientName": "Topsecret^Jane", "SeriesInstanceUID": "1.2.3",
        "StudyInstanceUID": "1.2", "InstanceNumber": 1, "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "Rows": pixels.shape[-2], "Columns": pixels.shape[-1], "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": bits, "BitsStored": bits, "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"), "RescaleSlope": 1, "RescaleIntercept": -1024,
        "PixelSpacing": [0.7, 0.7], "ImagePositionPatient": [0, 0, 0], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "ConvolutionKernel": "B30f", "PixelData": pixels.tobytes()} | tags
    path.parent.mkdir(parents=True, exist_ok=True)
    with pydicom.config.disable_value_validation():
        dataset.update({key: value for key, value in values.items() if key not in remove})
        if compress:
            dataset.compress(RLELossless, generate_instance_uid=False)
        if damage:  # the header says nothing of it
            dataset.PixelData = pydicom.encaps.encapsulate([b"\xff" * 64])
        dataset.save_as(path, enforce_file_format=True)
    return pixels


def set_raw(path, **fields):
    """Write fields of a DICOM file anew, each a (VR, bytes), valid or not."""
    dataset = pydicom.dcmread(path)
    for keyword, (vr, content) in fields.items():
        tag = pydicom.tag.Tag(keyword)
        dataset[tag] = pydicom.dataelem.RawDataElement(tag, vr, len(content), content, 0, False, True)
    dataset.save_as(path)


def make_series(folder, count=4, **tags):
    for index in range(count):
        place = {"ImagePositionPatient": [0, 0, 2.5 * index], "InstanceNumber": index}
        make_dicom(folder / f"{index}.dcm", **place | tags)


@pytest.fixture(autouse=True)
def without_status_lines(monkeypatch):
    """What a program prints does not depend on how long it takes."""
    monkeypatch.setattr(progress, "FIRST", 1e9)
    monkeypatch.setattr(progress.Progress, "due", 1e9)


@pytest.fixture
def data(tmp_path):
    """A data folder with train_img/, val_img/ and test_img/ of 32 x 32 slices."""
    for split, names in {"train": ("A", "B"), "val": ("C",), "test": ("D", "E")}.items():
        write_slices(tmp_path / "data" / f"{split}_img", names, 4, 32)
    return tmp_path / "data"


@pytest.fixture
def call(capsys):
    """Call a script's main(argv) in this process; its standard output and error as one text."""
    def call(main, *args, expect=0):
        try:
            main([str(a) for a in args])
            code = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        text = out + err + (code if isinstance(code, str) else "")
        assert (code in (0, None)) == (expect == 0), text
        return text

    return call


@pytest.fixture
def stops(capsys):
    """`with stops(pattern):` a script's main ends with a status and a sentence on standard error."""
    @contextmanager
    def stops(pattern):
        with pytest.raises(SystemExit) as stop:
            yield
        assert stop.value.code in (1, 2) and re.search(pattern, capsys.readouterr().err)

    return stops


def run(*command, expect=0, **environment):
    """Run a script of the project; its standard output and error as one text."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    text = done.stdout + done.stderr
    assert (done.returncode == 0) == (expect == 0), text
    assert "Traceback" not in text, text
    return text
