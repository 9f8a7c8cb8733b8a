"""Damaged and crafted files: states, checkpoints and pickles that are not what they should be."""

import random
import resource
import time
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch

from models.checkpoint import load_checkpoint
from utils.errors import InputError
from utils.scalars import read_lines
from utils.state import newest_state, save_state


def test_damaged_lines_of_metrics_are_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"images": 1}\n{"images": \xff}\n[1]\n7\n{"images": "2"}\n{}\n{"images": 3, "lr": 1}\n{"ima')
    assert read_lines(path) == [{"images": 1}, {"images": 3, "lr": 1}] and read_lines(tmp_path / "none") == []


@pytest.fixture
def state(tmp_path):
    """A state of random numbers, which no flipped bit leaves the same: 400 kB in 40 parts."""
    torch.manual_seed(0)
    save_state(tmp_path, 3, {"network": {str(i): torch.randn(50, 50) for i in range(40)}, "seen": 3})
    return tmp_path / "state-000000003.pt"


def test_every_flipped_bit_and_every_lost_block_of_a_state_is_noticed(state, capsys):
    whole, rng = state.read_bytes(), random.Random(0)
    path, content = newest_state(state.parent)
    assert path == state and content["seen"] == 3
    for _ in range(100):
        bit, damaged = rng.randrange(8 * len(whole)), bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        state.write_bytes(damaged)
        assert newest_state(state.parent) == (None, None), bit
    for _ in range(40):
        first, damaged = rng.randrange(len(whole) - 4096), bytearray(whole)
        damaged[first : first + 4096] = bytes(4096)
        state.write_bytes(damaged)
        assert newest_state(state.parent) == (None, None), first
    assert capsys.readouterr().err.count("cannot be read") == 140


def test_the_states_of_older_versions_are_read_and_checked(state):
    torch.save({"seen": 3, "a": torch.randn(1000)}, state)
    assert newest_state(state.parent)[1]["seen"] == 3
    damaged = bytearray(state.read_bytes())
    damaged[2000] ^= 1
    state.write_bytes(damaged)
    assert newest_state(state.parent) == (None, None)


def number(n: int) -> bytes:
    return b"\x8a" + bytes([8]) + n.to_bytes(8, "little")


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nDoubleStorage\nX\x01\0\0\0" \
         b"0X\x03\0\0\0cpu%stQK\0%s%s\x89ccollections\nOrderedDict\n)RtR"
CRAFTED = {
    "bytearray": b"\x80\x02c__builtin__\nbytearray\n" + number(3 * 10**9) + b"\x85R.",
    "tensor": b"\x80\x02ctorch\nTensor\n" + number(10**10) + b"\x85R.",
    "many": b"\x80\x02ctorch\nSize\n]" + b"K\1a" * 2**20 + b"\x85R.",
    "expanded": b"\x80\x02}X\x09\0\0\0net_param}X\x01\0\0\0a"
                + TENSOR % (b"K\x01", 3 * b"J@B\x0f\0" + b"\x87", b"K\0K\0K\0\x87") + b"ss.",
    "tuples": b"\x80\x02)q\1" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(1, 60)) + b"}h\x3cK\1s.",
    "long": b"\x80\x02" + b"]" * 2**21 + b"}.",
    "names": b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x06\0\0\0latin1\x86R."}


@pytest.mark.parametrize("what", CRAFTED)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_asks_for_more_than_it_holds_is_refused_at_once(what, zipped, tmp_path):
    path = tmp_path / "net.pkl"
    if zipped:
        with ZipFile(path, "w") as archive:
            for name, content in {"data.pkl": CRAFTED[what], "version": b"3\n", "data/0": bytes(8)}.items():
                archive.writestr(f"archive/{name}", content)
    else:
        torch.save({}, path, _use_new_zipfile_serialization=False)
        empty = b"\x80\x02}q\x00."
        content = path.read_bytes()
        assert empty in content
        path.write_bytes(content.replace(empty, CRAFTED[what], 1))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(InputError):
        load_checkpoint(path)
    assert time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "kB"


def test_weights_in_a_compressed_file_and_views_of_few_numbers_are_refused(tmp_path):
    path = tmp_path / "net.pkl"
    torch.save({"net_param": {"a": torch.zeros(10**6)}}, path)
    with ZipFile(path) as old, ZipFile(tmp_path / "small.pkl", "w", ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    with pytest.raises(InputError, match="is compressed"):
        load_checkpoint(tmp_path / "small.pkl")
    torch.save({"net_param": {str(i): torch.zeros(1, dtype=torch.float64).expand(5000, 5) for i in range(50)}}, path)
    with pytest.raises(InputError, match="describes more weights than it holds"):
        load_checkpoint(path)
    with open(path, "wb") as file:
        file.truncate(2**31)
    with pytest.raises(InputError, match="has 2.0 GiB"):
        load_checkpoint(path)
