"""The equations of the README in plain NumPy, float64: what the tests compare with."""

import numpy as np
import torch


def bilinear(image, x, y):
    """Values of (B, n, n) at texture coordinates, zero outside: (B, *x.shape)."""
    n = image.shape[-1]
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    x, y = (np.clip(p - 0.5, -1, n) for p in (x, y))
    q, r = (np.minimum(np.floor(p), n - 1).astype(int) for p in (x, y))
    fx, fy = x - q, y - r
    return ((1 - fx) * (1 - fy) * padded[:, r + 1, q + 1] + fx * (1 - fy) * padded[:, r + 1, q + 2]
            + (1 - fx) * fy * padded[:, r + 2, q + 1] + fx * fy * padded[:, r + 2, q + 2])


def along(image, o, ray, m):
    """Line integrals with m + 1 samples o + j ray/m: o, ray (2, rays); m (rays,), at least 1 -> (B, rays)."""
    length, total = np.hypot(*ray), np.zeros((len(image), len(m)))
    for j in range(int(m.max()) + 1):
        on = np.flatnonzero(j <= m)
        total[:, on] += bilinear(image, *(o[:, on] + j * ray[:, on] / m[on]))
    return total * length / m


def project(image, s, d, radius):
    """Line integrals along s + alpha d, both (2, rays), and where ceil(L) hangs on the last bit the other choice too.

    radius: of the circle to clip to, None for the square. Returns two arrays (B, rays).
    """
    v = image.shape[-1] / 2
    if radius is None:
        with np.errstate(divide="ignore", invalid="ignore"):
            crossings = np.sort([(-v - s) / d, (v - s) / d], axis=0)
        parallel = d == 0
        crossings[0][parallel] = np.where(np.abs(s[parallel]) <= v, -np.inf, np.inf)
        crossings[1][parallel] = np.where(np.abs(s[parallel]) <= v, np.inf, -np.inf)
        first, last = crossings[0].max(0), crossings[1].min(0)
    else:
        a, b, c = (d * d).sum(0), (s * d).sum(0), (s * s).sum(0) - radius**2
        q = np.sqrt(np.maximum(b * b - a * c, 1))
        first, last = (-b - q) / a, (-b + q) / a
    p = np.zeros((len(image), s.shape[1]))
    hit = np.flatnonzero(last > first)
    o, ray = s[:, hit] + first[hit] * d[:, hit] + v, (last - first)[hit] * d[:, hit]
    length = np.hypot(*ray)
    p[:, hit] = along(image, o, ray, np.ceil(length))
    other, edge = p.copy(), np.flatnonzero(np.abs(length - np.round(length)) < 1e-9 * length)
    if edge.size:
        m = 2 * np.round(length[edge]) + 1 - np.ceil(length[edge])
        other[:, hit[edge]] = along(image, o[:, edge], ray[:, edge], np.maximum(m, 1))
    return p, other


def detector(count, spacing):
    return (np.arange(count) - count / 2 + 0.5) * spacing


def rays(n, angles, u, fan=None):
    """Start and direction (2, views, bins) of every ray; fan = (S, D)."""
    angles = np.float32(angles).astype(np.float64)[:, None]
    sin, cos = np.sin(angles), np.cos(angles)
    if fan:
        s = np.stack([fan[0] * sin + 0 * u, fan[0] * cos + 0 * u])
        e = np.stack([u * cos - fan[1] * sin, -u * sin - fan[1] * cos])
    else:
        s = np.stack([u * cos + 0.71 * n * sin, -u * sin + 0.71 * n * cos])
        e = np.stack([u * cos - 0.71 * n * sin, -u * sin - 0.71 * n * cos])
    return s, e - s


def backproject(sinogram, n, angles, spacing, fan=None, radius=None):
    """(B, views, bins) -> (B, n, n)."""
    x = np.arange(n) - n / 2 + 0.5
    x, y = np.meshgrid(x, x)
    image, count = np.zeros((len(sinogram), n, n)), sinogram.shape[-1]
    for theta, row in zip(np.float32(angles).astype(np.float64), np.moveaxis(sinogram, 1, 0), strict=True):
        shrink = (fan[0] - x * np.sin(theta) - y * np.cos(theta)) / sum(fan) if fan else 1.0
        beside = np.equal(shrink, 0)  # the source's own row: on no ray to the detector
        shrink = np.where(beside, np.inf, shrink)
        b = (x * np.cos(theta) - y * np.sin(theta)) / (shrink * spacing) + count / 2 - 0.5
        low = np.clip(np.floor(b), -1, count).astype(int)
        padded = np.pad(row, ((0, 0), (1, 2)))
        weight = np.clip(b - low, 0, 1)
        inside = (b > -1) & (b < count)
        image += inside * ((1 - weight) * padded[:, low + 1] + weight * padded[:, low + 2]) / shrink
    return image / spacing * (1 if radius is None else np.hypot(x, y) <= radius)


def filtered(sinogram):
    """Ram-lak by the sum over its taps, times pi/(2 views)."""
    views, count = sinogram.shape[-2:]
    distance = np.abs(np.subtract.outer(np.arange(count), np.arange(count)))
    taps = np.where(distance % 2 == 1, -2 / (np.pi * np.maximum(distance, 1)) ** 2, np.where(distance == 0, 0.5, 0))
    return sinogram @ taps * np.pi / (2 * views)


def random_images(batch, n):
    return torch.rand(batch, n, n, generator=torch.Generator().manual_seed(n + batch))


def relative(found, *expected):
    """Relative error of a tensor; element by element against the nearest of the references given."""
    found = found.double().numpy()
    return np.linalg.norm(np.min([np.abs(found - e) for e in expected], axis=0)) / np.linalg.norm(expected[0])


def check(radon, n, angles, batch, fan=None, half=False):
    """Forward, filter and backprojection of random images against the reference."""
    tolerance = 1e-3 if half else 2e-5
    x = random_images(batch, n)
    x = x.half() if half else x
    radius = radon.det_count / 2 if radon.clip_to_circle else None
    s, d = rays(n, angles, detector(radon.det_count, radon.det_spacing), fan)
    shape = batch, len(angles), radon.det_count
    expected = [p.reshape(shape) for p in project(x.double().numpy(), s.reshape(2, -1), d.reshape(2, -1), radius)]
    p = radon.forward(x)
    assert p.shape == shape and p.dtype == x.dtype
    assert relative(p, *expected) <= tolerance
    assert relative(radon.filter_sinogram(p), filtered(p.double().numpy())) <= tolerance
    back = radon.backprojection(p)
    assert back.shape == x.shape and back.dtype == x.dtype
    assert relative(back, backproject(p.double().numpy(), n, angles, radon.det_spacing, fan, radius)) <= tolerance
