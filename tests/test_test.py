"""Evaluation at the command line: tables, resuming, bad input."""

import csv
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, body, run
from safetensors.torch import load_file, save_file

import test as evaluation
from models import evaluation as evaluate
from models.checkpoint import load_checkpoint, save_checkpoint
from models.degradation import Degradation
from models.evaluation import Noise, simulate_measurement
from models.unet import UNet, UNetConfig
from utils.metrics import score
from utils.units import WINDOWS, hu_to_mu, mu_to_hu


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
    assert len(summary) == 2 * 4 * 3 and {row["slices"] for row in summary} == {8}
    assert " ".join(summary[0]).startswith("method views window psnr ssim rmse_hu vif nfe seconds_per_slice peak_gib ")
    assert all(0.05 < row["peak_gib"] < 64 for row in summary) and "GiB of main memory" in text
    x = np.stack([np.load(f) for f in sorted((data / "test_img").glob("*.npy"))]).astype(np.float32)
    x0 = Degradation().full(hu_to_mu(torch.from_numpy(x))[:, None])
    expected = score(Degradation()(x0, 18), x0, *WINDOWS[0])
    fbp = next(row for row in summary if (row["method"], row["views"], row["window"]) == ("fbp", 18, [3000, 500]))
    assert fbp["psnr"] == pytest.approx(expected["psnr"].mean().item(), abs=1e-3) and fbp["nfe"] == 0
    assert f"{fbp['psnr']:.2f}" in text
    spdps = [row for row in csv.DictReader((out / "results.csv").open()) if row["method"] == "spdps"]
    assert len(spdps) == 8 * 2 * 3 and all(int(row["nfe"]) >= 6 for row in spdps)
    for figure in ("comparison_18views", "comparison_72views", "chain_18views", "psnr_views", "psnr_calls"):
        assert (out / f"{figure}.png").stat().st_size > 10_000
    assert (out / "table.md").read_text().strip() in text
    assert {row["patient"] for row in csv.DictReader((out / "results.csv").open())} == {"D", "E"}
    pairs = list(csv.DictReader((out / "comparisons.csv").open()))
    assert len(pairs) == 2 * 6 and all(float(row["p_holm"]) >= float(row["p_wilcoxon"]) for row in pairs)


MACHINE = {"seconds_per_slice": 0, "peak_gib": 0, "check": 0}


def timeless(path):
    """Rows without what the machine made of them, time and memory."""
    return [{k: v for k, v in row.items() if k not in MACHINE} for row in csv.DictReader(path.open())]


def test_an_interrupted_run_resumes_to_the_same_table(data, checkpoint, tmp_path, call):
    command = ["--data", data, "--checkpoint", checkpoint, "--views", 36, "--batch", 3, "--out"]
    call(evaluation.main, *command, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    lines = (tmp_path / "cut" / "results.csv").read_text().splitlines()
    (tmp_path / "cut" / "results.csv").unlink()
    (tmp_path / "cut" / "part-0.csv").write_text("\n".join(lines[1:38])[:-9])  # killed while it wrote a line
    shown = call(evaluation.main, *command, tmp_path / "cut")
    assert timeless(tmp_path / "cut" / "results.csv") == timeless(tmp_path / "whole" / "results.csv")
    assert not list((tmp_path / "cut").glob("part-*"))
    before = (tmp_path / "cut" / "results.csv").read_bytes()
    assert call(evaluation.main, *command, tmp_path / "cut") == shown, "nothing is done again, times included"
    assert (tmp_path / "cut" / "results.csv").read_bytes() == before


def test_batch_size_does_not_change_results(data, checkpoint, tmp_path, call):
    tables = []
    for batch in (1, 8):
        out = tmp_path / f"batch{batch}"
        call(evaluation.main, "--data", data, "--checkpoint", checkpoint, "--views", 36, "--batch", batch, "--out", out)
        tables.append(timeless(out / "results.csv"))
    assert tables[0] == tables[1], "to the last digit"


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
    assert "--levels 721: expected 1 to 720" in go("--levels", "721")
    assert "--channels 2 --residual-channel two-pass" in go("--methods", "reco")
    assert "expected WIDTH,CENTRE in HU" in go("--windows", "3000")
    assert "expected WIDTH,CENTRE in HU" in go("--windows=-5,0")
    assert "give --photons too" in go("--electronic", "5")
    assert "--photons 0.0: expected a number of at least 1" in go("--photons", "0")
    assert "--refine-steps 0: expected a number of at least 1" in go("--refine-steps", "0")
    assert "--start nan: expected an angle" in go("--start", "nan")
    assert not out.exists()
    np.save(data / "test_img" / "D_900.npy", np.zeros((32, 48)))
    (data / "test_img" / "D_901.npy").write_bytes(b"not an array")
    text = go(expect=0)
    assert "D_900.npy has shape (32, 48)" in text and "D_901.npy cannot be read" in text and "Skipped 2 of 10" in text
    before = (out / "results.csv").read_bytes()
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


def psnr_of(out, method="fbp"):
    return [float(row["psnr"]) for row in csv.DictReader((out / "results.csv").open()) if row["method"] == method]


def test_noise_is_the_scanners_and_the_same_for_the_same_seed(data, checkpoint, tmp_path, call):
    x0 = Degradation().full(hu_to_mu(torch.from_numpy(body(256, 1)[None, None].astype(np.float32))))
    noisy, clean = (simulate_measurement(x0, 18, ["D_000.npy"], Degradation(), noise)[0]
                    for noise in (Noise(1e5, 20.0, 3), Noise()))
    counts = 1e5 * torch.exp(-0.14 * clean)
    z = (noisy - clean) * 0.14 * counts / (counts + 20**2).sqrt()
    assert z.std().item() == pytest.approx(1, abs=0.05) and z.mean().item() == pytest.approx(0, abs=0.05)

    def go(name, *extra):
        call(evaluation.main, "--data", data, "--checkpoint", checkpoint, "--views", 36, "--methods", "fbp",
             "--windows", "3000,500", "--out", tmp_path / name, *extra)
        return psnr_of(tmp_path / name)

    clean, noisy = go("clean"), go("noisy", "--photons", "1e4")
    assert max(np.array(noisy) - clean) < -0.1
    assert go("again", "--photons", "1e4", "--batch", 1) == noisy
    assert abs(np.array(go("other", "--photons", "1e4", "--seed", 1)) - noisy).max() > 0.02
    summary = json.loads((tmp_path / "clean" / "summary.json").read_text())
    assert [row["window"] for row in summary] == [[3000, 500]]


def test_a_start_angle_turns_the_scanner(data, checkpoint, tmp_path, call):
    """From one view step further on the views are the same; from half a step they are others."""
    def go(start):
        out = tmp_path / str(start)
        call(evaluation.main, "--data", data, "--checkpoint", checkpoint, "--views", 18, "--methods", "fbp", "one-step",
             "--dc", 2, "--limit", 2, "--start", start, "--out", out)
        return np.array([psnr_of(out, method) for method in ("fbp", "one-step")])

    np.testing.assert_allclose(go(2 * math.pi / 18), go(0.0), atol=1e-2)
    assert abs(go(math.pi / 18) - go(0.0)).max() > 0.05


def test_images_are_saved_and_made_up_for_when_missing(data, checkpoint, tmp_path, call):
    command = ["--data", data, "--checkpoint", checkpoint, "--views", 36, "--methods", "fbp", "--out", tmp_path / "out"]
    call(evaluation.main, *command)
    call(evaluation.main, *command, "--save-images")
    saved = np.load(tmp_path / "out" / "images" / "fbp_36views" / "E_003.npy")
    x = hu_to_mu(torch.from_numpy(np.load(data / "test_img" / "E_003.npy").astype(np.float32)))[None, None]
    expected = mu_to_hu(Degradation()(Degradation().full(x), 36))[0, 0].numpy()
    np.testing.assert_allclose(saved, expected, atol=0.1)
    assert len(list((tmp_path / "out" / "images").rglob("*.npy"))) == 8


def test_a_published_file_runs_under_its_own_protocol(data, tmp_path, call):
    """The measurement is the same under both; D of an estimate, and so a chain, is not."""
    torch.manual_seed(0)
    weights = {"denoise_fn." + k: v for k, v in UNet(UNetConfig(width=32)).state_dict().items()}
    torch.save({"net_param": weights, "epoch": 1}, tmp_path / "net.pkl")
    command = ["--data", data, "--checkpoint", tmp_path / "net.pkl", "--views", 36, "--methods", "fbp", "one-step",
               "sequential", "--limit", 1]
    assert "protocol cvg-official" in call(evaluation.main, *command, "--out", tmp_path / "a")
    assert "protocol cvg," in call(evaluation.main, *command, "--out", tmp_path / "b", "--protocol", "cvg")
    for method in ("fbp", "sequential"):
        found = [psnr_of(tmp_path / name, method) for name in ("a", "b")]
        assert (found[0] == found[1]) == (method == "fbp")


def test_sampler_options_reach_the_sampler(data, checkpoint, tmp_path, call):
    calls = []
    for i, options in enumerate([(), ("--tau", "0"), ("--tau", "0", "--refine-steps", 2),
                                 ("--tau", "0", "--semantic-budget", 1)]):
        call(evaluation.main, "--data", data, "--checkpoint", checkpoint, "--views", 18, "--methods", "spdps",
             "--limit", 1, "--out", tmp_path / str(i), *options)
        calls.append(json.loads((tmp_path / str(i) / "summary.json").read_text())[0]["nfe"])
    assert calls[1:] == [8, 6, 6], "two calls a unit of budget, and m of refinement"


def test_chains_pass_through_the_levels_given(data, checkpoint, tmp_path, call):
    call(evaluation.main, "--data", data, "--checkpoint", checkpoint, "--views", 18, 54, "--methods", "sequential",
         "--limit", 1, "--levels", 36, 288, 36, "--out", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {row["views"]: row["nfe"] for row in summary} == {18: 3, 54: 2}


def test_chains_with_data_consistency_pass_through_multiples(data, checkpoint, tmp_path, call):
    """24 views: 48, 72, 96 ... 288 follow, and 72: 144, 216, 288; without, or knowing levels only, the published ones.

    What is named twice is done once, and results of other levels are not gone on with.
    """
    def go(network, dc, *more, **options):
        out = tmp_path / f"{network.stem}-{dc}"
        text = call(evaluation.main, "--data", data, "--checkpoint", network, "--views", 24, 72, 24, "--methods",
                    "sequential", "sequential", "--limit", 1, "--dc", dc, "--out", out, *more, **options)
        summary = json.loads((out / "summary.json").read_text())
        return text if options else {row["views"]: row["nfe"] for row in summary}

    network, _ = load_checkpoint(checkpoint)
    knowing = tmp_path / "knowing.safetensors"
    save_checkpoint(knowing, network.state_dict(), replace(network.config, conditioning="log-views"), {})
    assert go(knowing, 2) == {24: 8, 72: 4} and go(knowing, 0) == go(checkpoint, 2) == {24: 8, 72: 5}
    assert "another levels" in go(knowing, 2, "--levels", 288, expect=1)


def test_an_anchored_network_sees_the_residual_in_its_chain(data, checkpoint, tmp_path, call, monkeypatch):
    """One step knows none; a second call sees where the first contradicts the measurement."""
    torch.manual_seed(0)
    network = UNet(UNetConfig(width=32, stem=2, channels=2, residual_channel="anchored", conditioning="log-views"))
    save_checkpoint(checkpoint, network.state_dict(), network.config, {})
    seen, forward = [], UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, x, t: seen.append(x) or forward(self, x, t))
    for method in ("one-step", "sequential", "spdps"):
        seen.clear()
        call(evaluation.main, "--data", data, "--checkpoint", checkpoint, "--views", 72, "--methods", method, "--limit",
             1, "--dc", 2, "--out", tmp_path / method)
        channels = {x.shape[1] for x in seen}
        assert channels == ({1} if method == "one-step" else {1, 2})
        assert all(x[:, 1].abs().max() > 1e-3 for x in seen if x.shape[1] == 2)


def test_processes_share_the_slices_and_give_the_same_tables(data, checkpoint, tmp_path):
    command = ("test.py", "--data", data, "--checkpoint", checkpoint, "--views", 18, "--methods", "fbp", "spdps",
               "--batch", 3, "--out")
    run(*command, tmp_path / "one")
    text = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *command, tmp_path / "two")
    assert text.count("8 slices of 32 x 32, checkpoint") == 1
    assert timeless(tmp_path / "two" / "results.csv") == timeless(tmp_path / "one" / "results.csv")
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    assert [row | MACHINE for row in one] == [row | MACHINE for row in two]


def test_a_folder_grows_by_methods_and_view_counts(data, checkpoint, tmp_path, call, monkeypatch):
    """Only what is missing is computed, and the tables show all that is there."""
    done, timed = [], evaluate.timed
    monkeypatch.setattr(evaluate, "timed", lambda r, method, y, *more, **options: done.append(
        (method, y.shape[-2], len(y))) or timed(r, method, y, *more, **options))

    def go(*more, expect=0):
        done.clear()
        return call(evaluation.main, "--data", data, "--checkpoint", checkpoint, "--batch", 8, "--device", "cpu",
                    "--out", tmp_path / "out", *more, expect=expect)

    go("--methods", "fbp", "--views", 36)
    first = timeless(tmp_path / "out" / "results.csv")
    go("--methods", "fbp", "sirt", "--views", 36)
    assert done == [("sirt", 36, 8)]
    text = go("--methods", "fbp", "--views", 18, "--windows", "3000,500", "500,50", "2000,0")
    assert done == [("fbp", 18, 8)]
    shown = [line.split(" | ")[:2] for line in text.partition("W500/")[0].splitlines() if line.startswith("| ")]
    assert shown == [["| views", "method"], ["| 18", "fbp"], ["| 36", "fbp"], ["| 36", "sirt"]]
    rows = timeless(tmp_path / "out" / "results.csv")
    assert [row for row in rows if (row["method"], row["views"]) == ("fbp", "36")] == first
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["methods"] == ["fbp", "sirt"] and run["views"] == [18, 36] and set(run["levels"]) == {"18", "36"}
    assert len(list(csv.DictReader((tmp_path / "out" / "comparisons.csv").open()))) == 1
    go("--methods", "tv", "--views", 36, "--limit", 8)
    assert "another tv (weight)" in go("--methods", "tv", "--views", 36, "--tv-weight", "1", expect=1)
    assert "another levels (36)" in go("--methods", "fbp", "--views", 36, "--levels", 72, expect=1)
    go("--methods", "fbp", "--views", 36)
    assert done == [], "the options of a method are those it has in the folder"
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    assert "not empty" in go("--methods", "fbp", "--out", tmp_path / "foreign", expect=1)
    (tmp_path / "out" / "run.json").write_text('{"methods": 5}')
    assert "holds no run of test.py that can be read" in go("--methods", "fbp", expect=1)


def test_what_weights_were_not_trained_for_is_said_last(data, checkpoint, tmp_path, call):
    network, _ = load_checkpoint(checkpoint)

    def go(*more, method="one-step", preset=None, **header):
        header |= {"training": {"preset": preset or {}}}
        save_checkpoint(checkpoint, network.state_dict(), network.config, header)
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        text = call(evaluation.main, "--data", data, "--checkpoint", checkpoint, "--views", 36, "--methods", method,
                    "--limit", 1, "--device", "cpu", "--out", out, *more)
        return [line for line in text.splitlines() if line.startswith("Warning: the weights")]

    found = json.loads((ROOT / "docs" / "results" / "size.json").read_text())["rows"]
    psnr = {row["measurement"]: row["psnr"] for row in found if row["method"] == "spdps"}
    assert f"{psnr['256 pixels'] - psnr['512 pixels']:.1f}" == str(evaluate.LOSS_AT_512)
    assert "trained on slices of 256 pixels a side, and these have 32. At 512 pixels weights of 256" in go()[0]
    assert go(size=32) == [] == go(method="fbp")
    assert "trained without noise, and 1000 photons a ray" in go("--photons", 1e3, size=32)[0]
    noisy = {"noise_share": 0.5, "fewest_photons": 1e4}
    assert "saw noise of 10000 photons a ray or more" in go("--photons", 1e3, size=32, preset=noisy)[0]
    assert go("--photons", 1e5, size=32, preset=noisy) == []


def test_a_name_is_no_formula_and_moves_no_cursor(checkpoint, tmp_path, call):
    folder = tmp_path / "slices"
    folder.mkdir()
    for i, name in enumerate(("=1+1_001.npy", "-2_001.npy", "\x1b[2Jx\n_1.npy")):
        np.save(folder / name, body(32, i))
    command = ["--data", folder, "--checkpoint", checkpoint, "--views", 36, "--methods", "fbp", "--device", "cpu",
               "--out", tmp_path / "out"]
    text = call(evaluation.main, *command)
    assert "\x1b" not in text
    rows = list(csv.reader((tmp_path / "out" / "results.csv").open(newline="")))
    assert {row[0] for row in rows[1:]} == {"'=1+1_001.npy", "'-2_001.npy", "\\x1b[2Jx\\n_1.npy"}
    assert {row[1] for row in rows[1:]} == {"'=1+1", "-2", "\\x1b[2Jx\\n"}, "a number stays one"
    before = (tmp_path / "out" / "results.csv").read_bytes()
    call(evaluation.main, *command)
    assert (tmp_path / "out" / "results.csv").read_bytes() == before, "they are read again as they were"
