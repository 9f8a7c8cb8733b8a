"""The ramp filter and its windows, as a symmetric Toeplitz matrix and as a frequency response."""

from functools import lru_cache

import numpy as np

from .geometry import Geometry

FILTERS = ("ramp", "ram-lak", "shepp-logan", "cosine", "hamming", "hann")


@lru_cache(maxsize=16)
def impulse_response(det_count: int, name: str = "ramp") -> np.ndarray:
    """Filter taps h[0..det_count-1] (h[-l] = h[l]), float64, without the view weight pi/(2N).

    Ram-lak is h[0] = 1/2, h[l] = -2/(pi l)^2 for odd l. The windows multiply its response at the padded size of the
    full detector, as scikit-image's `iradon` does; only the real part of the inverse counts, which is even. Raises
    ValueError for an unknown name.
    """
    if name not in FILTERS:
        raise ValueError(f"filter_name is {name!r}; expected one of {', '.join(FILTERS)}")
    size = max(64, 2 ** int(np.ceil(np.log2(2 * det_count))))
    distance = np.minimum(np.arange(size), size - np.arange(size))
    taps = np.zeros(size)
    taps[0] = 0.5
    taps[distance % 2 == 1] = -2 / (np.pi * distance[distance % 2 == 1]) ** 2
    if name in ("ramp", "ram-lak"):
        return taps[:det_count]
    response = np.fft.fft(taps).real
    frequency = np.fft.fftfreq(size)
    if name == "shepp-logan":
        window = np.sinc(frequency)
    elif name == "cosine":
        window = np.fft.fftshift(np.sin(np.linspace(0, np.pi, size, endpoint=False)))
    elif name == "hamming":
        window = np.fft.fftshift(np.hamming(size))
    else:
        window = np.fft.fftshift(np.hanning(size))
    return np.fft.ifft(response * window).real[:det_count]


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
