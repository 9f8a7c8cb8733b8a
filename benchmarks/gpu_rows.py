"""The rows of benchmarks.gpu, section by section, and the process that measures them.

Every value is a median, after calls that compile kernels and build tables. Where a row says "each call", and for CG and
ASTRA, each call is followed by a wait for its result; else calls follow each other as fast as the host makes them. MFU:
the network's FLOP/s (models/cost.py) over the bf16 peak of the card's data sheet (utils/device.py).
"""

import gc
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch_radon.solvers import cgne

import train
from benchmarks.bench_sampling import PublishedProcedure
from datasets.loader import prefetch
from datasets.slices import find_slices, read_slices
from models.checkpoint import save_checkpoint
from models.cost import cost
from models.degradation import Degradation
from models.drawn import draw_views
from models.graphs import Graphs, directly
from models.levels import chain_levels
from models.presets import PRESETS
from models.reconstructor import Reconstructor
from models.run import Run
from models.schedule import forward_calls
from models.unet import UNet, UNetConfig
from utils.device import peak_flops, synchronize
from utils.state import commit, versions
from utils.units import hu_to_mu

ROOT = Path(__file__).parent.parent
SCALE = {"µs": 1e6, "µs/slice": 1e6, "ms": 1e3, "s": 1.0, "s/slice": 1.0}


LEFT_OUT = "left out"


class DeviceLost(Exception):
    """The GPU answers this process no more."""


@dataclass
class Bench:
    """What a section measures with and reports to.

    send: takes each row, {section, name, value, unit, goal, met, note}; no value where it could not be measured, and
    the note says why. folder: data by `make_data`, and space for files.
    """

    device: str
    rehearsal: bool
    folder: Path
    send: Callable[[dict], None]
    section: str = ""
    deadline: float = math.inf  # of the section, in time.monotonic()

    def pixels(self, side: int) -> int:
        """The side of images; an eighth of it in a rehearsal."""
        return side // 8 if self.rehearsal else side

    def few(self, count: int) -> int:
        """That many; two at most in a rehearsal."""
        return min(count, 2) if self.rehearsal else count

    def slices(self, count: int) -> torch.Tensor:
        """Ground truths of the test slices in `folder`, mu (count, 1, H, H)."""
        hu = read_slices(find_slices(self.folder, "test")[:self.few(count)])[1]
        return Degradation().full(hu_to_mu(torch.from_numpy(hu))[:, None].to(self.device))

    def images(self, count: int, side: int = 256) -> torch.Tensor:
        """Random images (count, 1, side, side) in mu."""
        side, generator = self.pixels(side), torch.Generator().manual_seed(0)
        return (0.3 * torch.rand(self.few(count), 1, side, side, generator=generator)).to(self.device)

    def row(self, name: str, measure: Callable[[], float], unit: str, at_most=None, at_least=None) -> float | None:
        """Measure a value and report it with its goal; None where that fails, with the reason in the row."""
        goal = f"≤ {at_most}" if at_most is not None else f"≥ {at_least}" if at_least is not None else ""
        try:
            if time.monotonic() > self.deadline:
                raise TimeoutError("no time was left for it")
            value = float(measure())
        except Exception as error:  # whatever goes wrong here must not hide the rows that follow
            self.report(name, unit=unit, goal=goal, note=describe(error))
            self.check_device()
            return None
        met = None
        if goal and not self.rehearsal:
            met = value <= at_most if at_most is not None else value >= at_least
        self.report(name, value, unit, goal, met)
        return value

    def report(self, name: str, value=None, unit: str = "", goal: str = "", met: bool | None = None, note: str = ""):
        """Send a row."""
        self.send({"section": self.section, "name": name, "value": value, "unit": unit, "goal": goal, "met": met,
                   "note": note})

    def time(self, name: str, function, unit: str, slices: int = 1, each: bool = False, graph: bool = False,
             at_most=None) -> float | None:
        """A row: the time of function(), over `slices`. graph: replayed as a CUDA graph (on a CPU: just called)."""
        def measure():
            ready = as_graph(function) if graph and self.device != "cpu" else function
            return SCALE[unit] * seconds(self, ready, each) / slices

        return self.row(name, measure, unit, at_most=at_most)

    def ratio(self, name: str, above: float | None, below: float | None, **goal) -> None:
        """A row: above / below, of two values of `row`."""
        if above is not None and below is not None:
            self.row(name, lambda: above / below, "x", **goal)

    def leave_out(self, why: str) -> None:
        """A line instead of rows that this machine cannot have."""
        self.report(why, note=LEFT_OUT)

    def check_device(self) -> None:
        """Raises DeviceLost after an error that a GPU does not forget, such as a wrong address."""
        try:
            synchronize(self.device)
        except Exception as error:
            raise DeviceLost(describe(error)) from None

    @cached_property
    def matrix_rate(self) -> float:
        """FLOP/s of a large product of bf16 matrices."""
        side = 128 if self.rehearsal else 8192
        a = torch.randn(side, side, device=self.device).bfloat16()
        return 2 * side**3 / seconds(self, lambda: a @ a)


def describe(error: Exception) -> str:
    """The kind of an error and the first line of its text."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no text').splitlines()[0][:200]}"


def seconds(bench: Bench, function, each: bool = False) -> float:
    """Median seconds of function(), after some calls to warm up. each: wait after each call, else every 10 ms."""
    def run(count):
        synchronize(bench.device)
        start = time.perf_counter()
        for _ in range(count):
            function()
        synchronize(bench.device)
        return (time.perf_counter() - start) / count

    if bench.rehearsal:
        return run(1)
    run(2)
    together = 1 if each else min(max(1, int(0.01 / run(1))), 100)
    times = []
    while True:
        times.append(run(together))
        spent = together * sum(times)
        if spent > 3 or (spent > 0.2 and len(times) >= 5) or time.monotonic() > bench.deadline:
            return median(times)


def as_graph(function):
    """function() captured as a CUDA graph: what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def make_data(folder: Path, rehearsal: bool) -> None:
    """Write train_img/, val_img/ and test_img/ to `folder`: the sample's slices, repeated, small in a rehearsal."""
    for split, count in (("train", 2 if rehearsal else 62), ("val", 1), ("test", 2 if rehearsal else 133)):
        sample, target = find_slices(ROOT / "datasets" / "sample", split), folder / f"{split}_img"
        target.mkdir(parents=True)
        for i in range(count):
            hu = np.load(sample[i % len(sample)])
            if rehearsal:
                hu = hu.reshape(32, 8, 32, 8).mean(axis=(1, 3)).astype(hu.dtype)
            np.save(target / f"P{i % len(sample)}_{i:03d}.npy", hu)


def machine(device: str) -> dict:
    """What the numbers depend on: card, driver, versions, commit."""
    found = {"device": platform.processor() or platform.machine(), **versions(), "torch": str(torch.__version__),
             "cuda": torch.version.cuda, "triton": None, "driver": None, "commit": "unknown"}
    with suppress(ImportError):
        import triton
        found["triton"] = triton.__version__
    with suppress(OSError):  # no git here
        found["commit"] = commit()
    if device != "cpu":
        found["device"] = torch.cuda.get_device_name(device)
        with suppress(OSError):
            asked = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                                   capture_output=True, text=True)
            found["driver"] = (asked.stdout.split() or [None])[0]
    return found


def card(bench: Bench) -> None:
    """What the card can do at best. A copy reads and writes; both count."""
    if machine(bench.device)["triton"] is None and bench.device != "cpu":
        bench.leave_out("Triton is not installed: the projector runs in plain PyTorch")
    a = torch.zeros(2**18 if bench.rehearsal else 2**28, device=bench.device)
    b = torch.empty_like(a)
    bench.row("copy bandwidth", lambda: 2 * a.nbytes / seconds(bench, lambda: b.copy_(a)) / 1e9, "GB/s")
    bench.row("bf16 matrix product", lambda: bench.matrix_rate / 1e12, "TFLOP/s")


def calls(bench: Bench) -> None:
    """Single operator calls on one slice."""
    degrade, x = Degradation(), bench.images(1)
    tasks = {"P18": partial(degrade.project, x, 18), "D18": partial(degrade, x, 18), "D72": partial(degrade, x, 72),
             "shift 36->54": partial(degrade.shift, x, x, [36], [54])}
    for name, task in tasks.items():
        bench.time(f"{name}, one slice, each call", task, "µs", each=True, at_most=80)
    for name in ("D18", "D72"):
        bench.time(f"{name}, one slice, replayed", tasks[name], "µs", each=True, graph=True)


def replays(bench: Bench) -> None:
    """D replayed as a CUDA graph: what the kernels take, without the host."""
    degrade = Degradation()
    for batch, goals in ((8, (4, 10, 40, 100)), (32, (3, 10, 40, 100))):
        x = bench.images(batch)
        for n, goal in zip((18, 72, 288, 720), goals, strict=True):
            bench.time(f"D{n} replayed, batch {batch}", partial(degrade, x, n), "µs/slice", len(x), graph=True,
                       at_most=goal)


def transposes(bench: Bench) -> None:
    """Projection and its transpose."""
    for batch in (8, 32):
        x = bench.images(batch)
        for n in (72, 720):
            operator = Degradation().operator(x.shape[-1], n)
            y = operator.forward(x)
            forward = bench.time(f"P{n}, batch {batch}", partial(operator.forward, x), "µs/slice", len(x))
            transpose = bench.time(f"P{n} transposed, batch {batch}", partial(operator.transpose, y), "µs/slice",
                                   len(x))
            bench.ratio(f"P{n} transposed / forward, batch {batch}", transpose, forward, at_most=2)


def mixed(bench: Bench) -> None:
    """D of slices with different view counts, 72 on average, against 72 for all."""
    degrade = Degradation()
    for batch in (8, 32):
        x = bench.images(batch)
        counts = np.linspace(72 - 31, 72 + 31, len(x)).round().astype(int).tolist()
        one = bench.time(f"D72, batch {batch}", partial(degrade, x, 72), "µs/slice", len(x))
        many = bench.time(f"D of {batch} counts, 41 to 103, batch {batch}", partial(degrade, x, counts), "µs/slice",
                          len(x))
        bench.ratio(f"D of different counts / of one, batch {batch}", many, one, at_most=1.5)


def cg(bench: Bench) -> None:
    """Data consistency."""
    for count, side, goal in ((1, 256, 1.5), (8, 256, 3), (32, 256, 8), (8, 512, 15)):
        x = bench.images(count, side)
        operator = Degradation().operator(x.shape[-1], 72)
        solve = partial(cgne, operator, torch.zeros_like(x), operator.forward(x), max_iter=8)
        bench.time(f"8 CG iterations, 72 views, {count} x {side}²", solve, "ms", each=True, at_most=goal)


def astra(bench: Bench) -> None:
    """ASTRA's projectors, which take one slice at a time from the CPU and back."""
    try:
        import astra

        from benchmarks.astra_projector import Astra
    except ImportError:
        return bench.leave_out("astra-toolbox is not installed: no comparison with it")
    cuda = bench.device != "cpu"
    if cuda and not astra.use_cuda():
        return bench.leave_out("astra-toolbox finds no GPU: no comparison with it")
    one, eight = bench.images(1), bench.images(8)
    for n in (18, 72, 720):
        operator = Degradation().operator(one.shape[-1], n)
        theirs = Astra(operator, "cuda" if cuda else "line_fanflat")
        y = operator.forward(eight)
        backproject = partial(theirs._run, "BP", theirs.sinogram, theirs.image)  # `fbp` would filter too
        for name, ours, their, x in (("FP", operator.forward, theirs.forward, eight),
                                     ("BP", operator.backprojection, backproject, y)):
            single = x[:1].contiguous()
            slow = bench.time(f"ASTRA's {name} {n}, one slice with copies", partial(their, single[:, 0].cpu()), "µs",
                              each=True)
            fast = bench.time(f"our {name} {n}, one slice", partial(ours, single), "µs", each=True)
            many = bench.time(f"our {name} {n}, batch 8", partial(ours, x), "µs/slice", len(x), each=True)
            bench.ratio(f"{name} {n}: ASTRA / ours, one slice", slow, fast, at_least=5)
            bench.ratio(f"{name} {n}: ASTRA / ours, batch 8", slow, many, at_least=10)
    astra.clear()


def training_rate(bench: Bench, preset: str, batch: int, flags: list[str]) -> tuple[float, object]:
    """(images a second of Trainer.update, as train.py calls it, the resolved preset)."""
    if bench.rehearsal:
        flags = [*flags, "--width", "32"]
    config = train.parse(["--data", "-", "--out", "-", "--preset", preset, *flags])[1]
    if bench.device != "cpu":  # in parts, where a batch needs more than 40 % of the memory
        kept = bench.few(batch) * cost(config.network(), 256, "bf16")[2]
        flags = [*flags, "--accumulate", str(math.ceil(kept / torch.cuda.mem_get_info()[1] / 0.4))]
    out = bench.folder / f"run-{time.monotonic_ns()}"
    args, config = train.parse(["--data", str(bench.folder), "--out", str(out), "--preset", preset, "--batch",
                                str(bench.few(batch)), "--images", str(10**5), "--val-slices", "1", *flags])
    args.device = bench.device
    run = Run(args, config)
    loaded = prefetch(run.load, run.spans())

    def update():
        (first, _), parts, weight = next(loaded)
        run.trainer.update(parts, weight, epoch=first // run.count)

    try:
        return bench.few(batch) / seconds(bench, update), config
    finally:
        loaded.close()
        run.scalars.close()
        run.bar.close()


def training_rows(bench: Bench, name: str, preset: str, batch: int, flags: list[str], at_least=None,
                  share=None) -> None:
    """Images a second and what share of the card they use. at_least, share: the goals."""
    found = {}

    def measure():
        rate, found["preset"] = training_rate(bench, preset, batch, flags)
        return rate

    rate = bench.row(name, measure, "images/s", at_least=at_least)
    if rate is None:
        return
    used = found["preset"]
    flops = rate * forward_calls(used, 1 + used.hops) * cost(used.network(), bench.pixels(256), "bf16")[1]
    bench.row(f"{name}: network's", lambda: flops / 1e12, "TFLOP/s")
    bench.row(f"{name}: of measured bf16", lambda: 100 * flops / bench.matrix_rate, "%")
    if peak := peak_flops(bench.device):
        bench.row(f"{name}: MFU", lambda: 100 * flops / peak, "%", at_least=share)


def network(bench: Bench) -> None:
    """The network forward and backward: restore inputs only, with D, optimizer and EMA, which take little."""
    flags = ["--hops", "0", "--dc", "0", "--any-view-share", "0"]
    for preset in ("small", "base"):
        training_rows(bench, f"network of {preset}, batch 62", preset, 62, flags, share=40)


def training(bench: Bench) -> None:
    """EPCT with five hops, once the tables of every scan are there that a long training meets."""
    preset, x, degrade = PRESETS["small"], bench.images(1), Degradation()
    counts = {draw_views(u, preset) for u in np.linspace(0, 1, 20_000, endpoint=False)}
    counts |= {n for measured in counts for n in chain_levels(measured, preset.conditioning, preset.dc)}

    def tables():
        start = time.perf_counter()
        for n in sorted(counts)[:bench.few(len(counts))]:
            degrade(x, n)
        synchronize(bench.device)
        return time.perf_counter() - start

    bench.row(f"first D of each of {len(counts)} view counts", tables, "s")
    for name, batch, flags in (("a view count a slice, batch 31", 31, []),
                               ("one view count, batch 62", 62, ["--no-per-sample-levels"])):
        training_rows(bench, f"small, EPCT, {name}", "small", batch, ["--epct-start", "0", *flags], at_least=300)


def sampling(bench: Bench) -> None:
    """SPDPS from 18 views. The published width has random weights, so its similarities are scripted: always alike."""
    torch.manual_seed(0)
    config = UNetConfig(width=32 if bench.rehearsal else 128)
    random = bench.folder / "random.safetensors"
    save_checkpoint(random, UNet(config).state_dict(), config, {"preset": "random"})

    def alike(a, b):
        return torch.ones(len(a), device=a.device)

    def make(name, precision, **given):
        return Reconstructor.from_checkpoint(name, device=bench.device, precision=precision, **given)

    x = bench.slices(16)
    y = Degradation().project(x, 18)
    ours, bf16 = (make(random, precision, protocol="cvg-official", dc=0) for precision in ("fp32", "bf16"))
    published = PublishedProcedure(**{f.name: getattr(ours, f.name) for f in fields(Reconstructor)})
    rows = {"published procedure": (published, y[:1], None), "ours, fp32": (ours, y, None),
            "ours, bf16": (bf16, y, 0.024)}
    took = {}
    for name, (reconstructor, part, goal) in rows.items():
        took[name] = bench.time(f"SPDPS, width 128, 18 views, {name}, batch {1 if part is not y else 16}",
                                partial(reconstructor.run, "spdps", part, x.shape[-1], similarity=alike), "s/slice",
                                len(part), at_most=goal)
    bench.ratio("SPDPS, width 128: published / ours, fp32", took["published procedure"], took["ours, fp32"])
    bench.ratio("SPDPS, width 128: published / ours, bf16", took["published procedure"], took["ours, bf16"],
                at_least=10)
    x = bench.slices(32)
    y = Degradation().project(x, 18)
    for precision in ("fp32", "bf16"):
        tiny = make("tiny", precision)
        bench.time(f"SPDPS, tiny, 18 views, batch 32, {precision}", partial(tiny.run, "spdps", y, x.shape[-1]),
                   "s/slice", len(x), at_most=0.004)
    for batch in (1, 32):
        for way, graphs in (("in graphs", Graphs()), ("without", directly)):
            tiny = make("tiny", "bf16", graphs=graphs)
            took[way] = bench.time(f"sequential, tiny, 18 views, bf16, batch {batch}, {way}",
                                   partial(tiny.run, "sequential", y[:batch], x.shape[-1]), "s/slice", len(y[:batch]))
        bench.ratio(f"sequential, tiny, batch {batch}: without graphs / in graphs", took["without"], took["in graphs"])
        bench.time(f"sequential, tiny, 18 views, bf16, batch {batch}, as one graph",
                   partial(tiny.run, "sequential", y[:batch], x.shape[-1]), "s/slice", len(y[:batch]), graph=True)


def evaluation(bench: Bench) -> None:
    """test.py from its start to its last figure: 4 methods, 3 view counts."""
    command = [sys.executable, "test.py", "--data", bench.folder, "--out", bench.folder / "evaluation", "--device",
               bench.device, "--batch", "32", "--precision", "bf16", *(["--views", "18"] if bench.rehearsal else [])]

    def measure():
        start = time.perf_counter()
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True,
                              timeout=max(1.0, bench.deadline - time.monotonic()))
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or "no text").splitlines()[-1])
        return time.perf_counter() - start

    bench.row("test.py --batch 32 --precision bf16, 133 slices", measure, "s", at_most=40)


# In this order. The seconds that each gets, besides what those before it left; the first also starts the process.
SECTIONS = {"card": (card, 25), "calls": (calls, 20), "replays": (replays, 15), "transposes": (transposes, 12),
            "mixed": (mixed, 10), "cg": (cg, 8), "astra": (astra, 15), "network": (network, 25),
            "training": (training, 30), "sampling": (sampling, 25), "evaluation": (evaluation, 55)}


def work(connection, names: list[str], ends: dict[str, float], device: str, rehearsal: bool, folder: Path) -> None:
    """A process: measure these sections and send ("machine", ...), ("row", ...) and ("done", section) as they come.

    Ends early, without "done", where the GPU is lost. ends: of each section, in time.monotonic().
    """
    os.setsid()  # what a section starts can then be ended with it
    if ":" in device:
        torch.cuda.set_device(device)
    bench = Bench(device, rehearsal, folder, lambda row: connection.send(("row", row)))
    connection.send(("machine", machine(device)))
    for name in names:
        bench.section, bench.deadline = name, ends[name]
        try:
            SECTIONS[name][0](bench)
        except DeviceLost as lost:
            bench.report(f"the rest of {name}", note=f"the GPU is lost: {lost}")
            return
        except Exception as error:
            bench.report(f"the rest of {name}", note=describe(error))
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
        connection.send(("done", name))
