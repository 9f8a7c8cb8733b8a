"""Files of every format to HU slices: DICOM, NIfTI, .npy (HU) and 16-bit PNG (value - 1024 = HU)."""

import re
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from datasets import dicom
from datasets.series import Refused, Slice, refuse_on_error
from utils.units import HU_RANGE

NIFTI = (".nii", ".nii.gz")
BAD_NIFTI = "cannot be read as NIfTI; is it damaged?"


def read_npy(path: str) -> np.ndarray:
    """HU as they are stored."""
    return np.load(path, mmap_mode="r", allow_pickle=False)


def read_png(path: str) -> np.ndarray:
    """16-bit grey, where value - 1024 = HU."""
    with Image.open(path) as image:
        if not image.mode.startswith("I"):
            raise Refused(f"is a PNG of mode {image.mode}; expected 16-bit grey, where value - 1024 = HU")
        return np.asarray(image).astype(np.int32) - 1024


READERS = {  # of files without a header: path -> HU, (H, H) or (N, H, H)
    ".npy": read_npy,
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


def _open_nifti(path):
    import nibabel  # only these inputs need it, and it is slow to import

    return nibabel.as_closest_canonical(nibabel.load(path))  # axes run right, front, head


@lru_cache(maxsize=1)  # the slices of a volume are asked for one after the other
def load(path: str) -> np.ndarray:
    """All slices of a file of any format: (N, H, W) HU, not yet clipped. Raises Refused or LeftOut."""
    if path.lower().endswith(NIFTI):
        with refuse_on_error(BAD_NIFTI):
            image = _open_nifti(path)  # slices are (head, back, left)
            return np.asanyarray(image.dataobj).reshape(image.shape[:3])[::-1, ::-1].transpose(2, 1, 0)
    return _load_array(path) if path.lower().endswith(ARRAYS) else dicom.read_hu(path)


@refuse_on_error("cannot be read; is it truncated or damaged?")
def _load_array(path):
    array = READERS[Path(path).suffix.lower()](path)
    if array.ndim not in (2, 3) or array.dtype.kind not in "iuf" or not array.size:
        raise Refused(f"holds {array.dtype} of shape {array.shape}; expected HU, one slice (H, H) or several (N, H, H)")
    return array.reshape(-1, *array.shape[-2:])


def scan(path: str, derived: bool = False) -> list[Slice]:
    """The slices of a file of any format, without pixels where possible. Raises Refused or LeftOut."""
    if path.lower().endswith(NIFTI):
        return _scan_nifti(path)
    if not path.lower().endswith(ARRAYS):
        return dicom.read_header(path, derived)
    count, rows, columns = load(path).shape
    if rows != columns:
        raise Refused(f"is {rows} x {columns} pixels, expected square: pad or crop it first")
    digits = re.search(r"(\d{1,9})$", Path(path).stem)
    first = int(digits[0]) if digits and count == 1 else 0
    return [Slice(path, frame, number=first + frame, size=rows) for frame in range(count)]


@refuse_on_error(BAD_NIFTI)
def _scan_nifti(path):
    image = _open_nifti(path)
    if len(image.shape) < 3 or np.prod(image.shape[3:]) != 1 or image.get_data_dtype().kind not in "iuf":
        raise Refused(f"holds {image.get_data_dtype()} of shape {image.shape}; expected one 3-D volume of HU")
    size, columns, count = image.shape[:3]
    step = np.linalg.norm(image.affine[:3, :2], axis=0)
    if size != columns or not 0.05 <= min(step) <= max(step) <= min(10, 1.01 * min(step)):
        raise Refused(f"has {size} x {columns} pixels of {step[0]:g} x {step[1]:g} mm; expected square ones")
    dicom.check_axial((image.affine[:3, :2] / step).T.ravel())
    # Without these codes the file does not say how it lies, and nibabel assumes an orientation.
    unknown = image.header.get("sform_code", 1) == image.header.get("qform_code", 1) == 0
    warning = "does not say how the patient lies; the orientation may be wrong" if unknown else ""
    to_left, to_back = -image.affine[:3, :2].T * (-1, -1, 1) / step[:, None]  # DICOM's axes run left, back, head
    corners = [(image.affine @ (size - 1, size - 1, frame, 1))[:3] * (-1, -1, 1) for frame in range(count)]
    return [Slice(path, frame, number=frame, size=size, spacing=float(step[0]), warning=warning,
                  position=float(image.affine[2, 3] + frame * image.affine[2, 2]),
                  orientation=(*to_left, *to_back), corner=tuple(corner)) for frame, corner in enumerate(corners)]
