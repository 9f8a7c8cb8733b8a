"""DICOM CT files to HU slices in the standard axial orientation.

`read_header` says what a file holds, `read_hu` gives its slices. Both raise `Refused` for a bad file and `LeftOut` for
one that is no CT slice (a localiser, a derived image). Reasons never quote text fields: these may name a patient.
"""

import math
import os
import re

import numpy as np
import pydicom
from pydicom.multival import MultiValue
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, MediaStorageDirectoryStorage

from datasets.series import LeftOut, Refused, Slice, refuse_on_error
from utils.units import HU_RANGE

MAX_SIDE = 4096  # no scanner writes more; a damaged header can claim 65535 and ask for gigabytes
CMS_ENVELOPE = bytes.fromhex("06092a864886f70d010703")  # object identifier that opens a Secure DICOM file
MODALITIES = "CR DX KO MG MR NM OT PR PT REG RTDOSE RTIMAGE RTPLAN RTSTRUCT SC SEG SR US XA".split()
LOSSY_SYNTAX = re.compile(r"1\.2\.840\.10008\.1\.2\.4\.(5[01]|81|91|93|203)$")


def to_hu(stored: np.ndarray, slope: float, intercept: float, padding: int | None = None) -> np.ndarray:
    """Stored integers (H, W) to float32 HU = slope * stored + intercept, clipped to [-1024, 3071].

    What scanners write outside the scan circle lies below -1024 and becomes air by the clip. A padding value above the
    range would become metal by it, so it is set to air.
    """
    hu = stored.astype(np.float32)
    hu *= slope
    hu += intercept
    hu.clip(*HU_RANGE, out=hu)
    if padding is not None and slope * padding + intercept > HU_RANGE[1]:
        hu[stored == padding] = HU_RANGE[0]
    return hu


def check_axial(orientation) -> None:
    """Refuses, by name, an ImageOrientationPatient (6 direction cosines) that is not axial to within 8 degrees."""
    cosines = np.abs(np.reshape(orientation, (2, 3)))
    axes = tuple(sorted(cosines.argmax(1)))
    if cosines.max() > 1.01 or (cosines.max(1) < 0.99).any() or axes[0] == axes[1]:
        angles = ", ".join(f"{value:g}" for value in orientation)
        raise Refused(f"is oblique (ImageOrientationPatient is {angles}); axial slices are expected: reformat it first")
    if axes != (0, 1):
        plane = "coronal" if axes == (0, 2) else "sagittal"
        raise Refused(f"is {plane}; axial slices are expected: reformat the series first")


def standard_axial(image: np.ndarray, orientation) -> np.ndarray:
    """An axial image (H, W) turned so that columns run to the patient's left and rows to the back.

    orientation: ImageOrientationPatient, the directions of growing column and row index, each as (left, back, head).
    """
    along_columns, along_rows = np.reshape(orientation, (2, 3))
    if abs(along_columns[1]) > abs(along_columns[0]):
        image, along_columns, along_rows = image.T, along_rows, along_columns
    return image[:: 1 if along_rows[1] > 0 else -1, :: 1 if along_columns[0] > 0 else -1]


def standard_corner(one: Slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where `standard_axial` puts a slice: directions of growing column and row index, and the first pixel in mm."""
    along_columns, along_rows = np.reshape(one.orientation, (2, 3))
    if abs(along_columns[1]) > abs(along_columns[0]):
        along_columns, along_rows = along_rows, along_columns
    columns, rows = along_columns * np.sign(along_columns[0]), along_rows * np.sign(along_rows[1])
    turned = (along_columns - columns + along_rows - rows) / 2  # axes that change their direction
    return columns, rows, one.corner + turned * (one.spacing * (one.size - 1))


def read_header(path: str) -> list[Slice]:
    """The slices that a DICOM file holds, one a frame, without reading pixels."""
    return _parse(path, with_pixels=False)[1]


def read_hu(path: str) -> np.ndarray:
    """All slices of a DICOM file, in its order: (N, H, W) float32 HU in [-1024, 3071], standard axial orientation."""
    dataset, slices = _parse(path, with_pixels=True)
    with refuse_on_error("has pixels that cannot be decoded; is it truncated or damaged?"):
        raw = dataset.pixel_array  # pydicom drops bits above BitsStored, which may hold overlays, and extends the sign
    raw = raw.reshape(-1, *raw.shape[-2:])
    if raw.shape != (len(slices), slices[0].size, slices[0].size):
        raise Refused(f"decodes to {raw.shape}, its header says {len(slices)} slices of {slices[0].size} pixels")
    padding = dataset.get("PixelPaddingValue")
    padding = padding if isinstance(padding, int) else None
    return np.stack([standard_axial(to_hu(image, one.slope, one.intercept, padding), one.orientation)
                     for one, image in zip(slices, raw, strict=True)])


@refuse_on_error("cannot be parsed as DICOM; is it damaged?")
@pydicom.config.disable_value_validation()
def _parse(path, with_pixels):
    # (pydicom's dataset, its slices)
    with open(path, "rb") as file:
        head = file.read(132)
    if not head:
        raise Refused("is empty (0 bytes)")
    if CMS_ENVELOPE in head:
        raise Refused("is encrypted (a CMS envelope): decrypt it first")
    # Old files lack the preamble and start with their first element, of group 2 or 8.
    if head[128:] != b"DICM" and head[:2] not in (b"\x02\x00", b"\x08\x00"):
        raise Refused("is not an image this program reads (DICOM, NIfTI, .npy or 16-bit PNG)")
    # Deferred elements are skipped, not read; unlike stop_before_pixels this tells whether the pixels are all there.
    dataset = pydicom.dcmread(path, defer_size=None if with_pixels else 1024, force=True)
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit = dataset.original_encoding[0]
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    _check_kind(dataset)
    frames = _check_pixels(path, dataset)
    patient = next((text for key in ("PatientID", "PatientName", "StudyInstanceUID", "SeriesInstanceUID")
                    if (text := str(dataset.get(key) or "").strip())), None)
    if patient is None or not dataset.get("SeriesInstanceUID"):
        raise Refused("has no SeriesInstanceUID, or nothing that tells its patient")
    words = [str(dataset.get("PatientID") or ""), *re.split(r"[\^=\s]+", str(dataset.get("PatientName") or ""))]
    names = tuple(filter(None, words))
    return dataset, [_slice(path, dataset, frame, patient, names) for frame in range(frames)]


def _check_kind(dataset):
    if dataset.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        raise LeftOut("is a DICOMDIR, an index of other files")
    if "EncryptedAttributesSequence" in dataset:
        raise Refused("has encrypted attributes: decrypt it first")
    if (modality := dataset.get("Modality")) != "CT":
        raise Refused(f"has {f'modality {modality}' if modality in MODALITIES else 'no known modality'}, expected CT")
    kind = dataset.get("ImageType") or []
    kind = {str(word).upper() for word in ([kind] if isinstance(kind, str) else kind)}
    if kind & {"LOCALIZER", "SCOUT", "TOPOGRAM"}:
        raise LeftOut("is a localiser")
    # Lossy compression alone makes an image DERIVED too; that one is still an axial slice and is kept, with a warning.
    if "SECONDARY" in kind or ("DERIVED" in kind and not _is_lossy(dataset)):
        raise LeftOut("is a derived or secondary image, not one the scanner reconstructed")


def _is_lossy(dataset):
    return dataset.get("LossyImageCompression") == "01" or LOSSY_SYNTAX.match(str(dataset.file_meta.TransferSyntaxUID))


def _check_pixels(path, dataset):
    # Returns the number of frames.
    rows, columns, allocated, stored, high = values = [
        dataset.get(keyword) or 0 for keyword in ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit")]
    if not rows or not columns:
        raise Refused("holds no image (no Rows or Columns)")
    if not all(isinstance(value, int) for value in values):
        raise Refused("has a number of rows, columns or bits that is not one number; is it damaged?")
    if dataset.get("SamplesPerPixel", 1) != 1 or "MONOCHROME" not in str(dataset.get("PhotometricInterpretation")):
        raise Refused("is a colour image; one grey channel of HU is expected")
    if rows != columns or rows > MAX_SIDE:
        raise Refused(f"is {rows} x {columns} pixels, expected square and at most {MAX_SIDE}: pad or crop it first")
    if allocated not in (16, 32) or not 8 <= stored <= allocated or high != stored - 1:
        raise Refused(f"has {stored} bits of {allocated}, high bit {high}; expected 8 to 16 of 16, high bit the last")
    if str(dataset.get("RescaleType") or "HU").strip() not in ("HU", "US"):
        raise Refused("has a RescaleType other than HU")
    frames, groups = int(dataset.get("NumberOfFrames") or 1), dataset.get("PerFrameFunctionalGroupsSequence") or []
    if frames > 1 and frames != len(groups):
        raise Refused(f"holds {frames} frames but positions for {len(groups)}; expected an enhanced CT")
    pixels, syntax = dataset.get_item("PixelData", keep_deferred=True), dataset.file_meta.TransferSyntaxUID
    if pixels is None:
        raise Refused("holds no pixel data; is it truncated?")
    needed = rows * columns * allocated // 8 * frames
    there = pixels.length if syntax.is_deflated else min(pixels.length, os.path.getsize(path) - pixels.value_tell)
    if not syntax.is_compressed and there < needed:
        raise Refused(f"is truncated: it holds {there} bytes of pixels of {needed}")
    return frames


def _slice(path, dataset, frame, patient, names):
    def numbers(group, keyword, count):
        value = _find(dataset, frame, group, keyword)
        if value is None or value == "":
            raise Refused(f"has no {keyword}")
        found = [float(number) for number in (value if isinstance(value, MultiValue) else [value])]
        if len(found) != count or not all(map(math.isfinite, found)):
            raise Refused(f"has {keyword} {found[:6]}, expected {count} finite number{'s' * (count > 1)}")
        return found

    slope, = numbers("PixelValueTransformationSequence", "RescaleSlope", 1)
    intercept, = numbers("PixelValueTransformationSequence", "RescaleIntercept", 1)
    if not 0.01 <= slope <= 100 or abs(intercept) > 65536:
        raise Refused(f"has rescale slope {slope:g} and intercept {intercept:g}: no CT has; HU cannot be trusted")
    spacing = numbers("PixelMeasuresSequence", "PixelSpacing", 2)
    if not 0.05 <= min(spacing) <= max(spacing) <= 10 or max(spacing) > 1.01 * min(spacing):
        raise Refused(f"has PixelSpacing {spacing} mm, expected two equal numbers between 0.05 and 10")
    orientation = numbers("PlaneOrientationSequence", "ImageOrientationPatient", 6)
    check_axial(orientation)
    normal = np.cross(orientation[:3], orientation[3:])
    corner = numbers("PlanePositionSequence", "ImagePositionPatient", 3)
    position = np.dot(corner, normal * np.sign(normal[2]))
    kernel = _find(dataset, frame, "CTReconstructionSequence", "ConvolutionKernel") or ""
    kernel = kernel if isinstance(kernel, str) else "/".join(map(str, kernel))
    return Slice(path, frame, patient, series=str(dataset.SeriesInstanceUID), position=float(position),
                 number=int(dataset.get("InstanceNumber") or 0), size=int(dataset.Rows), spacing=spacing[0],
                 kernel=re.sub(r"[^\w .,/+-]", "", kernel)[:32], names=names, slope=slope, intercept=intercept,
                 warning="was compressed with loss; kept" if _is_lossy(dataset) else "",
                 orientation=tuple(orientation), corner=tuple(corner),
                 description=str(dataset.get("SeriesDescription") or ""))


def _find(dataset, frame, group, keyword):
    # A multi-frame file keeps a value with the frame, or once for all frames; a single-frame file at the top.
    for sequence, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        items = dataset.get(sequence) or []
        if index < len(items) and items[index].get(group):
            return items[index].get(group)[0].get(keyword)
    return dataset.get(keyword)
