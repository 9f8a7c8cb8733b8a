"""The same global batch on one process, on two, or in parts gives the same training."""

import pytest
import torch
from conftest import run
from safetensors.torch import load_file

import train
from models.dropout import seed_dropout
from models.unet import UNet, UNetConfig
from utils.distributed import shares

ARGS = ["--preset", "tiny", "--device", "cpu", "--images", "16", "--batch", "7", "--epct-start", "1", "--ema-start",
        "2", "--hops", "1", "--dropout", "0.1", "--precision", "fp64", "--val-every", "16", "--val-slices", "3", "--dc",
        "1", "--stem", "4", "--augment"]  # without flips these few steps happen to magnify rounding to 3e-6


def difference(a, b) -> float:
    """Relative L2 distance of two checkpoints."""
    a, b = (torch.cat([v.double().flatten() for v in load_file(p / "checkpoint.safetensors").values()]) for p in (a, b))
    return ((a - b).norm() / a.norm()).item()


def test_two_processes_and_accumulation_equal_one(data, tmp_path, call):
    """Batches of 7 and 1 of 8 slices: shares are unequal, and once a process has none of its own."""
    call(train.main, *ARGS, "--data", data, "--out", tmp_path / "one")
    call(train.main, *ARGS, "--data", data, "--out", tmp_path / "parts", "--accumulate", "3")
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py", *ARGS, "--data", data,
        "--out", tmp_path / "two", NUMBA_NUM_THREADS="1")
    assert 0 < difference(tmp_path / "one", tmp_path / "parts") < 1e-9
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-9
    curves = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert len(curves[0]) == len(curves[1])  # one process writes


@pytest.mark.parametrize(("first", "last", "processes", "parts"),
                         [(0, 8, 2, 1), (8, 15, 2, 2), (3, 4, 3, 2), (0, 5, 1, 9)])
def test_shares_cover_a_batch_once(first, last, processes, parts):
    """The mean over processes of the weighted sums is the mean over the batch."""
    total = {}
    for rank in range(processes):
        ranges, weight = shares(first, last, rank, processes, parts)
        assert 1 <= len(ranges) <= parts and all(len(indices) for indices in ranges)
        for index in (i for indices in ranges for i in indices):
            total[index] = total.get(index, 0.0) + weight / processes
    assert total == pytest.approx({i: 1 / (last - first) for i in range(first, last)})


def test_dropout_of_a_slice_does_not_depend_on_its_batch():
    network = UNet(UNetConfig(width=32, dropout=0.5, stem=4))
    x, t = torch.rand(3, 1, 32, 32), torch.zeros(3)
    keys = [(1, 2, i) for i in range(3)]

    def call(which):
        seed_dropout(network, [keys[i] for i in which])
        return network(x[which], t[which])

    torch.testing.assert_close(call([0, 1, 2])[1:], call([1, 2]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(call([0]), call([0]) * 0 + network.eval()(x[:1], t[:1]), atol=1e-3)


def test_dropout_masks_keep_their_share():
    network = UNet(UNetConfig(width=32, dropout=0.3))
    layer = network.mid.block_1.dropout
    seed_dropout(network, [(5,), (6,)])
    out = layer(torch.ones(2, 64, 64, 64))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.7]) and (out == 0).float().mean().item() == pytest.approx(
        0.3, abs=0.01)
    assert not torch.equal(out[0], out[1])
