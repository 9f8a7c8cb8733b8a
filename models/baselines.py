"""Reconstruction without a network: functions (degrade, y, size) -> x0_hat (B, 1, size, size), mu, 1/cm.

y: measured sinograms of one view count, (1, n, bins) each. degrade: a `Degradation`, which knows the scanner. A batch
gives what its slices alone give. callback(x), if given, sees every iterate.
"""

import torch
from torch_radon import RadonFanbeam

from models.degradation import equal_angles, projector

TV_WEIGHT = 0.001  # chosen on validation slices, see README


def fbp(degrade, y, size):
    """Filtered backprojection with the published weights: the network's input."""
    return degrade.fbp(y, size)


def fbp_fdk(degrade, y, size):
    """Filtered backprojection with the weights of a true fan beam."""
    g = _operator(degrade, y, size).geometry
    operator = RadonFanbeam(size, equal_angles(y[0].shape[-2], degrade.start), g.source_distance, g.det_distance,
                            g.det_count, g.det_spacing, weights="fdk")
    return operator.backprojection(operator.filter_sinogram(torch.stack(y)))


@torch.no_grad()
def sirt(degrade, y, size, iterations=200, callback=None):
    """SIRT from zero with mu >= 0: x <- max(x + C A^T R (y - A x), 0), R and C the inverse row and column sums of A.

    Gregor & Benson, IEEE TMI 27(7), 2008.
    """
    operator, target = _operator(degrade, y, size), torch.stack(y)
    x = target.new_zeros(len(y), 1, size, size)
    rows, columns = (_inverse(sums) for sums in _sums(operator, x))
    for _ in range(iterations):
        x = (x + columns * operator.transpose(rows * (target - operator.forward(x)))).clamp_min(0)
        if callback:
            callback(x)
    return x


@torch.no_grad()
def tv(degrade, y, size, weight=TV_WEIGHT, iterations=150, callback=None):
    """Least squares with isotropic total variation: min over x >= 0 of |A x - y|^2/(2 n) + w sum |grad x|, n views.

    w = weight (size/256)^2, so that misfit and variation keep their proportion at other sizes. By the primal-dual
    algorithm of Chambolle & Pock (J. Math. Imaging Vis. 40, 2011, Alg. 1, theta = 1), as Sidky et al. (Phys. Med. Biol.
    57, 2012) use it for CT, over-relaxed (Condat, J. Optim. Theory Appl. 158, 2013, Alg. 3.1), with the diagonal step
    sizes of Pock & Chambolle (ICCV 2011, Lemma 2, alpha = 1), which need no norm of A. It starts from the FBP.
    """
    operator, target = _operator(degrade, y, size), torch.stack(y)
    n = target.shape[-2]
    limit = weight * (size / 256) ** 2 * n
    # The dual variables grow with n, so their steps do: balance. The gradient's rows are scaled by 3 balance, which
    # brings them to the size of A's. Both chosen on validation slices for 18 to 72 views; they change the speed alone.
    balance = n / 36
    x = degrade.fbp(y, size).clamp_min(0)
    rows, columns = _sums(operator, x)
    sigma, sigma_grad = balance * _inverse(rows), 1.5 * balance**2  # row sums of |grad|: 2
    tau = 1 / (balance * (columns + 12 * balance))                  # its largest column sum: 4
    p, q = torch.zeros_like(target), x.new_zeros(len(y), 2, size, size)
    for _ in range(iterations):
        x_new = torch.addcmul(x, tau, operator.transpose(p) + _gradient_transpose(q), value=-1).clamp_min_(0)
        x_bar = 2 * x_new - x
        p_new = (p + sigma * (operator.forward(x_bar) - target)) / (1 + sigma)
        q_new = q.add(_gradient(x_bar), alpha=sigma_grad)
        q_new *= limit / torch.hypot(*q_new.split(1, dim=1)).clamp_min(limit)
        for old, new in ((x, x_new), (p, p_new), (q, q_new)):
            old.lerp_(new, 1.9)
        if callback:
            callback(x_new)
    return x_new


def _operator(degrade, y, size) -> RadonFanbeam:
    return projector(size, equal_angles(y[0].shape[-2], degrade.start))


def _sums(operator, like):
    """Row sums (1, n, bins) and column sums (1, size, size) of the projection matrix, whose entries are >= 0."""
    ones = torch.ones_like(like[0])
    rows = operator.forward(ones)
    return rows, operator.transpose(torch.ones_like(rows))


def _inverse(sums):
    """1/sums, and 0 for rays that miss the image: their sums are zero, or so small that 1/sums is only noise."""
    return torch.where(sums > 1e-3, 1 / sums.clamp_min(1e-3), 0)


def _gradient(x):
    """Forward differences down and right, (B, 1, H, W) -> (B, 2, H, W), zero at the last row and column."""
    g = x.new_zeros(len(x), 2, *x.shape[-2:])
    g[:, 0, :-1] = x[:, 0, 1:] - x[:, 0, :-1]
    g[:, 1, :, :-1] = x[:, 0, :, 1:] - x[:, 0, :, :-1]
    return g


def _gradient_transpose(q):
    """The transpose of `_gradient`, (B, 2, H, W) -> (B, 1, H, W)."""
    x = q.new_zeros(len(q), 1, *q.shape[-2:])
    x[:, 0, 1:] += q[:, 0, :-1]
    x[:, 0, :-1] -= q[:, 0, :-1]
    x[:, 0, :, 1:] += q[:, 1, :, :-1]
    x[:, 0, :, :-1] -= q[:, 1, :, :-1]
    return x


BASELINES = {"fbp": fbp, "fbp-fdk": fbp_fdk, "sirt": sirt, "tv": tv}
