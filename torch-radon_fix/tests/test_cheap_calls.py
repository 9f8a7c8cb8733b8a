"""What a call costs the host on CUDA, without a GPU: its launches, its waits (none), and its time between them."""

import timeit

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch_radon import RadonFanbeam, Stack, operators, solvers
from torch_radon.solvers import cg, cgne

backend_cuda = pytest.importorskip("torch_radon.backend_cuda", reason="Triton is not installed")
from torch_radon import solvers_cuda  # noqa: E402 (it needs Triton too)


def fan(views, start=0.0):
    return RadonFanbeam(64, start + 2 * np.pi * np.arange(views) / views, 269, 269, 168, 2.0)


class Calls(TorchDispatchMode):
    """Counts the operators that are dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace != "prim":  # questions about a fake tensor
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def dispatched(call):
    """Names of the operators that a call dispatches for fake CUDA tensors, which have no values to ask for."""
    with FakeTensorMode(), Calls() as calls:
        call()
    return calls.names


@pytest.fixture
def launches(monkeypatch):
    """The kernels are replaced by nothing; the names of those launched. CPU tensors go the way of CUDA's."""
    names = []
    monkeypatch.setattr(backend_cuda, "_launch", lambda kernel, *rest: names.append(kernel.__name__))
    monkeypatch.setattr(operators, "backend_for", lambda tensor, geometry: backend_cuda)
    monkeypatch.setattr(backend_cuda, "_devices", {})
    return names


def images(batch, device="cuda"):
    return torch.zeros(batch, 1, 64, 64, device=device)


def test_launches_give_what_the_kernels_take(monkeypatch):
    """In the kernel's order, and every number one that Triton does not specialise: `_launch` relies on both."""
    seen = set()

    def launch(kernel, grid, arguments, constants, num_warps=4):
        seen.add(kernel.__name__)
        assert kernel.arg_names[len(arguments):] == list(constants)
        numbers = [n for n, a in zip(kernel.arg_names, arguments, strict=False) if isinstance(a, int)]
        assert set(numbers) <= {*backend_cuda.SIZES, *solvers_cuda.SIZES}
        assert len(grid) == 3 and all(0 < size < 2**31 for size in grid) and max(grid[1:]) < 2**16

    for module in (backend_cuda, solvers_cuda):
        monkeypatch.setattr(module, "_launch", launch)
    monkeypatch.setattr(operators, "backend_for", lambda tensor, geometry: backend_cuda)
    monkeypatch.setattr(backend_cuda, "_devices", {})
    monkeypatch.setattr(solvers, "_kernels", lambda *tensors: solvers_cuda)
    monkeypatch.setattr(solvers, "_check", lambda x, residual: x)  # the values mean nothing
    monkeypatch.setattr(solvers._Stopped, "__call__", lambda *arguments: False)
    for call in work(STACK, "cpu").values():
        call()
    backend_cuda.backproject_transpose(fan(5).geometry, images(3, "cpu")[:, 0])
    assert seen == {"_pack", "_project", "_project_transpose", "_smear", "_smear_transpose", "_filter", "_dot",
                    "_advance", "_turn"}


def test_what_was_compiled_once_is_launched_without_triton(monkeypatch):
    log = []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments: log.append(("compiled", grid, arguments))

    class Kernel:
        __name__ = "kernel"

        def __getitem__(self, grid):
            def run(*arguments, **options):
                log.append(("kernel", grid, arguments, options))
                return Compiled()

            return run

    monkeypatch.setattr(backend_cuda, "_compiled", {})
    x, half = torch.zeros(2), torch.zeros(2, dtype=torch.float16)
    for tensor, constant in ((x, 4), (x, 4), (x, 8), (half, 4), (x, 8)):
        backend_cuda._launch(Kernel(), (1, 2, 3), (tensor, 7), {"LANES": constant}, 2)
    assert [entry[0] for entry in log] == ["kernel", "compiled", "kernel", "kernel", "compiled"]
    assert log[0][1:] == ((1, 2, 3), (x, 7), {"LANES": 4, "num_warps": 2})
    assert log[1][1:] == ((1, 2, 3), (x, 7, 4)) and log[4][2] == (x, 7, 8)


STACK = [fan(n, 0.01 * n) for n in range(5, 37)]  # 32 different counts
EQUAL = [fan(36)] * 32


def work(radons, device="cuda"):
    """name -> a call on a batch of 32."""
    stack, x = Stack(radons), images(32, device)
    y = torch.zeros(32, 1, stack.n_max, 168, device=device)
    weights = torch.zeros(32, stack.n_max, device=device)
    return {
        "forward": lambda: stack.forward(x), "transpose": lambda: stack.transpose(y),
        "backprojection": lambda: stack.backprojection(y), "filter": lambda: stack.filter_sinogram(y, "hann"),
        "degrade": lambda: stack.degrade(x), "shift": lambda: x + stack.degrade(x, weights),
        "cgne": lambda: cgne(stack, x, y, max_iter=3),
        "noisy cgne": lambda: cgne(stack, x, y, max_iter=3, target=y.sum((-2, -1), keepdim=True), target_weights=y + 1),
    }


def test_nothing_waits_for_the_device():
    with FakeTensorMode():
        for call in work(STACK).values():
            assert call().device.type == "cuda"
        radon, x = fan(9), images(2)
        for dtype in (torch.float32, torch.float16, torch.float64):
            p = radon.forward(x.to(dtype))
            assert p.shape == (2, 1, 9, 168) and p.dtype == dtype
            radon.transpose(p), radon.backprojection(radon.filter_sinogram(p)), radon.degrade(x.to(dtype))
        weights = torch.ones(2, 1, 9, 1, device="cuda")
        cgne(radon, x, radon.forward(x), weights=weights, damp=2.0, target=1.0, max_iter=40)
        cgne(radon, x.double(), radon.forward(x.double()), max_iter=3)
        cg(lambda v: radon.transpose(radon.forward(v)), x, x, max_iter=3)
        with pytest.raises(DataDependentOutputException):  # else this test would see nothing
            cgne(radon, x, radon.forward(x), lambda z: z.norm().item(), max_iter=3)


@pytest.mark.parametrize("name", work([fan(3)] * 32, "cpu"))
def test_slices_of_different_scans_take_as_many_launches_as_of_one(name, launches):
    counts = [len(dispatched(lambda radons=radons: work(radons)[name]())) for radons in (STACK, EQUAL)]
    assert counts[0] <= 1.1 * counts[1]
    if "cgne" in name:
        return
    launched = []
    for radons in (STACK, EQUAL):
        launches.clear()
        work(radons, "cpu")[name]()
        launched.append(list(launches))
    assert launched[0] == launched[1] and 1 <= len(launched[0]) <= 4


@pytest.mark.parametrize(("name", "options"), [
    ("plain", {}), ("damped", {"damp": 2.0}), ("weighted", {"weights": True}),
    ("noisy", {"target": 1.0, "target_weights": True})])
def test_an_iteration_of_cg_takes_eight_operators(name, options):
    radon = fan(9)

    def iterations(count):
        x, y = images(4), torch.zeros(4, 1, 9, 168, device="cuda")
        given = {k: torch.ones_like(y) if v is True else v for k, v in options.items()}
        cgne(radon, x, y, max_iter=count, **given)

    names = dispatched(lambda: iterations(5))[len(dispatched(lambda: iterations(4))):]
    projections = dispatched(lambda: radon.transpose(radon.forward(images(4))))[1:]
    assert names.count("torch_radon.linear.default") == 2
    assert 4 <= len(names) - len(projections) <= 8, names


def test_a_call_costs_the_host_little(launches):
    """Least times of many repeats: a busy machine only adds to them."""
    def least(call, count):
        call()
        return min(timeit.repeat(call, number=count, repeat=30)) / count

    x, merged, small = images(1, "cpu"), fan(504), torch.zeros(8)
    plain, weights = fan(18), torch.ones(504)
    calls = {"forward": lambda: plain.forward(x), "degrade": lambda: plain.degrade(x),
             "merged": lambda: merged.degrade(x, weights)}
    addition = least(lambda: small.add_(1), 1000)
    times = {name: least(call, 100) / addition for name, call in calls.items()}
    assert set(launches) == {"_pack", "_project", "_filter", "_smear"}
    assert max(times.values()) <= 15, times


def test_the_same_stack_again_costs_little():
    def stack():
        Stack(STACK)

    small = torch.zeros(8)
    stack()
    again, addition = (min(timeit.repeat(call, number=100, repeat=30)) for call in (stack, lambda: small.add_(1)))
    assert again <= 60 * addition, "32 projectors, some microseconds"


def test_tables_on_the_device_are_bounded(launches, monkeypatch):
    """Each scan's table is held once; the least recently used go first, but not those of the call itself."""
    x = images(4, "cpu")
    Stack([fan(9), fan(7), fan(9), fan(8)]).forward(x)
    tables = backend_cuda._devices[x.device]
    sizes = {views: 8 * (backend_cuda.VIEW.value + 4 * 92) * views for views in range(5, 10)}
    assert [t.nbytes for t in tables.tables.values()] == [sizes[9], sizes[7], sizes[8]]
    monkeypatch.setattr(backend_cuda, "TABLE_BYTES", sizes[9] + sizes[8] + sizes[6])
    fan(9).forward(x[:1])
    fan(6).forward(x[:1])
    assert [t.nbytes for t in tables.tables.values()] == [sizes[8], sizes[9], sizes[6]]
    assert tables.bytes == sizes[8] + sizes[9] + sizes[6] <= backend_cuda.TABLE_BYTES
    monkeypatch.setattr(backend_cuda, "TABLE_BYTES", 1)
    Stack([fan(5), fan(6)]).forward(x[:2])
    assert sorted(t.nbytes for t in tables.tables.values()) == [sizes[5], sizes[6]]
