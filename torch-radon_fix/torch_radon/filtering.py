"""The ramp filter and its windows, as a symmetric Toeplitz matrix and as a frequency response."""

from functools import lru_cache

import numpy as np
import torch

from .geometry import Geometry

WINDOWS = {  # at the frequencies of an FFT of `size`, as scikit-image has them: hamming and hann are not even
    "shepp-logan": lambda size: np.sinc(np.fft.fftfreq(size)),
    "cosine": lambda size: np.fft.fftshift(np.sin(np.linspace(0, np.pi, size, endpoint=False))),
    "hamming": lambda size: np.fft.fftshift(np.hamming(size)),
    "hann": lambda size: np.fft.fftshift(np.hanning(size)),
}
FILTERS = ("ramp", "ram-lak", *WINDOWS)


def filter_named(name: str) -> str:
    """The name in lower case. Raises ValueError where it is none of FILTERS."""
    if str(name).lower() not in FILTERS:
        raise ValueError(f"filter_name is {name!r}; expected one of {', '.join(FILTERS)}")
    return name.lower()


def ramp_taps(size: int) -> np.ndarray:
    """Taps of the ramp on a ring of `size` bins, (size,) float64: h[0] = 1/2, h[l] = -2/(pi l)^2 for odd l."""
    distance = np.minimum(np.arange(size), size - np.arange(size))
    taps = np.zeros(size)
    taps[0] = 0.5
    taps[distance % 2 == 1] = -2 / (np.pi * distance[distance % 2 == 1]) ** 2
    return taps


def fourier_filter(size: int, name: str = "ramp") -> np.ndarray:
    """Response of a filter at the `size` frequencies of a complex FFT, (size,) float64; the ramp's is its taps' FFT."""
    response = np.fft.fft(ramp_taps(size)).real
    return response if name in ("ramp", "ram-lak") else response * WINDOWS[name](size)


@lru_cache(maxsize=16)
def impulse_response(det_count: int, name: str = "ramp") -> np.ndarray:
    """Filter taps h[0..det_count-1] (h[-l] = h[l]), float64, without the view weight pi/(2N).

    The windows multiply the ramp's response at the padded size of the full detector, as scikit-image's `iradon` does;
    only the real part of the inverse counts, which is even.
    """
    size = max(64, 2 ** int(np.ceil(np.log2(2 * det_count))))
    if name in ("ramp", "ram-lak"):
        return ramp_taps(size)[:det_count]
    return np.fft.ifft(fourier_filter(size, name)).real[:det_count]


@lru_cache(maxsize=16)
def frequency_response(det_count: int, name: str = "ramp") -> np.ndarray:
    """Real response on the rfft grid of a row zero-padded to twice `det_count` bins, (det_count + 1,) float64."""
    taps = impulse_response(det_count, name)
    return np.fft.rfft(np.concatenate([taps, [0.0], taps[:0:-1]])).real


def detector_weight(geometry: Geometry) -> np.ndarray:
    """Weight of each bin before the filter, (det_count,) float64: the fan beam's cosine for "fdk", else 1."""
    if geometry.weights != "fdk":
        return np.ones(geometry.det_count)
    span = geometry.source_distance + geometry.det_distance
    return span / np.hypot(span, geometry.bins)


def filter_matrix(det_count: int, name: str, first: int, stop: int) -> np.ndarray:
    """Rows and columns first..stop of the Toeplitz matrix of the filter, float64, without the view weight."""
    index = np.arange(first, stop)
    return impulse_response(det_count, name)[np.abs(index[:, None] - index[None, :])]


class FourierFilters:
    """Upstream's way to a filter: what a row's complex FFT, zero-padded to `size` bins, is multiplied by."""

    def get(self, size: int, filter_name: str, device) -> torch.Tensor:
        """The response, (1, 1, size, 1) float32 on `device`, without the view weight; an unknown name: ValueError."""
        response = torch.from_numpy(self.construct_fourier_filter(size, filter_name))
        return response.float().view(1, 1, -1, 1).to(device)

    @staticmethod
    def construct_fourier_filter(size: int, filter_name: str) -> np.ndarray:
        """The response, (size,) float64."""
        return fourier_filter(size, filter_named(filter_name))
