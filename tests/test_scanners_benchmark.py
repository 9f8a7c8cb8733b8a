"""The table of other scanners: their geometry, what it says, and that it goes on where it stopped."""

import csv

import torch

from benchmarks import scanners
from models.degradation import Degradation


def test_every_scanner_sees_the_slice():
    """FBP of 288 views in each geometry gives the inner field back."""
    x = torch.zeros(1, 1, 64, 64)
    x[..., 20:44, 20:44] = 0.2
    found = scanners.scanners(64, 288)
    assert list(found) == ["published", "parallel", "aapm", "short scan", "half fan", "micro-CT"]
    for name, scanner in found.items():
        image = Degradation(scanner)(x, 288)
        assert (image - x)[..., 24:40, 24:40].abs().max() < 0.02, name
    assert any(found["half fan"].padding) and not any(found["aapm"].padding)


def test_the_table_resumes(data, tmp_path, call):
    command = ["--data", data, "--views", 12, "--methods", "one-step", "--limit", 3, "--batch", 2, "--dc", 2, "--out"]
    text = call(scanners.main, *command, tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "scanners.csv").open()))
    psnr = {(row["scanner"], row["method"]): float(row["psnr"]) for row in rows}
    assert len(psnr) == 12
    gains = {name: psnr[name, "one-step"] - psnr[name, "fbp"] for name in ("published", "aapm")}
    assert f"| aapm | {psnr['aapm', 'fbp']:.2f} | {psnr['aapm', 'one-step']:.2f} | {gains['aapm']:+.2f} | " \
           f"{gains['aapm'] - gains['published']:+.2f} |" in text
    (tmp_path / "out" / "table.md").unlink()
    before = (tmp_path / "out" / "aapm" / "results.csv").read_bytes()
    assert call(scanners.main, *command, tmp_path / "out") == text
    assert (tmp_path / "out" / "aapm" / "results.csv").read_bytes() == before
    assert "another photons" in call(scanners.main, *command, tmp_path / "out", "--photons", 1e5, expect=1)
