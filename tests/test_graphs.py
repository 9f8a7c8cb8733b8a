"""CUDA graphs without a GPU: buffers, keys, what is forgotten, what cannot be captured; chains give the same bits.

The stand-in for a CUDA graph records the operators of a function and does them again on the same tensors, as a GPU does
with kernels and addresses. It also does what a GPU may: before a replay all that any graph of the pool has computed is
overwritten, and memory from outside that has been freed since is an error.
"""

import copy
import warnings
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch_radon import solvers

from benchmarks.bench_sampling import PublishedProcedure
from models import graphs
from models.degradation import Degradation
from models.estimate import denoiser
from models.graphs import PLAIN_CALLS, Graphs, directly
from models.reconstructor import Reconstructor
from models.samplers import SAMPLERS
from models.scanner import Scanner
from models.unet import UNet, UNetConfig


class FakeGraph:
    """Records and replays."""

    pool = []  # every graph: all work in the same memory

    def __init__(self):
        self.calls, self.made, self.replays = [], {}, 0
        FakeGraph.pool.append(self)

    def add(self, function, args, kwargs, results):
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        outside = known - self.made.keys()
        for x in results:
            if x.untyped_storage()._cdata not in known:
                self.made[x.untyped_storage()._cdata] = x
        hold = weakref.ref

        def held(x):
            return hold(x) if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata in outside else x

        self.calls.append((function, *tree_map(held, (args, kwargs)), results))

    @torch.no_grad()
    def replay(self):
        for graph in FakeGraph.pool:
            for x in graph.made.values():
                if x.is_floating_point():
                    x.fill_(torch.nan)
        self.replays += 1
        for function, args, kwargs, results in self.calls:
            args, kwargs = tree_map(self.alive, (args, kwargs))
            for x, again in zip(results, tensors(function(*args, **kwargs)), strict=True):
                x.copy_(again)

    @staticmethod
    def alive(x):
        if isinstance(x, weakref.ref):
            x = x()
            assert x is not None, "a graph reads memory that was freed"
        return x


def tensors(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Recording(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.graph.add(function, args, kwargs or {}, tensors(result))
        return result


class FakeStream:
    """Notes who waits for whom."""

    def __init__(self, device=None):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)


@contextmanager
def capture(graph, pool, stream, capture_error_mode):
    assert pool == "pool" and isinstance(stream, FakeStream) and capture_error_mode == "thread_local"
    with Recording(graph):
        yield


@pytest.fixture
def gpu(monkeypatch):
    """A CPU whose tensors go the way of a GPU's; the graphs that were made."""
    main = FakeStream()
    for name, stand_in in {"CUDAGraph": FakeGraph, "graph": capture, "Stream": FakeStream,
                           "graph_pool_handle": lambda: "pool", "current_stream": lambda device: main,
                           "stream": lambda stream: nullcontext(), "set_stream": main.wait_stream}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(graphs, "_on_gpu", lambda x: True)
    monkeypatch.setattr(solvers._Stopped, "__call__", lambda self, active: False)  # as on a GPU: no look at values
    monkeypatch.setattr(solvers, "_check", lambda x, residual: x)
    monkeypatch.setattr(FakeGraph, "pool", [])
    yield FakeGraph.pool


def test_the_fourth_call_is_captured_and_gives_what_the_function_gives(gpu):
    calls, run = [], Graphs()

    def function(x, y):
        calls.append(len(calls))
        return (x * y).cumsum(0) + 1

    kept = []
    for _ in range(8):
        x, y = torch.rand(3, 2), torch.rand(3, 2)
        result = run("key", function, x, y)
        kept.append((result, function(x, y)))
        calls.pop()
    assert len(calls) == PLAIN_CALLS + 2 and len(gpu) == 1, "plain calls, a warm-up and the capture"
    assert gpu[0].replays == 8 - PLAIN_CALLS
    assert all(torch.equal(a, b) for a, b in kept), "later replays change nothing that was returned"


def test_each_key_shape_and_type_has_a_graph(gpu):
    run, scale = Graphs(), {"a": 2.0, "b": 3.0}
    inputs = [torch.rand(2), torch.rand(3), torch.rand(2).double()]
    for _ in range(PLAIN_CALLS + 2):
        for key, factor in scale.items():
            for x in inputs:
                assert torch.equal(run(key, lambda x, factor=factor: x * factor, x), x * factor)
    assert len(gpu) == 6 and len(run.buffers) == 3, "graphs of one shape read the same buffer"


def test_what_is_rare_is_never_captured_and_old_graphs_go_first(gpu):
    run = Graphs(kept=4)
    for size in range(1, 30):
        for _ in range(PLAIN_CALLS):
            run("key", torch.neg, torch.ones(size))
    assert not gpu and len(run.known) == 4
    for _ in range(PLAIN_CALLS + 1):
        run("often", torch.neg, torch.ones(5))
    for size in range(1, 30):
        run("key", torch.neg, torch.ones(size))
        run("often", torch.neg, torch.ones(5))
    assert len(gpu) == 1 and gpu[0].replays == 30, "a graph in use is not forgotten"
    for size in range(1, 5):
        run("key", torch.neg, torch.ones(size))
    assert not run.buffers, "its buffers go with it"
    assert torch.equal(run("often", torch.neg, torch.ones(5)), -torch.ones(5)) and len(gpu) == 1


@pytest.mark.parametrize("where", ["warm-up", "capture"])
def test_where_nothing_can_be_captured_functions_are_called_after_one_warning(where, gpu):
    run, calls = Graphs(), []
    bad = PLAIN_CALLS + (where == "capture")

    def function(x):
        calls.append(0)
        if len(calls) == bad + 1:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return x + len(calls)

    with pytest.warns(UserWarning, match="graphs are off.*: operation not permitted when stream is capturing$"):
        for _ in range(PLAIN_CALLS + 1):
            run("key", function, torch.zeros(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for key in ("key", "other") * 5:
            assert run(key, function, torch.zeros(1)) == len(calls)
    assert len(gpu) == 1 and gpu[0].replays == 0


def test_a_mistake_in_a_function_is_its_own_and_not_a_reason_to_do_without_graphs(gpu):
    run, net = Graphs(), network()
    for _ in range(PLAIN_CALLS + 2):
        with pytest.raises(ValueError, match="13 x 13 pixels"):
            run("key", net, torch.zeros(1, 1, 13, 13), torch.zeros(1))
    assert run.works and not any(graph.calls for graph in gpu)


def test_a_cpu_and_whoever_captures_a_whole_chain_call_functions(monkeypatch):
    run, calls = Graphs(), []
    for _ in range(6):
        run("key", lambda x: calls.append(0) or x, torch.zeros(1))
    assert len(calls) == 6 and not run.known
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert graphs._on_gpu(type("OnGPU", (), {"is_cuda": True})()) is not capturing


def test_the_stand_in_sees_memory_that_was_freed(gpu):
    """Else the tests below would not."""
    run, cache = Graphs(), [torch.ones(2)]
    for _ in range(PLAIN_CALLS + 1):
        run("key", lambda x: x + cache[0], torch.ones(2))
    cache[0] = torch.ones(2)
    with pytest.raises(AssertionError, match="freed"):
        run("key", lambda x: x + cache[0], torch.ones(2))


REAL = Scanner(angles=tuple(i + 20 / (1 + i) for i in range(0, 360, 10)), detector_count=48, detector_pitch_mm=4.0,
               field_of_view_mm=90.0, size=32, source_distance_mm=300.0, detector_distance_mm=300.0)
LONG = (144, 108, 72, 54)  # levels enough that with data consistency too chains differ in length


def network(**config) -> UNet:
    """With random weights that leave an image what it is, more or less."""
    torch.manual_seed(0)
    return UNet(UNetConfig(width=32, multipliers=(1, 1), blocks=1, residual=True, scale=0.05, **config)).eval()


def measured(degrade, seed):
    return degrade.project(0.3 * torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(seed)), 36)


def similar(a, b):
    """Slices of a batch settle at different times."""
    return (a.mean((1, 2, 3)) * 1e4 % 1 > 0.6).float()


def chain(r: Reconstructor, name: str, y, **options):
    if name == "spdps":
        options |= {"similarity": similar, "tau": 0.5, "refine_steps": 2}
    return r.run(name, y, 32, **options)


@pytest.mark.parametrize(("name", "given", "options"), [
    ("sequential", {}, {}), ("naive", {"scanner": REAL, "dc": 2}, {}), ("reco", {"dc": 2}, {}),
    ("spdps", {}, {}), ("spdps", {"dc": 3, "levels": LONG}, {"photons": 1e5, "electronic": 3.0}),
    ("spdps", {"protocol": "cvg-official"}, {}),
    ("spdps", {"scanner": REAL, "precision": "bf16", "dc": 2, "levels": LONG}, {})])
def test_a_chain_by_graphs_gives_the_same_bits(name, given, options, request):
    config = {"channels": 2} if SAMPLERS[name].two_pass else {"channels": 2, "residual_channel": "anchored"}
    r = Reconstructor(network(**config), **{"levels": (108, 72, 54)} | given)
    batches = [measured(r.degrade, seed) for seed in range(2)]
    expected = [chain(replace(r, graphs=directly), name, y, **options) for y in batches]
    made = request.getfixturevalue("gpu")
    for _ in range(PLAIN_CALLS):
        for y, (x0_hat, calls) in zip(batches, expected, strict=True):
            found, times = chain(r, name, y, **options)
            assert times == calls and torch.equal(found, x0_hat)
    assert sum(graph.replays for graph in made) >= 20
    keys = {key[0][0] for key, (replay, _) in r.graphs.known.items() if replay}
    assert {type(key) for key in keys} == {UNet, str} and keys >= {"D"} | ({"dc"} if r.dc else set())
    if name == "spdps":
        assert len({n for _, calls in expected for n in calls}) > 1, "else nothing would have shrunk"


@pytest.mark.parametrize("dc", [0, 2])
def test_a_whole_chain_with_known_levels_can_be_one_graph(dc, gpu, monkeypatch):
    """Nothing in it comes from the host; a chain that decides is captured in pieces."""
    monkeypatch.setattr(graphs, "_on_gpu", lambda x: False)  # as while a graph is captured
    r = Reconstructor(network(channels=2, residual_channel="anchored"), levels=(72, 54), dc=dc)
    y, graph = measured(r.degrade, 0), FakeGraph()
    r.run("sequential", y, 32)  # builds tables
    with Recording(graph):
        result, _ = r.run("sequential", y, 32)
    assert not {str(call[0]) for call in graph.calls} & {"aten.lift_fresh.default", "aten.index.Tensor"}
    y.copy_(measured(r.degrade, 1))
    graph.replay()
    assert torch.equal(result, r.run("sequential", y, 32)[0])


def test_weights_that_training_changed_are_seen(gpu):
    """In place, as load_state_dict and optimizers change them."""
    net, run = network(), Graphs()
    denoise, plain = denoiser(net, graphs=run), denoiser(net)
    x = 0.2 * torch.rand(2, 1, 32, 32)
    for _ in range(PLAIN_CALLS + 2):
        denoise(x, [18, 36])
    with torch.no_grad():
        net.conv_out.bias += 0.5
    assert torch.equal(denoise(x, [36, 72]), plain(x, [36, 72])) and gpu[0].replays == 3


def test_other_weights_are_another_network(gpu):
    """In another place: of another type, or a copy's."""
    r, x = Reconstructor(network(), dc=0), measured(Degradation(), 0)
    for _ in range(PLAIN_CALLS + 2):
        r.run("one-step", x, 32)
    other = copy.deepcopy(r)
    with torch.no_grad():
        other.network.conv_out.bias += 0.5
    assert not torch.equal(other.run("one-step", x, 32)[0], r.run("one-step", x, 32)[0])
    made = len(gpu)
    r.network.bfloat16().float()
    assert torch.equal(r.run("one-step", x, 32)[0], replace(r, graphs=directly).run("one-step", x, 32)[0])
    assert len(gpu) == made == 1 and gpu[0].replays == 3
    assert PublishedProcedure(r.network).graphs is directly, "as published: no graphs"


def test_caches_may_forget_what_graphs_use(gpu):
    """Weights of views are an input of each call."""
    from models import degradation

    degrade, x = Degradation(REAL, graphs=Graphs()), torch.rand(2, 1, 32, 32)
    plain = Degradation(REAL)
    for _ in range(PLAIN_CALLS + 3):
        for n, s in (([9, 18], [18, 36]), ([12, 12], [18, 18])):
            for function in vars(degradation).values():
                getattr(function, "cache_clear", int)()
            assert torch.equal(degrade.shift(x, x / 2, n, s), plain.shift(x, x / 2, n, s))
            assert torch.equal(degrade(x, n), plain(x, n))
    assert len(gpu) == 4 and all(graph.replays == 3 for graph in gpu)
