"""Reconstructed volumes to files: a DICOM series beside the original, NIfTI, or one `.npy` array.

Slices are HU in the standard axial orientation (columns to the patient's left, rows to the back), feet first.
"""

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
from pydicom.multival import MultiValue
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from datasets.dicom import standard_corner
from datasets.privacy import pseudonym
from datasets.series import Slice, refuse_on_error, uneven
from utils.errors import InputError
from utils.files import atomic

# What a series shares with the original, attribute by attribute: anything else, private tags too, stays behind.
PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "PatientAge")
STUDY = ("StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyID",
         "StudyDescription", "InstitutionName", "PositionReferenceIndicator")
SCAN = {  # what stays when patients are removed, too, as PS3.15's Basic Profile has it: one of these words, or a number
    "PatientPosition": "HFS HFP HFDR HFDL FFS FFP FFDR FFDL",
    "BodyPartExamined": "ABDOMEN ABDOMENPELVIS ANKLE ARM BRAIN BREAST CHEST CHESTABDOMEN CHESTABDPELVIS COLON CSPINE "
                        "ELBOW EXTREMITY FOOT HAND HEAD HEADNECK HEART HIP IAC JAW KIDNEY KNEE LEG LIVER LSPINE LUNG "
                        "NECK NECKCHEST NECKCHESTABDOMEN NECKCHESTABDPELV ORBIT PANCREAS PELVIS SHOULDER SINUS SKULL "
                        "SPINE TSPINE WHOLEBODY WRIST",
    "BurnedInAnnotation": "YES NO", "RecognizableVisualFeatures": "YES NO", "LossyImageCompression": "00 01",
    "LossyImageCompressionMethod": "ISO_10918_1 ISO_14495_1 ISO_15444_1 ISO_15444_2 ISO_15444_15",
    "LossyImageCompressionRatio": "", "KVP": "", "SliceThickness": "", "AcquisitionNumber": ""}
UIDS = ("StudyInstanceUID", "FrameOfReferenceUID")
EMPTY = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber",
         "ReferringPhysicianName", "StudyID", "PositionReferenceIndicator", "SliceThickness", "KVP",
         "AcquisitionNumber")  # type 2: there, empty or not
BURNED_IN = "has text burned into its pixels, which may name the patient: the output is not called de-identified"
IMAGE = {"SpecificCharacterSet": "ISO_IR 192", "SOPClassUID": CTImageStorage, "Modality": "CT",
         "ImageType": ["DERIVED", "SECONDARY", "AXIAL"], "Manufacturer": "CvG-Diff", "SamplesPerPixel": 1,
         "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 12, "HighBit": 11,
         "PixelRepresentation": 0, "RescaleSlope": 1, "RescaleIntercept": -1024, "RescaleType": "HU",
         "WindowCenter": 50, "WindowWidth": 500}


@dataclass(frozen=True)
class Place:
    """Where a slice lies: DICOM's axes, which run to the patient's left, back and head."""

    corner: tuple[float, float, float]                     # mm, centre of the first pixel
    spacing: float                                         # mm between pixel centres
    columns: tuple[float, float, float] = (1.0, 0.0, 0.0)  # direction of growing column index
    rows: tuple[float, float, float] = (0.0, 1.0, 0.0)     # direction of growing row index


def place_of(one: Slice, size: int, index: int, spacing: float | None = None) -> Place:
    """Place of a slice resized to `size` pixels about its middle; over its own field of view if no spacing is given.

    One that does not say where it lies is centred on the axis, 360 mm wide unless it tells its spacing, 1 mm a slice.
    """
    before = one.spacing or 360 / one.size
    spacing = spacing or before * one.size / size
    if one.corner is None:
        return centred(spacing, size, float(index) if one.position is None else one.position)
    columns, rows, corner = standard_corner(one)
    corner = corner + (columns + rows) * (before * (one.size - 1) - spacing * (size - 1)) / 2
    return Place(tuple(corner.tolist()), spacing, tuple(columns.tolist()), tuple(rows.tolist()))


def centred(spacing: float, size: int, z: float) -> Place:
    """A slice with its middle on the axis, z mm above the origin."""
    return Place((spacing * (1 - size) / 2, spacing * (1 - size) / 2, z), spacing)


def write_header(file, shape: tuple[int, ...]) -> None:
    """Begin a `.npy` file of int16. What follows is written: a sparse map ends in a bus error on a full disk."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<i2", "fortran_order": False, "shape": shape})


def write_npy(path: Path, slices: Iterator[np.ndarray], places: list[Place], size: int) -> None:
    """(N, size, size) int16 HU, slice by slice."""
    with atomic(path) as partial, open(partial, "wb") as file:
        write_header(file, (len(places), size, size))
        for hu in slices:
            file.write(hu.astype("<i2").tobytes())


def nifti_affine(places: list[Place]) -> np.ndarray:
    """(4, 4): index along right, front, head to mm. Raises InputError unless the slices step evenly."""
    if found := uneven([place.corner for place in places]):
        raise InputError(f"Slice {found[0] + 1} {found[1]}, and NIfTI holds only even steps; choose --format dicom, or "
                         "npy, which holds no positions.")
    first, last = places[0], places[-1]
    normal = np.cross(first.columns, first.rows)
    step = np.subtract(last.corner, first.corner) / (len(places) - 1) if len(places) > 1 else normal
    columns, rows = np.multiply([first.columns, first.rows], first.spacing)
    return np.diag([-1, -1, 1, 1]) @ np.vstack([np.column_stack([columns, rows, step, first.corner]), (0, 0, 0, 1)])


def write_nifti(path: Path, slices: Iterator[np.ndarray], places: list[Place], size: int) -> None:
    """One gzipped NIfTI-1 file, slice by slice."""
    import nibabel  # only this output needs it, and it is slow to import

    affine = nifti_affine(places)
    header = nibabel.Nifti1Header()  # its axes run right, front, head
    header.set_data_dtype(np.int16)
    header.set_data_shape((size, size, len(places)))
    header.set_qform(affine, "scanner")
    header.set_sform(affine, "scanner")
    off = (header.get_qform() - affine) @ (size, size, len(places), 1)
    if np.abs(off).max() > 0.1:  # mm: it cannot hold the shear of a tilted gantry, and many readers prefer it
        header["qform_code"] = 0
    header.set_slope_inter(1, 0)
    header.set_xyzt_units("mm")
    header.set_data_offset(352)
    with atomic(path) as partial, gzip.open(partial, "wb", compresslevel=4) as file:
        file.write(header.binaryblock + bytes(4))  # four zeros: no extensions
        for hu in slices:  # the first axis, columns, varies fastest in a NIfTI file: as in memory
            file.write(hu.astype(np.int16).tobytes())


@pydicom.config.disable_value_validation()
def series_header(about: str, series_uid: str, original: pydicom.Dataset | None, patient: str,
                  deidentify: bool, position: str = "HFS") -> tuple[pydicom.Dataset, list[str]]:
    """(what all files of a new series share, what is odd about the original in sentences).

    about: how it was made; series_uid: a random one; patient: a pseudonym; position: how the patient lay, where no
    original says it.

    With an original, the series belongs to its patient, study and frame of reference. With `deidentify` nothing of the
    original stays but SCAN, and patient and UIDs are made of `series_uid`, so nothing leads back to the original.
    """
    alone, original = original is None, original or pydicom.Dataset()
    header, lost, others = pydicom.Dataset(), [], {}
    header.update(dict.fromkeys(EMPTY, ""))
    for name in (*(() if deidentify else PATIENT + STUDY + UIDS), *SCAN, "SeriesNumber"):
        try:
            if deidentify and not _stays(name, original.get(name)):
                continue
            if name in original and original[name].VR != "SQ":
                one = pydicom.Dataset()
                one.update({"SpecificCharacterSet": "ISO_IR 192", name: original[name].value})
                one.save_as(BytesIO(), implicit_vr=False, little_endian=True)
                (others if name in (*UIDS, "SeriesNumber") else header).update({name: original[name].value})
        except Exception:  # nothing needs it, and odd bytes make pydicom raise almost anything
            lost.append(name)
    for name in UIDS:
        setattr(header, name, str(others.get(name) or "") or generate_uid(entropy_srcs=[series_uid, name]))
    if deidentify:
        patient, profile = pseudonym(series_uid, "patient", keep=False), pydicom.Dataset()
        profile.CodeValue, profile.CodingSchemeDesignator = "113100", "DCM"
        profile.CodeMeaning = "Basic Application Confidentiality Profile"
        header.DeidentificationMethodCodeSequence = [profile]
        header.DeidentificationMethod = "PS3.15 Basic Profile, by a list of what is kept"
        header.LongitudinalTemporalInformationModified = "REMOVED"
        header.PatientIdentityRemoved = "NO" if header.get("BurnedInAnnotation") == "YES" else "YES"
    if deidentify or alone:
        header.PatientName, header.PatientID = f"{patient}^", patient
    number = others.get("SeriesNumber")
    number = number if isinstance(number, int) and abs(number) < 2**31 - 1000 else 0
    header.update(IMAGE | {
        "SeriesInstanceUID": series_uid, "SeriesNumber": 1000 + number,
        "SeriesDescription": about.partition(";")[0][:64], "DerivationDescription": about[:1024]})
    header.setdefault("PatientPosition", position)
    if "BodyPartExamined" not in header:
        header.Laterality = ""  # wanted, without a value, where nothing says that the part is not one of a pair
    odd = [f"has attributes that cannot be copied and are left out: {', '.join(lost)}"] if lost else []
    return header, odd + [BURNED_IN] * (header.get("PatientIdentityRemoved") == "NO")


def _stays(name, value):
    # Whether a value tells nothing but of the scan.
    words, values = SCAN.get(name, "").split(), value if isinstance(value, MultiValue) else [value]
    return all(str(one) in words if words else isinstance(one, int | float) for one in values)


def write_dicom(path: Path, header: pydicom.Dataset, hu: np.ndarray, place: Place, index: int) -> None:
    """One slice, (size, size) int16 HU in [-1024, 3071], of the series that `header` describes."""
    file = pydicom.Dataset(header)
    file.SOPInstanceUID = generate_uid(entropy_srcs=[header.SeriesInstanceUID, str(index)])
    file.InstanceNumber = index + 1
    file.Rows, file.Columns = hu.shape
    numbers = {"PixelSpacing": [place.spacing] * 2, "ImagePositionPatient": place.corner,
               "ImageOrientationPatient": place.columns + place.rows}
    for name, values in numbers.items():
        setattr(file, name, [f"{value:.10g}" for value in values])  # a decimal string holds 16 characters
    file.PixelData = (hu + 1024).astype("<u2").tobytes()
    file["PixelData"].VR = "OW"
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    with atomic(path) as partial, pydicom.config.disable_value_validation():
        file.save_as(partial, enforce_file_format=True)


@refuse_on_error("cannot be parsed as DICOM")
@pydicom.config.disable_value_validation()
def read_original(path: str) -> pydicom.Dataset:
    """The attributes of an original DICOM file, without its pixels. Raises Refused."""
    return pydicom.dcmread(path, stop_before_pixels=True, force=True)


def anonymous(one: Slice) -> str:
    """The pseudonym of a slice's patient."""
    return pseudonym(one.patient or one.path, "patient", keep=False)
