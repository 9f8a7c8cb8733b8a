"""Time of the projector: ours on CPU and CUDA, its plain PyTorch backend, and astra-toolbox's line_fanflat, in one run.

Every number is the median time of one slice in ms, after a warm-up and with the device synchronised. A ratio says how
many times slower than ours on the same device. astra-toolbox is left out where it is not installed.
"""

import json
import math
import os
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch_radon import backend_torch

from models.degradation import Degradation
from utils.cli import Parser, script
from utils.device import synchronize

try:
    import astra

    from benchmarks.astra_projector import Astra
except ImportError:
    astra = None

QUICK = ("forward 720", "FBP 720", "D(18)", "D(72)")
TASKS = (*QUICK, "D(288)", "shift 36->54")


def milliseconds(function, repeats: int, device: str) -> float:
    """Median time of a call in ms after a warm-up: `repeats` calls, more if they are short, ten seconds at most."""
    function()
    synchronize(device)
    times = []
    while (len(times) < repeats or sum(times) < 0.5) and sum(times) < 10:
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 1e3 * median(times)


def views_of(task: str) -> int:
    return int(task.split("(")[1][:-1]) if task.startswith("D(") else 720


def ours(task: str, x: torch.Tensor):
    """The task on images (B, 1, H, W) as a function without arguments."""
    if task.startswith("shift"):
        n_t, n_s = [36] * len(x), [54] * len(x)
        return partial(Degradation().shift, x, x, n_t, n_s)
    radon = Degradation().operator(x.shape[-1], views_of(task))
    if task.startswith("forward"):
        return partial(radon.forward, x)
    if task.startswith("FBP"):
        sinogram = radon.forward(x)
        return lambda: radon.backprojection(radon.filter_sinogram(sinogram))
    return partial(radon.degrade, x)


def plain(task: str, x: torch.Tensor):
    """The same by the PyTorch backend."""
    if task.startswith("shift"):
        d36, d54 = plain("D(36)", x), plain("D(54)", x)
        return lambda: x - (d36() - d54())[:, None]
    radon, images = Degradation().operator(x.shape[-1], views_of(task)), x[:, 0]
    weights = torch.full((len(radon.angles),), math.pi / 2 / len(radon.angles), device=x.device)
    if task.startswith("forward"):
        return partial(backend_torch.forward, radon.geometry, images)
    if task.startswith("FBP"):
        sinogram = backend_torch.forward(radon.geometry, images)
        return lambda: backend_torch.backproject(
            radon.geometry, backend_torch.apply_filter(sinogram, "ramp") * weights[:, None])
    return partial(backend_torch.fbp, radon.geometry, images, weights, "ramp")


def astras(task: str, x: torch.Tensor, cuda: bool):
    """The same by astra-toolbox, slice by slice; its arrays live on the CPU, so CUDA's times include the copies."""
    if task.startswith("shift"):
        d36, d54 = astras("D(36)", x, cuda), astras("D(54)", x, cuda)
        return lambda: x - (d36() - d54())[:, None]
    radon, images = Degradation().operator(x.shape[-1], views_of(task)), x[:, 0].contiguous()
    operator = Astra(radon, "cuda" if cuda else "line_fanflat")
    if task.startswith("forward"):
        return partial(operator.forward, images)
    if task.startswith("FBP"):
        return partial(operator.fbp, operator.forward(images))
    return lambda: operator.fbp(operator.forward(images))


def measure(tasks, batches, sizes, repeats: int, devices) -> list[dict]:
    """One row a task, size and batch: implementation -> ms a slice."""
    rows = []
    for size in sizes:
        for task in tasks:
            for batch in batches:
                x = torch.rand(batch, 1, size, size, generator=torch.Generator().manual_seed(0)) * 0.3
                row = {"task": task, "size": size, "batch": batch}
                for device in devices:
                    y = x.to(device)
                    row[f"ours {device}"] = milliseconds(ours(task, y), repeats, device) / batch
                    row[f"pytorch {device}"] = milliseconds(plain(task, y), 2, device) / batch
                    if astra:
                        function = astras(task, x, device == "cuda")
                        row[f"astra {device}"] = milliseconds(function, min(repeats, 5), device) / batch
                        astra.clear()
                rows.append(row)
                print(line(row), flush=True)
    return rows


def line(row: dict) -> str:
    """One row of the table."""
    cells = [f"{row['task']:<13}{row['size']:>5}{row['batch']:>6}"]
    for name, value in row.items():
        if name in ("task", "size", "batch"):
            continue
        implementation, device = name.split()
        ratio = "" if implementation == "ours" else f" ({value / row[f'ours {device}']:.1f}x)"
        cells.append(f"{implementation} {device} {value:.3f}{ratio}")
    return "  ".join(cells)


@script
def main(argv=None):
    parser = Parser("python -m benchmarks.bench_projector", __doc__)
    parser.add_argument("--quick", action="store_true", help="four tasks on the CPU alone")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256], help="pixels")
    parser.add_argument("--batches", type=int, nargs="+", help="slices at once (default: 1 8, on CUDA 32 too)")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of ours; the slow ones get fewer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too (default: nowhere)")
    args = parser.parse_args(argv)

    cuda = torch.cuda.is_available() and not args.quick
    device = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    print(f"torch {torch.__version__}, astra-toolbox {astra.__version__ if astra else 'not installed'}, {device}")
    print("ms a slice (times slower than ours)")
    rows = measure(QUICK if args.quick else TASKS, args.batches or ([1, 8, 32] if cuda else [1, 8]), args.sizes,
                   args.repeats, ["cpu", "cuda"] if cuda else ["cpu"])
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "device": device, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
