"""Evaluation at the command line: tables, resuming, bad input."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import body, run
from safetensors.torch import load_file, save_file

import test as evaluation
from models.checkpoint import load_checkpoint, save_checkpoint
from models.degradation import Degradation
from models.unet import UNet, UNetConfig
from utils.metrics import measure
from utils.units import WINDOWS, hu_to_mu


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    network = UNet(UNetConfig(width=32, stem=2, residual=True, shift=0.1, scale=0.1))
    torch.nn.init.normal_(network.conv_out.weight, std=1e-3)
    save_checkpoint(tmp_path / "net.safetensors", network.state_dict(), network.config, {"preset": "test"})
    return tmp_path / "net.safetensors"


def test_tables_agree_with_the_metrics(data, checkpoint, tmp_path):
    out = tmp_path / "out"
    text = run("test.py", "--data", data, "--out", out, "--checkpoint", checkpoint, "--views", 18, 72, "--batch", 3)
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary) == 2 * 3 * 3 and {row["slices"] for row in summary} == {8}
    assert " ".join(summary[0]) == "method views window psnr ssim rmse_hu nfe seconds_per_slice slices"
    x = np.stack([np.load(f) for f in sorted((data / "test_img").glob("*.npy"))]).astype(np.float32)
    x0 = Degradation().full(hu_to_mu(torch.from_numpy(x))[:, None])
    expected = measure(Degradation()(x0, 18), x0, *WINDOWS[0])
    fbp = next(row for row in summary if (row["method"], row["views"], row["window"]) == ("fbp", 18, [3000, 500]))
    assert fbp["psnr"] == pytest.approx(expected["psnr"].mean().item(), abs=1e-3) and fbp["nfe"] == 0
    assert f"{fbp['psnr']:.2f}" in text
    spdps = [row for row in csv.DictReader((out / "results.csv").open()) if row["method"] == "spdps"]
    assert len(spdps) == 8 * 2 * 3 and all(int(row["nfe"]) >= 6 for row in spdps)
    assert (out / "comparison_18views.png").stat().st_size > 10_000


def timeless(path):
    return [{k: v for k, v in row.items() if k != "seconds_per_slice"} for row in csv.DictReader(path.open())]


def test_an_interrupted_run_resumes_to_the_same_table(data, checkpoint, tmp_path, call):
    command = ["--data", data, "--checkpoint", checkpoint, "--views", 36, "--batch", 3, "--out"]
    call(evaluation.main, *command, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    lines = (tmp_path / "cut" / "results.csv").read_text().splitlines()
    (tmp_path / "cut" / "results.csv").write_text("\n".join(lines[:38])[:-7])
    call(evaluation.main, *command, tmp_path / "cut")
    assert timeless(tmp_path / "cut" / "results.csv") == timeless(tmp_path / "whole" / "results.csv")


def test_batch_size_does_not_change_results(data, checkpoint, tmp_path, call):
    tables = []
    for batch in (1, 8):
        out = tmp_path / f"batch{batch}"
        call(evaluation.main, "--data", data, "--checkpoint", checkpoint, "--views", 36, "--batch", batch, "--out", out)
        tables.append([float(row["psnr"]) for row in timeless(out / "results.csv")])
    np.testing.assert_allclose(*tables, atol=1e-3)


def test_bad_input_gets_a_sentence_and_nothing_is_overwritten(data, checkpoint, tmp_path, call):
    out = tmp_path / "out"

    def go(*extra, expect=1):
        return call(evaluation.main, "--data", data, "--out", out, "--checkpoint", checkpoint, "--views", 36,
                    "--methods", "fbp", *extra, expect=expect)

    assert "expected 1 to 720" in go("--views", "0")
    assert "expected 1 to 720" in go("--views", "721")
    assert "does not exist" in go("--checkpoint", tmp_path / "none.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(checkpoint.read_bytes()[:5000])
    assert "not a whole safetensors file" in go("--checkpoint", broken)
    save_file(load_file(checkpoint), broken)
    assert "no CvG-Diff configuration" in go("--checkpoint", broken)
    network, header = load_checkpoint(checkpoint)
    save_checkpoint(broken, network.state_dict(), UNetConfig(width=64), {})
    assert "another architecture" in go("--checkpoint", broken)
    assert "invalid choice" in go("--methods", "magic")
    assert not out.exists()
    np.save(data / "test_img" / "D_900.npy", np.zeros((32, 48)))
    (data / "test_img" / "D_901.npy").write_bytes(b"not an array")
    text = go(expect=0)
    assert "D_900.npy has shape (32, 48)" in text and "D_901.npy cannot be read" in text and "Skipped 2 of 10" in text
    before = (out / "results.csv").read_bytes()
    assert "another views" in go("--views", "18")
    np.save(data / "test_img" / "D_000.npy", body(32, 77))
    assert "another data" in go()
    assert "--strict" in go("--strict")
    assert (out / "results.csv").read_bytes() == before
    for size, sentence in ((40, "divisible by 16"), (0, "no .npy slices")):
        folder = tmp_path / str(size)
        folder.mkdir()
        if size:
            np.save(folder / "X_1.npy", np.zeros((size, size)))
        assert sentence in go("--data", folder, "--out", tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()


def test_other_sizes_keep_the_field_of_view(checkpoint, tmp_path, call):
    (tmp_path / "big").mkdir()
    np.save(tmp_path / "big" / "X_1.npy", body(64, 3))
    call(evaluation.main, "--data", tmp_path / "big", "--checkpoint", checkpoint, "--views", 100, "--out",
         tmp_path / "out")
    assert {row["views"] for row in json.loads((tmp_path / "out" / "summary.json").read_text())} == {100}
