"""Seconds per slice and PSNR of SPDPS as CvG-Diff published it and as this project runs it: same weights, one run.

published: one slice at a time in fp32; D has an extra full-view pass and is computed twice a step, each time with
operators built anew. Our kernels project in both, so the ratio is that of the procedure, not of torch-radon.
ours: protocol cvg-official in batches, the full-view pass once a step, levels merged, operators kept.
paper's D: the same without the full-view pass (protocol cvg).
All rows see the same measurements and have --dc iterations of data consistency, 0 as published unless the weights were
trained with it.
"""

import json
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch_radon import RadonFanbeam

from datasets.slices import evenly_spaced, find_slices, read_slices
from models.degradation import Degradation
from models.graphs import directly
from models.levels import FULL_VIEWS
from models.reconstructor import Reconstructor
from utils.cli import Parser, script
from utils.device import chosen_device, synchronize
from utils.files import atomic
from utils.metrics import score
from utils.units import WINDOWS, hu_to_mu


class Published(Degradation):
    """D as the published code computes it: D'(x, n) = D(D(x, 720), n), every operator built for its one use."""

    def __call__(self, x, n_views):
        for n in (FULL_VIEWS, n_views[0]):
            kept = self.operator(x.shape[-1], n)
            operator = RadonFanbeam(x.shape[-1], self.scanner.theta(n), kept.source_distance, kept.det_distance,
                                    kept.det_count, kept.det_spacing)
            x = operator.backprojection(operator.filter_sinogram(operator.forward(x)))
        return x

    def shift(self, x_t, x0_hat, n_t, n_s):
        return x_t - self(x0_hat, n_t) + self(x0_hat, n_s)


@dataclass
class PublishedProcedure(Reconstructor):
    """A reconstructor with that D, and without CUDA graphs."""

    def __post_init__(self):
        super().__post_init__()
        self.graphs = directly

    @property
    def degrade(self):
        return Published(self.scanner)


def sample(reconstructor: Reconstructor, y: torch.Tensor, size: int, batch: int):
    """Reconstructions, seconds a slice and calls a slice of SPDPS; the first batch warms up and is done again."""
    reconstructor.run("spdps", y[:batch], size)
    synchronize(str(y.device))
    start = time.perf_counter()
    results = [reconstructor.run("spdps", part, size) for part in y.split(batch)]
    synchronize(str(y.device))
    seconds = (time.perf_counter() - start) / len(y)
    images, calls = zip(*results, strict=True)
    return torch.cat(images), seconds, float(np.mean(sum(calls, [])))


@script
def main(argv=None):
    parser = Parser("python -m benchmarks.bench_sampling", __doc__)
    parser.add_argument("--checkpoint", default="tiny", help="as test.py takes it")
    parser.add_argument("--data", default="datasets/sample", help="folder with test_img/, or of HU .npy slices")
    parser.add_argument("--slices", type=int, default=8, help="evenly spread over the folder")
    parser.add_argument("--batch", type=int, default=8, help="slices at once, ours")
    parser.add_argument("--views", type=int, nargs="+", default=[18], help="sparsity levels")
    parser.add_argument("--dc", type=int, help="iterations of data consistency (default: as test.py)")
    parser.add_argument("--bf16", action="store_true", help="add rows with the network in bf16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too (default: nowhere)")
    parser.add_device()
    args = parser.parse_args(argv)
    device = chosen_device(args.device)

    def make(protocol: str, precision: str = "fp32"):
        return Reconstructor.from_checkpoint(args.checkpoint, device=device, dc=args.dc, protocol=protocol,
                                             precision=precision, mirror=False)

    official, paper = make("cvg-official"), make("cvg")
    published = PublishedProcedure(**{f.name: getattr(official, f.name) for f in fields(Reconstructor)})
    rows = {"published": (published, 1), "ours": (official, args.batch), "ours, paper's D": (paper, args.batch)}
    if args.bf16:
        rows["ours, bf16"] = (make("cvg-official", "bf16"), args.batch)
    files = find_slices(args.data, "test")
    _, hu = read_slices([files[i] for i in evenly_spaced(len(files), args.slices)], official.multiple)
    x0 = Degradation().full(hu_to_mu(torch.from_numpy(hu))[:, None].to(device))
    name = torch.cuda.get_device_name() if x0.is_cuda else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {name}, {len(x0)} slices, {official.header.get('preset')} weights")
    print("| views | procedure | s/slice | times faster | calls | PSNR dB | difference |\n|" + "---|" * 7)
    found = []
    for n in args.views:
        y, first = Degradation().project(x0, n), None
        for procedure, (reconstructor, batch) in rows.items():
            images, seconds, calls = sample(reconstructor, y, x0.shape[-1], batch)
            psnr = score(images, x0, *WINDOWS[0])["psnr"].mean().item()
            first = first or (seconds, psnr)
            found.append({"views": n, "procedure": procedure, "seconds_per_slice": seconds,
                          "speedup": first[0] / seconds, "nfe": calls, "psnr": psnr,
                          "psnr_difference": psnr - first[1]})
            print(f"| {n} | {procedure} | {seconds:.3f} | {first[0] / seconds:.2f} | {calls:.1f} | {psnr:.3f} | "
                  f"{psnr - first[1]:+.3f} |", flush=True)
    if args.json:
        with atomic(args.json) as partial:
            partial.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
