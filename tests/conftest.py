"""Small synthetic data: ellipses in HU, two patients of four slices a split."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def body(size: int, seed: int) -> np.ndarray:
    """A made-up body slice in HU, (size, size) int16."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[0:size, 0:size] / size - 0.5
    hu = np.full((size, size), -1000.0)
    hu[(xx / 0.42) ** 2 + (yy / 0.36) ** 2 < 1] = 40
    for _ in range(5):
        x, y = rng.uniform(-0.2, 0.2, 2)
        a, b = rng.uniform(0.03, 0.12, 2)
        hu[((xx - x) / a) ** 2 + ((yy - y) / b) ** 2 < 1] = rng.choice([-850, 120, 700])
    return hu.astype(np.int16)


def write_slices(folder: Path, patients, count: int, size: int) -> Path:
    folder.mkdir(parents=True)
    for p, patient in enumerate(patients):
        for i in range(count):
            np.save(folder / f"{patient}_{i:03d}.npy", body(size, 100 * p + i))
    return folder


@pytest.fixture
def data(tmp_path):
    """A data folder with train_img/, val_img/ and test_img/ of 32 x 32 slices."""
    for split, names in {"train": ("A", "B"), "val": ("C",), "test": ("D", "E")}.items():
        write_slices(tmp_path / "data" / f"{split}_img", names, 4, 32)
    return tmp_path / "data"


@pytest.fixture
def call(capsys):
    """Call a script's main(argv) in this process; its standard output and error as one text."""
    def call(main, *args, expect=0):
        try:
            main([str(a) for a in args])
            code = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        text = out + err + (code if isinstance(code, str) else "")
        assert (code in (0, None)) == (expect == 0), text
        return text

    return call


def run(*command, expect=0, **environment):
    """Run a script of the project; its standard output and error as one text."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    text = done.stdout + done.stderr
    assert (done.returncode == 0) == (expect == 0), text
    assert "Traceback" not in text, text
    return text
