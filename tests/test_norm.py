"""The norm's CUDA kernels without a GPU: numbers through Triton's interpreter, machine code through its compiler.

The interpreter has to be chosen before Triton is imported, so it runs in a process of its own: this file as a script.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

triton = pytest.importorskip("triton", reason="Triton is not installed: the CUDA kernels cannot be checked")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here: the kernels run interpreted only")
# (B, C, H, W): several tiles and a part of one; 1, 2, 3 and 16 channels a group; fewer pixels than a tile; odd sides.
SHAPES = [(1, 64, 12, 15), (1, 96, 9, 7), (1, 512, 8, 9), (2, 32, 3, 5)]


def images(shape, dtype, device, seed=0):
    """x with a mean far from zero, its shift, weight, bias and a gradient; x and gradient channels-last."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    batch, channels = shape[:2]
    x, dy = (0.5 * draw(*shape) + 10 + 3 * draw(1, channels, 1, 1)), draw(*shape)
    x, dy = (value.to(device, dtype, memory_format=torch.channels_last) for value in (x, dy))
    small = (draw(batch, channels), 1 + 0.1 * draw(channels), 0.3 * draw(channels))
    return (x, *(value.to(device) for value in small)), dy


def plain(x, shift, weight, bias, silu):
    y = F.group_norm(x if shift is None else x + shift[:, :, None, None], 32, weight, bias, 1e-6)
    return F.silu(y) if silu else y


def with_gradients(function, inputs, dy):
    inputs = [None if value is None else value.detach().requires_grad_() for value in inputs]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, [value for value in inputs if value is not None], dy)]


def relative(a, b, least=0.0):
    a, b = a.double().cpu(), b.double().cpu()
    return ((a - b).norm() / max(b.norm(), least)).item()


def measure(device, shapes):
    """Relative errors against float64 of results and of the gradients of x, shift, weight and bias."""
    from models import norm

    errors = {}
    for shape in shapes:
        for dtype, silu, shifted in ((torch.float32, True, True), (torch.float32, True, False),
                                     (torch.float32, False, False), (torch.bfloat16, True, True)):
            (x, shift, weight, bias), dy = images(shape, dtype, device)
            inputs = [x, shift if shifted else None, weight, bias]
            found = with_gradients(
                lambda x, shift, w, b, silu=silu: norm.group_norm(x, w, b, 1e-6, silu=silu, shift=shift), inputs, dy)
            exact = [None if value is None else value.double() for value in inputs]
            expected = with_gradients(lambda *a, silu=silu: plain(*a, silu), exact, dy.double())
            assert found[0].dtype == found[1].dtype == dtype
            assert all(v.is_contiguous(memory_format=torch.channels_last) for v in found[:2])
            for i, pair in enumerate(zip(found, expected, strict=True)):
                stored = dtype == torch.bfloat16 and i < 2
                least = expected[1].norm().item()  # the shift of a group of one channel has no gradient at all
                errors[f"{shape} {dtype} {silu} {shifted} {i} {'stored' if stored else ''}"] = relative(*pair, least)
        (x, _, _, bias), dy = images(shape, torch.float32, device)
        found, expected = (with_gradients(f, (x, dy, bias), dy)
                           for f in (norm.add, lambda x, h, b: x + h + b[None, :, None, None]))
        errors |= {f"{shape} add {i}": relative(*pair) for i, pair in enumerate(zip(found, expected, strict=True))}
    return errors


def check(errors, shapes):
    assert len(errors) == len(shapes) * (5 + 4 + 4 + 5 + 4)
    bad = {name: e for name, e in errors.items() if not e <= (6e-3 if name.endswith("stored") else 1e-5)}
    assert not bad


def measure_network():
    """Relative errors of a small network with the kernels against the network without: output and each gradient."""
    from models import norm, unet

    torch.manual_seed(0)
    network = unet.UNet(unet.UNetConfig(width=32, multipliers=(1, 2), blocks=1, dropout=0.0, stem=2))
    x, t, parameters = torch.rand(1, 1, 16, 16), torch.tensor([2.0]), list(network.parameters())
    expected = network(x, t)
    expected = expected, *torch.autograd.grad(expected.square().sum(), parameters)
    unet._fused = lambda x: norm
    found = network.to(memory_format=torch.channels_last)(x, t)
    found = found, *torch.autograd.grad(found.square().sum(), parameters)
    largest = max(gradient.norm() for gradient in expected[1:])
    return {name: ((a - b).norm() / max(b.norm(), 1e-3 * largest)).item() for name, a, b in
            zip(["output", *dict(network.named_parameters())], found, expected, strict=True)}


def measure_compiled():
    """Relative errors of gradients through one compiled graph; PyTorch's own checks of the operators before."""
    from models import norm

    (x, shift, weight, bias), dy = images((1, 64, 5, 6), torch.float32, "cpu")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    inputs = [value.clone().requires_grad_() for value in (x, shift, weight, bias)]
    torch.library.opcheck(norm._group_norm, (*inputs, 1e-6, True), test_utils=checks)
    mean, rstd = norm._group_norm(x, None, weight, bias, 1e-6, True)[1:]
    torch.library.opcheck(norm._group_norm_backward, (dy, x, None, weight, bias, mean, rstd, True), test_utils=checks)
    torch.library.opcheck(norm._sum, (x, dy, bias.clone().requires_grad_()), test_utils=checks)

    def function(x, shift, weight, bias):
        h = norm.group_norm(x, weight, bias, 1e-6, silu=True, shift=shift)
        return norm.add(x, norm.group_norm(h, weight, bias, 1e-6), bias)  # the same operator twice

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    pairs = zip(*(with_gradients(f, (x, shift, weight, bias), dy) for f in (compiled, function)), strict=True)
    return {str(i): relative(*pair) for i, pair in enumerate(pairs)}


def test_kernels_interpreted():
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=600, cwd=ROOT,
                          env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    kernels, network, compiled = json.loads(done.stdout)
    check(kernels, SHAPES)
    assert max(network.values()) <= 1e-4, network
    assert max(compiled.values()) <= 1e-6


@GPU
def test_kernels_on_the_gpu():
    shapes = [*SHAPES, (2, 64, 256, 256)]
    check(measure("cuda", shapes), shapes)


@GPU
def test_the_same_input_gives_the_same_bits():
    from models import norm

    (x, shift, weight, bias), dy = images((4, 64, 128, 128), torch.bfloat16, "cuda")
    first, again = (with_gradients(lambda x, s, w, b: norm.group_norm(x, w, b, 1e-6, silu=True, shift=s),
                                   (x, shift, weight, bias), dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@GPU
def test_the_network_on_the_gpu():
    """In float32 it is the network without the kernels; in bf16 it is as near to that as PyTorch's operators are."""
    from models import unet

    torch.manual_seed(0)
    network = unet.UNet(unet.UNetConfig(width=64, stem=2, dropout=0.0)).to("cuda", memory_format=torch.channels_last)
    x, t = torch.rand(4, 1, 128, 128, device="cuda"), torch.arange(4.0, device="cuda")
    parameters, chosen = list(network.parameters()), unet._fused

    def call(kernels, bf16):
        with (pytest.MonkeyPatch.context() as patch, torch.autocast("cuda", torch.bfloat16, enabled=bf16),
              torch.backends.cudnn.flags(enabled=True, allow_tf32=False)):
            patch.setattr(unet, "_fused", chosen if kernels else lambda x: None)
            y = network(x, t)
            gradients = torch.autograd.grad(y.square().sum(), parameters)
        return y.detach(), torch.cat([g.flatten() for g in gradients])

    exact = call(kernels=False, bf16=False)
    assert all(relative(*pair) <= 1e-3 for pair in zip(call(True, False), exact, strict=True))
    for ours, theirs, truth in zip(call(True, True), call(False, True), exact, strict=True):
        assert relative(ours, truth) <= 2 * relative(theirs, truth)


@GPU
def test_the_network_as_cuda_graph():
    from models.unet import UNet, UNetConfig, to_bf16

    network = to_bf16(UNet(UNetConfig(width=64, stem=2)).to("cuda", memory_format=torch.channels_last)).eval()
    x, t = torch.rand(2, 1, 64, 64, device="cuda"), torch.zeros(2, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        expected = network(1 - x, t)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = network(x, t)
    x.copy_(1 - x)
    graph.replay()
    assert relative(y, expected) <= 1e-2


KERNELS = ("_moments", "_merge", "_normalise", "_moments_back", "_merge_back", "_normalise_back", "_add")
IMAGES = ("x", "y", "h", "dx", "dy")


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("case", ["bf16 64", "fp32 512", "bf16 96 one"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_without_spills(name, case, architecture):
    """case: stored type, channels, and whether there is one pixel and one tile, which a launch makes constants."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from models import norm

    kernel, (dtype, channels, *one) = getattr(norm, name), case.split()
    channels = int(channels)
    wide = 64 if channels % 64 == 0 else 32
    values = {"C": channels, "GROUPS": norm.GROUPS, "CHANNELS": wide, "PIXELS": norm.TILE // wide, "ROWS": norm.ROWS,
              "WIDTH": triton.next_power_of_2(channels // norm.GROUPS), "SHIFTED": not one, "SILU": True}
    if one:
        values |= {"pixels": 1, "tiles": 1, "shift": None, "dshift": None}
    names = kernel.arg_names
    constants = {n: values[n] for n in names if n in values}
    types = {"eps": "fp32", "pixels": "i32", "tiles": "i32"} | dict.fromkeys(IMAGES, f"*{dtype}")
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    warps = 4 if "merge" in name else norm.WARPS
    code = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps}).asm["sass"]
    assert re.search(r"\bEXIT\b", code)
    assert not re.search(r"\b(LDL|STL)\b", code), "registers spill to local memory"
    if "merge" not in name:
        assert "LDG.E.128" in code, "16 bytes of neighbouring channels are not read at once"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([measure("cpu", SHAPES), measure_network(), measure_compiled()]))
