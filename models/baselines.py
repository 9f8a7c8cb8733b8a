"""Reconstruction without a network: functions (degrade, y, size) -> x0_hat (B, 1, size, size), mu, 1/cm.

y: measured sinograms of one view count, (B, 1, n, bins). degrade: a `Degradation`, which knows the scanner. A batch
gives what its slices alone give. callback(x), if given, sees every iterate. They run without gradients
(models/reconstructor.py). As models/samplers.py, this file needs no PyTorch before it runs.
"""

from models.samplers import Method

TV_WEIGHT = 0.001  # chosen on validation slices, see docs/results.md


def fbp(degrade, y, size):
    """Filtered backprojection with the published weights: the network's input."""
    return degrade.fbp(y, size)


def fbp_fdk(degrade, y, size):
    """Filtered backprojection with the weights of a true fan beam, which those of a real scanner are anyway."""
    if degrade.scanner.shares(y.shape[-2]) is not None:
        return fbp(degrade, y, size)
    operator = degrade.scanner.projector(size, degrade.scanner.theta(y.shape[-2]), weights="fdk")
    return operator.backprojection(operator.filter_sinogram(y))


def sirt(degrade, y, size, iterations=200, callback=None):
    """SIRT from zero with mu >= 0: x <- max(x + C A^T R (y - A x), 0), R and C the inverse row and column sums of A.

    Gregor & Benson, IEEE TMI 27(7), 2008.
    """
    operator = degrade.operator(size, y.shape[-2])
    x = y.new_zeros(len(y), 1, size, size)
    rows, columns = (_inverse(sums) for sums in _sums(operator, x))
    for _ in range(iterations):
        x = (x + columns * operator.transpose(rows * (y - operator.forward(x)))).clamp_min(0)
        if callback:
            callback(x)
    return x


def tv(degrade, y, size, weight=TV_WEIGHT, iterations=150, callback=None):
    """Least squares with isotropic total variation: min over x >= 0 of |A x - y|^2/(2 n) + w sum |grad x|, n views.

    w = weight (size/256)^2, so that misfit and variation keep their proportion at other sizes. By the primal-dual
    algorithm of Chambolle & Pock (J. Math. Imaging Vis. 40, 2011, Alg. 1, theta = 1), as Sidky et al. (Phys. Med. Biol.
    57, 2012) use it for CT, over-relaxed (Condat, J. Optim. Theory Appl. 158, 2013, Alg. 3.1), with the diagonal step
    sizes of Pock & Chambolle (ICCV 2011, Lemma 2, alpha = 1), which need no norm of A. It starts from the FBP.
    """
    n = y.shape[-2]
    operator = degrade.operator(size, n)
    limit = weight * (size / 256) ** 2 * n
    # The dual variables grow with n, so their steps do: balance. The gradient's rows are scaled by 3 balance, which
    # brings them to the size of A's. Both chosen on validation slices for 18 to 72 views; they change the speed alone.
    balance = n / 36
    x = degrade.fbp(y, size).clamp_min(0)
    rows, columns = _sums(operator, x)
    sigma, sigma_grad = balance * _inverse(rows), 1.5 * balance**2  # row sums of |grad|: 2
    tau = 1 / (balance * (columns + 12 * balance))                  # its largest column sum: 4
    p, q = y.new_zeros(y.shape), x.new_zeros(len(y), 2, size, size)
    for _ in range(iterations):
        x_new = x.addcmul(tau, operator.transpose(p) + _gradient_transpose(q), value=-1).clamp_min_(0)
        x_bar = 2 * x_new - x
        p_new = (p + sigma * (operator.forward(x_bar) - y)) / (1 + sigma)
        q_new = q.add(_gradient(x_bar), alpha=sigma_grad)
        q_new *= limit / q_new[:, :1].hypot(q_new[:, 1:]).clamp_min(limit)
        for old, new in ((x, x_new), (p, p_new), (q, q_new)):
            old.lerp_(new, 1.9)
        if callback:
            callback(x_new)
    return x_new


def _sums(operator, like):
    """Row sums (1, n, bins) and column sums (1, size, size) of the projection matrix, whose entries are >= 0."""
    rows = operator.forward(like.new_ones(like.shape[1:]))
    return rows, operator.transpose(rows.new_ones(rows.shape))


def _inverse(sums):
    """1/sums, and 0 for rays that miss the image: their sums are zero, or so small that 1/sums is only noise."""
    return (sums > 1e-3) / sums.clamp_min(1e-3)


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


BASELINES = {
    "fbp": Method("FBP", fbp),
    "fbp-fdk": Method("FBP (FDK weights)", fbp_fdk),
    "sirt": Method("SIRT", sirt),
    "tv": Method("TV", tv),
}
