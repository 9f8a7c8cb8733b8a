"""Measurements that our projector did not make, and the table of what they cost."""

import csv
import shutil

import numpy as np
import pytest
import torch
from conftest import body

from benchmarks import robustness
from models.degradation import Degradation
from utils.units import hu_to_mu


@pytest.fixture(scope="module")
def x0():
    hu = torch.from_numpy(np.stack([body(128, seed) for seed in range(2)])[:, None].astype(np.float32))
    return Degradation().full(hu_to_mu(hu))


def test_other_projectors_measure_the_same_slices_otherwise(x0):
    """The same geometry, orientation and unit, to what pixels of another shape make of the same slice."""
    ours = Degradation().project(x0, 30)
    found = {name: measure(x0, 30, names=["A", "B"])
             for name, (measure, _) in robustness.measurements([1e5], 0).items()}
    assert list(found) == ["simulated", "strip", "line", "fine", "photons-100000"]
    for name, y in found.items():
        difference = (y - ours).norm() / ours.norm()
        assert (difference == 0) if name == "simulated" else (1e-4 < difference < 0.02), (name, difference)
    assert (found["strip"] - found["line"]).norm() > 1e-4 * ours.norm()
    turned = robustness.by_astra("line_fanflat", x0.flip(-1), 30)
    assert (turned - ours).norm() > 0.05 * ours.norm()


def test_table_resumes_and_says_what_consistency_gains(data, tmp_path, call):
    command = ["--data", data, "--views", 36, "--methods", "one-step", "--photons", 1e4, "--batch", 3, "--limit", 4,
               "--out"]
    shown = call(robustness.main, *command, tmp_path / "whole")
    rows = list(csv.DictReader((tmp_path / "whole" / "robustness.csv").open()))
    assert [(row["measurement"], row["method"]) for row in rows] == [
        (name, method) for name in ("simulated", "strip", "line", "fine", "photons-10000")
        for method in ("fbp", "one-step", "one-step + dc")]
    psnr = {(row["measurement"], row["method"]): float(row["psnr"]) for row in rows}
    least = min(psnr[name, "one-step + dc"] - psnr[name, "one-step"] for name, _ in psnr)
    assert f"changes PSNR by {least:+.2f} dB or more" in shown and least != 0
    assert psnr["photons-10000", "fbp"] < psnr["simulated", "fbp"] - 0.1
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    folder = tmp_path / "cut" / "strip"
    lines = (folder / "results.csv").read_text().splitlines()
    (folder / "results.csv").unlink()
    (folder / "part-0.csv").write_text("\n".join(lines[1:8])[:-4])
    shutil.rmtree(tmp_path / "cut" / "fine")
    (tmp_path / "cut" / "table.md").unlink()
    assert call(robustness.main, *command, tmp_path / "cut") == shown
    assert (tmp_path / "cut" / "table.md").read_text() == (tmp_path / "whole" / "table.md").read_text()
    assert "another dc" in call(robustness.main, *command, tmp_path / "cut", "--dc", 3, expect=1)
    assert (tmp_path / "cut" / "robustness.csv").read_bytes() == (tmp_path / "whole" / "robustness.csv").read_bytes()


def test_bad_options_get_a_sentence(data, tmp_path, call, monkeypatch):
    def go(*extra):
        return call(robustness.main, "--data", data, "--out", tmp_path / "out", *extra, expect=2)

    assert "--photons 0.0: expected a number of at least 1" in go("--photons", 0)
    assert "--dc 0: expected a number of at least 1" in go("--dc", 0)
    assert "--views 0: expected a number of at least 1" in go("--views", 0)
    monkeypatch.setattr(robustness, "Astra", None)
    assert "pip install astra-toolbox" in go()
    assert not (tmp_path / "out").exists()
