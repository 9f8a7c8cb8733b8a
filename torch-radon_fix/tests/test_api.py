"""The names of upstream's v1, and v2's operators."""

import importlib
import pickle

import numpy as np
import pytest
import torch
import torch_radon
from equations import backproject, detector, filtered, project, random_images, rays, relative
from torch_radon import BaseRadon, FanBeam, ParallelBeam, Radon, RadonFanbeam, Volume2D

pytestmark = pytest.mark.filterwarnings("ignore:det_count:UserWarning")

V1 = {
    "torch_radon": "BaseRadon Radon RadonFanbeam RadonForward RadonBackprojection FourierFilters normalize_shape "
                   "compute_lookup_table ReadingsLookup __version__",
    "torch_radon.solvers": "Landweber cg cgne",
    "torch_radon.shearlet": "ShearletTransform",
    "torch_radon.filtering": "FourierFilters",
    "torch_radon.utils": "normalize_shape _normalize_shape _unnormalize_shape",
    "torch_radon.differentiable_functions": "RadonForward RadonBackprojection",
}
ATTRIBUTES = ("angles det_count det_spacing rays_cfg tex_cache fourier_filters noise_generator forward backprojection "
              "backward filter_sinogram add_noise emulate_readings emulate_readings_new readings_lookup set_seed")


@pytest.mark.parametrize("module", V1)
def test_names_of_v1(module):
    assert not [name for name in V1[module].split() if not hasattr(importlib.import_module(module), name)]


def test_attributes_of_v1():
    radon = RadonFanbeam(32, np.linspace(0, 3, 5), 100, 50, 40, 2.0)
    assert not [name for name in ATTRIBUTES.split() if not hasattr(radon, name)]
    rays_cfg = radon.rays_cfg
    assert (rays_cfg.height, rays_cfg.width, rays_cfg.n_angles) == (32, 32, 5)
    assert (rays_cfg.det_count, rays_cfg.det_spacing, rays_cfg.clip_to_circle) == (40, 2.0, False)
    assert (rays_cfg.source_distance, rays_cfg.det_distance) == (100, 50)


def test_a_projector_from_angles_and_rays_cfg_as_upstreams_base_class():
    radon, x = RadonFanbeam(32, [0.0], 100, 50, 40, 2.0), random_images(1, 32)
    other = BaseRadon([0.3, 0.4], radon.rays_cfg)
    assert torch.equal(other.forward(x), RadonFanbeam(32, [0.3, 0.4], 100, 50, 40, 2.0).forward(x))
    assert isinstance(radon, BaseRadon) and torch.equal(pickle.loads(pickle.dumps(other)).forward(x), other.forward(x))


def test_normalize_shape_gives_a_method_one_leading_dimension():
    class Sums:
        @torch_radon.normalize_shape(2)
        def rows(self, x, factor=1):
            self.seen = tuple(x.shape)
            return factor * x.sum(-1, keepdim=True)

        @torch_radon.normalize_shape(1)
        def both(self, x):
            return x, x.sum(-1, keepdim=True)

    sums = Sums()
    for shape, seen in (((4, 5), (1, 4, 5)), ((3, 4, 5), (3, 4, 5)), ((2, 3, 4, 5), (6, 4, 5))):
        x = torch.rand(shape)
        strided = x.transpose(-1, -2).contiguous().transpose(-1, -2)
        torch.testing.assert_close(sums.rows(strided, factor=2), 2 * x.sum(-1, keepdim=True))
        assert sums.seen == seen
    same, total = sums.both(x)
    assert torch.equal(same, x) and total.shape == (2, 3, 4, 1)


# v2

def expected_v2(x, angles, count, spacing, fan=None):
    """Projection of (B, n, n) by the equations, (B, views, bins)."""
    s, d = rays(x.shape[-1], angles, detector(count, spacing), fan)
    return [p.reshape(len(x), len(angles), count)
            for p in project(x.double().numpy(), s.reshape(2, -1), d.reshape(2, -1), None)]


@pytest.mark.parametrize("angles", [(0.2, 3.0, 9), [0.3, 1.0, 2.0], np.linspace(0, 3, 7), torch.linspace(1, 2, 3)],
                         ids=["range", "list", "array", "tensor"])
def test_v2_parallel_beam(angles):
    listed = 0.2 + 2.8 * np.arange(9) / 9 if isinstance(angles, tuple) else np.asarray(torch.as_tensor(angles))
    beam, x = ParallelBeam(70, angles, 1.1), random_images(2, 64)
    p = beam.forward(x)
    assert relative(p, *expected_v2(x, listed, 70, 1.1)) <= 2e-5
    assert torch.equal(beam.angles, torch.from_numpy(np.float32(listed))), "v2 does not negate its angles"
    assert relative(beam.filter_sinogram(p, "Ram-Lak"), filtered(p.double().numpy())) <= 2e-5
    assert relative(beam.backward(p), backproject(p.double().numpy(), 64, listed, 1.1)) <= 2e-5
    v1 = Radon(64, listed, 70, 1.1)
    assert torch.equal(p, v1.forward(x)) and torch.equal(beam.backprojection(p), v1.backward(p))


def test_v2_fan_beam_and_other_angles():
    beam, x = FanBeam(48, (0, 6.0, 5)), random_images(1, 48)
    assert (beam.src_dist, beam.det_dist, beam.det_spacing, beam.det_count) == (48, 48, 2.0, 48)
    beam, other = FanBeam(det_count=60, angles=(0, 6.0, 5), src_dist=100, det_dist=50), np.array([0.1, 2.0])
    assert beam.det_spacing == 1.5
    p = beam.forward(x, torch.from_numpy(other))
    assert relative(p, *expected_v2(x, other, 60, 1.5, (100, 50))) <= 2e-5
    assert relative(beam.backward(p, other), backproject(p.double().numpy(), 48, other, 1.5, (100, 50))) <= 2e-5
    assert beam.forward(x[0]).shape == (5, 60)


def test_v2_voxels_have_a_size():
    """Lengths in mm: a projection is pixels' line integrals times the voxel size, and FBP gives the image back."""
    volume = Volume2D(voxel_size=(0.5, 0.5))
    beam = FanBeam(60, (0, 6.0, 5), 50, 25, 0.75, volume)
    volume.set_size(48, 48)
    p, x = beam.forward(random_images(1, 48)), random_images(1, 48)
    assert relative(p, *(0.5 * e for e in expected_v2(x, beam.angles.double().numpy(), 60, 1.5, (100, 50)))) <= 2e-5
    v1 = RadonFanbeam(48, beam.angles, 100, 50, 60, 1.5)
    assert relative(beam.backward(p), v1.backprojection(p / 0.5).double().numpy()) <= 2e-5


def test_what_v2_cannot_do_gets_a_sentence():
    with pytest.raises(NotImplementedError, match="no cone beam"):
        torch_radon.ConeBeam(10, [0.0], 20)
    with pytest.raises(NotImplementedError, match="no cone beam"):
        torch_radon.volumes.Volume3D()
    with pytest.raises(ValueError, match="expected one around the centre of rotation with square voxels"):
        torch_radon.volumes.Volume2D(center=(1, 0))
    with pytest.raises(ValueError, match="square voxels"):
        Volume2D(voxel_size=(1, 2))
    with pytest.raises(ValueError, match="the volume has no size yet"):
        ParallelBeam(32, (0, 1, 4)).backward(torch.rand(4, 32))
