"""Seconds per slice and PSNR of SPDPS as CvG-Diff published it and as this project runs it: same weights, one run.

published: one slice at a time in fp32; D has an extra full-view pass and is computed twice a step, each time with
operators built anew. Our kernels project in both, so the ratio is that of the procedure, not of torch-radon.
ours: protocol cvg-official in batches, the full-view pass once a step, levels merged, operators kept.
paper's D: the same without the full-view pass (protocol cvg), against the same truth.
All rows have --dc iterations of data consistency, 0 as published unless the weights were trained with it.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch_radon import RadonFanbeam

sys.path.insert(0, str(Path(__file__).parent.parent))
from datasets.slices import find_slices, read_slices, spread  # noqa: E402
from models.checkpoint import default_dc, denoiser, find_checkpoint, load_checkpoint, placed  # noqa: E402
from models.consistency import data_consistency  # noqa: E402
from models.degradation import FULL_VIEWS, Degradation, equal_angles, projector  # noqa: E402
from models.samplers import chain_of, spdps  # noqa: E402
from utils.device import check_device, default_device  # noqa: E402
from utils.metrics import measure  # noqa: E402
from utils.units import WINDOWS, hu_to_mu  # noqa: E402


class Published:
    """D as the published code computes it: D'(x, n) = D(D(x, 720), n), every operator built for its one use."""

    def __call__(self, x, n_views):
        for n in (FULL_VIEWS, n_views[0]):
            g = projector(x.shape[-1], equal_angles(n)).geometry
            operator = RadonFanbeam(x.shape[-1], equal_angles(n), g.source_distance, g.det_distance, g.det_count,
                                    g.det_spacing)
            x = operator.backprojection(operator.filter_sinogram(operator.forward(x)))
        return x

    def shift(self, x_t, x0_hat, n_t, n_s):
        return x_t - self(x0_hat, n_t) + self(x0_hat, n_s)


@torch.no_grad()
def sample(denoise, config, degrade, measurement, y, size: int, n_views: int, batch: int, iterations: int):
    """Reconstructions, seconds a slice and calls a slice of SPDPS; the first batch warms up and is done again."""
    synchronise = torch.cuda.synchronize if y[0].is_cuda else (lambda: None)

    def chain(first):
        part = y[first:first + batch]
        dc = data_consistency(measurement, part, iterations)
        return spdps(denoise, degrade, measurement.fbp(part, size), dc=dc, **chain_of(config, n_views, iterations))

    chain(0)
    synchronise()
    start = time.perf_counter()
    results = [chain(first) for first in range(0, len(y), batch)]
    synchronise()
    seconds = (time.perf_counter() - start) / len(y)
    images, calls = zip(*results, strict=True)
    return torch.cat(images), seconds, float(np.mean(sum(calls, [])))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="tiny", help="as test.py takes it")
    parser.add_argument("--data", default="datasets/sample", help="folder with test_img/, or of HU .npy slices")
    parser.add_argument("--slices", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8, help="slices at once, ours")
    parser.add_argument("--views", type=int, nargs="+", default=[18])
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--dc", type=int, help="iterations of data consistency (default: as test.py)")
    parser.add_argument("--bf16", action="store_true", help="add rows with the network in bf16")
    args = parser.parse_args()
    try:
        check_device(args.device)
    except ValueError as error:
        parser.error(str(error))

    network, header = load_checkpoint(find_checkpoint(args.checkpoint), args.device)
    iterations = default_dc(header) if args.dc is None else args.dc
    files = find_slices(args.data, "test")
    _, hu = read_slices([files[i] for i in spread(len(files), args.slices)], network.config.multiple)
    x0 = Degradation().full(hu_to_mu(torch.from_numpy(hu))[:, None].to(args.device))
    device = torch.cuda.get_device_name() if x0.is_cuda else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {device}, {len(x0)} slices, {header.get('preset')} weights")
    print("| views | procedure | s/slice | times faster | calls | PSNR dB | difference |\n|" + "---|" * 7)
    for n in args.views:
        official, paper = Degradation(official=True), Degradation()
        fp32 = denoiser(network, clip=False)
        rows = {"published": (fp32, Published(), official, 1), "ours": (fp32, official, official, args.batch),
                "ours, paper's D": (fp32, paper, paper, args.batch)}
        if args.bf16:
            bf16 = denoiser(placed(copy.deepcopy(network), args.device, "bf16"), clip=False, precision="bf16")
            rows["ours, bf16"] = (bf16, official, official, args.batch)
        first = None
        for name, (denoise, degrade, measurement, batch) in rows.items():
            y = measurement.project(x0, [n] * len(x0))
            images, seconds, calls = sample(denoise, network.config, degrade, measurement, y, x0.shape[-1], n, batch,
                                            iterations)
            psnr = measure(images, x0, *WINDOWS[0])["psnr"].mean().item()
            first = first or (seconds, psnr)
            print(f"| {n} | {name} | {seconds:.3f} | {first[0] / seconds:.2f} | {calls:.1f} | {psnr:.3f} | "
                  f"{psnr - first[1]:+.3f} |", flush=True)


if __name__ == "__main__":
    main()
