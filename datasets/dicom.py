"""DICOM CT files to HU slices in the standard axial orientation.

`read_header` says what a file holds, `read_hu` gives its slices. Both raise `Refused` for a bad file and `LeftOut` for
one that is no CT slice (a localiser, a derived image). Reasons never quote text fields: these may name a patient.
"""

import math
import os
import re
import zlib
from io import BytesIO

import numpy as np
import pydicom
from pydicom import uid
from pydicom.encaps import generate_frames
from pydicom.filereader import _read_file_meta_info, read_preamble
from pydicom.filewriter import write_file_meta_info
from pydicom.multival import MultiValue
from pydicom.tag import Tag

from datasets.privacy import ways_to_write
from datasets.series import LeftOut, Refused, Slice, refuse_on_error
from utils.units import HU_RANGE

PLAUSIBLE_HU = (-10000, 16000)  # from what lies outside the scan circle to steel
MAX_SIDE = 4096  # no scanner writes more; a damaged header can claim 65535 and ask for gigabytes
MOST_PIXELS = 1 << 30  # bytes of a file's pixels, of which up to four times as many are in memory
MOST_INFLATED = 1 << 28  # bytes of a deflated file: three megabytes can swell to three gigabytes
CMS_ENVELOPE = bytes.fromhex("06092a864886f70d010703")  # object identifier that opens a Secure DICOM file
MODALITIES = "CR DX KO MG MR NM OT PR PT REG RTDOSE RTIMAGE RTPLAN RTSTRUCT SC SEG SR US XA".split()
LOSSY_SYNTAX = re.compile(r"1\.2\.840\.10008\.1\.2\.4\.(5[01]|81|91|93|203)$")


def to_hu(stored: np.ndarray, slope: float, intercept: float, padding: int | None = None,
          bits: int = 16) -> np.ndarray:
    """Stored integers (H, W) to float32 HU = slope * stored + intercept, clipped to [-1024, 3071].

    What scanners write outside the scan circle lies below -1024 and becomes air by the clip. Padding that lies above
    the range, or in it because it lost its sign, becomes air too: it is compared modulo 2**bits. In the range it must
    take a corner of the image: dense bone may have the same number.
    """
    hu = stored.astype(np.float32)
    hu *= slope
    hu += intercept
    if padding is not None:
        padded = (stored.astype(np.int64) - padding) % 2**bits == 0
        is_hu = HU_RANGE[0] <= slope * padding + intercept <= HU_RANGE[1]
        if is_hu or not padded[[0, 0, -1, -1], [0, -1, 0, -1]].any():
            padded &= hu > HU_RANGE[1]
        hu[padded] = HU_RANGE[0]
    return hu.clip(*HU_RANGE, out=hu)


def stored_numbers(words: np.ndarray, bits: int, signed: bool, slope: float, intercept: float) -> tuple:
    """Words of pixel data (H, W) to (the integers that they hold, how many of their bits count).

    By the header these are the lowest `bits`. Two kinds of file are not as their header says: values outgrow its bits
    (metal, the -3024 around the scan circle), and negative ones are called unsigned. What makes plausible HU decides.
    """
    width = 8 * words.itemsize
    whole = words.view(f"i{words.itemsize}")
    part = whole << (width - bits) >> (width - bits)
    hu = slope * whole.astype(np.float32) + intercept
    # No CT is metal in more than a quarter of its pixels: words with one more bit set everywhere look as if they were.
    outgrown = (words >> min(bits, width - 1)).any() and (hu > HU_RANGE[1]).mean() < 0.25
    if outgrown and PLAUSIBLE_HU[0] < hu.min() <= hu.max() < PLAUSIBLE_HU[1]:
        return whole, width
    return (part if signed or lacks_sign(intercept) and (part < 0).mean() > 0.01 else words & (2**bits - 1)), bits


def lacks_sign(intercept: float) -> bool:
    """Whether unsigned pixels with this intercept cannot hold air."""
    return intercept > -500


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


def read_header(path: str, derived: bool = False) -> list[Slice]:
    """The slices that a DICOM file holds, one a frame, without reading pixels. derived: those of derived images too."""
    return _parse(path, with_pixels=False, derived=derived)[1]


def read_hu(path: str) -> np.ndarray:
    """All slices of a DICOM file, in its order: (N, H, W) float32 HU in [-1024, 3071], standard axial orientation."""
    dataset, slices = _parse(path, with_pixels=True, derived=True)
    signed = _optional(dataset, "PixelRepresentation") == 1
    dataset.add_new("PixelRepresentation", "US", int(signed))  # some files lack it
    padding = _optional(dataset, "PixelPaddingValue")
    padding = padding if isinstance(padding, int) else None
    with refuse_on_error("has pixels that cannot be decoded; is it truncated or damaged?"):
        # The bits of an overlay (in group 6000, 6002, ...) are no part of the numbers; all others may be.
        overlays = [_optional(dataset, Tag(group, 0x0102)) for group in range(0x6000, 0x6020, 2)]
        dataset.pixel_array_options(correct_unused_bits=any(one is not None and one.value for one in overlays))
        if dataset.file_meta.TransferSyntaxUID.is_compressed:
            _check_streams(dataset, len(slices))
        raw = dataset.pixel_array
    words = raw.reshape(-1, *raw.shape[-2:]).view(f"u{raw.itemsize}")
    if words.shape != (len(slices), slices[0].size, slices[0].size):
        raise Refused(f"decodes to {words.shape}, its header says {len(slices)} slices of {slices[0].size} pixels")
    bits = min(dataset.BitsStored, 8 * words.itemsize)

    volume = np.empty(words.shape, np.float32)
    for index, one in enumerate(slices):
        stored, meant = stored_numbers(words[index], bits, signed, one.slope, one.intercept)
        volume[index] = standard_axial(to_hu(stored, one.slope, one.intercept, padding, meant), one.orientation)
    return volume


def _check_streams(dataset, frames):
    # Decoders take as much memory as a stream says that it needs: it must be as large as the header says.
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax == uid.JPEGExtended12Bit:  # GDCM reads its 12 bits, too, but pydicom lets it only under another name
        dataset.file_meta.TransferSyntaxUID = uid.JPEGLosslessSV1
    table = dataset.get("ExtendedOffsetTable") and (dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths)
    for frame in generate_frames(dataset.PixelData, number_of_frames=frames, extended_offsets=table):
        if syntax != uid.RLELossless and stream_shape(frame) != (dataset.Rows, dataset.Columns, 1):
            raise Refused(f"holds a compressed image of other than its {dataset.Rows} x {dataset.Columns} grey pixels")


def stream_shape(stream: bytes) -> tuple[int, int, int]:
    """(rows, columns, components) by the header of a JPEG, JPEG-LS or JPEG 2000 stream.

    Raises ValueError where it has none, or one of numbers that end GDCM's process.
    """
    def number(start, size):
        return int.from_bytes(stream[start : start + size], "big")

    at = 0
    if stream[4:8] == b"jP  ":  # a JP2 file: boxes around the stream
        while stream[at + 4 : at + 8] != b"jp2c" and number(at, 4) >= 8:
            at += number(at, 4)
        at += 8
    if stream[at : at + 4] == b"\xff\x4f\xff\x51":
        width, height, left, top = (number(at + start, 4) for start in (8, 12, 16, 20))
        return height - top, width - left, number(at + 40, 2)
    at = 2
    while number(at, 1) == 0xFF:  # one segment after the other: marker, length, content
        marker = number(at + 1, 1)
        if marker == 0xF7 or 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # the frame's header
            if not 2 <= number(at + 4, 1) <= 16:
                raise ValueError("bits that no CT has")
            return number(at + 5, 2), number(at + 7, 2), number(at + 9, 1)
        at += 1 if marker == 0xFF else 2 + number(at + 2, 2)  # 0xFF before a marker fills up
    raise ValueError("no header of a frame")


def _parse(path, with_pixels, derived):
    # (pydicom's dataset, its slices)
    dataset, size = _read(path, with_pixels)
    patient, names = _whose(dataset)
    try:
        return dataset, _slices(path, dataset, size, derived, patient, names)
    except Refused as error:
        error.whose = patient or "", names
        raise


@refuse_on_error("cannot be parsed as DICOM; is it damaged?")
@pydicom.config.disable_value_validation()
def _read(path, with_pixels):
    # (pydicom's dataset, how many bytes it was read from)
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
    inflated = _inflated(path)
    dataset = pydicom.dcmread(inflated or path, defer_size=None if with_pixels or inflated else 1024, force=True)
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit = dataset.original_encoding[0]
        dataset.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian
    return dataset, len(inflated.getbuffer()) if inflated else os.path.getsize(path)


def _inflated(path):
    # A deflated file as one that is not, so that its size is limited; None for any other file.
    with open(path, "rb") as file:
        read_preamble(file, force=True)
        meta = _read_file_meta_info(file)
        if meta.get("TransferSyntaxUID") != uid.DeflatedExplicitVRLittleEndian:
            return None
        content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(file.read(), MOST_INFLATED)
    if len(content) == MOST_INFLATED:
        raise Refused(f"is deflated and holds over {MOST_INFLATED >> 20} MiB, which is the limit")
    meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    buffer = BytesIO()
    buffer.write(bytes(128) + b"DICM")
    write_file_meta_info(buffer, meta, enforce_standard=False)
    buffer.write(content)
    buffer.seek(0)
    return buffer


def _whose(dataset):
    # (the patient, None where nothing tells; what identifies him or her)
    def texts(key):
        value = _optional(dataset, key)
        values = value if isinstance(value, MultiValue) else [value]
        return [text for one in values if (text := str(one or "").strip())]

    patient = next((text for key in ("PatientID", "PatientName", "StudyInstanceUID", "SeriesInstanceUID")
                    for text in texts(key)), None)
    names = [word for key in ("PatientName", "OtherPatientNames", "PatientBirthName", "PatientMotherBirthName")
             for text in texts(key) for word in re.split(r"[\^=\s]+", text)]
    accession = [text for text in texts("AccessionNumber") if re.search(r"\d", text)]
    born = [form for text in texts("PatientBirthDate") for form in ways_to_write(text)]
    return patient, tuple(filter(None, texts("PatientID") + names + texts("OtherPatientIDs") + accession + born))


@refuse_on_error("cannot be parsed as DICOM; is it damaged?")
@pydicom.config.disable_value_validation()
def _slices(path, dataset, size, derived, patient, names):
    _check_kind(dataset)
    frames = _check_pixels(size, dataset)
    for frame in range(frames):
        _check_frame(dataset, frame, derived)
    if patient is None or not dataset.get("SeriesInstanceUID"):
        raise Refused("has no SeriesInstanceUID, or nothing that tells its patient")
    return [_slice(path, dataset, frame, patient, names) for frame in range(frames)]


def _check_kind(dataset):
    if dataset.file_meta.get("MediaStorageSOPClassUID") == uid.MediaStorageDirectoryStorage:
        raise LeftOut("is a DICOMDIR, an index of other files")
    if "EncryptedAttributesSequence" in dataset:
        raise Refused("has encrypted attributes: decrypt it first")
    if (modality := _text(dataset.get("Modality"))) != "CT":
        raise Refused(f"has {f'modality {modality}' if modality in MODALITIES else 'no known modality'}, expected CT")


def _check_frame(dataset, frame, derived):
    kind = {word for group, keyword in (("", "ImageType"), ("CTImageFrameTypeSequence", "FrameType"))
            for word in re.findall("[A-Z]+", _text(_find(dataset, frame, group, keyword)))}
    if kind & {"LOCALIZER", "SCOUT", "TOPOGRAM"}:
        raise LeftOut("is a localiser")
    # Lossy compression alone makes an image DERIVED too; that one is still an axial slice and is kept, with a warning.
    if not derived and ("SECONDARY" in kind or "DERIVED" in kind and not _is_lossy(dataset)):
        raise LeftOut("is a derived or secondary image, not one the scanner reconstructed; --derived takes these too")
    units = _text(_find(dataset, frame, "PixelValueTransformationSequence", "RescaleType"))
    if units not in ("", "HU", "US") and not units.startswith("HOUNSFIELD"):
        raise Refused("has a RescaleType other than HU")


def _is_lossy(dataset):
    return (_text(_optional(dataset, "LossyImageCompression")) == "01"
            or LOSSY_SYNTAX.match(str(dataset.file_meta.TransferSyntaxUID)))


def _text(value):
    # Upper-case words: archives hold them with spaces and in lower case.
    return " ".join(map(str, value if isinstance(value, MultiValue) else [value or ""])).strip().upper()


def _optional(dataset, keyword):
    # A value that nothing needs: None where it cannot be read.
    try:
        return dataset.get(keyword)
    except Exception:
        return None


def _check_pixels(size, dataset):
    # Returns the number of frames.
    rows, columns, allocated, stored, high = values = [
        dataset.get(keyword) or 0 for keyword in ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit")]
    if not rows or not columns:
        raise Refused("holds no image (no Rows or Columns)")
    if not all(isinstance(value, int) for value in values):
        raise Refused("has a number of rows, columns or bits that is not one number; is it damaged?")
    if dataset.get("SamplesPerPixel", 1) != 1 or "MONOCHROME" not in _text(dataset.get("PhotometricInterpretation")):
        raise Refused("is a colour image; one grey channel of HU is expected")
    if rows != columns or rows > MAX_SIDE:
        raise Refused(f"is {rows} x {columns} pixels, expected square and at most {MAX_SIDE}: pad or crop it first")
    if allocated not in (16, 32) or not 8 <= stored <= allocated or high != stored - 1:
        raise Refused(f"has {stored} bits of {allocated}, high bit {high}; expected 8 to 16 of 16, high bit the last")
    frames, groups = int(dataset.get("NumberOfFrames") or 1), dataset.get("PerFrameFunctionalGroupsSequence") or []
    if frames < 1:
        raise Refused(f"says that it holds {frames} frames; is it damaged?")
    if frames > 1 and frames != len(groups):
        raise Refused(f"holds {frames} frames but positions for {len(groups)}; expected an enhanced CT")
    pixels, syntax = dataset.get_item("PixelData", keep_deferred=True), dataset.file_meta.TransferSyntaxUID
    if pixels is None:
        raise Refused("holds no pixel data; is it truncated?")
    needed = rows * columns * allocated // 8 * frames
    there = min(pixels.length, size - pixels.value_tell)
    if needed > MOST_PIXELS:
        raise Refused(f"says that it holds {needed} bytes of pixels; the limit is {MOST_PIXELS >> 30} GiB")
    if not syntax.is_compressed and there < needed:
        raise Refused(f"is truncated: it holds {there} bytes of pixels of {needed}")
    return frames


def _slice(path, dataset, frame, patient, names):
    def numbers(group, keyword, count):
        value = _find(dataset, frame, group, keyword)
        if value is None or value == "":
            raise Refused(f"has no {keyword}")
        try:
            found = [float(str(number).replace(",", "."))
                     for number in (value if isinstance(value, MultiValue) else [value])]
        except ValueError:
            raise Refused(f"has a {keyword} that is not a number") from None
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
    kernel = "/".join(map(str, kernel)) if isinstance(kernel, MultiValue) else str(kernel)
    number = _optional(dataset, "InstanceNumber")
    acquisition = _find(dataset, frame, "FrameContentSequence", "FrameAcquisitionNumber")
    warnings = ["was compressed with loss; kept"] * bool(_is_lossy(dataset))
    if _optional(dataset, "PixelRepresentation") != 1 and lacks_sign(intercept):
        warnings.append(f"says that none of its HU is below {intercept:g}, so none is air; the upper half of its "
                        "values is read as negative where it is too many pixels to be bone")
    return Slice(path, frame, patient, series=str(dataset.SeriesInstanceUID), position=float(position),
                 number=number if isinstance(number, int) else 0, size=int(dataset.Rows), spacing=spacing[0],
                 kernel=re.sub(r"[^\w .,/+-]", "", kernel)[:32], names=names, slope=slope, intercept=intercept,
                 warning="; ".join(warnings), orientation=tuple(orientation), corner=tuple(corner),
                 acquisition=str(acquisition or _optional(dataset, "AcquisitionNumber") or ""),
                 uid=f"{_optional(dataset, 'SOPInstanceUID') or path} {frame}",
                 description=str(_optional(dataset, "SeriesDescription") or ""))


def _find(dataset, frame, group, keyword):
    # A multi-frame file keeps a value with the frame, or once for all frames; a single-frame file at the top.
    for sequence, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        items = _optional(dataset, sequence) or []
        if index < len(items) and _optional(items[index], group):
            return _optional(_optional(items[index], group)[0], keyword)
    return _optional(dataset, keyword)
