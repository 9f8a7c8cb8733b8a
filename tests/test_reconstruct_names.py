"""Names of patients in what reconstruct.py writes and prints: whole runs over all kinds of input and output.

NAMES=all tries 200 patients, otherwise one for each kind.
"""

import gzip
import io
import json
import os
import random
import re

import nibabel
import numpy as np
import pydicom
import pytest
from conftest import body, make_dicom
from PIL import Image
from test_privacy import PARTS, bare, written_somehow
from test_scanner import FAN, line_integrals

from models.scanner import make_scanner
from reconstruct import main

SIDE, SLICES = 16, 2
KINDS = [  # input, output, options
    ("series", "dicom", ()), ("series", "dicom", ("--deidentify",)), ("series", "nifti", ()), ("series", "npy", ()),
    ("volume", "dicom", ("--deidentify",)), ("volume", "nifti", ()), ("file", "dicom", ()), ("arrays", "npy", ()),
    ("arrays", "dicom", ("--original",)), ("sinogram", "dicom", ()), ("sinogram", "npy", ())]
COUNT = 200 if os.environ.get("NAMES") == "all" else len(KINDS)
SCANNER = FAN | {"angles": {"start": 0, "step": 4, "count": 90}, "detector_count": 125, "detector_pitch_mm": 6.0,
                 "size": SIDE}
LINES = line_integrals(make_scanner(SCANNER))


class Patient:
    """A made-up patient, and the ways that people write of one."""

    def __init__(self, index: int):
        self.draw, self.index = random.Random(index), index
        self.family, self.given = (self.draw.choice(PARTS[index % len(PARTS)]) for _ in range(2))
        self.code = self.draw.choice([f"{self.draw.randint(10000, 9999999):08d}", f"AB-{index % 90}-{index + 100}"])

    def anyhow(self) -> str:
        """Name, ID or both, for a file or a folder."""
        return written_somehow(self.draw, self.family, self.given, self.code)

    def name(self) -> str:
        """The name alone, in either order: all that a file without a header can tell."""
        return self.draw.choice("_-. ").join(self.draw.sample([self.family, self.given], 2))

    def told_by(self, text: str) -> list[str]:
        """What of the patient is in a text. Of two or three letters a word counts if it stands alone, of one (the O of
        O'Brien) where a script has no case.
        """
        left = bare(re.sub("patient-[0-9a-f]{10}", "|", text))
        words = re.findall(r"[^\W\d_]+", bare(f"{self.family} {self.given}"))
        patterns = [word if len(word) > 3 else rf"(?<![^\W\d_]){word}(?![^\W\d_])" for word in words
                    if len(word) > 1 or word.upper() == word.lower()]
        code = re.sub(r"[\W_]", "", self.code.lower()).lstrip("0")
        return [word for word in patterns if re.search(word, left)] + [
            number for number in (code, "19800102", f"a{self.index + 7000}") if number in re.sub(r"[\W_]", "", left)]


def write_series(folder, patient):
    """A DICOM series, a slice that is refused, and a report."""
    text = f"{patient.given} {patient.family}, {patient.code}"
    for z in range(SLICES + 1):
        pixels = body(SIDE if z < SLICES else 8, z) + 1024
        make_dicom(folder / f"{patient.anyhow()} {z}.dcm", pixels=pixels.astype(np.uint16), InstanceNumber=z + 1,
                   ImagePositionPatient=[0, 0, z], PatientID=patient.code, SpecificCharacterSet="ISO_IR 192",
                   PatientName=f"{patient.family}^{patient.given}", PatientBirthDate="19800102", StudyDescription=text,
                   AccessionNumber=f"A{patient.index + 7000}", ImageComments=text, PatientComments=text,
                   SeriesDescription=text, ProtocolName=text, ConvolutionKernel="B30f", StudyID=patient.code,
                   OtherPatientIDs=patient.code, InstitutionName=text)
    (folder / f"19800102 a-{patient.index + 7000} {patient.anyhow()}.pdf").write_bytes(b"a report")
    return folder


def write_arrays(folder, patient):
    """Slices without a header and one that is damaged."""
    name = patient.name()
    for z in range(SLICES):
        np.save(folder / f"{name}_{z:03d}.npy", body(SIDE, z))
    (folder / f"{name}_{SLICES:03d}.npy").write_bytes(b"damaged")


def write_volume(folder, patient):
    """A NIfTI volume without a place, which is a warning, and one that is damaged; the volume's path."""
    name = patient.name()
    image = nibabel.Nifti1Image(np.stack([body(SIDE, z) for z in range(SLICES)], -1), None)
    nibabel.save(image, folder / f"{name}.nii.gz")
    (folder / f"{name}.nii").write_bytes(b"damaged")
    return folder / f"{name}.nii.gz"


def write_sinogram(folder, patient, whole):
    """A measured scan with a view that is dead, which is a warning, or unless `whole` a slice that is refused."""
    (folder / "g.json").write_text(json.dumps(SCANNER))
    odd = LINES * (np.arange(len(LINES)) != 7)[:, None] if whole else np.nan * LINES
    np.save(folder / f"{patient.anyhow()}.npy", np.stack([LINES, odd, LINES]))
    return next(folder.glob("*.npy")), "--geometry", folder / "g.json"


def command(source, output, options, folder, patient):
    """INPUT and options of reconstruct.py; what it reads lies in a folder of the patient below `folder`."""
    root = folder / patient.anyhow()
    inner = root / "scan" / (patient.anyhow() if source == "series" else patient.name())
    inner.mkdir(parents=True)
    if source == "sinogram":
        return *write_sinogram(inner, patient, output != "dicom"), "--format", output
    made = {"series": write_series, "arrays": write_arrays, "volume": write_volume, "file": write_volume}[source](
        inner, patient)
    if options == ("--original",):
        options = "--original", write_series(folder / "original" / patient.anyhow(), patient)
    return made if source == "file" else root, "--views", 9, "--format", output, *options


@pytest.mark.parametrize("index", range(COUNT))
def test_a_name_is_only_where_it_is_wanted(index, tmp_path, capfd):
    patient, (source, output, options) = Patient(index), KINDS[index % len(KINDS)]
    given = [str(one) for one in command(source, output, options, tmp_path / "in", patient)]
    main([*given, "--out", str(tmp_path / "out"), "--method", "fbp", "--device", "cpu"])
    said = "".join(capfd.readouterr())
    for path in filter(os.path.isabs, sorted(given, key=len, reverse=True)):  # what one types is printed
        said = said.replace(path, "")
    assert patient.told_by(said) == [], said
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(files) > 3 and b"\n" in files["report.csv"].strip()
    joins = output == "dicom" and ("--original" in options or source == "series" and not options)
    for name, content in files.items():
        content = gzip.decompress(content) if name.endswith(".gz") else content
        content = str(Image.open(io.BytesIO(content)).info).encode() if name.endswith(".png") else content
        content = content.replace(b"fortran_order", b"")  # Tran is a name
        told = patient.told_by(f"{name} {content.decode('utf-8', 'ignore')}")
        assert bool(told) == (joins and name.endswith(".dcm")), f"{name}: {told}"
    if joins:
        assert pydicom.dcmread(tmp_path / "out/slice_0001.dcm").PatientID == patient.code
