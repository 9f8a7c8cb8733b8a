"""The CUDA kernels without a GPU: their numbers through Triton's interpreter, their machine code through its compiler.

The interpreter has to be chosen before Triton is imported, so it runs in a process of its own: this file as a script.
"""

import json
import math
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch_radon import Radon, RadonFanbeam, Stack, backend_torch, operators
from torch_radon.solvers import cg, cgne

triton = pytest.importorskip("triton", reason="Triton is not installed: the CUDA kernels cannot be checked")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here: the kernels run interpreted only")
TURN = 2 * np.pi
KERNELS = ("forward", "forward_transpose", "backproject", "backproject_transpose")


def scans(size, views):
    """name -> (operator, batch)."""
    angles = TURN * np.arange(views) / views
    near, bins = 4.2 * size, int(2.7 * size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the circles leave the corners out
        return {
            "fan": (RadonFanbeam(size, angles, near, near, bins, 2.0), 3),
            "fan circle": (RadonFanbeam(size, angles + 0.1, near, size, size, 1.3, clip_to_circle=True), 1),
            "fdk offset": (RadonFanbeam((size - 4, size + 3), angles[: views // 2], 2 * size, 30, 2 * size, 1.3,
                                        det_offset=0.3, weights="fdk"), 1),
            "parallel": (Radon(size, angles / 2 + 0.05, int(1.5 * size)), 1),
            "parallel circle": (Radon(size, angles / 2 + 0.05, size - 4, 1.1, clip_to_circle=True), 3),
        }


def relative(a, b):
    a, b = a.double().cpu(), b.double().cpu()
    return ((a - b).norm() / b.norm()).item()


def measure(size, views, device):
    """Relative errors against float64, {"fan forward": ..., "fan adjoint": ..., "half fbp": ...}."""
    from torch_radon import backend_cuda

    errors, generator = {}, torch.Generator().manual_seed(0)
    for name, (radon, batch) in scans(size, views).items():
        g = radon.geometry
        x = torch.rand(batch, g.height, g.width, generator=generator)
        p = torch.rand(batch, len(g.angles), g.det_count, generator=generator)
        results = {}
        for kernel in KERNELS:
            argument = x if kernel in ("forward", "backproject_transpose") else p
            results[kernel] = getattr(backend_cuda, kernel)(g, argument.to(device)).cpu()
            errors[f"{name} {kernel}"] = relative(results[kernel], getattr(backend_torch, kernel)(g, argument.double()))
        for map_, transpose, a, b in ((*KERNELS[:2], x, p), (*KERNELS[2:], p, x)):
            left, right = (results[map_].double() * b).sum(), (a.double() * results[transpose]).sum()
            errors[f"{name} {map_} adjoint"] = abs(left - right).item() / (results[map_].norm() * b.norm()).item()
        weights = torch.full((len(g.angles),), math.pi / 2 / len(g.angles))
        fbp = backend_cuda.fbp(g, x.to(device), weights.to(device), "hamming")
        errors[f"{name} fbp"] = relative(fbp, backend_torch.fbp(g, x.double(), weights.double(), "hamming"))
        if name == "fan":
            half = backend_cuda.fbp(g, x.half().to(device), weights.to(device), "ramp")
            errors["half"] = relative(half, backend_torch.fbp(g, x.half().double(), weights.double(), "ramp"))
    return errors


def random_scans(count):
    """(operators that differ in their angles, images a slice) of all kinds of scanners."""
    random = np.random.default_rng(0)
    for _ in range(count):
        height = int(random.integers(5, 15))
        width = height if random.random() < 0.5 else int(random.integers(5, 15))
        detector = int(random.integers(3, 40)), random.uniform(0.4, 2.5)
        options = {"clip_to_circle": bool(random.random() < 0.3), "det_offset": random.choice([0.0, 1.3, -4.0])}
        fan, near = random.random() < 0.7, math.hypot(height, width) / 2 * random.choice([1.05, 1.3, 3.0, 6.0])
        far, weights = random.uniform(0, 60), random.choice(["published", "fdk"])

        def operator(angles, size=(height, width), detector=detector, options=options, fan=fan, near=near, far=far,
                     weights=weights):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the detector may be too small
                if fan:
                    return RadonFanbeam(size, angles, near, far, *detector, weights=weights, **options)
                return Radon(size, angles, *detector, **options)

        scans = [random.uniform(-7, 7, int(random.integers(1, 8))) for _ in range(int(random.integers(1, 4)))]
        order = random.integers(0, len(scans), int(random.integers(1, 6)))
        yield [operator(scans[i]) for i in order], int(random.integers(1, 4))


def ragged(device, count):
    """Errors of stacks of random scans, {"3 forward": ...} to float64, {"3 forward alone": ...} to a slice alone."""
    from torch_radon import backend_cuda

    errors, generator = {}, torch.Generator().manual_seed(0)
    for i, (radons, share) in enumerate(random_scans(count)):
        stacked = Stack(radons)._stacked
        scan, batch = stacked.scans[0], share * len(radons)
        x = torch.rand(batch, scan.height, scan.width, generator=generator)
        p = torch.rand(batch, stacked.n_angles, scan.det_count, generator=generator)
        weights = torch.randn(len(radons), stacked.n_angles, generator=generator)
        rows = torch.arange(stacked.n_angles) < torch.tensor([s.n_angles for s in stacked.scans])[:, None]
        nan = p.where(rows.repeat_interleave(share, 0)[..., None], torch.nan)  # nothing there is read
        for kernel, *arguments in (("forward", x), ("forward_transpose", nan), ("backproject", nan),
                                   ("backproject_transpose", x), ("filter_rows", nan, "hann", False),
                                   ("filter_rows", nan, "ramp", True), ("fbp", x, None, "ramp"),
                                   ("fbp", x, weights, "cosine")):
            arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
            found = getattr(backend_cuda, kernel)(stacked, *arguments).cpu()
            double = [a.double().cpu() if isinstance(a, torch.Tensor) else a for a in arguments]
            expected = backend_torch.by_scan(getattr(backend_torch, kernel), stacked, *double)
            name = f"{i} {kernel} {[a for a in arguments[1:] if isinstance(a, str | bool)]}"
            errors[name] = relative(found, expected) if expected.norm() > 0 else found.abs().max().item()
            if kernel in ("forward", "forward_transpose", "backproject"):
                own = stacked.scans[-1]
                argument = arguments[0][-share:]
                alone = getattr(backend_cuda, kernel)(
                    own, argument if kernel == "forward" else argument[:, :own.n_angles].contiguous()).cpu()
                together = found[-share:, :own.n_angles] if kernel == "forward" else found[-share:]
                errors[f"{name} alone"] = ((alone - together).norm() / alone.norm().clamp_min(1e-9)).item()
    return errors


def check(errors):
    assert errors.pop("half") <= 3e-4
    assert len(errors) == 5 * 7
    bad = {k: v for k, v in errors.items() if not v <= (1e-5 if k.endswith("adjoint") else 2e-5)}
    assert not bad


def solved(device):
    """Errors of the solvers on the kernels, relative to float64: {"least squares": ...}."""
    from torch_radon import backend_cuda, solvers, solvers_cuda

    if device == "cpu":  # as if its tensors were a GPU's
        solvers._kernels = lambda *tensors: solvers_cuda if tensors[0].dtype == torch.float32 else None
        operators.backend_for = lambda x, g: backend_cuda if x.dtype == torch.float32 else backend_torch
    stack = Stack([RadonFanbeam(12, TURN * np.arange(n) / n, 50, 50, 33, 2.0) for n in (5, 3, 5)])
    x = torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1] *= 1e-3  # stops at another iteration than the others
    y, start = stack.forward(x), 0.9 * x
    weights, other = stack.forward(x.flip(-1)) + 0.1, y + 1
    target = (other * (stack.forward(start) - y).square()).sum((-2, -1), keepdim=True) * torch.tensor([0.01, 1e-4, 2]
                                                                                                     ).view(3, 1, 1, 1)

    def normal(v):
        v = v[:, None]
        return (stack.transpose(stack.forward(v)) + v)[:, 0]

    cases = {"least squares": lambda x, y, w, o, t: cgne(stack, x, y, max_iter=3),
             "weights": lambda x, y, w, o, t: cgne(stack, x, y, max_iter=3, weights=w, damp=2.0),
             "target": lambda x, y, w, o, t: cgne(stack, x, y, max_iter=5, target=t, target_weights=o),
             "one weight": lambda x, y, w, o, t: cgne(stack, x, y, max_iter=3, weights=w[..., :1], target=1e-9),
             "symmetric": lambda x, y, w, o, t: cg(normal, x[:, 0], stack.transpose(y)[:, 0], max_iter=3),
             "watched": lambda x, y, w, o, t: torch.stack(cgne(stack, x, y, lambda z, r: (z.double() - x).square().sum(
                 (-2, -1)), max_iter=3)[1])}
    given, errors = (start, y, weights, other, target), {}
    for name, solve in cases.items():
        before = [t.float().to(device) for t in given]
        after = [t.clone() for t in before]
        found = solve(*after)
        errors[name] = max(relative(a, b) for a, b in zip(found, solve(*given), strict=True) if b.norm() > 0)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "a solver changed what it was given"
        assert name != "target" or torch.equal(found[2], after[0][2]), "a slice within its target stays as it is"
    return errors


def check_solved(errors):
    assert len(errors) == 6
    assert max(errors.values()) <= 2e-5, errors


def check_ragged(errors, count):
    assert len(errors) == count * 11
    bad = {k: v for k, v in errors.items() if not v <= (1e-6 if k.endswith("alone") else 1e-5)}
    assert not bad


def interpreted(what):
    done = subprocess.run([sys.executable, __file__, what], env={**os.environ, "TRITON_INTERPRET": "1"},
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kernels_interpreted():
    check(interpreted("scans"))


def test_stacks_of_random_scans_interpreted():
    check_ragged(interpreted("stacks"), 7)


def test_solvers_interpreted():
    check_solved(interpreted("solvers"))


@GPU
def test_kernels_on_the_gpu():
    check(measure(256, 36, "cuda"))
    check_ragged(ragged("cuda", 30), 30)
    check_solved(solved("cuda"))


@GPU
def test_cuda_graph():
    radon, x = scans(256, 18)["fan"][0], torch.rand(2, 256, 256, device="cuda")
    expected = radon.degrade(1 - x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = radon.degrade(x)
    x.copy_(1 - x)
    graph.replay()
    assert torch.equal(y, expected)


FLOAT, HALF = "*fp32", "*fp16"
PACK = {"source": FLOAT, "target": FLOAT, "ROW_PAD": 2, "FRONT": 2, "BACK": 2, "SINOGRAM": False, "TURNED": True,
        "LANES": 4}
RAYS = {"image": FLOAT, "sinogram": FLOAT, "LANES": 4}
PIXELS = RAYS | {"FAN": True, "SQUARED": False}
PRODUCT = {"sinogram": FLOAT, "target": FLOAT, "WEIGHTED": True, "PACKED": True, "LANES": 4}
ROWS_ALONE = PRODUCT | {"WEIGHTED": False, "PACKED": False, "LANES": 1}
ONE = {"LANES": 1, "STEPS": 16}
# Kernel, what its arguments are (a type of pointer, or a constant), its warps, and how many loads of 16 bytes it must
# have.
COMPILED = {
    "pack": ("_pack", PACK, 4, 0),
    "pack sinogram": ("_pack", PACK | {"SINOGRAM": True, "TURNED": False, "ROW_PAD": 0, "LANES": 1}, 4, 0),
    "pack half as float": ("_pack", PACK | {"source": HALF, "SINOGRAM": True, "TURNED": False, "LANES": 8}, 4, 0),
    "forward": ("_project", RAYS, 4, 4),
    "forward half": ("_project", RAYS | {"image": HALF, "LANES": 8}, 4, 4),
    "forward of few": ("_project", RAYS | {"STEPS": 16}, 8, 4),
    "forward half of few": ("_project", RAYS | {"image": HALF, "LANES": 8, "STEPS": 16}, 8, 4),
    "forward one": ("_project", RAYS | ONE, 8, 0),
    "forward two": ("_project", RAYS | ONE | {"LANES": 2}, 8, 0),
    "forward transposed": ("_project_transpose", PIXELS | {"GROUPS": 2}, 1, 2),
    "forward transposed four": ("_project_transpose", PIXELS | {"GROUPS": 1}, 1, 1),
    "forward transposed one": ("_project_transpose", PIXELS | {"FAN": False, "GROUPS": 1, "LANES": 1}, 1, 0),
    "backproject": ("_smear", PIXELS, 2, 2),
    "backproject parallel": ("_smear", PIXELS | {"FAN": False}, 2, 2),
    "backproject half fdk": ("_smear", PIXELS | {"sinogram": HALF, "SQUARED": True, "LANES": 8}, 2, 2),
    "backproject one": ("_smear", PIXELS | {"LANES": 1}, 2, 0),
    "backproject transposed": ("_smear_transpose", PIXELS, 4, 1),
    "backproject transposed parallel": ("_smear_transpose", PIXELS | {"FAN": False}, 4, 1),
    "backproject transposed fdk one": ("_smear_transpose", PIXELS | {"SQUARED": True, "LANES": 1}, 4, 0),
    "filter": ("_filter", PRODUCT, 8, 0),
    "filter half": ("_filter", PRODUCT | {"target": HALF, "LANES": 8}, 8, 0),
    "filter alone": ("_filter", ROWS_ALONE, 8, 0),
    "filter half alone": ("_filter", ROWS_ALONE | {"sinogram": HALF}, 8, 0),
    "dot": ("_dot", {"WEIGHTED": True}, 4, 0),
    "advance": ("_advance", {"MOST": 128}, 4, 0),
    "turn": ("_turn", {"MOST": 16, "TARGET": True, "TARGET_MOST": 128}, 4, 0),
}
TILES = ("STEPS", "BINS", "CELLS", "ROWS", "COLUMNS", "DEPTH")
POINTERS = {"blocks": "*i64", "rows_of": "*i64", "matrix": FLOAT, "view_weights": FLOAT, "scale": "fp32"} | {
    n: FLOAT for n in ("a", "b", "weights", "x", "r", "p", "q", "s", "limit", "target", "state", "new_state")} | {
    n: "*fp64" for n in ("out", "curvature", "squares", "misfits")}


def compiled(case, architecture):
    """The machine code of a case."""
    from torch_radon import backend_cuda, solvers_cuda
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, given, warps, _ = COMPILED[case]
    module = solvers_cuda if hasattr(solvers_cuda, name) else backend_cuda
    kernel = getattr(module, name)
    given = {n: getattr(backend_cuda, n) for n in TILES} | {
        "TILE": backend_cuda.SMALL_TILE if name == "_project_transpose" else backend_cuda.TILE,
        "BLOCK": solvers_cuda.BLOCK, "PIECE": solvers_cuda.PIECE} | given
    names = [n for n in kernel.arg_names if n in given]
    constants = {n: given[n] for n in names if not isinstance(given[n], str)}
    types = POINTERS | {n: given[n] for n in names if n not in constants}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    assert all(signature[n] != "i32" or n in module.SIZES for n in signature), "Triton would specialise a number"
    free = kernel.do_not_specialize_on_alignment or ()
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names)
               if signature[n].startswith("*") and n not in free}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps}).asm["sass"]


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("case", COMPILED)
def test_kernels_compile_without_spills(case, architecture):
    code = compiled(case, architecture)
    assert re.search(r"\bEXIT\b", code)
    assert not re.search(r"\b(LDL|STL)\b", code), "registers spill to local memory"
    wide_loads = COMPILED[case][3]
    assert len(re.findall(r"\bLDG\.E\.128\b", code)) >= wide_loads, "a texel's images are not read at once"


def test_operators_compile_into_one_graph():
    """Through torch.compile, with gradients of gradients' maps, and from one operator to the next."""
    def function(x, radon):
        p = radon.filter_sinogram(radon.forward(x), "hann")
        return radon.backprojection(p).square().sum() + radon.transpose(p).sum() + radon.degrade(x).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = torch.rand(2, 1, 24, 24, requires_grad=True)
    for radon in (RadonFanbeam(24, TURN * np.arange(6) / 6, 100, 100, 70, 2.0), Radon(24, np.linspace(0, 3, 7), 35)):
        (expected,), (found,) = (torch.autograd.grad(f(x, radon), x) for f in (function, compiled))
        assert expected.norm() > 0 and relative(found, expected) <= 1e-6


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"scans": lambda: measure(24, 12, "cpu"), "stacks": lambda: ragged("cpu", 7),
                      "solvers": lambda: solved("cpu")}[sys.argv[1]]()))
