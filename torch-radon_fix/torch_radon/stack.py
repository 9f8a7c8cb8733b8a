"""`Stack`: one operator for a batch whose slices were scanned under different angles."""

from functools import lru_cache

import torch

from .filtering import filter_named
from .geometry import Geometry, Stacked
from .operators import GEOMETRIES, BaseRadon, _checked, _degrade, _linear, _register, _view_weights


@lru_cache(maxsize=4096)  # of a few hundred bytes each
def _stacked(keys: tuple[str, ...]) -> Stacked:
    """The scans with these keys. Raises ValueError where they differ in more than their angles."""
    scans = tuple(GEOMETRIES[key] for key in keys)
    first = scans[0].without_angles
    for i, scan in enumerate(scans):
        if scan.without_angles != first:
            raise ValueError(f"projector {i} of the stack is {_shown(scan)} and projector 0 is {_shown(scans[0])}; "
                             "expected projectors that differ in their angles alone")
    stacked = Stacked(scans)
    _register(stacked)
    return stacked


def _shown(scan: Geometry) -> str:
    return repr(scan.without_angles).replace("angles=(), ", "")


class Stack:
    """Projectors of a batch's slices, one a slice, as one operator: on CUDA one launch does all slices.

    operators: `Radon`s or `RadonFanbeam`s that differ in their angles alone; the stack keeps these as they are now.
    Images are (B, ..., H, W), sinograms (B, ..., n_max, bins): slice b's views are its first views[b] rows. What lies
    beyond them is ignored in what is given and zero in what is returned. A slice gets what its own projector gives it,
    on the CPU to the last bit. `solvers.cgne` takes a stack as it takes a projector; y must then be zero beyond a
    slice's views (`pad`). Gradients are the true transposes. Making the same stack again costs microseconds.
    """

    def __init__(self, operators: list[BaseRadon]):
        operators = list(operators)
        if not operators or not all(isinstance(operator, BaseRadon) for operator in operators):
            raise TypeError(f"a stack is made of {[type(o).__name__ for o in operators]}; expected a projector, Radon "
                            "or RadonFanbeam, for each slice, and at least one")
        self._stacked = _stacked(tuple([operator._key for operator in operators]))
        self._key = self._stacked.key
        self.views = [scan.n_angles for scan in self._stacked.scans]
        scan = self._stacked.scans[0]
        self._image_shape, self._sinogram_shape = (scan.height, scan.width), (self._stacked.n_angles, scan.det_count)

    def __len__(self) -> int:
        return len(self.views)

    @property
    def n_max(self) -> int:
        """Rows of the padded sinogram: the most views of a slice."""
        return self._sinogram_shape[0]

    def __setstate__(self, state):
        self.__dict__.update(state)
        _register(self._stacked)  # another process has a table of its own

    def _checked(self, x, trailing: tuple[int, int], what: str):
        _checked(x, trailing, what)
        if x.ndim < 3 or len(x) != len(self.views):
            raise ValueError(f"{what} has shape {tuple(x.shape)}; expected one for each of the stack's "
                             f"{len(self.views)} projectors: ({len(self.views)}, ..., {trailing[0]}, {trailing[1]})")
        return x

    def _images(self, x) -> torch.Tensor:
        return self._checked(x, self._image_shape, "the image")

    def _sinograms(self, x) -> torch.Tensor:
        return self._checked(x, self._sinogram_shape, "the sinogram")

    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        """Projection of images (B, ..., H, W) -> (B, ..., n_max, bins)."""
        return _linear("forward", self._images(imgs), self._key)

    def backprojection(self, sinogram: torch.Tensor) -> torch.Tensor:
        """Backprojection of (B, ..., n_max, bins) -> (B, ..., H, W)."""
        return _linear("backproject", self._sinograms(sinogram), self._key)

    def backward(self, sinogram: torch.Tensor) -> torch.Tensor:
        """`backprojection`."""
        return self.backprojection(sinogram)

    def transpose(self, sinogram: torch.Tensor) -> torch.Tensor:
        """The exact transpose of `forward`: (B, ..., n_max, bins) -> (B, ..., H, W)."""
        return _linear("forward_transpose", self._sinograms(sinogram), self._key)

    def filter_sinogram(self, sinogram: torch.Tensor, filter_name: str = "ramp") -> torch.Tensor:
        """Filter every row of (B, ..., n_max, bins) and weight it by pi/(2 views[b]); zero beyond a slice's views."""
        return _linear("filter", self._sinograms(sinogram), self._key, filter_named(filter_name))

    def degrade(self, imgs: torch.Tensor, view_weights: torch.Tensor | None = None,
                filter_name: str = "ramp") -> torch.Tensor:
        """FBP of the projection, (B, ..., H, W) -> (B, ..., H, W), without a gradient.

        view_weights: the factor of each view, (B, n_max), ignored beyond a slice's views; pi/(2 views[b]) if None.
        """
        self._images(imgs)
        weights = _view_weights(view_weights, imgs, (len(self.views), self.n_max))
        return _degrade(imgs, weights, self._key, filter_named(filter_name))

    def pad(self, sinograms: list[torch.Tensor]) -> torch.Tensor:
        """Sinograms (..., views[b], bins), one a slice, as one (B, ..., n_max, bins), with zeros beyond their views."""
        if [p.shape[-2] for p in sinograms] != self.views:
            raise ValueError(f"the sinograms have {[p.shape[-2] for p in sinograms]} views; expected {self.views}")
        return torch.stack([torch.nn.functional.pad(p, (0, 0, 0, self.n_max - p.shape[-2])) for p in sinograms])

    def exists(self, device) -> torch.Tensor:
        """Whether a row of the padded sinogram is a view, (B, n_max, 1) bool on a device. Not to be written to."""
        device = torch.device(device)
        if torch._C._len_torch_dispatch_stack():  # fake tensors are not kept
            return _exists.__wrapped__(self._stacked, device)
        return _exists(self._stacked, device)


@lru_cache(maxsize=1024)
def _exists(stacked: Stacked, device: torch.device) -> torch.Tensor:
    views = torch.tensor([scan.n_angles for scan in stacked.scans])
    return (torch.arange(stacked.n_angles) < views[:, None])[..., None].to(device)
