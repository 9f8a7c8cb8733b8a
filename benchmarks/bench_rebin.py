"""Rebinning a helical scan, synthetic: `python -m benchmarks.bench_rebin`.

A water cylinder, as long as asked for. Every view is the same, in memory, or with --files a DICOM file that is read
again for each view.
"""

import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pydicom

from datasets.ctpd import Scan
from datasets.rebin import Rebinned, compiled
from utils.cli import Parser, script
from utils.device import memory
from utils.progress import Progress

GOAL = 600  # seconds on two cores for 20 turns of 2,304 views, 64 rows and 736 columns


class Synthetic(Scan):
    """A Scan whose views are all the same stored integers, or the same file."""

    def view(self, i: int) -> np.ndarray:
        path = self.files[i][0]
        if path:
            return super().view(i)
        return self.pixels.T * np.float32(1e-4)


def make_scan(turns: int, views: int, rows: int, columns: int, file: str = "") -> Synthetic:
    """Pitch 0.6, an in-plane flying focal spot of two states."""
    n, steps = turns * views, np.arange(turns * views)
    feed = 0.6 * rows * 1.0947 * 595 / 1085.6
    scan = Synthetic(
        files=[(file, 0, 1e-4, 0.0)] * n, phi=2 * np.pi * steps / views, z=feed * steps / views, state=steps % 2,
        states=np.array([[0.0007, 0, 0], [-0.0007, 0, 0]]), rho=595.0, d0=1085.6, columns=columns, rows=rows,
        du=1.2858 * 736 / columns, dv=1.0947, cx=columns / 2 + 0.375, cy=(rows + 1) / 2, shape="curved", position="HFS",
        turn=views)
    gamma = scan.cells()[0]
    chord = 2 * np.sqrt(np.maximum(150**2 - (595 * np.sin(gamma)) ** 2, 0)) * 0.0192
    object.__setattr__(scan, "pixels", np.repeat(np.rint(chord * 1e4).astype(np.uint16)[:, None], rows, 1))
    return scan


def write_view(path: Path, pixels: np.ndarray) -> None:
    """A DICOM file of stored integers (columns, rows)."""
    file = pydicom.Dataset()
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file.update({"SOPClassUID": pydicom.uid.CTImageStorage, "SOPInstanceUID": pydicom.uid.generate_uid(),
                 "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16,
                 "BitsStored": 16, "HighBit": 15,
                 "PixelRepresentation": 0})
    file.Rows, file.Columns, file.PixelData = *pixels.shape, pixels.astype("<u2").tobytes()
    file.save_as(path, enforce_file_format=True)


@script
def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m benchmarks.bench_rebin", __doc__)
    parser.add_argument("--turns", type=int, default=20, help="of the scan")
    parser.add_argument("--views", type=int, default=2304, help="a turn, and of a sinogram")
    parser.add_argument("--rows", type=int, default=64, help="of the detector")
    parser.add_argument("--columns", type=int, default=736, help="of the detector")
    parser.add_argument("--slices", type=int, help="make this many and estimate the rest (default: all)")
    parser.add_argument("--files", action="store_true", help="read every view from a DICOM file")
    args = parser.parse_args(argv)
    parser.at_least(args, {"turns": 2, "views": 36, "rows": 1, "columns": 8, "slices": 1})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "view.dcm")
        scan = make_scan(args.turns, args.views, args.rows, args.columns, str(path) if args.files else "")
        write_view(path, scan.pixels)
        lines = Rebinned(scan)
        compiled()
        lines[0]
        count = min(args.slices or len(lines), len(lines) - 1)
        wall, cpu = time.perf_counter(), time.process_time()
        for i in Progress(range(1, count + 1), desc="Rebinning", unit="slice"):
            lines[i]
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    views, share = len(scan.phi), len(lines) / count
    wall, cpu = wall * share, cpu * share
    print(f"{views} views of {args.rows} x {args.columns}, {len(lines)} slices of {lines.shape[1]} views:\n"
          f"{count} made; {wall:.0f} s for all, {views / wall:.0f} views/s on {os.cpu_count()} busy cores; {cpu:.0f} s "
          f"of processor time,\n{views / cpu * 2:.0f} views/s if two cores were idle (goal: {views / GOAL:.0f}); at "
          f"most {memory('cpu'):.2f} GiB.")



if __name__ == "__main__":
    main()
