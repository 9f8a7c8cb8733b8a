"""Nothing on the hot path asks the device for a value: a GPU would stand still until the host has it.

Here on CPU tensors, with every way to read a tensor's value counted. What the solver does on a GPU instead of looking
is tested with torch_radon.
"""

import sys
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch_radon import solvers

from datasets.loader import load_batch
from models.estimate import denoiser
from models.presets import PRESETS
from models.reconstructor import Reconstructor
from models.samplers import SAMPLERS
from models.training import Trainer
from models.unet import UNet, UNetConfig

READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


OURS = ("models", "datasets", "utils", __name__.split(".")[0])  # the projector's CPU kernels read, its CUDA ones do not


class Dispatched(TorchDispatchMode):
    """Notes the operators whose results have a size that depends on values, and in `copies` those that a GPU copies
    Python numbers for: tensors made of lists, and lists as indices, which it even waits for."""

    def __init__(self, seen):
        super().__init__()
        self.seen, self.copies = seen, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        by_mask = name.startswith("aten::index") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in (args[1] if len(args) > 1 else ()) or ())
        if by_mask or name in ("aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select"):
            self.seen.append(name)
        if name in ("aten::lift_fresh", "aten::index", "aten::index_put_"):
            self.copies.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch):
    """The reads of values, as they happen; the solver's own on a CPU are left out."""
    class Seen(list):
        """With the copies."""

    seen = Seen()

    def watch(name, original):
        def watched(tensor, *args):
            if sys._getframe(1).f_globals["__name__"].split(".")[0] in OURS:
                seen.append(name)
            return original(tensor, *args)
        return watched

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, watch(name, getattr(torch.Tensor, name)))
    monkeypatch.setattr(solvers._Stopped, "__call__", lambda self, active: False)
    monkeypatch.setattr(solvers, "_check", lambda x, residual: x)
    with Dispatched(seen) as dispatched:
        seen.copies = dispatched.copies
        yield seen


def test_the_counter_counts(reads):
    x = torch.ones(3)
    assert bool(x.sum() > 0) and x[x > 0].shape == (3,) and x.tolist() == [1, 1, 1] and float(x[0]) == 1
    assert {"__bool__", "tolist", "__float__", "aten::index"} <= set(reads)


@pytest.mark.parametrize(("name", "fields"), [
    ("tiny", {"hops": 5, "epct_start": 0}), ("tiny", {"augment": True, "accumulate": 2, "epct_start": 0}),
    ("real", {"noise_share": 1.0, "scanner_share": 0.5}), ("paper", {"width": 32, "epct_start": 0}),
    ("reco", {"width": 32, "epct_start": 0})])
def test_a_training_step_with_epct_waits_for_nothing(name, fields, reads):
    preset = replace(PRESETS[name], batch=4, precision="fp32", **fields)
    mu = torch.rand(4, 1, 32, 32) * 0.3
    trainer = Trainer(preset, seed=0, steps=10, device="cpu")
    for first in (0, 4):
        _, parts, weight = load_batch(mu, (first, first + 4), 0, preset)
        reads.clear()
        steps = trainer.update(parts, weight, 0)
        assert len(steps) == 1 + preset.hops and not reads


@pytest.mark.parametrize("dc", [0, 2])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_asks_once_a_level_at_most(name, dc, reads):
    channels = 2 if SAMPLERS[name].two_pass else 1
    r = Reconstructor(UNet(UNetConfig(width=32, channels=channels)).eval(), dc=dc)
    y = r.degrade.project(torch.rand(2, 1, 32, 32) * 0.3, 36)
    r.run(name, y)
    reads.clear()
    reads.copies.clear()
    _, calls = r.run(name, y)
    assert len(reads) <= (max(calls) if name == "spdps" else 0)
    assert not reads.copies


def test_slices_at_different_levels_are_told_so_by_one_copy_a_call(reads):
    network = UNet(UNetConfig(width=32)).eval()
    x, n_t = torch.rand(3, 1, 32, 32), [18, 36, 36]
    denoiser(network)(x, n_t)
    assert reads.copies == ["aten::lift_fresh"] and not reads
