"""Preparing 500 DICOM slices of 512x512 with one process and with two: `python -m benchmarks.bench_prepare`."""

import os
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from datasets.prepare import main as prepare
from utils.cli import Parser, script
from utils.progress import Progress

GOAL = 1.6  # two processes on two idle cores


def write_series(folder: Path, count: int, side: int) -> None:
    """Write `count` CT files of noise about a water disc, 1 mm apart."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:side * 1j, -1:1:side * 1j]
    disc = np.where(x**2 + y**2 < 0.8, 1024, 0) + random.integers(0, 50, (side, side))
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.update({
        "SOPClassUID": CTImageStorage, "Modality": "CT", "PatientID": "bench", "SeriesInstanceUID": generate_uid(),
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "Rows": side, "Columns": side, "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15,
        "PixelRepresentation": 0, "RescaleSlope": 1, "RescaleIntercept": -1024, "PixelSpacing": [0.7, 0.7],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]})
    for index in Progress(range(count), desc="Writing DICOM"):
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset.InstanceNumber, dataset.ImagePositionPatient = index, [0, 0, index]
        dataset.PixelData = np.roll(disc, index, 1).astype(np.uint16).tobytes()
        dataset.save_as(folder / f"{index}.dcm", enforce_file_format=True)


@script
def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m benchmarks.bench_prepare", __doc__)
    parser.add_argument("--slices", type=int, default=500, help="how many to make")
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--repeats", type=int, default=3, help="the best of so many counts")
    args = parser.parse_args(argv)
    parser.at_least(args, {"slices": 1, "side": 16, "repeats": 1})
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "dicom")
        source.mkdir()
        write_series(source, args.slices, args.side)
        os.sync()  # an archive lies on the disk: writing it is no part of what is timed
        seconds = {1: [], 2: []}
        for repeat in range(args.repeats):
            for workers in seconds:
                out = f"{folder}/{workers}-{repeat}"
                start = time.perf_counter()
                with redirect_stdout(None):
                    prepare([str(source), "--out", out, "--workers", str(workers), "--size", str(args.side // 2)])
                seconds[workers].append(time.perf_counter() - start)
    one, two = (min(times) for times in seconds.values())
    print(f"{args.slices} slices of {args.side}x{args.side}: one process {one:.2f} s, two {two:.2f} s, "
          f"{one / two:.2f}x faster (goal: {GOAL}x on two idle cores)")


if __name__ == "__main__":
    main()
