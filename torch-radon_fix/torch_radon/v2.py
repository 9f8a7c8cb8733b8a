"""torch-radon v2's operators over the same kernels: `ParallelBeam`, `FanBeam` and `Volume2D`.

v2 takes det_count first, does not negate its angles, and reads the size of the image from what it is given.
"""

from functools import lru_cache

import torch

from .operators import BaseRadon, Radon, RadonFanbeam, _angles


class Volume2D:
    """Size and scale of the image. voxel_size: (y, x), one length in the unit of the scanner's distances."""

    def __init__(self, center=(0.0, 0.0), voxel_size=(1.0, 1.0)):
        if tuple(center) != (0, 0) or voxel_size[0] != voxel_size[1] or not voxel_size[0] > 0:
            raise ValueError(f"the volume has center {tuple(center)} and voxel_size {tuple(voxel_size)}; expected one "
                             "around the centre of rotation with square voxels")
        self.center, self.voxel_size = tuple(center), tuple(voxel_size)
        self.height = self.width = -1

    def has_size(self) -> bool:
        return self.height > 0 and self.width > 0

    def set_size(self, height: int, width: int):
        self.height, self.width = height, width

    def num_dimensions(self) -> int:
        return 2


def _three_dimensions(*args, **kwargs):
    raise NotImplementedError("torch_radon has no cone beam: its kernels are two-dimensional. ParallelBeam and FanBeam "
                              "project slices; for cone beam use astra-toolbox or LEAP")


ConeBeam = Volume3D = _three_dimensions


@lru_cache(maxsize=64)  # an operator's tables are cached by its geometry: this spares making it anew
def _operator(size, angles, det_count, det_spacing, distances) -> BaseRadon:
    if distances is None:
        return Radon(size, angles, det_count, det_spacing)
    return RadonFanbeam(size, angles, *distances, det_count, det_spacing)


class _Beam:
    """angles: (views,) radians, a list, array or tensor, or a tuple (start, end, count), `end` left out."""

    def __init__(self, det_count, angles, det_spacing, distances, volume):
        if isinstance(angles, tuple) and len(angles) == 3:
            start, end, count = angles
            angles = start + (end - start) * torch.arange(count, dtype=torch.float64) / count
        self.angles = torch.tensor(_angles(angles), dtype=torch.float32)
        self.det_count, self.det_spacing = det_count, float(det_spacing)
        self.volume = Volume2D() if volume is None else volume
        self._distances = distances

    def _at(self, angles) -> BaseRadon:
        """The operator of the volume's size under these angles, in pixels."""
        angles, voxel = _angles(self.angles if angles is None else angles), self.volume.voxel_size[0]
        distances = None if self._distances is None else tuple(d / voxel for d in self._distances)
        return _operator((self.volume.height, self.volume.width), angles, self.det_count, self.det_spacing / voxel,
                         distances)

    def forward(self, x: torch.Tensor, angles=None) -> torch.Tensor:
        """Projection of images (..., H, W) -> (..., views, bins), under other angles where they are given.

        The volume takes the image's size.
        """
        self.volume.set_size(*x.shape[-2:])
        p, voxel = self._at(angles).forward(x), self.volume.voxel_size[0]
        return p if voxel == 1 else p * voxel

    def backward(self, sinogram: torch.Tensor, angles=None) -> torch.Tensor:
        """Backprojection of (..., views, bins) -> (..., H, W), of the volume's size: v1's `backprojection`.

        Raises ValueError where the volume has no size yet.
        """
        if not self.volume.has_size():
            raise ValueError("the volume has no size yet; call its set_size(height, width), or forward first")
        image, voxel = self._at(angles).backprojection(sinogram), self.volume.voxel_size[0]
        return image if voxel == 1 else image / voxel

    backprojection = backward

    def filter_sinogram(self, sinogram: torch.Tensor, filter_name: str = "ramp") -> torch.Tensor:
        """v1's: every row of (..., views, bins) filtered and weighted by pi/(2 views). It needs no image."""
        return _operator((1, 1), (0.0,), self.det_count, self.det_spacing, None).filter_sinogram(sinogram, filter_name)


class ParallelBeam(_Beam):
    def __init__(self, det_count, angles, det_spacing=1.0, volume: Volume2D | None = None):
        super().__init__(det_count, angles, det_spacing, None, volume)


class FanBeam(_Beam):
    """Distances from the centre of rotation; src_dist is det_count, det_dist is src_dist unless given, det_spacing
    (src_dist + det_dist)/src_dist, a pixel at the centre.
    """

    def __init__(self, det_count, angles, src_dist=None, det_dist=None, det_spacing=None,
                 volume: Volume2D | None = None):
        src_dist = det_count if src_dist is None else src_dist
        det_dist = src_dist if det_dist is None else det_dist
        det_spacing = (src_dist + det_dist) / src_dist if det_spacing is None else det_spacing
        super().__init__(det_count, angles, det_spacing, (float(src_dist), float(det_dist)), volume)
        self.src_dist, self.det_dist = float(src_dist), float(det_dist)
