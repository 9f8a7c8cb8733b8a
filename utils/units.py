"""HU, linear attenuation mu and display windows, of tensors and of arrays. Needs no PyTorch."""

MU_WATER = 0.192           # 1/cm
HU_RANGE = (-1024, 3071)   # what a 12-bit scanner stores
FIELD_CM = 256 * 0.14      # field of view: images of other sizes have other pixels
WINDOWS = ((3000, 500), (500, 50), (2000, 0))  # (width, centre) in HU; the first is the headline


def hu_to_mu(hu):
    """HU -> mu in 1/cm."""
    return hu / 1000 * MU_WATER + MU_WATER


def mu_to_hu(mu):
    """mu in 1/cm -> HU."""
    return (mu - MU_WATER) / MU_WATER * 1000


def pixel_cm(size: int) -> float:
    """Side of a pixel of a slice of `size` pixels, cm. A line integral is the sinogram's value times this."""
    return FIELD_CM / size


def window(mu, width: float, centre: float):
    """mu -> [0, 1], clipped to the HU window."""
    return ((mu_to_hu(mu) - (centre - width / 2)) / width).clip(0, 1)


def number(text: str) -> int | float:
    """The number that a text says, whole ones as integers."""
    value = float(text)
    return int(value) if value.is_integer() else value
