"""`Stack`: every slice gets what its own projector gives it."""

import pickle

import numpy as np
import pytest
import torch
from torch_radon import Radon, RadonFanbeam, Stack
from torch_radon.solvers import cgne

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
SCANS = {
    "fan": lambda angles: RadonFanbeam(40, angles, 170, 170, 110, 2.0),
    "fdk offset": lambda angles: RadonFanbeam((32, 40), angles, 120, 90, 90, 1.7, det_offset=0.3, weights="fdk"),
    "parallel": lambda angles: Radon(40, angles, 58),
    "source inside": lambda angles: RadonFanbeam(20, angles, 12, 12, 50, 2.0),
}

ONE = Radon(8, [0.0], 12)


def turn(views, start=0.0):
    return start + 2 * np.pi * np.arange(views) / views


def scanned(name):
    """Projectors of six slices: two of one scan, two of as many views from different angles, one of many views."""
    make = SCANS[name]
    return [make(turn(n, start)) for n, start in ((12, 0.0), (5, 0.1), (12, 0.0), (9, 0.0), (5, 0.2), (72, 0.0))]


def noise(*shape, dtype=torch.float32, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@DTYPES
@pytest.mark.filterwarnings("ignore:source_distance:UserWarning")
@pytest.mark.parametrize("name", SCANS)
def test_a_slice_of_a_stack_is_the_slice_alone_to_the_last_bit(name, dtype):
    radons = scanned(name)
    stack = Stack(radons)
    assert stack.views == [12, 5, 12, 9, 5, 72] and stack.n_max == 72 and len(stack) == 6
    x, p = noise(6, 2, *stack._image_shape, dtype=dtype), noise(6, 2, *stack._sinogram_shape, dtype=dtype, seed=1)
    weights = noise(6, 72, seed=2) - 0.5
    for i, n in enumerate(stack.views):
        p[i, :, n:] = weights[i, n:] = torch.nan  # ignored
    filtered, projected, image = stack.filter_sinogram(p, "hann"), stack.forward(x), stack.backprojection(p)
    transposed, degraded, weighted = stack.transpose(p), stack.degrade(x), stack.degrade(x, weights, "cosine")
    for i, (radon, n) in enumerate(zip(radons, stack.views, strict=True)):
        own = p[i, :, :n].contiguous()
        assert torch.equal(projected[i, :, :n], radon.forward(x[i])) and not projected[i, :, n:].any()
        assert torch.equal(filtered[i, :, :n], radon.filter_sinogram(own, "hann")) and not filtered[i, :, n:].any()
        assert torch.equal(image[i], radon.backprojection(own))
        assert torch.equal(transposed[i], radon.transpose(own))
        assert torch.equal(degraded[i], radon.degrade(x[i]))
        assert torch.equal(weighted[i], radon.degrade(x[i], weights[i, :n], "cosine"))
    assert projected.dtype == dtype and degraded.dtype == dtype


def test_gradients_are_the_transposes():
    stack = Stack([Radon(7, [0.3, 1.6, 2.0], 11), Radon(7, [0.1], 11)])
    x, p = noise(2, 7, 7, dtype=torch.float64).requires_grad_(), noise(2, 3, 11, dtype=torch.float64).requires_grad_()
    for function, argument in ((stack.forward, x), (stack.transpose, p), (stack.backprojection, p),
                               (stack.filter_sinogram, p)):
        assert torch.autograd.gradcheck(function, argument)


def test_a_stack_under_transforms_and_in_another_process():
    stack, x = Stack(scanned("fan")), noise(6, 1, 3, 40, 40)
    expected = torch.stack([stack.forward(x[:, :, i]) for i in range(3)])
    assert torch.equal(torch.func.vmap(stack.forward, in_dims=2)(x), expected)
    compiled = torch.compile(lambda x: stack.degrade(x) + stack.transpose(stack.forward(x)), backend="eager",
                             fullgraph=True)
    torch.testing.assert_close(compiled(x), stack.degrade(x) + stack.transpose(stack.forward(x)))
    assert torch.equal(pickle.loads(pickle.dumps(stack)).forward(x), stack.forward(x))


def test_least_squares_of_a_stack_are_those_of_its_slices():
    radons = scanned("fan")
    stack, x = Stack(radons), noise(6, 1, 40, 40)
    alone = [radon.forward(image) for radon, image in zip(radons, x, strict=True)]
    y, zero = stack.pad(alone), torch.zeros(1, 40, 40)
    assert torch.equal(y, stack.forward(x))
    found = cgne(stack, torch.zeros_like(x), y, max_iter=4)
    for image, radon, own in zip(found, radons, alone, strict=True):
        assert torch.equal(image, cgne(radon, zero, own, max_iter=4))


def test_which_rows_exist():
    stack = Stack(scanned("fan"))
    exists = stack.exists("cpu")
    assert exists.shape == (6, 72, 1) and exists.sum((1, 2)).tolist() == stack.views
    assert exists[1, :5].all() and not exists[1, 5:].any()


@pytest.mark.parametrize(("make", "error", "sentence"), [
    (lambda: Stack([]), TypeError, "expected a projector, Radon or RadonFanbeam, for each slice, and at least one"),
    (lambda: Stack([ONE, "x"]), TypeError, r"made of \['Radon', 'str'\]"),
    (lambda: Stack([ONE, Radon(8, [0.0], 13)]), ValueError, "projector 1 .* det_count=13.* projector 0"),
    (lambda: Stack([ONE]).forward(noise(2, 8, 8)), ValueError, r"stack's 1 projectors: \(1, ..., 8, 8\)"),
    (lambda: Stack([ONE]).forward(noise(8, 8)), ValueError, r"image has shape \(8, 8\); expected one for"),
    (lambda: Stack([ONE]).transpose(noise(1, 2, 12)), ValueError, "sinogram has shape"),
    (lambda: Stack([ONE]).degrade(noise(1, 8, 8), [1.0]), ValueError, r"view_weights has shape \(1,\)"),
    (lambda: Stack([ONE]).pad([noise(2, 12)]), ValueError, r"have \[2\] views; expected \[1\]"),
])
def test_what_a_stack_does_not_take_gets_a_sentence(make, error, sentence):
    with pytest.raises(error, match=sentence):
        make()
