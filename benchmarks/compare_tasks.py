"""The tasks of benchmarks.compare, which starts this file in the tree of each commit: it uses what all of them have.

For each task named on standard input it prints the seconds of a call and the mean of its result.
"""

import sys
import time

VIEWS, ITERATIONS = 18, 16
COUNTS = {"one": 1, "eight": 8}
OPERATORS = ("P18", "P72", "P18^T", "P72^T", "D18", "D72", "D288", "shift 36->54", "CG 18")
TASKS = (*(f"{name}, {count}" for name in OPERATORS for count in COUNTS), "network, one", "SPDPS, one",
         "SPDPS with CG, one")


def prepare(task: str, size: int):
    """The task as a function without arguments."""
    import torch
    from torch_radon.solvers import cgne

    from models.degradation import Degradation

    name, count = task.split(", ")
    generator, degrade = torch.Generator().manual_seed(0), Degradation()
    x = 0.3 * torch.rand(COUNTS[count], 1, size, size, generator=generator)
    if name == "network":
        network, t = make_network(), torch.tensor([3.0])
        return lambda: network(x, t)
    if name.startswith("SPDPS"):
        return chain(degrade, x, ITERATIONS if "CG" in name else 0)
    if name.startswith("shift"):
        return lambda: degrade.shift(x, x, [36] * len(x), [54] * len(x))
    if name.startswith("D"):
        return lambda: degrade(x, int(name[1:]))
    operator = projector(degrade, size, int(name.removeprefix("CG ").strip("PT^")))
    if name.startswith("CG"):
        y, start = operator.forward(x), torch.zeros_like(x)
        return lambda: cgne(operator, start, y, max_iter=ITERATIONS)
    if name.endswith("^T"):
        y = operator.forward(x)
        return lambda: operator.transpose(y)
    return lambda: operator.forward(x)


def make_network():
    """Preset tiny's size, with random weights that leave an image more or less what it is."""
    import torch

    from models.unet import UNet, UNetConfig

    torch.manual_seed(0)
    return UNet(UNetConfig(width=32, stem=2, residual=True, scale=0.05, conditioning="log-views")).eval()


def projector(degrade, size: int, views: int):
    """P_n."""
    try:
        return degrade.operator(size, views)
    except AttributeError:  # before the scanners
        from models import degradation
        return degradation.projector(size, degradation.equal_angles(views))


def chain(degrade, x, iterations: int):
    """SPDPS from 18 views in which no two estimates are alike: every level is visited."""
    import torch

    network, y = make_network(), projector(degrade, x.shape[-1], VIEWS).forward(x)

    def never(a, b):
        return torch.zeros(len(a))

    try:
        from models.reconstructor import Reconstructor
    except ImportError:
        from models.checkpoint import denoiser
        from models.consistency import data_consistency
        from models.samplers import chain_of, spdps

        def run():
            dc = data_consistency(degrade, list(y), iterations)
            options = chain_of(network.config, VIEWS, iterations)
            return spdps(denoiser(network), degrade, degrade.fbp(list(y), x.shape[-1]), dc=dc, similarity=never,
                         **options)[0]

        return run
    reconstructor = Reconstructor(network, dc=iterations)
    return lambda: reconstructor.run("spdps", y, x.shape[-1], similarity=never)[0]


def main(size: int, seconds: float) -> None:
    import torch

    ready = {}
    with torch.no_grad():
        for line in sys.stdin:
            task = line.strip()
            if task not in ready:
                ready.clear()
                ready[task] = prepare(task, size)
                ready[task]()
            calls, start = 0, time.perf_counter()
            while time.perf_counter() - start < seconds or not calls:
                result = ready[task]()
                calls += 1
            took = (time.perf_counter() - start) / calls
            print(took, result.double().abs().mean().item(), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
