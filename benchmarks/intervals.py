"""Whether the intervals of `reconstruct.py --trust` hold what they promise, on slices that took no part in them.

`python -m benchmarks.intervals --data DATA --json FILE` reconstructs slices from 18, 36 and 72 views, without noise and
with, and counts the pixels whose truth lies in the interval. `of the body`: of the pixels above -500 HU alone. `worst
slice`: the least coverage of a slice. It takes the error network beside the checkpoint.
"""

import json
from pathlib import Path

import torch

from datasets.slices import evenly_spaced, find_slices, read_slices
from fig.tables import coverage as table
from models.degradation import Degradation
from models.reconstructor import Reconstructor
from models.train_trust import METHOD, PHOTONS, VIEWS, interval
from models.trust import beside
from utils.cli import Parser, script
from utils.errors import InputError
from utils.files import atomic
from utils.progress import Progress
from utils.units import MU_WATER, hu_to_mu

BODY = -500  # HU


def coverage(error: torch.Tensor, width: torch.Tensor, x0: torch.Tensor) -> dict:
    """Shares of pixels with error <= width, all (N, 1, H, H) in mu, and the mean error and width in HU."""
    held, body = (error <= width).float(), x0 > hu_to_mu(BODY)
    to_hu = 1000 / MU_WATER
    return {"coverage": held.mean().item(), "body": held[body].mean().item(),
            "worst": held.mean((1, 2, 3)).min().item(), "error_hu": error.mean().item() * to_hu,
            "width_hu": width.mean().item() * to_hu}


@script
def main(argv=None):
    parser = Parser("python -m benchmarks.intervals", __doc__)
    parser.add_argument("--data", required=True, help="folder with test_img/, or of HU .npy slices")
    parser.add_argument("--checkpoint", default="tiny", help="as test.py takes it")
    parser.add_argument("--views", type=int, nargs="+", default=list(VIEWS), help="of the measurements")
    parser.add_argument("--limit", type=int, help="this many slices, evenly spread over the folder (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too (default: nowhere)")
    parser.add_device()
    args = parser.parse_args(argv)
    parser.at_least(args, {"views": 1, "limit": 1})
    reconstructor = Reconstructor.from_checkpoint(args.checkpoint, device=args.device)
    if not reconstructor.error_network:
        raise InputError(f"{beside(reconstructor.path)} does not exist; make it by python -m models.train_trust.")
    files = find_slices(args.data, "test")
    files, hu = read_slices([files[i] for i in evenly_spaced(len(files), args.limit)], reconstructor.multiple)
    x0 = Degradation().full(hu_to_mu(torch.from_numpy(hu))[:, None].to(reconstructor.device))
    grid, rows = [(n, photons) for n in args.views for photons in PHOTONS], []
    for n, photons in Progress(grid, desc="Coverage", unit="condition"):
        error, width = interval(reconstructor, x0, [f.name for f in files], n, photons)
        rows.append({"method": METHOD, "views": n, "photons": photons, **coverage(error, width, x0)})
    print("\n".join(table(rows)))
    if args.json:
        with atomic(args.json) as partial:
            partial.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
