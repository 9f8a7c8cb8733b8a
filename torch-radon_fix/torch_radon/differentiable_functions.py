"""Upstream's two autograd functions, `apply(x, angles, tex_cache, rays_cfg)`: what its operators are made of.

angles: a tensor as an operator's `angles` is, negated; tex_cache: not used, there are no textures; rays_cfg: an
operator's `rays_cfg`. Gradients are the true transposes.
"""

import torch

from .operators import apply_linear


class RadonForward:
    @staticmethod
    def apply(x: torch.Tensor, angles: torch.Tensor, tex_cache, rays_cfg) -> torch.Tensor:
        """Projection of images (..., H, W) -> (..., views, bins)."""
        return apply_linear("forward", x, rays_cfg, angles)


class RadonBackprojection:
    @staticmethod
    def apply(x: torch.Tensor, angles: torch.Tensor, tex_cache, rays_cfg) -> torch.Tensor:
        """Backprojection of sinograms (..., views, bins) -> (..., H, W)."""
        return apply_linear("backproject", x, rays_cfg, angles)
