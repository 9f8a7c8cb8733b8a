"""Files of every format to HU slices: DICOM, NIfTI, .npy (HU) and 16-bit PNG (value - 1024 = HU)."""

import gzip
import math
import os
import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from datasets import dicom
from datasets.plausible import ALL_THE_SAME, doubt
from datasets.series import LeftOut, Refused, Slice, refuse_on_error
from datasets.slices import open_array
from utils.units import HU_RANGE

NIFTI = (".nii", ".nii.gz")
BAD_NIFTI = "cannot be read as NIfTI; is it damaged?"
BAD_GZIP = "is damaged: its gzip check sum is wrong, or it ends too early, or it holds no NIfTI"
MOST_BYTES = 2 << 30  # of a volume as float32: a damaged header can claim terabytes
PACKED_BYTES = 512 << 20  # of a volume that is packed to less than a fiftieth: a label map, or a trap
MM = {1: 1000.0, 3: 0.001}  # NIfTI's codes for metres and microns


def read_png(path: str) -> np.ndarray:
    """16-bit grey, where value - 1024 = HU; or value - 32768 where most are so high, as in DeepLesion."""
    with Image.open(path) as image:
        if not image.mode.startswith("I"):
            raise Refused(f"is a PNG of mode {image.mode}; expected 16-bit grey, where value - 1024 = HU")
        values = np.asarray(image).astype(np.int32)
        return values - (32768 if np.median(values) > 16384 else 1024)


READERS = {  # of files without a header: path -> HU, (H, H) or (N, H, H)
    ".npy": open_array,
    ".png": read_png,
}
ARRAYS = tuple(READERS)


def resize_hu(hu: np.ndarray, size: int) -> np.ndarray:
    """(H, H) HU, any real dtype, to (size, size) int16, clipped to [-1024, 3071] before any averaging.

    From 2 * size it is the 2x2 mean rounded to integer HU (AAPM protocol); any other ratio is resampled by a triangle
    as wide as the larger of the two pixels, which does not alias. Both keep the field of view. Raises Refused for NaN.
    """
    hu = np.asarray(hu, np.float32)
    if not np.isfinite(hu).all():
        raise Refused("contains NaN or infinity")
    hu = hu.clip(*HU_RANGE)
    if len(hu) == 2 * size:
        hu = (hu[::2, ::2] + hu[::2, 1::2] + hu[1::2, ::2] + hu[1::2, 1::2]) / 4
    elif len(hu) != size:
        hu = np.asarray(Image.fromarray(hu).resize((size, size), Image.Resampling.BILINEAR))
    return np.rint(hu).astype(np.int16)


def read_hu(one: Slice, size: int, trust: bool = False) -> np.ndarray:
    """The (size, size) int16 HU of a slice. Raises Refused, or LeftOut for a label map.

    Values that are no HU are refused unless `trust`, or a header says that they are (DICOM's).
    """
    hu = load(one.path)[one.frame]
    resized = resize_hu(hu, size)
    if not trust and one.path.lower().endswith(NIFTI + ARRAYS):
        refuse_doubtful(hu)
    return resized


def refuse_doubtful(hu: np.ndarray, *verdicts: str) -> None:
    """Raises Refused or LeftOut for values that are no HU. verdicts: of these alone."""
    verdict, reason = doubt(hu) or ("warning", "")
    if verdict in (verdicts or ("left out", "refused")):
        raise (LeftOut if verdict == "left out" else Refused)(reason + ALL_THE_SAME)


def _read_nifti(path):
    # (volume (right, front, head) of HU, affine in mm, what is odd about it)
    import nibabel  # only these inputs need it, and it is slow to import

    with open(path, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"  # whatever its name says
    with refuse_on_error(BAD_GZIP if zipped else BAD_NIFTI), (gzip.open if zipped else open)(path, "rb") as file:
        wide = file.read(4) in (b"\x1c\x02\0\0", b"\0\0\x02\x1c")  # 540, the size of a NIfTI-2 header
        file.seek(0)
        image = (nibabel.Nifti2Image if wide else nibabel.Nifti1Image).from_stream(file)
        kind, shape = image.get_data_dtype(), image.shape
        if len(shape) < 3 or 0 in shape or np.prod(shape[3:]) != 1 or kind.kind not in "iuf":
            raise Refused(f"holds {kind} of shape {shape}; expected one 3-D volume of HU")
        voxels = math.prod(shape)
        needed = kind.itemsize * voxels
        there = os.path.getsize(path)  # gzip packs to a thousandth at best
        most = min(1100 * there, max(50 * there, PACKED_BYTES)) if zipped else there
        if needed > most or max(needed, 4 * voxels) > MOST_BYTES:
            raise Refused(f"says that it holds {needed} bytes of voxels, in a file of {there}: it is truncated or "
                          f"damaged, or over the limit of {MOST_BYTES >> 30} GiB")
        plain = image.dataobj.slope == 1 and image.dataobj.inter == 0
        volume = (np.asanyarray(image.dataobj) if plain else image.dataobj.get_scaled(np.float32)).reshape(shape[:3])
        while zipped and file.read(1 << 20):  # to its end, where the check sum is compared
            pass
    with refuse_on_error(BAD_NIFTI):
        affine, odd = _place(image.header, shape)
        turn = nibabel.io_orientation(affine)
        return (nibabel.apply_orientation(volume, turn),
                affine @ nibabel.orientations.inv_ornt_aff(turn, shape[:3]), odd)


def _place(header, shape):
    # (affine in mm, what is odd about it): by the sform, else the qform, of those that have a code and can be inverted
    found = []
    for read in (header.get_sform, header.get_qform):
        with suppress(Exception):  # numbers that are no rotation
            matrix, code = read(coded=True)
            found += [matrix] if code and np.isfinite(matrix).all() and np.linalg.det(matrix) else []
    affine, odd = (found or [header.get_base_affine()])[0], ""
    if not found:
        odd = "does not say how the patient lies; the orientation may be wrong"
    elif np.abs((found[0] - found[-1]) @ (*shape[:3], 1)).max() > np.abs(affine[:3, :3]).max():
        odd = "says two places of the patient, by sform and qform; the sform is used"
    return np.diag([MM.get(int(header["xyzt_units"]) & 7, 1.0)] * 3 + [1]) @ affine, odd


def load(path: str) -> np.ndarray:
    """All slices of a file of any format: (N, H, W) HU, not yet clipped. Raises Refused or LeftOut."""
    found = _load(path)
    if isinstance(found, Refused):
        raise found
    return found


@lru_cache(maxsize=1)  # the slices of a volume are asked for one after the other; why there are none, too
def _load(path):
    try:
        if path.lower().endswith(NIFTI):
            return _read_nifti(path)[0][::-1, ::-1].transpose(2, 1, 0)  # slices are (head, back, left)
        return _load_array(path) if path.lower().endswith(ARRAYS) else dicom.read_hu(path)
    except Refused as error:
        return error


@refuse_on_error("cannot be read; is it truncated or damaged?")
def _load_array(path):
    array = READERS[Path(path).suffix.lower()](path)
    if array.ndim not in (2, 3) or array.dtype.kind not in "iuf" or not array.size:
        raise Refused(f"holds {array.dtype} of shape {array.shape}; expected HU, one slice (H, H) or several (N, H, H)")
    return array.reshape(-1, *array.shape[-2:])


def scan(path: str, derived: bool = False, trust: bool = False) -> list[Slice]:
    """The slices of a file of any format, without pixels where possible. Raises Refused or LeftOut.

    derived: take derived DICOM images too. Of a volume that is a label map, too, unless `trust`: it is no second scan
    of its patient.
    """
    if path.lower().endswith(NIFTI):
        slices, volume = _scan_nifti(path)
    elif path.lower().endswith(ARRAYS):
        slices, volume = _scan_array(path)
    else:
        return dicom.read_header(path, derived)
    if not trust and volume.min() >= 0:
        every = 1 + volume.size // (MOST_BYTES // 32)  # slices of a huge one that are compared
        refuse_doubtful(volume[::every], LeftOut.verdict)
    return slices


def _scan_array(path):
    volume = load(path)
    count, rows, columns = volume.shape
    if rows != columns:
        raise Refused(f"is {rows} x {columns} pixels, expected square: pad or crop it first")
    digits = re.search(r"(\d{1,9})$", Path(path).stem)
    first = int(digits[0]) if digits and count == 1 else 0
    return [Slice(path, frame, number=first + frame, size=rows) for frame in range(count)], volume


@refuse_on_error(BAD_NIFTI)
def _scan_nifti(path):
    volume, affine, odd = _read_nifti(path)
    size, columns, count = volume.shape
    step = np.linalg.norm(affine[:3, :2], axis=0)
    if size != columns or not 0.05 <= min(step) <= max(step) <= min(10, 1.01 * min(step)):
        raise Refused(f"has {size} x {columns} pixels of {step[0]:g} x {step[1]:g} mm; expected square ones")
    dicom.check_axial((affine[:3, :2] / step).T.ravel())
    to_left, to_back = -affine[:3, :2].T * (-1, -1, 1) / step[:, None]  # DICOM's axes run left, back, head
    corners = [(affine @ (size - 1, size - 1, frame, 1))[:3] * (-1, -1, 1) for frame in range(count)]
    return [Slice(path, frame, number=frame, size=size, spacing=float(step[0]), warning=odd,
                  position=float(affine[2, 3] + frame * affine[2, 2]), orientation=(*to_left, *to_back),
                  corner=tuple(corner)) for frame, corner in enumerate(corners)], volume
