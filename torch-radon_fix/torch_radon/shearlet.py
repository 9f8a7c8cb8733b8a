"""The shearlet transform: `ShearletTransform` on torch.fft; the filters come from the package alpha-transform."""

import hashlib
import os

import numpy as np
import torch

from .utils import save_arrays


def _spectra(width: int, height: int, alphas: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """The filters of a Parseval frame as the FFT orders frequencies, (shearlets, H, W), and their scales."""
    try:
        from alpha_transform import AlphaShearletTransform
    except ImportError as error:
        raise ImportError(f"ShearletTransform takes its filters from the package alpha-transform, which cannot be "
                          f'imported ({error}); pip install "torch-radon[shearlet]" installs it') from error
    system = AlphaShearletTransform(width, height, alphas, real=True, parseval=True, verbose=False)
    spectra = np.fft.ifftshift(np.array(system.spectrograms)[:, ::-1], axes=(-2, -1))  # its frequency axis y points up
    # The highest frequency of an even size is its own negative, but the filters take its row and column for positive:
    # a real image would have complex coefficients. The root mean square of a filter and its mirror image is even, and
    # the squares still sum to 1.
    negative = np.roll(spectra[:, ::-1, ::-1], 1, axis=(-2, -1))
    scales = [0] + [index[0] for index in system.indices[1:]]
    return np.sqrt((spectra**2 + negative**2) / 2), np.array(scales)


class ShearletTransform:
    """Alpha-shearlet transform of images (..., height, width): a Parseval frame, so `backward` inverts `forward`.

    alphas: one a scale, 0.5 for shearlets; cache: folder where the filters are kept from one program to the next.
    `scales`: the scale of each shearlet, (shearlets,) float32; the first, the low-pass filter, counts as 0.
    Raises ImportError without the extra: pip install "torch-radon[shearlet]".
    """

    def __init__(self, width: int, height: int, alphas, cache: str | None = None):
        alphas = [float(alpha) for alpha in alphas]
        kept = None
        if cache is not None:
            name = hashlib.sha256(repr((width, height, alphas)).encode()).hexdigest()[:24]
            kept = os.path.join(os.path.expanduser(cache), f"shearlets-{name}.npz")
        if kept is not None and os.path.exists(kept):
            with np.load(kept, allow_pickle=False) as saved:
                spectra, scales = saved["spectra"], saved["scales"]
        else:
            spectra, scales = _spectra(width, height, alphas)
            if kept is not None:
                os.makedirs(os.path.dirname(kept), exist_ok=True)
                save_arrays(kept, spectra=spectra, scales=scales)
        self.shearlets = torch.from_numpy(spectra)  # real and even: half of the FFT's frequencies would do
        self.scales = torch.from_numpy(scales).float()

    def _filters(self, x: torch.Tensor) -> torch.Tensor:
        if tuple(x.shape[-2:]) != tuple(self.shearlets.shape[-2:]):
            raise ValueError(f"the shape is {tuple(x.shape)}; expected (..., {self.shearlets.shape[-2]}, "
                             f"{self.shearlets.shape[-1]}), the size of the shearlets")
        self.shearlets = self.shearlets.to(x.device)
        return self.shearlets[..., :x.shape[-1] // 2 + 1].to(x.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Coefficients (..., shearlets, H, W) of images (..., H, W); differentiable."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        spectrum = torch.fft.rfft2(wide)[..., None, :, :] * self._filters(wide)
        return torch.fft.irfft2(spectrum, s=x.shape[-2:]).to(x.dtype)

    def backward(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Images (..., H, W) from coefficients (..., shearlets, H, W): the transpose of `forward` and its inverse."""
        wide = coefficients.to(torch.promote_types(coefficients.dtype, torch.float32))
        spectrum = (torch.fft.rfft2(wide) * self._filters(wide)).sum(-3)
        return torch.fft.irfft2(spectrum, s=wide.shape[-2:]).to(coefficients.dtype)
